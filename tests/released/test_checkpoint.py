"""Files of the released code: read in every state that people have them in, refused where they do not fit."""

import math
import re
from pathlib import Path

import pytest
import torch

import irra_core as irra
from irra_core.backbone import new_clip, seeded
from irra_core.model import IRRA
from irra_core.released import checkpoint
from irra_core.released.checkpoint import released_name

TINY = Path(__file__).parent.parent / "reference" / "irra_tiny.pth"
SIZE = (64, 32)
MLM = ("cross_attn.", "cross_modal_transformer.", "ln_pre_t.", "ln_pre_i.", "ln_post.", "mlm_head.")


@pytest.fixture
def released():
    """The tensors of the released code's tiny file."""
    return torch.load(TINY, weights_only=True)["model"]


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 290, (2, 9), generator=generator)
    tokens[:, 0], tokens[:, -1] = 298, 299
    return torch.randn(2, 3, *SIZE, generator=generator), tokens


@pytest.fixture
def no_memory(monkeypatch):
    """A model that is built with memory, or with more than 80 blocks in an encoder, fails the test."""

    def built(*given, **named):
        config = given[0]
        assert torch.empty(0).is_meta, "a model was built in memory before it was compared with the file"
        assert max(config["vision_cfg"]["layers"], config["text_cfg"]["layers"]) <= 80
        return new_clip(*given, **named)

    monkeypatch.setattr(checkpoint, "new_clip", built)


def written(tensors, tmp_path, **others):
    path = tmp_path / "best.pth"
    torch.save({"model": tensors, **others}, path)
    return path


def same(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_every_tensor_of_a_released_file_arrives(released):
    model = irra.load_official(TINY, SIZE)
    found = {released_name(name): parameter for name, parameter in model.named_parameters()}
    assert found.keys() == released.keys()
    assert all(torch.equal(found[name], released[name].float()) for name in released)
    assert model.padding_attention
    assert model.classifier.out_features == 23
    assert model.clip.vocab_size == 300


def test_loading_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    irra.load_official(TINY, SIZE)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_precision_prefix_and_other_entries_of_the_file_change_nothing(dtype, prefix, released, tmp_path):
    optimiser = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))])
    others = {"optimizer": optimiser.state_dict(), "scheduler": {"milestones": (20, 50)}, "epoch": 60, "iteration": 0}
    path = written({prefix + name: value.to(dtype) for name, value in released.items()}, tmp_path, **others)
    assert same(irra.load_official(path, SIZE), irra.load_official(TINY, SIZE))


def test_a_file_without_classifier_gives_features_and_word_scores(released, batch, tmp_path):
    path = written({n: v for n, v in released.items() if not n.startswith("classifier.")}, tmp_path)
    model, whole = irra.load_official(path, SIZE), irra.load_official(TINY, SIZE)
    assert model.classifier is None
    assert model(*batch).image_logits is None
    assert torch.equal(model.word_logits(*batch), whole.word_logits(*batch))


def test_a_file_without_interaction_gives_features_and_says_what_it_cannot(released, batch, tmp_path):
    path = written({n: v for n, v in released.items() if not n.startswith(MLM)}, tmp_path)
    model, whole = irra.load_official(path, SIZE), irra.load_official(TINY, SIZE)
    assert torch.equal(model.encode_image(batch[0]), whole.encode_image(batch[0]))
    for name in ("word_logits", "attention"):
        with pytest.raises(ValueError, match=f"{name} needs the interaction encoder"):
            getattr(model, name)(*batch)


NAMES = [
    "base_model.visual.conv1.weight",
    "base_model.visual.positional_embedding",
    "base_model.visual.transformer.resblocks.0.mlp.c_fc.bias",
    "base_model.positional_embedding",
    "base_model.text_projection",
    "base_model.token_embedding.weight",
    "base_model.transformer.resblocks.1.attn.in_proj_weight",
    "base_model.ln_final.weight",
    "classifier.weight",
    "classifier.bias",
    "cross_attn.in_proj_weight",
    "cross_modal_transformer.resblocks.0.ln_2.bias",
    "ln_pre_t.bias",
    "ln_post.weight",
    "mlm_head.dense.weight",
    "mlm_head.fc.weight",
    "mlm_head.fc.bias",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_tensor_is_named(name, released, tmp_path):
    del released[name]
    with pytest.raises(ValueError, match=rf"best\.pth.*{re.escape(name)}.* is missing"):
        irra.load_official(written(released, tmp_path), SIZE)


@pytest.mark.parametrize(
    ("axis", "name"),
    [(axis, name) for axis in (0, -1) for name in NAMES if (axis, name) != (0, "base_model.positional_embedding")],
)  # with fewer text positions, the file is a model that reads fewer tokens
def test_a_misshapen_tensor_is_named(name, axis, released, tmp_path):
    released[name] = released[name].narrow(axis, 0, released[name].shape[axis] - 1).clone()
    shape = tuple(released[name].shape)
    with pytest.raises(ValueError, match=r"best\.pth") as caught:
        irra.load_official(written(released, tmp_path), SIZE)
    if "visual.positional_embedding" in name and axis == 0:  # as many positions as no 4×2 grid has
        assert "positional_embedding has 7 patches: image size 64×32 at stride 16 makes 4×2 = 8 patches" in str(
            caught.value
        )
    else:
        assert name in str(caught.value)
        assert str(shape) in str(caught.value)


@pytest.mark.parametrize("name", ["visual.proj", "base_model.logit_bias2", "cross_attn.gate", "classifier2.weight"])
def test_a_tensor_too_many_is_named(name, released, tmp_path):
    released[name] = torch.ones(2)
    with pytest.raises(ValueError, match=f"{re.escape(name)} is left over"):
        irra.load_official(written(released, tmp_path), SIZE)


def test_a_block_left_out_in_the_middle_is_named(released, tmp_path):
    gone = "base_model.transformer.resblocks.0."
    path = written({n: v for n, v in released.items() if not n.startswith(gone)}, tmp_path)
    with pytest.raises(ValueError, match=r"base_model\.transformer\.resblocks\.0\.\S+ is missing"):
        irra.load_official(path, SIZE)


def test_an_image_size_that_does_not_fit_lists_those_that_do():
    with pytest.raises(ValueError, match="8 patches: image size 384×128 at stride 16 makes 24×8 = 192") as caught:
        irra.load_official(TINY)
    assert "at stride 16 64×32, 32×64" in str(caught.value)
    assert "at stride 12 52×28" in str(caught.value)


def test_every_size_that_the_error_lists_fits():
    with pytest.raises(ValueError, match="What fits") as caught:
        irra.load_official(TINY)
    for stride, sizes in re.findall(r"at stride (\d+) ((?:\d+×\d+(?:, )?)+)", str(caught.value).split("What fits")[1]):
        for height, width in re.findall(r"(\d+)×(\d+)", sizes):
            model = irra.load_official(TINY, (int(height), int(width)), int(stride))
            assert model.image_tokens(torch.zeros(1, 3, int(height), int(width))).shape == (1, 9, 128)


def test_an_overlapping_stride_is_read_with_its_patches(released, tmp_path):
    released["base_model.visual.positional_embedding"] = torch.randn(1 + 5 * 2, 128)
    model = irra.load_official(written(released, tmp_path), image_size=(64, 28), stride=12)
    assert model.grid == (5, 2)
    assert model.image_tokens(torch.zeros(1, 3, 64, 28)).shape == (1, 11, 128)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"weight": torch.ones(2)}}, "none of its tensors is under base_model"),
        ({"model": 3}, "holds no state dict under 'model'"),
        ({"args": "a", "epoch": 3}, "holds no state dict under 'model'"),
        ({"model": {"base_model.visual.proj": torch.ones(2, 2)}}, "text_projection.*is missing|no multiple of 64"),
    ],
)
def test_a_file_in_another_format_is_refused(content, message, tmp_path):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=rf"other\.pth.*({message})"):
        irra.load_official(tmp_path / "other.pth", SIZE)


def repeated(*shape):
    """A tensor of any size whose numbers are one and the same in memory."""
    return torch.zeros(1).expand(shape)


BLOCK = "resblocks.{}.ln_1.weight"
HOSTILE = {
    "positions beyond number": (
        {"base_model.visual.positional_embedding": repeated(10**9, 128)},
        r"base_model\.visual\.positional_embedding is \(10{9}, 128\) with memory for 1 numbers",
    ),
    "identities beyond number": (
        {"classifier.weight": repeated(10**12, 128), "classifier.bias": repeated(10**12)},
        r"classifier\.weight is \(10{12}, 128\) with memory for 1 numbers",
    ),
    "a block beyond number": (
        {"base_model.visual.transformer." + BLOCK.format(10**9): torch.zeros(128)},
        r"base_model\.visual\.transformer\.resblocks\.10{9}\.ln_1\.weight is of block 1,000,000,000, but the file ",
    ),
    "a block far away": (
        {"base_model.transformer." + BLOCK.format(20_000): torch.zeros(128)},
        r"resblocks\.20000\.ln_1\.weight is of block 20,000, but the file holds [0-9]+ tensors",
    ),
    "a block between the two encoders": (
        {"cross_modal_transformer." + BLOCK.format(400): torch.zeros(128)},
        r"cross_modal_transformer\.resblocks\.400\.ln_1\.weight is of block 400, but the file holds [0-9]+ tensors",
    ),
    "a block of 5,000 digits": (
        {"base_model.transformer." + BLOCK.format("9" * 5000): torch.zeros(128)},
        "resblocks.9{5000}.ln_1.weight is left over",
    ),
    "a number for a name": ({1: torch.zeros(2)}, "a tensor is named by 1, of type int"),
    "patches of no pixel": ({"base_model.visual.conv1.weight": torch.zeros(128, 3, 0, 0)}, "patch size 0 by base_mod"),
    "no patch": ({"base_model.visual.positional_embedding": torch.zeros(1, 128)}, "image positions 1 by base_model"),
    "no words": (
        {
            "base_model.token_embedding.weight": torch.zeros(0, 128),
            "mlm_head.fc.weight": torch.zeros(0, 128),
            "mlm_head.fc.bias": torch.zeros(0),
        },
        "vocabulary 0 by base_model",
    ),
    "a meta tensor": ({"base_model.text_projection": torch.zeros(128, 128, device="meta")}, "without numbers"),
    "a sparse tensor": ({"base_model.text_projection": torch.eye(128).to_sparse()}, "a sparse_coo tensor"),
    "complex numbers": ({"base_model.text_projection": torch.zeros(128, 128, dtype=torch.complex64)}, "of complex64"),
    "a NaN": ({"ln_post.bias": torch.full((128,), math.nan)}, r"ln_post\.bias is not finite"),
    "no tensor": ({"ln_post.bias": 3}, r"ln_post\.bias is no tensor but of type int"),
}


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize("case", HOSTILE)
def test_a_small_file_that_claims_much_or_nothing_is_refused_before_anything_large_is_made(
    case, released, no_memory, tmp_path
):
    changes, message = HOSTILE[case]
    path = written(released | changes, tmp_path)
    assert path.stat().st_size < 2 * TINY.stat().st_size + 10_000
    with pytest.raises(ValueError, match=rf"best\.pth.*{message}"):
        irra.load_official(path, SIZE)


@pytest.mark.parametrize("stride", [0, -16])
def test_a_stride_that_does_not_advance_is_refused(stride):
    with pytest.raises(ValueError, match=f"stride {stride}: accepted is from 1 to the patch size, here 16 pixels"):
        irra.load_official(TINY, SIZE, stride)


def test_the_sizes_that_fit_are_every_pair_of_divisors():
    for positions in (1, 2, 7, 12, 36, 97):
        with pytest.raises(ValueError, match="What fits") as caught:
            checkpoint._check_positions(positions, (10**6, 16), 16, 16, "file")
        found = re.findall(r"(\d+)×(\d+)", str(caught.value).split("at stride 16 ")[-1].split(";")[0])
        grids = {(int(height) // 16, int(width) // 16) for height, width in found}
        divisors = [number for number in range(1, positions + 1) if positions % number == 0]
        assert grids <= {(number, positions // number) for number in divisors}
        assert len(grids) == min(len(divisors), 6)


def test_what_save_official_writes_is_the_file_that_was_read(released, tmp_path):
    irra.save_official(irra.load_official(TINY, SIZE), tmp_path / "again.pth")
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert again.keys() == {"model"}
    assert again["model"].keys() == released.keys()
    assert all(torch.equal(again["model"][name], released[name].float()) for name in released)


@pytest.mark.parametrize("losses", ["sdm", "sdm+id", "sdm+id+mlm"])
def test_a_model_of_ours_comes_back_from_the_released_format(losses, tmp_path):
    model = irra.build_model(irra.recipe(pretrained="none", losses=losses), 7)
    irra.save_official(model, tmp_path / "ours.pth")
    assert same_parameters(irra.load_official(tmp_path / "ours.pth", (96, 32), stride=8), model)


def same_parameters(one, other):
    ours, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"interaction": "co"}, "no CoEncoder: only interaction 'cross'"),
        ({"interaction": "merged"}, "no MergedEncoder: only interaction 'cross'"),
        ({"quick_gelu": False}, "QuickGELU"),
        ({"heads": 4}, "heads of width 64"),
    ],
)
def test_a_model_that_the_released_code_cannot_hold_is_not_written(changes, message, tmp_path):
    config = {
        "embed_dim": 128,
        "quick_gelu": changes.get("quick_gelu", True),
        "vision_cfg": {"layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"vocab_size": 300, "width": 128, "heads": changes.get("heads", 2), "layers": 1},
    }
    with seeded(0):
        model = IRRA(new_clip(config, SIZE, 16), 3, changes.get("interaction", "cross"), 1)
    with pytest.raises(ValueError, match=message):
        irra.save_official(model, tmp_path / "no.pth")
    assert not list(tmp_path.iterdir())
