"""The name, folder or file of a run → the file of its weights; a data set → its newest run. Imports no torch."""

import json
import os
from contextlib import suppress
from pathlib import Path

from irra_core.recipes import own_file
from irra_core.settings import project_root, runs_root, short

WEIGHTS = "weights.safetensors"  # as in irra_core.runs, which imports torch
SOURCES = (
    "'latest', the folder or the name of a run, a weights file (.safetensors of a run, or a released .pth), "
    "hub:owner/name, or 'clip'"
)


def weights_file(source: str | Path) -> Path:
    """The absolute path of the weights of a run or file: `latest`, a path, or the name of a run below the reports.

    A relative path is taken from the working directory, else from the project's root. A name may lack its data set
    (`epochs=1` for `rstp/epochs=1`). Raises FileNotFoundError, which lists the runs that exist, ValueError for a name
    that several data sets have.
    """
    reports = runs_root()
    given = Path(source).expanduser()
    folders = [Path.cwd(), project_root(), reports]
    places = [latest_run(reports)] if os.fspath(source) == "latest" else [linked(folder / given) for folder in folders]
    named = [] if len(given.parts) > 1 else sorted(reports.glob(f"*/{_literal(given.name)}/{WEIGHTS}"))
    for place in places:
        file = place / WEIGHTS if place.is_dir() else place
        if file.is_file():
            return file.resolve()
    if len(named) > 1:
        raise ValueError(
            f"{short(str(source))} is a run of several data sets: give one of "
            f"{', '.join(str(file.parent.relative_to(reports)) for file in named)}"
        )
    if named:
        return named[0].resolve()
    runs = sorted(str(file.parent.relative_to(reports)) for file in reports.glob(f"*/*/{WEIGHTS}"))
    have = f"The runs in {reports} are {', '.join(runs[:20])}" if runs else f"There is no run in {reports} yet"
    raise FileNotFoundError(f"no weights are at {short(str(source))}: accepted are {SOURCES}. {have}")


def latest_run(reports: Path) -> Path:
    """The run that latest.txt in a reports folder names; where it is absent, the link `latest` beside it."""
    with suppress(OSError):
        if name := (reports / "latest.txt").read_text(encoding="utf-8").strip():
            return reports / name
    return reports / "latest"


def linked(place: Path) -> Path:
    """The path, or where it goes through a link `latest` that is absent, as on Windows, what latest.txt names."""
    for link in (place, place.parent):
        if link.name == "latest" and not link.exists():
            return latest_run(link.parent) / place.relative_to(link)
    return place


def _literal(name: str) -> str:
    """A file name as a pattern that matches only itself."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def newest_run(dataset: str) -> Path | None:
    """The folder of the data set's finished run that ended last; None without one."""
    runs = {}
    for metrics in runs_root().glob("*/*/metrics.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):  # no run, or one that is being written
            theirs = json.loads((metrics.parent / "recipe.json").read_text(encoding="utf-8"))["recipe"]["dataset"]
            same = theirs == dataset or (own_file(dataset) is not None and own_file(theirs) == own_file(dataset))
            if same and (metrics.parent / WEIGHTS).is_file() and metrics.parent.name != "latest":
                runs[metrics.parent] = metrics.stat().st_mtime
    return max(runs, key=runs.get, default=None)
