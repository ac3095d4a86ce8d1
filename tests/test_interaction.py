"""The three interaction encoders against torch's own attention, one caption at a time, and the paper's counts."""

import pytest
import torch
from open_clips import their_block

from irra_core.interaction import build_interaction

KINDS = ("cross", "co", "merged")


@pytest.fixture
def sides():
    """Words [3, 7, 128], patches [3, 5, 128] and which words are real."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randn(3, 7, 128, dtype=torch.float64, generator=generator)
    patches = torch.randn(3, 5, 128, dtype=torch.float64, generator=generator)
    return words, patches, torch.arange(7) < torch.tensor([7, 4, 1])[:, None]


def encoder(kind, depth=2):
    torch.manual_seed(0)
    return build_interaction(kind, 128, depth).double()


def slow_states(encoder, words, patches):
    """One pair's word states with torch's and open_clip's own forward functions and no mask."""
    kind, words, patches = type(encoder).__name__, words[None], patches[None]
    if kind == "CrossEncoder":
        image = encoder.ln_image(patches)
        states = encoder.attention(encoder.ln_text(words), image, image)[0]
        for block in encoder.blocks:
            states = their_block(block)(states)
    elif kind == "MergedEncoder":
        states = torch.cat([words, patches], dim=1)
        for block in encoder.blocks:
            states = their_block(block)(states)
        states = states[:, : words.shape[1]]
    else:
        for layer in encoder.blocks:
            words, patches = (
                tokens + layer[side].attn(*[layer[side].ln_1(tokens)] * 3)[0]
                for side, tokens in (("text", words), ("image", patches))
            )
            seen = {"text": layer["text"].ln_2(words), "image": layer["image"].ln_2(patches)}
            words = words + layer["text"].cross(seen["text"], seen["image"], seen["image"])[0]
            patches = patches + layer["image"].cross(seen["image"], seen["text"], seen["text"])[0]
            words, patches = (
                tokens + layer[side].mlp(layer[side].ln_3(tokens))
                for side, tokens in (("text", words), ("image", patches))
            )
        states = words
    return encoder.ln_post(states)[0]


@pytest.mark.parametrize(("kind", "millions"), [("cross", 13.66), ("merged", 12.61), ("co", 33.62)])
def test_an_interaction_encoder_has_the_papers_number_of_parameters(kind, millions):
    with torch.device("meta"):
        found = build_interaction(kind, 512, 4)
    assert sum(p.numel() for p in found.parameters()) == pytest.approx(millions * 1e6, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_not_attended_to_each_caption_is_as_if_it_were_alone(kind, sides):
    words, patches, real = sides
    model = encoder(kind)
    found = model(words, patches, real)
    for row, length in enumerate(real.sum(1).tolist()):
        alone = slow_states(model, words[row, :length], patches[row])
        torch.testing.assert_close(found[row, :length], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_mask_padding_is_attended_to(kind, sides):
    words, patches, _ = sides
    model = encoder(kind)
    found = model(words, patches)
    for row in range(3):
        torch.testing.assert_close(found[row], slow_states(model, words[row], patches[row]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_states_at_some_positions_are_those_of_all_with_the_same_gradient(kind, sides):
    words, patches, real = sides
    model, at = encoder(kind), torch.tensor([[6, 0], [2, 3], [0, 0]])
    results = []
    for some in (False, True):
        inputs = words.clone().requires_grad_(), patches.clone().requires_grad_()
        states = model(*inputs, real, at) if some else model(*inputs, real)[torch.arange(3)[:, None], at]
        parameters = list(model.parameters())
        grads = torch.autograd.grad(states.square().sum() + states.sum(), [*inputs, *parameters], allow_unused=True)
        results.append([states, *(grad for grad in grads if grad is not None)])
    assert len(results[0]) == len(results[1])
    for slow, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("kind", "layers"), [("cross", 1), ("co", 2), ("merged", 2)])
def test_recording_attention_changes_no_state_and_gives_one_entry_an_image_facing_layer(kind, layers, sides):
    words, patches, real = sides
    model, record = encoder(kind), []
    states = model(words, patches, real, record=record)
    torch.testing.assert_close(states, model(words, patches, real), rtol=1e-9, atol=1e-9)
    assert [tuple(layer.shape) for layer in record] == [(3, 2, 7, 5)] * layers


def test_the_recorded_attention_of_cross_is_torchs(sides):
    words, patches, _ = sides
    model, record = encoder("cross"), []
    model(words, patches, record=record)
    image = model.ln_image(patches)
    _, shares = model.attention(model.ln_text(words), image, image, average_attn_weights=False)
    torch.testing.assert_close(record[0], shares, rtol=1e-9, atol=1e-9)


def test_the_recorded_attention_of_merged_leaves_the_words_share_out(sides):
    words, patches, _ = sides
    model, record = encoder("merged", depth=1), []
    model(words, patches, record=record)
    joined = model.blocks[0].ln_1(torch.cat([words, patches], dim=1))
    _, shares = model.blocks[0].attn(joined, joined, joined, average_attn_weights=False)
    torch.testing.assert_close(record[0], shares[:, :, :7, 7:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_new_weights_have_the_released_spread(kind):
    torch.manual_seed(0)
    model, width, depth = build_interaction(kind, 256, 3), 256, 3
    wanted = {
        "in_proj_weight": width**-0.5,
        "out_proj.weight": width**-0.5 * (2 * depth) ** -0.5,
        "c_fc.weight": (2 * width) ** -0.5,
        "c_proj.weight": width**-0.5 * (2 * depth) ** -0.5,
    }
    checked = 0
    for name, parameter in model.named_parameters():
        for ending, spread in wanted.items():
            if name.endswith(ending):
                assert parameter.std().item() == pytest.approx(spread, rel=0.02), name
                assert parameter.mean().abs() < 0.02 * spread + 1e-3, name
                checked += 1
        if name.endswith(("in_proj_bias", "out_proj.bias")):
            assert not parameter.any(), name
    assert checked == {"cross": 2 + 4 * 3, "merged": 4 * 3, "co": 6 * 2 * 3}[kind]


def test_an_unknown_interaction_encoder_is_named_with_the_accepted_ones():
    with pytest.raises(ValueError, match="interaction 'cros' is unknown: did you mean 'cross'"):
        build_interaction("cros", 128, 1)
