"""Packed tokens are the real ones of padded rows, their gradients too; a model computes the same with them."""

import pytest
import torch
from test_objective import gradients, setting

from irra_core.interaction import build_interaction
from irra_core.model import IRRA
from irra_core.objective import Objective
from irra_core.packing import Packing

LENGTHS = {"uneven": (3, 5, 1), "full": (5, 5), "one": (2,), "none": ()}
CPU = torch.device("cpu")


@pytest.fixture(params=LENGTHS.values(), ids=LENGTHS)
def lengths(request):
    return request.param


def rows(lengths, length=5, dim=2):
    return torch.randn(len(lengths), length, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def real(tokens, lengths):
    """Row by row, in plain loops."""
    found = [tokens[row, place] for row, count in enumerate(lengths) for place in range(count)]
    return torch.stack(found) if found else tokens.new_empty(0, *tokens.shape[2:])


def test_packed_are_the_real_tokens_and_padded_again_they_are_where_they_were(lengths):
    tokens, packing = rows(lengths), Packing.of(lengths, 5, CPU)
    packed = packing.pack(tokens)
    assert torch.equal(packed, real(tokens, lengths))
    again = packing.pad(packed)
    assert again.shape == tokens.shape
    for row, count in enumerate(lengths):
        assert torch.equal(again[row, :count], tokens[row, :count])
        assert not again[row, count:].any()


def test_their_gradients_are_those_of_finite_differences(lengths):
    tokens, packing = rows(lengths).requires_grad_(), Packing.of(lengths, 5, CPU)
    packed = packing.pack(tokens).detach().requires_grad_()
    if lengths:
        assert torch.autograd.gradcheck(packing.pack, tokens)
        assert torch.autograd.gradcheck(packing.pad, packed)
        assert torch.autograd.gradcheck(packing.pick, (packed, torch.zeros(len(lengths), 3, dtype=torch.long)))


def test_a_position_in_the_padding_picks_the_last_real_token():
    tokens, packing = rows((3, 5, 1)), Packing.of((3, 5, 1), 5, CPU)
    picked = packing.pick(packing.pack(tokens), torch.tensor([[0, 2, 4], [4, 3, 1], [0, 1, 3]]))
    assert torch.equal(picked[0], tokens[0, [0, 2, 2]])
    assert torch.equal(picked[1], tokens[1, [4, 3, 1]])
    assert torch.equal(picked[2], tokens[2, [0, 0, 0]])


def test_the_same_rows_twice_and_rows_with_more_tokens_are_packed_alike(lengths):
    tokens, others = rows(lengths), rows(lengths, length=3) + 9
    packing = Packing.of(lengths, 5, CPU)
    packed = packing.pack(tokens)
    assert torch.equal(packing.twice().pack(torch.cat([tokens, tokens + 1])), torch.cat([packed, packed + 1]))
    at = torch.zeros(2 * len(lengths), 1, dtype=torch.long)
    assert torch.equal(
        packing.twice().pick(torch.cat([packed, packed + 1]), at)[:, 0], torch.cat([tokens, tokens + 1])[:, 0]
    )
    both = torch.cat([packed, others.flatten(0, 1)])
    joined = packing.beside(3)
    assert torch.equal(joined.pack(torch.cat([tokens, others], 1)), both)
    assert torch.equal(joined.pad(both)[:, 5:], others)
    assert torch.equal(joined.pick(both, at[: len(lengths)])[:, 0], tokens[:, 0])


@pytest.mark.parametrize("kind", ["cross", "co", "merged"])
def test_an_interaction_encoder_gives_packed_words_the_states_of_padded_ones(kind, lengths):
    torch.manual_seed(0)
    encoder, packing = build_interaction(kind, 64, 2).double(), Packing.of(lengths, 5, CPU)
    words, patches = rows(lengths, dim=64), rows(lengths, length=7, dim=64)
    known = torch.arange(5) < torch.tensor(lengths, dtype=torch.long)[:, None]
    expected = encoder(words, patches, known)
    found = encoder(packing.pack(words), patches, known, packing=packing)
    assert found.shape == expected.shape
    torch.testing.assert_close(real(found, lengths), real(expected, lengths), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", ["every loss", "co", "merged"])
def test_a_step_on_packed_captions_is_that_on_padded_ones(case, monkeypatch):
    found = []
    for packed in (True, False):
        if not packed:
            monkeypatch.setattr(IRRA, "_packing", lambda *given: None)
        recipe, model, batches = setting(case, True)
        batch = batches.at(0)
        assert len(set(batch.lengths)) > 1
        found.append((Objective(model, recipe, "fp32")(batch), gradients(model)))
    (parts, first), (expected, others) = found
    torch.testing.assert_close(parts, expected, rtol=1e-9, atol=1e-9)
    assert first.keys() == others.keys()
    for name, gradient in first.items():
        torch.testing.assert_close(gradient, others[name], rtol=1e-7, atol=1e-9)


def test_captions_and_masked_captions_of_other_lengths_are_packed_to_the_longer_one():
    _, model, batches = setting("every loss", True)
    batch = batches.at(0)
    longer = batch.masked_tokens.clone()
    longer[0] = longer[batch.lengths.index(max(batch.lengths))]
    with torch.no_grad():
        found = model(batch.images, batch.tokens, longer, batch.labels)
        expected = model.word_logits(batch.images, longer)[batch.labels != 0]
        torch.testing.assert_close(found.text, model.encode_text(batch.tokens))
    torch.testing.assert_close(found.word_logits, expected)
