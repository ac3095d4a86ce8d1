"""The rows of a run → what TensorBoard reads back, what other trackers are told, and the same run as without them."""

import importlib.util
import io
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import irra_core as irra
from irra_core import runs
from irra_core.analysis import check_log, logged
from irra_core.training import train

ROOT = Path(__file__).resolve().parent.parent.parent


def read(folder: Path) -> EventAccumulator:
    """What TensorBoard itself has read of the event files of a run."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    return events.Reload()


def curve(events: EventAccumulator, tag: str) -> dict[int, float]:
    found = [(each.step, each.value) for each in events.Scalars(tag)]
    assert len(found) == len(dict(found))  # no step twice
    return dict(found)


@pytest.fixture(scope="module")
def plain(annotations, narrow, tmp_path_factory):
    """A run without a log: its folder and its rows."""
    steps = {"batch_size": 8, "epochs": 2, "max_steps": 5, "evaluate_every": 2}
    recipe = irra.recipe(pretrained="none", erase_probability=0.2, **steps)
    folder = tmp_path_factory.mktemp("plain")
    return recipe, folder, list(train(recipe, annotations, folder))


def test_the_event_file_holds_every_number_and_a_ranking_per_evaluation(plain, annotations, tmp_path):
    recipe, folder, rows = plain
    given = list(logged(train(recipe, annotations, tmp_path), "tensorboard", tmp_path, annotations))
    assert given == rows
    for name in (runs.WEIGHTS, "history.csv", "metrics.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()  # the log changes nothing
    events = read(tmp_path)
    steps = [row["step"] for row in rows]
    assert len(steps) == 3
    tags = {"loss": "loss/total", "lr": "training/lr", "epoch": "training/epoch", "val_R1": "val/R1"}
    tags |= {name: f"loss/{name}" for name in recipe.loss_names} | {"val_mAP": "val/mAP"}
    for name, tag in tags.items():
        assert curve(events, tag) == pytest.approx({row["step"]: row[name] for row in rows}), name
    assert set(rows[0]) - {"step"} <= {*tags, "val_R5", "val_R10", "val_mINP"}  # nothing of a row is left out
    pictures = events.Images("ranking/val")
    assert [each.step for each in pictures] == steps
    drawn = [np.asarray(Image.open(io.BytesIO(each.encoded_image_string)).convert("RGB")) for each in pictures]
    assert all(each.shape[1] > each.shape[0] > 100 for each in drawn)
    photo_colours = sum(len(np.unique(each.reshape(-1, 3), axis=0)) > 200 for each in drawn)
    assert photo_colours == 3
    assert not np.array_equal(drawn[0], drawn[-1])  # the weights have changed
    value, low, high = runs.load_run(tmp_path)["metrics"]["text_to_image"]["R1"]
    ends = [curve(events, f"test_at_the_end/R1{end}") for end in ("", "_low", "_high")]
    assert ends == [pytest.approx({steps[-1]: number}) for number in (value, low, high)]


def test_an_interrupted_run_goes_on_in_its_curves_and_a_finished_one_keeps_its_pictures(plain, annotations, tmp_path):
    recipe, _, rows = plain
    begun = logged(train(recipe, annotations, tmp_path), "tensorboard", tmp_path, annotations)
    assert next(begun) == rows[0]
    begun.close()
    rest = list(logged(train(recipe, annotations, tmp_path), "tensorboard", tmp_path, annotations))
    assert rest == rows[1:]
    files = sorted((tmp_path / "tensorboard").iterdir())
    again = list(logged(train(recipe, annotations, tmp_path), "tensorboard", tmp_path, annotations))
    assert again == rows
    assert sorted((tmp_path / "tensorboard").iterdir()) == files
    events = read(tmp_path)
    assert curve(events, "val/R1") == pytest.approx({row["step"]: row["val_R1"] for row in rows})
    assert [each.step for each in events.Images("ranking/val")] == [row["step"] for row in rows]


def test_a_finished_run_without_a_log_gets_its_curves(plain, annotations, tmp_path):
    recipe, folder, rows = plain
    assert list(logged(train(recipe, annotations, folder), None, folder, annotations)) == rows
    assert not (folder / "tensorboard").exists()
    list(logged(train(recipe, annotations, folder), "tensorboard", folder, annotations))
    assert len(curve(read(folder), "loss/total")) == 3
    assert read(folder).Tags()["images"] == []


def test_the_ranking_is_that_of_the_evaluations_own_weights(plain, annotations, tmp_path, monkeypatch):
    """What is drawn equals the ranking of a model whose weights were taken out of the training itself."""
    from irra_core import training
    from irra_core.analysis import plots

    recipe, *_ = plain
    drawn, taken = [], []
    monkeypatch.setattr(
        plots, "ranking", lambda results, **_: drawn.append(results) or types.SimpleNamespace(figure=None)
    )
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_figure", lambda *_, **__: None)
    row = training._Run.evaluation_row

    def spied(run, losses):
        val = annotations[annotations.split == "val"]
        query = val.sample(1, random_state=recipe.seed).iloc[0].caption
        taken.append(irra.Gallery.build(run.model, val, recipe).search(query, k=10))
        return row(run, losses)

    monkeypatch.setattr(training._Run, "evaluation_row", spied)
    list(logged(train(recipe, annotations, tmp_path), "tensorboard", tmp_path, annotations))
    assert len(drawn) == len(taken) == 3
    for ours, theirs in zip(drawn, taken):
        assert list(ours.image_id) == list(theirs.image_id)
        np.testing.assert_allclose(ours.score, theirs.score, atol=1e-5)


def test_an_unknown_log_and_a_missing_package_stop_before_training(annotations, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"log 'tensorbord' is unknown: did you mean 'tensorboard'\?"):
        check_log("tensorbord")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ModuleNotFoundError, match=r"needs the package tensorboard.*pip install 'irra-core\[tensorboard\]'"
    ):
        check_log("tensorboard")
    rows = iter([{"step": 1}])
    with pytest.raises(ModuleNotFoundError):
        next(logged(rows, "tensorboard", tmp_path, annotations))
    assert next(rows) == {"step": 1}  # nothing was trained
    assert check_log(None) is None


def blocks(name: str) -> list[str]:
    """The Python in docs/logging.md that uses a package."""
    text = (ROOT / "docs" / "logging.md").read_text()
    return [block for block in re.findall(r"```python\n(.*?)```", text, re.S) if f"import {name}" in block]


class Recorder(types.ModuleType):
    """A module whose functions keep what they are called with."""

    def __init__(self, name: str):
        super().__init__(name)
        self.calls: list[tuple] = []

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)

        def called(*values, **named):
            self.calls.append((name, values, named))
            return self

        return called


@pytest.mark.parametrize(("name", "metric"), [("wandb", "log"), ("mlflow", "log_metrics")])
def test_three_lines_tell_another_tracker_every_row(name, metric, plain, annotations, monkeypatch):
    recipe, folder, rows = plain
    (block,) = blocks(name)
    lines = [line for line in block.splitlines() if line and not line.startswith("import")]
    assert len(lines) == 3
    module = Recorder(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(block, {"irra": irra, "recipe": recipe, "annotations": annotations, "folder": folder})
    told = [(values, named) for called, values, named in module.calls if called == metric]
    assert told == [((row,), {"step": row["step"]}) for row in rows]
    assert any(
        recipe.seed in (named.get("config") or (values or [{}])[0]).values() for _, values, named in module.calls[:1]
    )
