"""Token selection: which tokens, against plain loops; the head against torch's modules; joined features in search."""

import pytest
import torch
import torch.nn.functional as F

from irra_core.variants.joined import joined, parts
from irra_core.variants.selection_head import BatchNorm, SelectionHead, selected
from irra_core.variants.token_selection import RATIO, TokenSelection

DIM = 6


def drawn(*size, seed=0):
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def head(training=True):
    torch.manual_seed(0)
    return SelectionHead(DIM).double().train(training)


def slow_feature(head, tokens):
    """One row of a head outside of training: the maximum over the tokens, channel by channel, one token at a time."""
    norm, states = head.norm, []
    for token in tokens:
        token = token / token.norm()
        hidden = (head.hidden(token) - norm.mean) / (norm.variance + 1e-5).sqrt() * norm.weight + norm.bias
        states.append((head.direct(token) + head.out(hidden.clamp(min=0))).tolist())
    return [max(channel) for channel in zip(*states, strict=True)]


def test_a_feature_of_an_image_is_that_of_the_patches_to_which_its_class_token_attends_most():
    model = TokenSelection(DIM).double().eval()
    tokens, attention = drawn(3, 13, DIM), drawn(3, 13, seed=1).softmax(1)
    attention[:, 0] = 0.9  # the class token itself is never selected
    found = model.of_image(tokens, attention)
    for row in range(3):
        best = sorted(range(1, 13), key=lambda patch: -attention[row, patch])[: int(RATIO * 12)]
        assert len(best) == 3
        assert parts(found)[0][row].tolist() == tokens[row, 0].tolist()
        local = F.normalize(parts(found)[1][row], dim=0)
        expected = torch.tensor(slow_feature(model.image, tokens[row, best]), dtype=torch.float64)
        torch.testing.assert_close(local, F.normalize(expected, dim=0))


def test_a_feature_of_a_caption_is_that_of_the_words_to_which_its_end_token_attends_most():
    model = TokenSelection(DIM).double().eval()
    tokens, attention = drawn(3, 9, DIM), drawn(3, 9, seed=1).softmax(1)
    attention[:, 0] = 0.9
    end = torch.tensor([[8], [3], [1]])  # seven words, two words, none
    found = model.of_text(tokens, attention, end, longest=17)
    for row, (last, words) in enumerate([(8, 4), (3, 2), (1, 0)]):
        best = sorted(range(1, last), key=lambda word: -attention[row, word])[: int(RATIO * 15)]
        assert len(best) == words
        local = F.normalize(parts(found)[1][row], dim=0)
        expected = slow_feature(model.text, tokens[row, best or [last]])
        torch.testing.assert_close(local, F.normalize(torch.tensor(expected, dtype=torch.float64), dim=0))
        assert parts(found)[0][row].tolist() == tokens[row, last].tolist()


@pytest.mark.parametrize("training", [True, False])
def test_longer_padding_changes_no_feature_of_a_caption(training):
    torch.manual_seed(0)
    model = TokenSelection(DIM).double().train(training)
    tokens, attention, end = drawn(3, 9, DIM), drawn(3, 9, seed=1).softmax(1), torch.tensor([[8], [3], [5]])
    longer = torch.cat([tokens, drawn(3, 4, DIM, seed=2)], 1), F.pad(attention, (0, 4))
    short = model.of_text(tokens, attention, end, longest=40)  # eleven words would be selected: more than there are
    torch.testing.assert_close(model.of_text(*longer, end, longest=40), short)


def test_batch_norm_is_torchs_over_the_real_tokens():
    own, torchs = BatchNorm(DIM).double(), torch.nn.BatchNorm1d(DIM).double()
    real = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]], dtype=torch.bool)
    for seed in range(3):
        states = drawn(3, 3, DIM, seed=seed) * 3 + 2
        torch.testing.assert_close(own(states, real)[real], torchs(states[real]))
        torch.testing.assert_close(own.mean, torchs.running_mean)
        torch.testing.assert_close(own.variance, torchs.running_var)
    own.eval(), torchs.eval()
    torch.testing.assert_close(own(states, real)[real], torchs(states[real]))


def test_the_head_has_the_papers_parameters():
    model = TokenSelection(512)
    per_side = (512 * 1024 + 1024) + (512 * 512 + 512) + 2 * 512 + (512 * 1024 + 1024)
    assert sum(weight.numel() for weight in model.parameters()) == 2 * per_side


@pytest.mark.parametrize("training", [True, False])
def test_the_gradients_are_those_of_differences(training):
    real = torch.tensor([[1, 1, 1], [1, 0, 0]], dtype=torch.bool)
    model = head(training)

    def feature(tokens):
        model.norm.mean.zero_()
        model.norm.variance.fill_(1)
        return model(tokens, real)

    assert torch.autograd.gradcheck(feature, drawn(2, 3, DIM).requires_grad_())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("side", ["image", "text"])
def test_the_gradients_from_tokens_to_the_joined_feature_are_those_of_differences(side, training):
    """From the tokens that can be selected: the length of the global feature gets no gradient (see joined)."""
    torch.manual_seed(0)
    model = TokenSelection(DIM).double().train(training)
    whole, attention = drawn(3, 1, DIM), drawn(3, 8, seed=1).softmax(1)

    def feature(others):
        if side == "image":
            return model.of_image(torch.cat([whole, others], 1), attention)
        return model.of_text(torch.cat([others, whole], 1), attention, torch.full((3, 1), 7), longest=12)

    others = drawn(3, 7, DIM, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(feature, others)
    feature(others).sum().backward()
    chosen = (others.grad.abs().sum(2) > 0).sum(1)
    assert chosen.tolist() == [int(RATIO * (7 if side == "image" else 10))] * 3


def test_the_cosine_of_joined_features_is_the_mean_of_both_cosines():
    image, text = (joined(drawn(4, DIM, seed=n), drawn(4, 2 * DIM, seed=n + 2)) for n in range(2))
    halves = [F.normalize(a, dim=1) @ F.normalize(b, dim=1).T for a, b in zip(parts(image), parts(text), strict=True)]
    torch.testing.assert_close(F.normalize(image, dim=1) @ F.normalize(text, dim=1).T, sum(halves) / 2)


def test_the_selected_part_gives_no_gradient_to_the_global_feature():
    whole, local = drawn(4, DIM).requires_grad_(), drawn(4, 2 * DIM, seed=1).requires_grad_()
    parts(joined(whole, local))[1].sum().backward()
    assert whole.grad is None or not whole.grad.any()
    assert local.grad.any()


def test_tokens_without_a_score_are_not_real_but_the_first_is():
    scores = torch.tensor([[0.5, -1.0, 0.2], [-1.0, -2.0, -2.0]], dtype=torch.float64)
    tokens, real = selected(drawn(2, 3, DIM), scores, 3)
    assert real.tolist() == [[True, True, False], [True, False, False]]
    torch.testing.assert_close(tokens.norm(dim=2), torch.ones(2, 3, dtype=torch.float64))
