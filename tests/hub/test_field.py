"""Weights files of later papers: made here in exactly their layout, read as `pretrained`, and marked in the outputs."""

import json
import warnings

import pytest
import torch

import irra_core as irra
from irra_core.backbone import build_model, load_clip_weights, resize_positions
from irra_core.released.checkpoint import released_name
from irra_core.scale.summary import summary
from irra_core.training import train

pytestmark = pytest.mark.usefixtures("narrow")
WARNING = "HAM's captions come from a model trained on the captions of CUHK-PEDES"


def field_file(path, recipe, prefix="module.", half=True, **extra):
    """A file as the pretraining of LUPerson-MLLM (NAM) and HAM writes it; the encoders' tensors under our names.

    SDM alone was trained, so the file holds nothing but `base_model.`; DataParallel adds `module.`, training in half
    precision leaves matrices in it, and the checkpoint keeps optimiser, scheduler and counters beside the weights.
    """
    clip = build_model(recipe.replace(losses="sdm"), 1, device="cpu").clip
    state = {f"clip.{name}": value for name, value in clip.state_dict().items() if name != "logit_scale"}
    kept = {name: value.half() if half and value.ndim > 1 else value for name, value in state.items()}
    names = {name: prefix + released_name(name) for name in kept}
    model = {names[name]: value for name, value in kept.items()} | extra
    model[f"{prefix}base_model.logit_scale"] = torch.tensor(4.6)
    moments = {0: {"step": torch.tensor(7.0), "exp_avg": torch.zeros(3)}}
    about = {"optimizer": {"state": moments, "param_groups": [{"lr": 1e-5, "params": [0]}]}, "epoch": 12}
    torch.save({"model": model, "scheduler": {"last_epoch": 12}, "iteration": 0, "num_epoch": 30} | about, path)
    return {name.removeprefix("clip."): value.float() for name, value in kept.items()}


@pytest.mark.parametrize("prefix", ["module.", ""], ids=["DataParallel", "one GPU"])
@pytest.mark.parametrize("half", [True, False], ids=["half", "single"])
def test_a_file_of_the_field_fills_the_encoders_with_its_weights(prefix, half, tiny, tmp_path):
    expected = field_file(tmp_path / "best0.pth", tiny.replace(seed=5), prefix, half)
    with pytest.warns(UserWarning, match=WARNING):
        model = build_model(tiny.replace(pretrained=str(tmp_path / "best0.pth")), 10, device="cpu")
    found = {name: value for name, value in model.clip.state_dict().items() if name != "logit_scale"}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert model.clip.origin == {"pretrained_on": "test"}


@pytest.mark.parametrize(("size", "grid"), [((96, 32), (12, 4)), ((64, 32), (8, 4)), ((48, 48), (6, 6))])
def test_its_image_may_have_another_size(size, grid, tiny, tmp_path):
    made = tiny.replace(seed=5, image_height=size[0], image_width=size[1])
    positions = field_file(tmp_path / "best0.pth", made, half=False)["visual.positional_embedding"]
    model = build_model(tiny.replace(image_height=80, image_width=40), 10, device="cpu")
    with pytest.warns(UserWarning, match=WARNING):
        load_clip_weights(model.clip, tmp_path / "best0.pth")
    expected = resize_positions(positions, 10, 5, source=grid)
    assert torch.equal(model.clip.visual.positional_embedding, expected)


def test_a_tensor_that_is_no_part_of_clip_is_named(tiny, tmp_path):
    field_file(tmp_path / "best0.pth", tiny, **{"module.base_model.adapter.weight": torch.zeros(3)})
    with pytest.warns(UserWarning, match=WARNING), pytest.raises(ValueError, match=r"adapter\.weight is left over"):
        build_model(tiny.replace(pretrained=str(tmp_path / "best0.pth")), 10, device="cpu")


def test_the_outputs_of_a_run_from_such_a_file_are_marked(tiny, annotations, tmp_path):
    field_file(tmp_path / "best0.pth", tiny.replace(seed=5))
    recipe = tiny.replace(pretrained=str(tmp_path / "best0.pth"), max_steps=1, precision="fp32")
    with pytest.warns(UserWarning, match=WARNING):
        list(train(recipe, annotations, tmp_path / "run"))
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["selected"] == {"on": "val", "step": 1, "pretrained_on": "test"}
    assert "(weights selected on test: not comparable)" in summary(tmp_path / "run")


def test_weights_of_another_kind_are_not_marked(tiny, tmp_path):
    model = build_model(tiny, 10, device="cpu")
    irra.save_checkpoint(model, tiny, tmp_path / "own.safetensors")
    torch.save(model.clip.state_dict(), tmp_path / "clip.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("own.safetensors", "clip.pt"):
            load_clip_weights(model.clip, tmp_path / name)
            assert model.clip.origin == {}


def test_weights_of_a_run_of_this_library_that_was_selected_on_test_are_marked(tiny, tmp_path):
    model = build_model(tiny, 10, device="cpu")
    irra.save_checkpoint(model, tiny.replace(select_on="test"), tmp_path / "own.safetensors")
    with pytest.warns(UserWarning, match=r"own\.safetensors is of a run with select_on test"):
        load_clip_weights(model.clip, tmp_path / "own.safetensors")
    assert model.clip.origin == {"pretrained_on": "test"}


def test_the_preset_has_the_published_fine_tuning_numbers():
    recipe = irra.recipe("cuhk", preset="domain")
    assert (recipe.batch_size, recipe.lr, recipe.epochs) == (128, 5e-6, 60)
    assert recipe.sources()["lr"] == "preset domain"
