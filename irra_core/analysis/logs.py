"""A run's rows while it trains → the event files of TensorBoard: curves, and a ranking per evaluation.

Imports neither torch nor TensorBoard until the first row.
"""

import importlib.util
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pandas import DataFrame

from irra_core.settings import unknown

LOGS = ("tensorboard",)
FOLDER = "tensorboard"  # of a run folder; its pictures show photos and captions
PATIENCE = 60.0  # seconds until an evaluation's weights are on the disk, which are written while training goes on


def check_log(log: str | None) -> str | None:
    """The name of a log; None stays. Raises ValueError for an unknown one, ModuleNotFoundError without its package."""
    if log is None:
        return None
    if log not in LOGS:
        raise unknown("log", log, LOGS)
    if importlib.util.find_spec("tensorboard") is None:
        raise ModuleNotFoundError(
            "log 'tensorboard' needs the package tensorboard, which is not installed: pip install "
            "'irra-core[tensorboard]', or leave log out"
        )
    return log


def logged(
    rows: Iterable[dict[str, Any]], log: str | None, folder: str | Path, annotations: DataFrame
) -> Iterator[dict[str, Any]]:
    """The rows of `train`, each written to a log as it comes; without a log just the rows.

    `log` is `tensorboard`: event files in the run folder's folder `tensorboard`, which `tensorboard --logdir reports`
    shows. Each row is a point of every curve. With each comes the ranking of one caption of the selecting split by that
    evaluation's weights. The test scores follow at the end. An interrupted run goes on in its curves; of a finished one
    without a log only the curves can be written. Raises as `check_log`.
    """
    from irra_core import runs

    if check_log(log) is None:
        yield from rows
        return
    target = Path(folder) / FOLDER
    if (over := runs.finished(folder)) and target.exists():  # with its pictures, which could not be made again
        yield from rows
        return
    writer = None
    for row in rows:
        writer = writer or _writer(target, row["step"])
        _write_row(writer, row)
        if not over:
            _write_ranking(writer, Path(folder), annotations, row["step"])
        writer.flush()
        yield row
    if writer is not None:
        _write_scores(writer, Path(folder), row["step"])
        writer.close()


def _writer(target: Path, step: int) -> Any:
    """A writer into a folder; what other files there have from this step on is void."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(target, purge_step=step)


def _write_row(writer: Any, row: dict[str, Any]) -> None:
    """A point of each curve: losses, learning rate, scores in per cent."""
    from irra_core.recipes import LOSS_NAMES

    for name, value in row.items():
        split, _, score = name.partition("_")
        if name in (*LOSS_NAMES, "loss"):
            writer.add_scalar(f"loss/{'total' if name == 'loss' else name}", value, row["step"])
        elif split in ("val", "test"):
            writer.add_scalar(f"{split}/{score}", value, row["step"])
        elif name in ("lr", "epoch"):
            writer.add_scalar(f"training/{name}", value, row["step"])


def _write_ranking(writer: Any, folder: Path, annotations: DataFrame, step: int) -> None:
    """The ten photos that this evaluation's weights rank first for one caption of the selecting split."""
    from irra_core import runs
    from irra_core.analysis import plots
    from irra_core.annotations import hold_out
    from irra_core.retrieval import Gallery

    recipe = runs.load_run(folder)["recipe"]
    if recipe.select_on == "val":
        annotations = hold_out(annotations)
    split = "test" if recipe.select_on == "test" else "val"
    photos = annotations[annotations.split == split]
    captions = photos.dropna(subset="caption")
    if captions.empty or (model := _model(folder, recipe, step)) is None:
        return
    asked = captions.sample(1, random_state=recipe.seed).iloc[0]
    found = Gallery.build(model, photos, recipe).search(asked.caption, k=10)
    axes = plots.ranking(found.assign(right=found.pid == asked.pid), truth=asked.path)
    writer.add_figure(f"ranking/{split}", axes.figure, step)  # which closes it


def _model(folder: Path, recipe: Any, step: int) -> Any:
    """The model of an evaluation's step, from the state that a resume would take; None where that has another step."""
    from safetensors import safe_open

    from irra_core import runs
    from irra_core.backbone import build_model, learned
    from irra_core.checkpoints import filled

    end = time.monotonic() + PATIENCE
    while True:
        if (file := folder / runs.STATE).exists():
            with safe_open(file, "pt") as state:
                reached = json.loads(state.metadata()["run"])["step"]
                if reached == step:
                    names = [name for name in state.keys() if name.startswith("model.")]  # noqa: SIM118 (not a dict)
                    weights = learned({name.removeprefix("model."): state.get_tensor(name).clone() for name in names})
                    break
                if reached > step:  # several processes train on meanwhile
                    return None
        if runs.finished(folder) or time.monotonic() > end:
            return None
        time.sleep(0.05)
    people = len(weights.get("classifier.weight", ()))
    plain = recipe.replace(pretrained="none", pretrained_towers="both")
    return filled(lambda: build_model(plain, people, device="meta"), weights, file)


def _write_scores(writer: Any, folder: Path, step: int) -> None:
    """The test scores of a finished run, and its recipe as text."""
    from irra_core import runs

    run = runs.load_run(folder)
    for score, (value, low, high) in (run["metrics"] or {}).get("text_to_image", {}).items():
        for name, number in (("", value), ("_low", low), ("_high", high)):
            writer.add_scalar(f"test_at_the_end/{score}{name}", number, step)
    writer.add_text("recipe", f"```\n{run['recipe'].to_json()}\n```", step)
