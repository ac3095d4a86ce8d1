"""A run, a file or "clip" → the model that is there; what is not there, with what to put where."""

import shutil
import warnings
from pathlib import Path

import open_clip
import pytest
import torch
from open_clips import new_open_clip
from safetensors.torch import save_file

import irra_core as irra
from irra_core.hub import configurations, sources, tags
from irra_core.hub.runs import weights_file
from irra_core.settings import reports_root

TINY = Path(__file__).parent.parent / "reference" / "irra_tiny.pth"
B_16 = {
    "embed_dim": 64,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 224, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
}


def same(one, other) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.fixture
def reports(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("IRRA_REPORTS", str(tmp_path / "reports"))
    monkeypatch.setenv("IRRA_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    return reports_root()


@pytest.fixture
def run(reports, narrow):
    """Writes the weights of a run, as a seed draws them."""

    def written(name: str, seed: int):
        recipe = irra.recipe(pretrained="none", losses="itc", seed=seed)
        model = irra.build_model(recipe, 5)
        (reports / name).mkdir(parents=True)
        irra.save_checkpoint(model, recipe, reports / name / "weights.safetensors")
        return model

    return written


def test_a_run_is_found_by_its_folder_its_file_its_name_and_as_latest(run, reports, monkeypatch):
    models = {seed: run(f"synthetic/seed={seed}", seed) for seed in (1, 2)}
    (reports / "latest").symlink_to("synthetic/seed=2")
    (reports / "elsewhere").mkdir()
    for folder in (reports.parent, reports / "elsewhere"):  # the working directory does not matter
        monkeypatch.chdir(folder)
        for source in ("latest", "seed=2", "synthetic/seed=2", reports / "synthetic" / "seed=2",
                       str(reports / "latest" / "weights.safetensors")):  # fmt: skip
            model, recipe = irra.load_model(source)
            assert same(model, models[2]), source
            assert recipe.seed == 2
            model, recipe = irra.checkpoints.open_checkpoint(source)  # what a notebook's `checkpoint` is opened with
            assert same(model, models[2]), source
            assert recipe.seed == 2
    monkeypatch.chdir(reports / "synthetic")
    assert same(irra.load_model("seed=1/weights.safetensors")[0], models[1])
    assert same(irra.load_model("seed=1", device="cpu")[0], models[1])


def test_in_smoke_mode_the_runs_are_those_of_smoke_mode(run, reports, monkeypatch):
    run("synthetic/smoke", 1)
    shrunk = run("smoke/synthetic/smoke", 2)
    monkeypatch.setenv("IRRA_SMOKE", "1")
    assert same(irra.load_model("smoke")[0], shrunk)


def test_a_name_that_several_data_sets_have_is_refused_with_all_of_them(run):
    run("synthetic/default", 1)
    run("rstp/default", 2)
    with pytest.raises(ValueError, match=r"'default' is a run of several data sets: .*rstp/default, synthetic/default"):
        irra.load_model("default")
    assert irra.load_model("rstp/default")[1].seed == 2


def test_a_source_that_is_not_there_is_answered_with_what_is(run, reports):
    with pytest.raises(FileNotFoundError, match=r"no weights are at 'latest': .*There is no run in .*reports yet"):
        irra.load_model("latest")
    run("synthetic/epochs=1", 1)
    (reports / "synthetic" / "started").mkdir()
    for source in ("epochs=*", "started", "nowhere.pth", "../..", ""):
        with pytest.raises(FileNotFoundError, match=r"accepted are 'latest', .*The runs in .* are synthetic/epochs=1$"):
            irra.load_model(source)


@pytest.mark.parametrize(
    ("losses", "num_ids", "dataset"),
    [("sdm+id+mlm", 3701, "rstp"), ("sdm+id", 3102, "icfg"), ("sdm", 0, "cuhk")],
)
def test_a_released_file_comes_with_the_recipe_that_builds_its_model(losses, num_ids, dataset, tmp_path):
    given = irra.recipe(pretrained="none", losses=losses, seed=3)
    model = irra.build_model(given, num_ids)
    irra.save_official(model, tmp_path / "best.pth")
    loaded, recipe = irra.load_model(tmp_path / "best.pth")
    assert same(loaded, model)
    expected = {"dataset": dataset, "losses": losses, "backbone": "small", "image_height": 96, "image_width": 32,
                "stride": 8, "padding_attention": "mlm" in losses}  # fmt: skip
    assert {name: getattr(recipe, name) for name in expected} == expected
    again = irra.build_model(recipe.replace(pretrained="none"), num_ids)
    assert {name: value.shape for name, value in again.state_dict().items()} == {
        name: value.shape for name, value in model.state_dict().items()
    }


@pytest.mark.parametrize(
    ("size", "patch", "stride"),
    [((384, 128), 16, 16), ((384, 128), 16, 12), ((224, 224), 16, 16), ((378, 126), 14, 14)],
)
def test_the_size_and_stride_of_a_released_file_are_found_by_its_positions(size, patch, stride, tmp_path):
    from irra_core.backbone import new_clip
    from irra_core.model import IRRA

    vision = B_16["vision_cfg"] | {"patch_size": patch}
    irra.save_official(IRRA(new_clip(B_16 | {"vision_cfg": vision}, size, stride)), tmp_path / "best.pth")
    model = irra.load_official(tmp_path / "best.pth", image_size=None, stride=None)
    assert (model.image_size, model.clip.visual.conv1.stride) == (size, (stride, stride))


def test_a_released_file_of_sizes_that_no_backbone_has_is_read_by_load_official_alone():
    with pytest.raises(ValueError, match=r"irra_tiny.pth: .*has 8 patches: .*What fits: .*64×32"):
        irra.load_model(TINY)


def test_sizes_that_no_backbone_has_are_named(tmp_path):
    model = irra.load_official(TINY, (64, 32))
    with pytest.raises(ValueError, match=r"has no recipe.*features 128, .* images \(16, 128, 1"):
        sources._released_recipe(model, TINY)


@pytest.fixture
def small_b_16(monkeypatch):
    """open_clip's ViT-B/16 with one layer of width 64, which makes a file of 20 MB."""
    models = configurations.open_clip_models() | {"ViT-B-16-quickgelu": B_16}
    monkeypatch.setattr(configurations, "open_clip_models", lambda: models)


def test_clip_has_open_clips_features_and_a_warning_that_says_how_much_worse_it_is(reports, small_b_16):
    torch.manual_seed(0)
    theirs = new_open_clip(B_16, (224, 224)).eval()
    (reports.parent / "data").mkdir()
    save_file(theirs.state_dict(), reports.parent / "data" / "open_clip_model.safetensors")
    with pytest.warns(UserWarning, match="about 13 % .* against 68 % once fine-tuned and 73 % for IRRA"):
        model, recipe = irra.load_model("clip")
    tokens = irra.tokenize(["a woman in a red coat", "a man with a bag"])
    with torch.inference_mode():
        torch.testing.assert_close(model.encode_text(tokens), theirs.encode_text(tokens), rtol=1e-4, atol=1e-5)
    assert (model.image_size, recipe.image_height, recipe.image_width, recipe.stride) == ((384, 128), 384, 128, 16)
    assert torch.equal(model.clip.visual.conv1.weight, theirs.visual.conv1.weight)
    assert model.interaction is model.classifier is None


def test_clip_is_downloaded_by_open_clip(reports, small_b_16, monkeypatch, tmp_path):
    torch.manual_seed(1)
    theirs = new_open_clip(B_16, (224, 224))
    save_file(theirs.state_dict(), tmp_path / "downloaded.safetensors")
    monkeypatch.setattr(tags, "getproxies", lambda: {"https": "a proxy, so that no name is looked up"})
    monkeypatch.setattr(open_clip, "download_pretrained", lambda source: tmp_path / "downloaded.safetensors")
    with pytest.warns(UserWarning, match="never fine-tuned"):
        model, recipe = irra.load_model("clip")
    assert recipe.pretrained == "openai"
    assert torch.equal(model.clip.text_projection, theirs.text_projection)


def test_without_network_the_error_says_which_file_to_put_where(reports, monkeypatch):
    def fail(*_):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(tags, "getproxies", lambda: {"https": "a proxy"})
    monkeypatch.setattr(open_clip, "download_pretrained", fail)
    with pytest.warns(UserWarning, match="never fine-tuned"), pytest.raises(FileNotFoundError) as caught:
        irra.load_model("clip")
    home = f"https://huggingface.co/{open_clip.get_pretrained_cfg('ViT-B-16-quickgelu', 'openai')['hf_hub']}"
    for part in ("no route to the hub", f"get open_clip_model.safetensors of {home.rstrip('/')} ",
                 f"put it into {reports.parent / 'data'}: load_model('clip') takes it"):  # fmt: skip
        assert part in str(caught.value)


def test_a_model_of_rendered_people_warns_on_a_folder_of_photos_and_nowhere_else(annotations, tmp_path, monkeypatch):
    monkeypatch.setenv("IRRA_DATA", str(tmp_path / "data"))
    recipe = irra.recipe(pretrained="none", losses="itc")
    model, photos = irra.build_model(recipe, 5), Path(annotations.path[0]).parent
    for build in (irra.Gallery.build, irra.kept_gallery):
        with pytest.warns(UserWarning, match="trained on rendered people only"):
            build(model, photos, recipe=recipe)
    rendered = tmp_path / "data" / "synthetic-night" / "imgs"
    shutil.copytree(photos, rendered)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        irra.Gallery.build(model, rendered, recipe=recipe)
        irra.Gallery.build(model, annotations, recipe=recipe)
        irra.Gallery.build(model, photos)  # of a model of which nothing is known
        irra.Gallery.build(model, photos, recipe=irra.recipe("cuhk", backbone="small", pretrained="none"))


def test_the_weights_of_a_source_are_given_as_an_absolute_path(run, reports):
    run("synthetic/seed=1", 1)
    assert weights_file("seed=1") == reports.resolve() / "synthetic" / "seed=1" / "weights.safetensors"
