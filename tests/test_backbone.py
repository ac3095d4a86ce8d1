"""Weights files of every make that people have, the position resize, and what happens when a file is not there."""

from pathlib import Path

import numpy as np
import pytest
import torch
from open_clips import new_open_clip
from safetensors.torch import save_file
from torch.nn import functional as F

import irra_core as irra
from irra_core import backbone
from irra_core.backbone import configuration, load_clip_weights, new_clip, resize_positions
from irra_core.hub.configurations import backbones, unsuited

REFERENCE = np.load(Path(__file__).parent / "reference" / "irra_reference.npz")
TINY = {
    "embed_dim": 64,
    "quick_gelu": True,
    "vision_cfg": {"layers": 2, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 120, "width": 64, "heads": 1, "layers": 1},
}


def tiny(image_size=(32, 32), stride=8, seed=0):
    torch.manual_seed(seed)
    return new_clip(TINY, image_size, stride)


def images(height, width, count=2):
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_positions_resize_as_the_released_code_does():
    found = resize_positions(torch.from_numpy(REFERENCE["pos_in"]), 24, 8)
    np.testing.assert_allclose(found.numpy(), REFERENCE["pos_24x8"], atol=1e-6)


def test_each_resized_position_is_the_bilinear_mean_of_its_neighbours():
    grid = torch.arange(4.0)[:, None] * 10 + torch.arange(3.0)  # a plane: 10 row + col
    embedding = torch.cat([torch.tensor([[-1.0]]), grid.reshape(-1, 1)])
    found = resize_positions(embedding, 8, 3, source=(4, 3))
    rows = ((torch.arange(8.0) + 0.5) / 2 - 0.5).clamp(0, 3)
    assert found[0] == -1
    torch.testing.assert_close(found[1:].reshape(8, 3), rows[:, None] * 10 + torch.arange(3.0))


def test_positions_of_the_same_grid_are_left_alone():
    embedding = torch.randn(13, 4)
    assert torch.equal(resize_positions(embedding, 6, 2), embedding)


def test_positions_that_form_no_known_grid_are_refused():
    with pytest.raises(ValueError, match="13 patch positions are no 3×3 grid: they fit no 5×5 grid"):
        resize_positions(torch.randn(14, 4), 5, 5)


def test_overlapping_patches_are_the_crops_a_stride_apart():
    clip = tiny((32, 20), stride=6)
    assert clip.visual.grid_size == (5, 3)
    pictures = images(32, 20)
    apart = torch.cat(  # the same patches laid side by side, for a model that knows no overlap
        [torch.cat([pictures[:, :, r : r + 8, c : c + 8] for c in (0, 6, 12)], 3) for r in (0, 6, 12, 18, 24)], 2
    )
    plain = tiny((40, 24))
    plain.load_state_dict(clip.state_dict())
    torch.testing.assert_close(clip.visual(pictures), plain.visual(apart), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stride", [0, -1, 9, 40])
def test_a_stride_that_skips_pixels_or_does_not_advance_is_refused(stride):
    with pytest.raises(
        ValueError, match=f"stride {stride}, patch 8, image 32×32: accepted is 1 ≤ stride ≤ patch ≤ image"
    ):
        tiny(stride=stride)


MAKES = {
    "a plain state dict": lambda state: state,
    "under state_dict, from DataParallel": lambda state: {
        "epoch": 3,
        "state_dict": {f"module.{name}": value for name, value in state.items()},
    },
    "of the released code": lambda state: {
        "model": {f"base_model.{n}": v for n, v in state.items() if n != "logit_scale"}
        | {"classifier.bias": torch.ones(3)}
    },
    "of this library": lambda state: (
        {f"clip.{name}": value for name, value in state.items()} | {"interaction.ln_post.weight": torch.ones(64)}
    ),
    "with the text encoder apart": lambda state: {
        name if name.startswith(("visual.", "logit_scale")) else f"text.{name}": value for name, value in state.items()
    },
    "from OpenAI": lambda state: state | {"input_resolution": torch.tensor(32), "context_length": torch.tensor(77)},
}


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_weights_file_gives_its_weights(make, suffix, tmp_path):
    source, target, path = tiny(seed=1), tiny(seed=2), tmp_path / f"weights{suffix}"
    content = MAKES[make](source.state_dict())
    if suffix == ".pt":
        torch.save(content, path)
    else:
        save_file(next((v for v in content.values() if isinstance(v, dict)), content), path)
    load_clip_weights(target, path)
    tokens = torch.tensor([[1, 5, 9, 119, *[0] * 73]])
    assert torch.equal(target.visual(images(32, 32)), source.visual(images(32, 32)))
    assert torch.equal(target.begin_text(tokens), source.begin_text(tokens))
    assert torch.equal(target.finish_text(target.begin_text(tokens)), source.finish_text(source.begin_text(tokens)))


def test_half_precision_weights_are_read_into_single_precision(tmp_path):
    source = tiny(seed=1).half()
    torch.save(source.state_dict(), tmp_path / "half.pt")
    target = tiny(seed=2)
    load_clip_weights(target, tmp_path / "half.pt")
    assert target.visual.proj.dtype == torch.float32
    assert torch.equal(target.visual.proj, source.visual.proj.float())


def test_positions_are_resized_on_the_way_in_and_never_by_open_clip(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("open_clip resized the positions")

    monkeypatch.setattr("open_clip.model.resize_pos_embed", refuse)
    monkeypatch.setattr("open_clip.factory.resize_pos_embed", refuse)
    source, target = tiny(seed=1), tiny((48, 16), stride=4, seed=2)
    torch.save(source.state_dict(), tmp_path / "square.pt")
    load_clip_weights(target, tmp_path / "square.pt")
    grid = source.visual.positional_embedding[1:].reshape(4, 4, 64).permute(2, 0, 1)[None]
    expected = F.interpolate(grid, (11, 3), mode="bilinear")[0].flatten(1).T
    torch.testing.assert_close(target.visual.positional_embedding[1:], expected)
    assert torch.equal(target.visual.positional_embedding[0], source.visual.positional_embedding[0])


def test_a_checkpoint_of_this_library_is_resized_from_its_own_grid(tmp_path):
    recipe = irra.recipe(pretrained="none", losses="sdm", seed=1)
    model = irra.build_model(recipe, 3)
    irra.save_checkpoint(model, recipe, tmp_path / "tall.safetensors")
    wide = recipe.replace(pretrained=str(tmp_path / "tall.safetensors"), image_height=48, image_width=64)
    found = irra.build_model(wide, 3).clip.visual.positional_embedding
    expected = resize_positions(model.clip.visual.positional_embedding, 6, 8, source=(12, 4))
    assert torch.equal(found, expected)


def test_tensors_that_do_not_fit_are_named_each(tmp_path):
    state = tiny().state_dict()
    state["visual.conv2.weight"] = state.pop("visual.conv1.weight")
    state["ln_final.bias"] = torch.zeros(65)
    torch.save(state, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=r"bad\.pt does not fit the model") as caught:
        load_clip_weights(tiny(), tmp_path / "bad.pt")
    for part in ("conv1.weight is missing", "conv2.weight is left over", r"ln_final.bias is (65,), wanted (64,)"):
        assert part in str(caught.value)


def test_nothing_of_a_file_that_does_not_fit_is_taken_over(tmp_path):
    state = tiny(seed=1).state_dict()
    del state["visual.proj"]
    torch.save(state, tmp_path / "part.pt")
    clip = tiny(seed=2)
    before = {name: value.clone() for name, value in clip.state_dict().items()}
    with pytest.raises(ValueError, match=r"visual\.proj is missing"):
        load_clip_weights(clip, tmp_path / "part.pt")
    assert all(torch.equal(value, before[name]) for name, value in clip.state_dict().items())


def view_of_little(shape):
    return torch.zeros(1).expand(shape)


UNSOUND = {  # what a file may hold in the place of visual.proj (64, 64), and what is said of it
    "a number": (lambda proj: 3, "no tensor but of type int"),
    "a list": (lambda proj: [proj], "no tensor but of type list"),
    "complex numbers": (lambda proj: proj.to(torch.complex64), "of complex64"),
    "whole numbers": (lambda proj: proj.long(), "of int64"),
    "truth values": (lambda proj: proj > 0, "of bool"),
    "eight bits": (lambda proj: proj.to(torch.float8_e4m3fn), "of float8_e4m3fn"),
    "a sparse tensor": (lambda proj: proj.to_sparse(), "a sparse_coo tensor"),
    "no numbers": (lambda proj: proj.to("meta"), r"without numbers \(device meta\)"),
    "one number many times": (lambda proj: view_of_little(proj.shape), r"\(64, 64\) with memory for 1 numbers"),
    "far more than is there": (lambda proj: view_of_little((10**9, 64)), r"\(1000000000, 64\) with memory for 1 num"),
    "a NaN": (lambda proj: proj.clone().index_fill_(0, torch.tensor([7]), float("nan")), "not finite"),
    "infinities": (lambda proj: torch.stack([*proj[:-2], proj[0] + torch.inf, proj[0] - torch.inf]), "not finite"),
    "more than single precision holds": (lambda proj: proj.double() + 1e39, "not finite"),
}


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize("form", UNSOUND)
def test_what_is_no_dense_tensor_of_finite_floats_is_named_and_nothing_is_taken_over(form, tmp_path):
    make, said = UNSOUND[form]
    state = tiny(seed=1).state_dict()
    state["visual.proj"] = make(state["visual.proj"])
    torch.save(state, tmp_path / "odd.pt")
    clip = tiny(seed=2)
    before = {name: value.clone() for name, value in clip.state_dict().items()}
    with pytest.raises(ValueError, match=rf"odd\.pt: visual\.proj is {said}.*Accepted are dense tensors of finite"):
        load_clip_weights(clip, tmp_path / "odd.pt")
    assert all(torch.equal(value, before[name]) for name, value in clip.state_dict().items())


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_large_finite_weights_are_taken_in_every_precision_and_layout(kind, tmp_path):
    state = tiny(seed=1).state_dict()
    large = min(torch.finfo(kind).max, torch.finfo(torch.float32).max) * 0.5  # their sum is beyond the precision
    state["visual.proj"] = torch.full((64, 64), large, dtype=kind).t()
    state["visual.conv1.weight"] = state["visual.conv1.weight"].to(memory_format=torch.channels_last)
    torch.save(state, tmp_path / "large.pt")
    clip = tiny(seed=2)
    load_clip_weights(clip, tmp_path / "large.pt")
    assert torch.equal(clip.visual.proj, state["visual.proj"].float())
    assert torch.equal(clip.visual.conv1.weight, state["visual.conv1.weight"])


def test_tensors_that_share_their_memory_are_refused(tmp_path):
    state = tiny(seed=1).state_dict()
    state["visual.proj"] = state["text_projection"]
    torch.save(state, tmp_path / "shared.pt")
    with pytest.raises(ValueError, match=r"shared\.pt: its tensors share [\d,]+ bytes and would take [\d,]+"):
        load_clip_weights(tiny(), tmp_path / "shared.pt")


def test_weights_cut_from_one_flat_vector_are_taken(tmp_path):
    state = tiny(seed=1).state_dict()
    flat = torch.cat([value.flatten() for value in state.values()])
    parts = flat.split([value.numel() for value in state.values()])
    cut = {name: part.view(value.shape) for (name, value), part in zip(state.items(), parts, strict=True)}
    torch.save(cut, tmp_path / "flat.pt")
    clip = tiny(seed=2)
    load_clip_weights(clip, tmp_path / "flat.pt")
    assert torch.equal(clip.visual.proj, state["visual.proj"])


def test_a_tensor_that_no_text_names_is_refused(tmp_path):
    torch.save({"state_dict": {**tiny().state_dict(), 3: torch.zeros(2)}}, tmp_path / "named.pt")
    with pytest.raises(ValueError, match=r"named\.pt: a tensor is named by 3, of type int: accepted are names in text"):
        load_clip_weights(tiny(), tmp_path / "named.pt")


@pytest.mark.parametrize("shape", [(17,), (0, 64), (1, 64), (17, 64, 1), (12, 64)])
def test_positions_that_are_no_rows_of_a_grid_are_refused_by_file_and_name(shape, tmp_path):
    state = tiny().state_dict() | {"visual.positional_embedding": torch.zeros(shape)}
    torch.save(state, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=r"odd\.pt: visual\.positional_embedding(: 11 patch positions| is \()"):
        load_clip_weights(tiny(), tmp_path / "odd.pt")


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("{}", "KeyError: 'image_height'"),
        ("hello", "JSONDecodeError"),
        ("[1]", "TypeError"),
        ("[" * 100_000, "RecursionError"),
        ('{"image_height": 32, "image_width": 32, "stride": 0}', "stride 0, patch 8, image 32×32"),
        ('{"image_height": 32, "image_width": 32, "stride": "8"}', "must be whole numbers"),
        ('{"image_height": 32, "image_width": 32.5, "stride": 8}', "must be whole numbers"),
        ('{"image_height": 4, "image_width": 32, "stride": 8}', "stride 8, patch 8, image 4×32"),
    ],
)
def test_a_recipe_beside_the_weights_that_gives_no_grid_is_refused(recipe, said, tmp_path):
    save_file(tiny().state_dict(), tmp_path / "odd.safetensors", {"recipe": recipe})
    with pytest.raises(ValueError, match=rf"odd\.safetensors: the recipe in its metadata does not say .*{said}"):
        load_clip_weights(tiny(), tmp_path / "odd.safetensors")


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path):
    torch.save({"model": Trap(tmp_path / "run")}, tmp_path / "trap.pth")
    with pytest.raises(ValueError, match="without running code"):
        load_clip_weights(tiny(), tmp_path / "trap.pth")
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore:'torch.load' received")
def test_a_torchscript_file_is_refused_with_the_way_to_convert_it(tmp_path):
    torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).save(tmp_path / "ViT-B-16.pt")
    with pytest.raises(ValueError, match=r"torch\.save\(torch\.jit\.load\(path\)\.state_dict\(\)"):
        load_clip_weights(tiny(), tmp_path / "ViT-B-16.pt")


@pytest.mark.parametrize("name", ["cut.pt", "cut.safetensors"])
def test_a_file_cut_short_is_named_with_its_size(name, tmp_path):
    (tmp_path / name).write_bytes(b"\x50\x4b\x03\x04" + b"0" * 60)
    with pytest.raises(ValueError, match=rf"{name} \(64 bytes\) is not a weights file"):
        load_clip_weights(tiny(), tmp_path / name)


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(FileNotFoundError, match=r"pretrained 'no/such.pt': there is no such file"):
        irra.build_model(irra.recipe(pretrained="no/such.pt"), 3)


def test_the_weights_of_the_small_clip_are_read_from_the_file_that_is_given(tmp_path):
    made = irra.recipe(pretrained="none", losses="itc", seed=7)
    source = irra.build_model(made, 3)
    irra.save_checkpoint(source, made, tmp_path / "general.safetensors")
    model = irra.build_model(irra.recipe(pretrained=str(tmp_path / "general.safetensors")), 3)
    for name, value in model.clip.state_dict().items():
        assert torch.equal(value, source.clip.state_dict()[name]), name


@pytest.mark.parametrize("towers", ["image", "text"])
def test_the_encoder_that_is_not_pretrained_keeps_its_random_weights(towers, tmp_path):
    made = irra.recipe(pretrained="none", losses="itc", seed=7)
    source = irra.build_model(made, 3)
    irra.save_checkpoint(source, made, tmp_path / "general.safetensors")
    weights = str(tmp_path / "general.safetensors")
    recipe = irra.recipe(pretrained=weights, pretrained_towers=towers, losses="sdm+id+mlm")
    model = irra.build_model(recipe, 3)
    drawn = irra.build_model(recipe.replace(pretrained="none", pretrained_towers="both"), 3)
    for name, value in model.state_dict().items():
        pretrained = name.startswith("clip.") and name.startswith("clip.visual.") == (towers == "image")
        assert torch.equal(value, (source if pretrained else drawn).state_dict()[name]), name
    irra.save_checkpoint(model, recipe, tmp_path / "model.safetensors")
    assert irra.load_checkpoint(tmp_path / "model.safetensors")[1] == recipe


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("RN50", "image encoder is not CLIP's"),
        ("ViT-B-16-SigLIP", "image encoder is not CLIP's"),
        ("EVA02-B-16", "image encoder is not CLIP's"),
        ("coca_ViT-B-32", "its text encoder is not CLIP's"),
        ("roberta-ViT-B-32", "its text encoder is not CLIP's"),
        ("nllb-clip-base", "its text encoder is not CLIP's"),
        ("ViT-H-14-CLIPA", "its text encoder is not CLIP's"),
    ],
)
def test_a_backbone_that_irra_cannot_use_is_refused_with_the_reason(name, reason):
    with pytest.raises(ValueError, match=f"backbone '{name}' is not supported: .*{reason}"):
        configuration(name)


@pytest.mark.parametrize(
    ("name", "grid", "width", "parameters"),
    [
        ("ViT-B-16-quickgelu", (24, 8), 512, 149.6e6),
        ("ViT-B-32", (12, 4), 512, 151e6),
        ("ViT-L-14", (27, 9), 768, 427e6),
    ],
)
def test_backbones_by_name_have_the_size_that_open_clip_gives_them(name, grid, width, parameters):
    with torch.device("meta"):
        patch = configuration(name)["vision_cfg"]["patch_size"]
        clip = new_clip(configuration(name), (384, 128), patch)
    assert clip.visual.grid_size == grid
    assert clip.text_projection.shape[1] == width
    assert sum(p.numel() for p in clip.parameters()) == pytest.approx(parameters, rel=0.01)


def shallow(name: str) -> dict:
    """A backbone's configuration with its widths, heads and options, of one block an encoder."""
    config = configuration(name)
    return {
        **config,
        "vision_cfg": config["vision_cfg"] | {"layers": 1},
        "text_cfg": config["text_cfg"] | {"layers": 1},
    }


@pytest.fixture
def one_block(monkeypatch):
    """Backbones by name, each cut to one block an encoder."""
    monkeypatch.setattr(backbone, "configuration", shallow)


REAL = {  # patch 14 to 32, GELU and QuickGELU, heads of 64 to 104, feed-forwards of 4 to 4.9 widths, LayerScale
    "ViT-B-32": (512, 224),
    "ViT-L-14": (768, 224),
    "ViT-L-14-336-quickgelu": (768, 336),
    "ViT-H-14": (1024, 224),
    "ViT-bigG-14": (1280, 224),
    "ViT-M-16-alt": (384, 224),
    "ViT-B-16-plus-240": (640, 240),
}
SENTENCES = F.pad(torch.tensor([[49406, 320, 1125, 539, 49407], [49406, 2533, 49407, 0, 0]]), (0, 72))


@pytest.mark.parametrize("name", REAL)
def test_a_real_backbones_features_are_open_clips_own_at_its_own_size(name, one_block):
    width, side = REAL[name]
    patch = configuration(name)["vision_cfg"]["patch_size"]
    size = {"image_height": side, "image_width": side, "stride": patch}
    ours = irra.build_model(irra.recipe("rstp", backbone=name, pretrained="none", losses="sdm", **size), 3)
    config = shallow(name)
    theirs = new_open_clip(config, (side, side))
    theirs.load_state_dict(ours.clip.state_dict())
    pictures = images(side, side)
    with torch.no_grad():
        found = ours.encode_image(pictures), ours.encode_text(SENTENCES)
        expected = theirs.encode_image(pictures), theirs.encode_text(SENTENCES)
    assert found[0].shape == found[1].shape == (2, width)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["ViT-L-14", "ViT-H-14", "ViT-M-16-alt"])
def test_every_weight_of_a_real_backbone_and_of_what_follows_it_learns_on_a_tall_photo(name, one_block):
    recipe = irra.recipe("rstp", backbone=name, pretrained="none", interaction_depth=1)
    whole = irra.build_model(recipe, 3)
    assert whole.image_size == (recipe.image_height, recipe.image_width)
    labels = torch.where(SENTENCES == 1125, SENTENCES, 0)
    found = whole(images(*whole.image_size), SENTENCES, SENTENCES.masked_fill(labels != 0, 49405), labels)
    parts = irra.losses.total_loss(found, torch.tensor([0, 1]), recipe)
    sum(parts.values()).backward()
    assert whole.interaction.attention.num_heads == whole.interaction.attention.embed_dim // 64
    for name, parameter in whole.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@pytest.mark.parametrize(("name", "grid"), [("ViT-L-14", (7, 5)), ("ViT-B-32", (4, 3))])
def test_a_stride_of_half_a_real_patch_sees_the_crops_that_far_apart(name, grid, one_block):
    patch = configuration(name)["vision_cfg"]["patch_size"]
    step = patch // 2
    height, width = (patch + step * (count - 1) for count in grid)
    sizes = {"image_height": height, "image_width": width, "stride": step}
    recipe = irra.recipe("rstp", backbone=name, pretrained="none", losses="sdm", **sizes)
    overlapping, pictures = irra.build_model(recipe, 3), images(height, width)
    assert overlapping.grid == grid
    crops = pictures.unfold(2, patch, step).unfold(3, patch, step)  # the same patches laid side by side
    apart = crops.permute(0, 1, 2, 4, 3, 5).flatten(2, 3).flatten(3, 4)
    plain = irra.build_model(recipe.replace(image_height=apart.shape[2], image_width=apart.shape[3], stride=patch), 3)
    plain.load_state_dict(overlapping.state_dict())
    with torch.no_grad():
        found, expected = overlapping.encode_image(pictures), plain.encode_image(apart)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_every_accepted_backbone_encodes_photos_and_sentences_with_its_own_recipe(one_block):
    for name in backbones():
        recipe = irra.recipe("rstp", backbone=name, pretrained="none", interaction_depth=1)
        with torch.device("meta"):
            whole = irra.build_model(recipe, 3, device="meta")
            shown = whole.image_tokens(torch.zeros(2, 3, *whole.image_size))
            read = whole.text_tokens(torch.zeros(2, 9, dtype=torch.long))
        width = configuration(name)["embed_dim"]
        assert (shown.shape, read.shape) == ((2, 1 + whole.grid[0] * whole.grid[1], width), (2, 9, width)), name
        assert whole.grid[0] == 3 * whole.grid[1], name


@pytest.mark.parametrize(
    ("side", "option"),
    [
        ("vision_cfg", {"patch_dropout": 0.5}),
        ("vision_cfg", {"no_ln_pre": True}),
        ("vision_cfg", {"pos_embed_type": "sin_cos_2d"}),
        ("vision_cfg", {"qk_norm": True}),
        ("text_cfg", {"no_causal_mask": True}),
        ("text_cfg", {"proj_bias": True}),
        ("text_cfg", {"embed_cls": True}),
    ],
)
def test_an_option_of_open_clip_that_the_forward_pass_would_ignore_is_refused(side, option):
    config = configuration("ViT-B-16")
    assert unsuited(config) is None
    (name,) = option
    assert f"does not follow its options {name}" in unsuited({**config, side: config[side] | option})
    assert unsuited({**config, side: config[side] | {name: False}}) is None
