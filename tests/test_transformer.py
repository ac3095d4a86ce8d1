"""CLIP written out against open_clip's own: the forward pass, the names of weights, and the weights from a seed."""

import copy

import pytest
import torch
from open_clips import new_open_clip, their_block, their_image_tokens, their_text_tokens
from torch import nn
from torch.nn import functional as F

from irra_core.backbone import configuration, new_clip, patch_grid, seeded
from irra_core.hub.configurations import backbones
from irra_core.transformer import CLIP, ImageEncoder, LayerNorm, ResidualAttentionBlock, added, attend, initialise

MOST = 512  # width of an encoder in these tests, so that the largest backbones take no minute


def reduced(name: str) -> dict:
    """A backbone's configuration of two blocks per encoder, a small vocabulary, and heads of its own width."""
    config = copy.deepcopy(dict(configuration(name)))
    vision, text = config["vision_cfg"], config["text_cfg"]
    head = vision.get("head_width", 64)
    vision |= {"layers": 2, "width": min(vision["width"], MOST // head * head)}
    text_head = text["width"] // text["heads"]
    text |= {"layers": 2, "width": min(text["width"], MOST), "vocab_size": 120}
    return config | {"text_cfg": text | {"heads": text["width"] // text_head}}


OPTIONS = {  # options of open_clip that are followed and that no supported configuration sets
    "ViT-S-32 of options": {
        "vision_cfg": {"norm_kwargs": {"eps": 1e-3}, "act_kwargs": {"approximate": "tanh"}, "ls_init_value": 0.3},
        "text_cfg": {"norm_kwargs": {"eps": 1e-2}, "act_kwargs": {"approximate": "tanh"}, "mlp_ratio": 2.5}
        | {"ls_init_value": 0.2, "heads": 3},
    }
}


def config_of(name: str) -> dict:
    config = reduced(name.split(" ")[0])
    return config | {side: config[side] | more for side, more in OPTIONS.get(name, {}).items()}


def drawn(model: nn.Module, seed: int = 1) -> None:
    """Every parameter drawn anew: biases that are zero and scales that are one would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.05, generator=generator)


@pytest.mark.parametrize("name", [*backbones(), *OPTIONS])
def test_the_encoders_are_open_clips_weights_load_both_ways_and_are_those_of_the_same_seed(name):
    config, patch = config_of(name), configuration(name.split(" ")[0])["vision_cfg"]["patch_size"]
    size = (3 * patch, 2 * patch)
    with seeded(3):
        ours = new_clip(config, size, patch)
    with seeded(3):
        theirs = new_open_clip(config, size)
    state = ours.state_dict()
    assert list(state) == list(theirs.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in theirs.state_dict().items())
    ours, theirs = ours.double(), theirs.double()
    drawn(ours)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, *size, dtype=torch.float64, generator=generator)
    tokens = torch.randint(1, 119, (2, 77), generator=generator)
    tokens[0, 9], tokens[1, 76] = 119, 119
    with torch.no_grad():
        torch.testing.assert_close(ours.visual(images), their_image_tokens(theirs, images), rtol=0, atol=1e-6)
        read = ours.finish_text(ours.begin_text(tokens))
        torch.testing.assert_close(read, their_text_tokens(theirs, tokens), rtol=0, atol=1e-6)
        start, end = torch.zeros(2, 1, dtype=torch.long), tokens.argmax(1, keepdim=True)
        expected = theirs.encode_image(images), theirs.encode_text(tokens)
        found = ours.visual(images, start)[:, 0], ours.finish_text(ours.begin_text(tokens), end)[:, 0]
    assert found[0].std() > 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_the_temperature_is_a_buffer_of_the_model_and_no_parameter():
    clip = CLIP(reduced("ViT-S-32"), (64, 64))
    assert not any("logit_scale" in name for name, _ in clip.named_parameters())
    assert clip.logit_scale.exp().item() == pytest.approx(1 / 0.07)


@pytest.fixture
def words():
    """Three rows of seven words of width 128, and which of them are real."""
    words = torch.randn(3, 7, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return words, torch.arange(7) < torch.tensor([7, 4, 1])[:, None]


@pytest.fixture
def block():
    with seeded(0):
        block = ResidualAttentionBlock(128, 2).double()
        initialise(block, 128, 2)
    return block


def test_causal_attention_at_one_position_is_that_row_of_causal_attention(words, block):
    words, at, places = words[0], torch.tensor([[6], [3], [0]]), torch.arange(7)
    mask = torch.full((7, 7), float("-inf"), dtype=torch.float64).triu(1)
    expected = their_block(block)(words, attn_mask=mask)
    torch.testing.assert_close(block(words, places <= places[:, None]), expected, rtol=1e-9, atol=1e-9)
    found = block(words, (places <= at[..., None])[:, None], at)
    torch.testing.assert_close(found, expected[torch.arange(3)[:, None], at], rtol=1e-9, atol=1e-9)


def test_attention_is_torchs_multi_head_attention_recorded_or_not(words):
    words, real = words
    patches = torch.randn(3, 5, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(128, 2, batch_first=True).double()
    nn.init.normal_(layer.in_proj_bias)
    expected, shares = layer(patches, words, words, key_padding_mask=~real, average_attn_weights=False)
    for record in (None, []):
        found = attend(layer, patches, words, real[:, None, None], record)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(record, [shares], rtol=1e-9, atol=1e-9)
    expected = layer(words, words, words)[0]
    torch.testing.assert_close(attend(layer, words), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mask", ["none", "causal", "padding"])
def test_attention_in_bf16_is_that_of_single_precision_to_its_rounding(mask):
    torch.manual_seed(0)
    layer, tokens = nn.MultiheadAttention(128, 2, batch_first=True), torch.randn(3, 7, 128)
    causal, padding = torch.ones(7, 7, dtype=torch.bool).tril(), (torch.arange(7) < 4).expand(3, 1, 1, 7)
    given = {"none": None, "causal": causal, "padding": padding}[mask]
    found = []
    for bf16 in (False, True):
        entered = tokens.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            states = attend(layer, entered, mask=given)
        states.float().pow(2).sum().backward()
        found.append((states.detach().float(), entered.grad))
    for exact, rounded in zip(*found, strict=True):
        assert (exact - rounded).norm() < 0.02 * exact.norm()
        assert not torch.equal(exact, rounded)


def test_a_layer_norm_computes_in_the_precision_of_its_weights():
    layer, tokens = LayerNorm(64), torch.randn(3, 64, generator=torch.Generator().manual_seed(0)) * 300
    expected = F.layer_norm(tokens.half().float(), (64,)).half()
    found = layer(tokens.half())
    assert found.dtype == torch.float16
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("size", "stride"), [((96, 32), 16), ((96, 32), 12), ((40, 23), 16), ((40, 23), 5)])
def test_patches_are_a_convolutions_with_its_gradients_where_they_touch_and_where_they_overlap(size, stride):
    """Images that no stride divides lose the same right and lower edge."""
    with seeded(0):
        visual = ImageEncoder({"width": 64, "layers": 1, "patch_size": 16}, size, 32, True)
    visual.conv1.stride, visual.grid_size = (stride, stride), patch_grid(size, 16, stride)
    images = torch.randn(3, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for dtype, close in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        visual.to(dtype)
        results = []
        for patches in (visual._patches, lambda entered: visual.conv1(entered).flatten(2).transpose(1, 2)):
            entered = images.to(dtype, copy=True).requires_grad_()
            visual.conv1.weight.grad = None
            found = patches(entered)
            found.sin().sum().backward()
            results.append((found.detach(), entered.grad, visual.conv1.weight.grad))
        torch.testing.assert_close(*results, rtol=close, atol=close * 10)


def test_a_block_with_causal_or_an_added_mask_is_the_block_with_the_mask(words, block):
    (words, real), places = words, torch.arange(7)
    expected, record = block(words, places <= places[:, None]), []
    torch.testing.assert_close(block(words, causal=True), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(block(words, causal=True, record=record), expected, rtol=1e-12, atol=1e-12)
    assert not record[0].triu(1).any()
    padding = real[:, None, None]
    expected = block(words, padding)
    torch.testing.assert_close(block(words, added(padding, words.dtype)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize(("size", "stride"), [((48, 32), 16), ((50, 35), 16), ((48, 32), 12), ((40, 40), 5)])
def test_the_patch_embedding_is_the_convolution_with_its_gradients(size, stride, dtype, close):
    visual = new_clip(reduced("ViT-B-16"), size, stride).visual.to(dtype)
    images = torch.randn(2, 3, *size, dtype=dtype, generator=torch.Generator().manual_seed(0))
    found, expected = images.clone().requires_grad_(), images.clone().requires_grad_()
    ours, theirs = visual._patches(found), visual.conv1(expected).flatten(2).transpose(1, 2)
    torch.testing.assert_close(ours, theirs, rtol=close, atol=close)
    weights = torch.randn(theirs.shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    of_weight = []
    for patches, pixels in ((ours, found), (theirs, expected)):
        of_weight.append(torch.autograd.grad((patches * weights).sum(), [visual.conv1.weight, pixels]))
    for mine, yours in zip(*of_weight, strict=True):
        torch.testing.assert_close(mine, yours, rtol=10 * close, atol=10 * close)
