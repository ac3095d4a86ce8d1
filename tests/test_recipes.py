"""Recipes: where each number comes from, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import irra_core as irra
from irra_core.hub.configurations import OPENAI, backbones
from irra_core.recipes import LOSS_NAMES, NEUTRAL, PRESETS, RECIPES, Recipe, read_recipe


def test_the_cuhk_recipe_carries_the_papers_numbers():
    paper = irra.recipe("cuhk")
    assert (paper.backbone, paper.pretrained) == ("ViT-B-16-quickgelu", "openai")
    assert (paper.image_height, paper.image_width, paper.stride) == (384, 128, 16)
    assert (paper.epochs, paper.warmup_epochs, paper.batch_size, paper.lr) == (60, 5, 64, 1e-5)
    assert (paper.losses, paper.temperature, paper.interaction_depth) == ("sdm+id+mlm", 0.02, 4)
    assert (paper.select_on, paper.mask_captions, paper.padding_attention) == ("val", False, False)


def test_the_released_preset_sets_every_departure_and_nothing_else():
    paper, released = irra.recipe("cuhk"), irra.recipe("cuhk", preset="released")
    changed = {name for name in Recipe.__dataclass_fields__ if getattr(paper, name) != getattr(released, name)}
    assert changed == {"preset", *PRESETS["released"]}
    assert (released.adam_eps, released.select_on, released.precision) == (1e-3, "test", "fp16")


def test_the_tbps_preset_is_the_recipe_of_tbps_clip_and_may_be_taken_apart():
    paper, tbps = irra.recipe("cuhk"), irra.recipe("cuhk", preset="tbps")
    changed = {name for name in Recipe.__dataclass_fields__ if getattr(paper, name) != getattr(tbps, name)}
    assert changed == {"preset", *PRESETS["tbps"]}
    assert (tbps.losses, tbps.temperature, tbps.epochs, tbps.word_deletion) == ("nitc+ritc", 0.01, 5, 0.05)
    assert irra.recipe("cuhk", preset="tbps", losses="tal").learned_temperature  # the preset's value, which is not read


def test_the_study_preset_shortens_a_run_from_pretrained_weights_and_one_from_scratch_alike():
    made = [irra.recipe(preset="study", pretrained=weights) for weights in (None, "none")]
    assert {each.epochs for each in made} == {PRESETS["study"]["epochs"]}
    assert irra.recipe(preset="study").differences() == {"preset": "study"}


def test_an_override_beats_preset_backbone_and_data_set():
    made = irra.recipe("rstp", backbone="small", preset="released", adam_eps=1e-4, lr=3e-3)
    assert (made.adam_eps, made.lr, made.image_height, made.pretrained) == (1e-4, 3e-3, 96, "general")
    sources = made.sources()
    assert (sources["lr"], sources["image_height"], sources["select_on"]) == ("given", "small CLIP", "preset released")


def test_none_means_what_the_recipe_says_and_zero_is_a_value():
    assert irra.recipe("cuhk", epochs=None, warmup_epochs=0).epochs == 60
    assert irra.recipe("cuhk", warmup_epochs=0).warmup_epochs == 0


@pytest.mark.parametrize(
    ("backbone", "size"),
    [
        ("ViT-B-16-quickgelu", (384, 128, 16)),
        ("ViT-B-32-quickgelu", (384, 128, 32)),
        ("ViT-L-14-quickgelu", (378, 126, 14)),
        ("small", (96, 32, 8)),
    ],
)
def test_a_backbones_patches_lie_side_by_side_and_fill_the_image_unless_told_otherwise(backbone, size):
    made = irra.recipe("rstp", backbone=backbone)
    assert (made.image_height, made.image_width, made.stride) == size
    assert made.image_height % made.stride == made.image_width % made.stride == 0
    assert made.differences() == ({} if backbone == "ViT-B-16-quickgelu" else {"backbone": backbone})
    overlapping = irra.recipe("rstp", backbone=backbone, stride=7, image_height=224, image_width=112)
    assert (overlapping.stride, overlapping.sources()["stride"]) == (7, "given")


def test_a_recipe_that_leaves_the_younger_fields_alone_has_the_key_of_one_without_them():
    values = json.loads(irra.recipe("cuhk").to_json())
    assert irra.recipe("cuhk").key() == json.dumps({n: v for n, v in values.items() if n not in NEUTRAL}, indent=2)
    for name, value in (("frozen", "text"), ("adapter_rank", 2)):
        assert set(json.loads(irra.recipe("cuhk", **{name: value}).key())) == set(values) - set(NEUTRAL) | {name}


def test_differences_name_what_was_asked_for_and_not_what_follows_from_it():
    assert irra.recipe().differences() == {}
    made = irra.recipe("rstp", backbone="small", pretrained="none", epochs=1)
    assert made.differences() == {"backbone": "small", "pretrained": "none", "epochs": 1}


def test_a_recipe_survives_json():
    made = irra.recipe("icfg", losses="itc", seed=3)
    assert read_recipe(json.loads(made.to_json())) == made


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        ({"datset": "rstp"}, ValueError, ["'datset'", "did you mean 'dataset'?", "temperature"]),
        ({"dataset": "rtsp"}, ValueError, ["data set 'rtsp'", "did you mean 'rstp'?", "cuhk"]),
        ({"dataset": "absent.json"}, ValueError, ["absent.json", "path of an annotation file"]),
        ({"epochs": "five"}, TypeError, ["'epochs'", "'five'", "int"]),
        ({"epochs": True}, TypeError, ["'epochs'", "True"]),
        ({"epochs": 0}, ValueError, ["'epochs'", "0", "at least 1"]),
        ({"lr": float("nan")}, ValueError, ["'lr'", "nan"]),
        ({"lr": 0.0}, ValueError, ["'lr' is 0.0", "above 0.0"]),
        ({"lr": 10**400}, ValueError, ["'lr' is 1000", "(401 characters)", "above 0.0 and at most 1.8e+308"]),
        ({"lr": -(10**400)}, ValueError, ["'lr' is -1000", "above 0.0"]),
        ({"adam_eps": 0.0}, ValueError, ["'adam_eps' is 0.0", "above 0.0"]),
        ({"adam_beta1": 1.0}, ValueError, ["'adam_beta1' is 1.0", "at least 0.0 and below 1.0"]),
        ({"adam_beta2": 1}, ValueError, ["'adam_beta2' is 1.0", "at least 0.0 and below 1.0"]),
        ({"adam_beta1": -0.1}, ValueError, ["'adam_beta1' is -0.1", "at least 0.0 and below 1.0"]),
        ({"dataset": "a" * 5000 + ".json"}, ValueError, ["data set 'aaa", "(5,007 characters)", "annotation file"]),
        ({"dataset": "a\0.json"}, ValueError, ["data set 'a\\x00.json'", "annotation file"]),
        ({"backbone": ["small"]}, TypeError, ["'backbone' is ['small']", "str"]),
        ({"preset": ["study"]}, TypeError, ["'preset' is ['study']", "str"]),
        ({"preset": {"a": 1}}, TypeError, ["'preset' is {'a': 1}", "str"]),
        ({"preset": "stuy"}, ValueError, ["preset 'stuy'", "did you mean 'study'?"]),
        ({"losses": list("sdm") * 99}, TypeError, ["'losses' is ['s', 'd', 'm',", "… (1,485 characters)", "str"]),
        ({"mask_probability": 1.5}, ValueError, ["mask_probability", "at most 1.0"]),
        ({"losses": "sdm+nosuch"}, ValueError, ["loss 'nosuch'", "sdm"]),
        ({"losses": "sdm+sdm"}, ValueError, ["twice"]),
        ({"losses": "id+mlm"}, ValueError, ["align nothing"]),
        ({"losses": ""}, ValueError, ["loss ''"]),
        ({"losses": "sdm", "interaction": "co"}, ValueError, ["no effect with losses 'sdm'", "add mlm"]),
        ({"losses": "cmpm+id", "temperature": 0.05}, ValueError, ["temperature 0.05", "add sdm"]),
        ({"cmpm_target": "l2"}, ValueError, ["cmpm_target 'l2'", "add cmpm"]),
        ({"losses": "tal", "learned_temperature": True}, ValueError, ["learned_temperature True", "add sdm"]),
        ({"token_selection": "layers"}, ValueError, ["token_selection 'layers'", "add tse"]),
        ({"losses": "tse+id"}, ValueError, ["align nothing"]),
        ({"losses": "tal+tse", "micro_batch": 8}, ValueError, ["micro_batch 8", "loss tse", "leave micro_batch out"]),
        ({"per_identity": 2}, ValueError, ["per_identity 2 has no effect", "take sampler 'identity'"]),
        ({"sampler": "identity", "batch_size": 10}, ValueError, ["batch_size 10 is no multiple", "4: take 8"]),
        ({"sampler": "identity", "batch_size": 3}, ValueError, ["batch_size 3 is no multiple", "4: take 4"]),
        ({"sampler": "identiy"}, ValueError, ["sampler 'identiy'", "did you mean 'identity'?"]),
        ({"shuffled_captions": 1.5}, ValueError, ["'shuffled_captions' is 1.5", "at most 1.0"]),
        ({"backbone": "ViT-B-61"}, ValueError, ["'ViT-B-61'", "did you mean 'ViT-B-16'?"]),
        ({"backbone": "RN50"}, ValueError, ["'RN50' is not supported", "vision transformer", "ViT-B-16"]),
        ({"backbone": "ViT-B-16", "pretrained": "general"}, ValueError, ["general", "small CLIP"]),
        (
            {"pretrained": "none", "pretrained_towers": "text"},
            ValueError,
            ["'text' has no effect", "pretrained 'none'"],
        ),
        ({"pretrained_towers": "txet"}, ValueError, ["did you mean 'text'?"]),
        ({"frozen": "imge"}, ValueError, ["frozen 'imge'", "did you mean 'image'?"]),
        ({"frozen": "both", "losses": "sdm"}, ValueError, ["frozen 'both'", "nothing to train", "add id or mlm"]),
        ({"frozen": "both", "adapter_rank": 4}, ValueError, ["adapter_rank 4 has no effect", "frozen 'both'"]),
        ({"adapter_rank": -1}, ValueError, ["'adapter_rank'", "at least 0"]),
        ({"stride": 9}, ValueError, ["stride 9, patch 8, image 96×32", "stride ≤ patch ≤ image"]),
        (
            {"dataset": "rstp", "backbone": "ViT-L-14", "pretrained": "none", "stride": 16},
            ValueError,
            ["stride 16, patch 14, image 378×126", "stride ≤ patch"],
        ),
        ({"dataset": "rstp", "backbone": "ViT-L-14"}, ValueError, ["'openai' does not fit", "ViT-L-14-quickgelu"]),
        ({"backbone": "ViT-H-14"}, ValueError, ["'openai' does not fit backbone 'ViT-H-14'", "open_clip's tags"]),
        ({"backbone": "ViT-B-32", "pretrained": "none", "image_width": 24}, ValueError, ["patch 32, image 384×24"]),
        ({"pretrained": "openai"}, ValueError, ["'openai'", "general", "none"]),
        ({"interaction": "crss"}, ValueError, ["did you mean 'cross'?"]),
        ({"select_on": "tset"}, ValueError, ["did you mean 'test'?"]),
        (
            {"precision": "fp16"},
            ValueError,
            ["precision 'fp16' with adam_eps 1e-08", "at least 0.0001", "preset 'released'", "precision 'bf16'"],
        ),
        (
            {"preset": "released", "adam_eps": 9e-5},
            ValueError,
            ["precision 'fp16' with adam_eps 9e-05", "at least 0.0001"],
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_mistake_is_named_with_what_is_accepted(overrides, error, words):
    with pytest.raises(error) as raised:
        irra.recipe(**overrides)
    for word in words:
        assert word in str(raised.value)


def test_half_precision_is_accepted_with_a_larger_epsilon_and_every_other_precision_with_any():
    assert irra.recipe(precision="fp16", adam_eps=1e-4).adam_eps == 1e-4
    assert irra.recipe("cuhk", preset="released").precision == "fp16"
    assert {irra.recipe(precision=name).adam_eps for name in ("auto", "fp32", "bf16")} == {1e-8}


def largest_excess(adam_eps: float) -> float:
    """How many times larger an Adam step of half weights becomes than that of float32 weights.

    The gradient is 1e-3 in each of 2,000 steps: its square enters Adam's second moment as 1e-9, less than half of the
    smallest number of float16, so that this moment stays 0.
    """
    steps = {}
    for dtype in (torch.float16, torch.float32):
        weight = torch.nn.Parameter(torch.zeros(1, dtype=dtype))
        adam = torch.optim.Adam([weight], lr=1e-3, eps=adam_eps, fused=True)
        steps[dtype] = []
        for _ in range(2000):
            weight.data.zero_()
            weight.grad = torch.full_like(weight, 1e-3)
            adam.step()
            steps[dtype].append(weight.item())
        assert (adam.state[weight]["exp_avg_sq"].item() == 0) == (dtype == torch.float16)
    return max(half / single for half, single in zip(*steps.values(), strict=True))


def test_the_released_epsilon_bounds_the_steps_that_half_precision_makes_29_times_too_large():
    assert largest_excess(Recipe.adam_eps) == pytest.approx(29.3, rel=0.01)
    assert largest_excess(PRESETS["released"]["adam_eps"]) < 2


@pytest.mark.parametrize(("name", "sign", "least"), [("weight_decay", 1, "0.0"), ("batch_size", -1, "2")])
def test_a_number_too_long_to_be_written_is_refused_without_being_written(name, sign, least):
    with pytest.raises(ValueError, match=f"'{name}' is a number of more than 4,300 digits: accepted .* {least}"):
        irra.recipe(**{name: sign * 10**5000})


@pytest.mark.parametrize("given", ["[]", "None", "{'a': 1}"])
def test_a_data_set_that_is_no_text_is_refused_without_type_checks_too(given):
    code = f"import irra_core as irra; irra.recipe({given})"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stderr
    assert shown.endswith(f"TypeError: recipe field 'dataset' is {given}: accepted is str\n")


def test_the_least_betas_and_the_smallest_rate_are_accepted():
    made = irra.recipe(lr=5e-324, adam_beta1=0, adam_beta2=0.999_999)
    assert (made.lr, made.adam_beta1, made.adam_beta2) == (5e-324, 0.0, 0.999_999)


def test_smoke_shrinks_every_recipe(monkeypatch):
    monkeypatch.setenv("IRRA_SMOKE", "1")
    assert (irra.recipe("cuhk").identities, irra.recipe("cuhk").max_steps) == (24, 3)
    assert irra.recipe(max_steps=2).max_steps == 2
    monkeypatch.setenv("IRRA_SMOKE", "0")
    assert irra.recipe("cuhk").max_steps is None


def test_a_recipe_outlives_the_file_of_its_own_data(tmp_path):
    (tmp_path / "mine.json").write_text("[]")
    made = irra.recipe(str(tmp_path / "mine.json"))
    (tmp_path / "mine.json").unlink()
    assert read_recipe(json.loads(made.to_json())) == made


def test_own_data_is_found_from_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "mine.json").write_text("[]")
    monkeypatch.chdir(tmp_path)
    assert irra.recipe("mine.json").backbone == "ViT-B-16-quickgelu"


def test_the_names_known_without_torch_are_the_names_that_exist():
    from irra_core.variants.losses import LOSSES

    assert set(LOSSES) == set(LOSS_NAMES)
    import open_clip

    assert (
        {"ViT-B-16", "ViT-L-14", "ViT-B-16-quickgelu"} <= set(backbones()) - {"small"} <= set(open_clip.list_models())
    )
    tagged = {name for name in backbones() if name != "small" and open_clip.get_pretrained_cfg(name, "openai")}
    assert set(OPENAI) == {name for name in tagged if open_clip.get_model_config(name).get("quick_gelu")}


def test_the_table_shows_every_field_and_escapes_it():
    shown = irra.recipe("cuhk", epochs=7)._repr_html_()
    assert all(f"<td>{name}</td>" in shown for name in Recipe.__dataclass_fields__)
    assert "<td>7</td><td>given</td>" in shown


@pytest.fixture
def notebook(monkeypatch):
    """A stand-in for the running kernel: call it with the cells that have run."""

    def run(*cells):
        shell = SimpleNamespace(user_ns={"In": ["", *cells]})
        monkeypatch.setattr("IPython.get_ipython", lambda: shell)
        return irra.notebook_parameters

    return run


DECLARED = 'dataset: str = "synthetic"  # data set\nepochs: int = None  # epochs\nlr: float = 0.1\nmask: bool = False'


def test_injected_values_replace_the_declared_ones(notebook):
    read = notebook(DECLARED, '# Parameters\ndataset = "rstp"\nlr = 1\n', "import this")
    assert read() == {"dataset": "rstp", "epochs": None, "lr": 1, "mask": False}
    assert read(without=["mask", "lr"]) == {"dataset": "rstp", "epochs": None}


def test_a_parameters_cell_run_again_forgets_what_was_injected_before(notebook):
    assert notebook(DECLARED, "# Parameters\nepochs = 3\n", DECLARED)()["epochs"] is None


@pytest.mark.parametrize(
    ("injected", "error", "words"),
    [
        ('datset = "rstp"', ValueError, ["parameter 'datset'", "did you mean 'dataset'?"]),
        ('epochs = "five"', TypeError, ["'epochs'", "'five'", "int"]),
        ("epochs = 1.5", TypeError, ["'epochs'", "1.5"]),
        ("mask = 1", TypeError, ["'mask'", "bool"]),
        ("lr = True", TypeError, ["'lr'", "float"]),
        ("dataset = 7", TypeError, ["'dataset'", "-r dataset 7"]),
    ],
)
def test_an_injected_mistake_stops_the_notebook(notebook, injected, error, words):
    with pytest.raises(error) as raised:
        notebook(DECLARED, f"# Parameters\n{injected}\n")()
    for word in words:
        assert word in str(raised.value)


def test_outside_a_notebook_there_are_no_parameters():
    with pytest.raises(RuntimeError, match="reads the cells of a notebook"):
        irra.notebook_parameters()


def test_importing_the_package_and_making_a_recipe_leaves_torch_alone():
    code = "import sys, irra_core as irra; irra.recipe('cuhk'); print('torch' in sys.modules, 'pandas' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.split() == ["False", "False"]


def test_every_public_name_leads_somewhere():
    assert all(getattr(irra, name) is not None for name in irra.__all__)
    with pytest.raises(AttributeError, match="nosuch"):
        irra.nosuch  # noqa: B018
    assert set(RECIPES) >= {"synthetic", "cuhk", "icfg", "rstp"}
    assert Path(irra.settings.project_root(), "irra_core").is_dir()


def test_a_recipe_stored_when_the_usual_depth_was_another_is_read_where_its_losses_read_no_depth():
    stored = json.loads(irra.recipe(losses="itc").to_json()) | {"interaction_depth": 4}
    assert read_recipe(stored) == irra.recipe(losses="itc")
    stored = json.loads(irra.recipe().to_json()) | {"interaction_depth": 4}
    assert read_recipe(stored).interaction_depth == 4
