"""Checkpoints come back as they were, and files that contradict themselves are refused."""

import json
import math
from pathlib import Path

import pytest
import torch

import irra_core as irra
from irra_core import checkpoints
from irra_core.backbone import new_clip, read_weights
from irra_core.checkpoints import load_weights

TINY = Path(__file__).parent / "reference" / "irra_tiny.pth"


def same(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize(
    ("losses", "interaction"),
    [("sdm", None), ("sdm+id", None), ("itc+mlm", "cross"), ("sdm+id+mlm", "co"), ("sdm+id+mlm", "merged")],
)
def test_a_checkpoint_comes_back_bit_for_bit_with_its_recipe(losses, interaction, tmp_path):
    given = {"interaction": interaction, "interaction_depth": 1, "padding_attention": True} if interaction else {}
    recipe = irra.recipe(pretrained="none", losses=losses, seed=3, **given)
    model = irra.build_model(recipe, 7)
    irra.save_checkpoint(model, recipe, tmp_path / "model.safetensors")
    found, read = irra.load_checkpoint(tmp_path / "model.safetensors")
    assert same(found, model)
    assert read == recipe
    assert found.padding_attention == (interaction is not None)


def test_what_a_loaded_model_holds_beside_its_weights_is_what_a_built_one_holds(tmp_path):
    recipe = irra.recipe(pretrained="none", frozen="text", adapter_rank=2)
    model = irra.build_model(recipe, 7)
    irra.save_checkpoint(model, recipe, tmp_path / "model.safetensors", merge=False)
    found, _ = irra.load_checkpoint(tmp_path / "model.safetensors")
    ours, theirs = dict(found.named_buffers()), dict(model.named_buffers())
    assert ours.keys() == theirs.keys() >= {"clip.logit_scale"}
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    learning = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in found.named_parameters()} == learning


@pytest.fixture(scope="module")
def ours():
    """The tensors of a checkpoint of this library, and what it says of them."""
    recipe = irra.recipe(pretrained="none", losses="sdm+id+mlm", interaction_depth=1)
    state = irra.build_model(recipe, 7).state_dict()
    return state, {"format": checkpoints.FORMAT, "recipe": recipe.to_json(), "num_ids": "7"}


@pytest.fixture
def no_memory(monkeypatch):
    """A model that is built with memory fails the test."""

    def built(*given, **named):
        assert torch.empty(0).is_meta, "a model was built in memory before it was compared with the file"
        return new_clip(*given, **named)

    monkeypatch.setattr("irra_core.backbone.new_clip", built)


LIES = [
    ({"interaction_depth": 3000}, {}, "interaction_depth is 3000, but it holds [0-9]+ tensors"),
    ({"interaction_depth": 10**30}, {}, "interaction_depth is 10{30}, but it holds [0-9]+ tensors"),
    ({"interaction_depth": 3}, {}, r"interaction\.blocks\.1\.\S+ is missing"),
    ({"image_height": 8_000_000}, {}, "image_height 8000000, .* make 4000000 patches, but .* has rows for 48"),
    ({"image_width": 8 * 10**30}, {}, "image_width 80{30} .* but .* has rows for 48"),
    ({"stride": 4}, {}, "stride 4 make 161 patches, but .* has rows for 48"),
    ({"backbone": "ViT-bigG-14", "stride": 14}, {}, "image_height 96, image_width 32"),
    (
        {"backbone": "ViT-bigG-14", "image_height": 224, "image_width": 42, "stride": 14},
        {},
        r"clip\.visual\.transformer\.resblocks\.3\.\S+ is missing",
    ),
    ({"adapter_rank": 3}, {}, None),
    ({}, {"num_ids": "1000000000000"}, "num_ids is 10{12}, but its classifier.weight has 7 rows"),
    ({}, {"num_ids": "-5"}, "num_ids is -5, but its classifier.weight has 7 rows"),
    ({}, {"num_ids": "1" + "0" * 30}, "num_ids is 10{30}, but its classifier.weight has 7 rows"),
    ({}, {"num_ids": "seven"}, "does not say what model it holds .*seven"),
    ({}, {"recipe": "[" * 100_000}, "does not say what model it holds .*recursion"),
    ({}, {"recipe": '{"lr": ' + "[" * 100_000}, "does not say what model it holds .*recursion"),
    ({"lr": 10**400}, {}, "does not say what model it holds (?s:.*)'lr'"),
    ({"backbone": ["small"]}, {}, "does not say what model it holds (?s:.*)'backbone'"),
]


@pytest.mark.parametrize(("changes", "said", "message"), LIES, ids=range(len(LIES)))
def test_a_checkpoint_that_says_what_its_tensors_are_not_costs_no_memory(
    changes, said, message, ours, no_memory, tmp_path
):
    state, metadata = ours
    metadata = metadata | {"recipe": json.dumps(json.loads(metadata["recipe"]) | changes)} | said
    checkpoints.save_tensors(state, tmp_path / "lie.safetensors", metadata)
    if message is None:  # adapters were merged
        assert irra.load_checkpoint(tmp_path / "lie.safetensors")[1].adapter_rank == 3
        return
    with pytest.raises(ValueError, match=rf"lie\.safetensors.*{message}"):
        irra.load_checkpoint(tmp_path / "lie.safetensors")


@pytest.mark.parametrize("spoil", [lambda value: value * math.nan, lambda value: value.long()], ids=["NaN", "int64"])
def test_weights_of_ours_that_are_no_finite_floats_are_named(spoil, ours, tmp_path):
    state, metadata = ours
    path = tmp_path / "odd.safetensors"
    checkpoints.save_tensors(state | {"mlm_head.fc.bias": spoil(state["mlm_head.fc.bias"])}, path, metadata)
    model = irra.build_model(irra.recipe(pretrained="none", interaction_depth=1), 7)
    for load in (irra.load_checkpoint, lambda path: load_weights(model, path)):
        with pytest.raises(ValueError, match=r"odd\.safetensors: mlm_head\.fc\.bias is (of int64|not finite)"):
            load(path)


def test_weights_that_are_no_numbers_are_read_where_one_asks_for_them(ours, tmp_path):
    state, metadata = ours
    state = state | {"mlm_head.fc.bias": state["mlm_head.fc.bias"] * math.nan}
    checkpoints.save_tensors(state, tmp_path / "broken.safetensors", metadata)
    found, _ = irra.load_checkpoint(tmp_path / "broken.safetensors", finite=False)
    assert found.mlm_head.fc.bias.isnan().all()


def test_equal_tensors_and_metadata_are_equal_bytes(tmp_path):
    said = {name: f'{name}: 1 – "quoted"\n' for name in ("zebra", "apple", "pear", "fig", "kiwi")}
    written = set()
    for number in range(5):
        path = tmp_path / f"{number}.safetensors"
        checkpoints.save_tensors({"b": torch.arange(3), "a": torch.ones(2)}, path, said)
        written.add(path.read_bytes())
    assert len(written) == 1
    tensors, metadata = read_weights(path)
    assert tensors["b"].tolist() == [0, 1, 2]
    assert {name: metadata[name] for name in said} == said


def test_a_checkpoint_of_a_pretrained_model_needs_neither_network_nor_the_pretrained_file(tmp_path):
    recipe = irra.recipe(pretrained="none", losses="sdm")
    model = irra.build_model(recipe, 7)
    given = recipe.replace(pretrained="gone.safetensors")
    irra.save_checkpoint(model, given, tmp_path / "model.safetensors")
    found, read = irra.load_checkpoint(tmp_path / "model.safetensors")
    assert same(found, model)
    assert read == given


def test_weights_are_loaded_into_a_model_that_is_there(tmp_path):
    recipe = irra.recipe(pretrained="none", losses="sdm+id")
    first, second = irra.build_model(recipe, 7), irra.build_model(recipe.replace(seed=1), 7)
    irra.save_checkpoint(first, recipe, tmp_path / "model.safetensors")
    load_weights(second, tmp_path / "model.safetensors")
    assert same(first, second)
    with pytest.raises(ValueError, match=r"classifier\.bias is \(7,\), wanted \(8,\)"):
        load_weights(irra.build_model(recipe, 8), tmp_path / "model.safetensors")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    recipe = irra.recipe(pretrained="none", losses="sdm")
    path = tmp_path / "model.safetensors"
    irra.save_checkpoint(irra.build_model(recipe, 7), recipe, path)
    before = path.read_bytes()

    def broken(tensors, aside, metadata):
        Path(aside).write_bytes(b"half a file")
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", broken)
    with pytest.raises(OSError, match="No space left"):
        irra.save_checkpoint(irra.build_model(recipe.replace(seed=1), 7), recipe, path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_released_file_is_no_checkpoint_and_the_error_names_the_function_for_it():
    with pytest.raises(ValueError, match=r"irra_tiny\.pth is no checkpoint of this library: .* load_official"):
        irra.load_checkpoint(TINY)


def test_processes_of_one_number_on_two_machines_may_write_the_same_file_at_once(tmp_path):
    with checkpoints.replaced(tmp_path / "file") as ours:
        with checkpoints.replaced(tmp_path / "file") as theirs:
            theirs.write_text("theirs")
            ours.write_text("ours")
        assert (tmp_path / "file").read_text() == "theirs"
    assert (tmp_path / "file").read_text() == "ours"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
