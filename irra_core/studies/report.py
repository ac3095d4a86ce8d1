"""Run folders and studies → one web page: leaderboard, published rows, learning curves, the studies' figures."""

import base64
import functools
import io
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import jinja2
import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from pandas import DataFrame

from irra_core import runs
from irra_core.analysis import plots
from irra_core.evaluation import METRICS, Interval
from irra_core.metrics import bootstrap_interval
from irra_core.recipes import RECIPES, Recipe
from irra_core.released.published import published
from irra_core.settings import runs_root
from irra_core.studies import comparison, transfer
from irra_core.studies.tables import collect, files_below

HEADINGS = {"R1": "R@1 (%)", "R5": "R@5 (%)", "R10": "R@10 (%)", "mAP": "mAP (%)", "mINP": "mINP (%)"}
LARGEST_FIGURE = 2**20  # bytes; a larger one is linked and not embedded, which keeps the page small
LONGEST_TABLE = 12  # rows; a longer one is folded
MOST_ROWS = 40  # of a study's other tables; a longer one is linked
EXECUTED = (".html", ".ipynb")

Shown = dict[str, Any]  # a part of the page as the template takes it: texts, formatted here and escaped there


class Entry(NamedTuple):
    """One line of the leaderboard: the runs of one recipe on the same data, one per seed.

    `line` is its row and `curves` the picture of its learning curves (None without a history), for the template.
    """

    dataset: str
    name: str
    folders: list[Path]
    recipe: Recipe
    scores: dict[str, Interval]
    example: bool
    line: Shown
    curves: Shown | None


def write_report(root: str | Path | None = None) -> Path:
    """The path of the page `index.html` in the reports folder, written from every finished run and study below it.

    It needs no other file and no network. With IRRA_SMOKE=1 the page of the shrunken runs is written in their folder;
    other pages leave those runs out. Committed examples are included, and marked.
    """
    base = runs_root(root)
    base.mkdir(parents=True, exist_ok=True)
    runs.write_text(base / "index.html", page(base))
    return base / "index.html"


def page(base: Path) -> str:
    """The HTML of the page for the reports folder `base`."""
    table = collect(base)
    left_out = dict(table.attrs["broken"])
    shown = entries(table, base, left_out)
    names = list(dict.fromkeys(entry.dataset for entry in shown))
    only = sorted(set(published().query("table == 'results'").dataset) - set(names))
    folders = _studies(base)
    studies = []
    for folder in folders:
        with _or_left_out([folder], left_out):
            studies.append(_study(folder, base))
    runs_shown = sum(len(entry.folders) for entry in shown)
    return _template().render(
        count={"runs": _count(runs_shown, "finished run"), "studies": _count(len(studies), "study", "studies")},
        datasets=[_dataset(name, [entry for entry in shown if entry.dataset == name]) for name in names],
        studies=studies,
        notebooks=_other_notebooks(base, [folder for entry in shown for folder in entry.folders] + folders),
        left_out=[reason if path in reason else f"{path}: {reason}" for path, reason in left_out.items()],
        only_published=[_dataset(name, []) for name in only],
        headings=list(HEADINGS.values()),
        longest_table=LONGEST_TABLE,
        blue=plots.PALETTE[0],
        quiet=plots.QUIET,
        faint=plots.FAINT,
    )


@functools.cache
def _template() -> jinja2.Template:
    """The page's template; a value that it misses is an error, not an empty text."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("irra_core.studies", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("report.html.jinja")


@contextmanager
def _or_left_out(folders: list[Path], left_out: dict[str, str]) -> Iterator[None]:
    """Within, an error leaves these folders out of the page: each with its reason is added to `left_out`."""
    try:
        yield
    except Exception as error:  # damaged files make pandas and matplotlib raise almost anything
        reason = f"{type(error).__name__}: {error}"
        for folder in folders:
            left_out[str(folder)] = f"{folder} cannot be shown ({reason}): copy it again, or remove it and run it again"
            warnings.warn(f"left out of the page: {left_out[str(folder)]}", stacklevel=3)


def entries(table: DataFrame, base: Path, left_out: dict[str, str]) -> list[Entry]:
    """The leaderboard's lines from the table of all runs, the best R@1 first; only the seed differs within a line.

    Folders that cannot be shown are added to `left_out`: path → reason.
    """
    groups: dict[tuple, list[tuple[Path, dict[str, Any]]]] = {}
    for path in map(Path, table.path if len(table) else ()):
        place = path.relative_to(base).parts
        if place[0] != "smoke":
            run = runs.load_run(path)
            key = (place[0] == "example", run["recipe"].replace(seed=0), run["data"])
            groups.setdefault(key, []).append((path, run))
    found = []
    for (example, _, _), kept in groups.items():
        kept = sorted(kept, key=lambda pair: pair[1]["recipe"].seed)
        folders = [path for path, _ in kept]
        with _or_left_out(folders, left_out):
            found.append(_entry(kept, example, base))
    return sorted(found, key=lambda entry: (entry.dataset, -entry.scores.get("R1", (-1.0,))[0]))


def _entry(kept: list[tuple[Path, dict[str, Any]]], example: bool, base: Path) -> Entry:
    """The line of the runs of one recipe."""
    folders, recipe = [path for path, _ in kept], kept[0][1]["recipe"]
    dataset = recipe.dataset if recipe.dataset in RECIPES else folders[0].parent.name
    entry = Entry(dataset, _name(folders[0], base), folders, recipe, _scores(kept), example, {}, None)
    return entry._replace(line=_line(entry, base), curves=_curves(entry))


def _name(path: Path, base: Path) -> str:
    """What a run's folder says of its recipe, without the seed."""
    if path == base / "example":
        return "default"
    parts = [part for part in re.sub(r"~\d+$", "", path.name).split(",") if not part.startswith("seed=")]
    return ", ".join(parts) or "default"


def _scores(kept: list[tuple[Path, dict[str, Any]]]) -> dict[str, Interval]:
    """Scores and intervals of the runs of one recipe; none where the data have no test split."""
    if any("text_to_image" not in run["metrics"] for _, run in kept):
        return {}
    if len(kept) == 1 or any(run["queries"] is None for _, run in kept):
        values = [run["metrics"]["text_to_image"] for _, run in kept]
        alone = len(values) == 1
        means = {name: float(np.mean([value[name][0] for value in values])) for name in METRICS}
        return {name: (means[name], *(values[0][name][1:] if alone else (np.nan, np.nan))) for name in METRICS}
    tables = [run["queries"] for _, run in kept]
    found = {}
    for name, column in METRICS.items():
        values = np.stack([table[column].to_numpy(dtype=np.float64) for table in tables])
        low, high = bootstrap_interval(values, tables[0].pid.to_numpy())
        found[name] = (float(values.mean()), low, high)
    return found


def _dataset(name: str, shown: list[Entry]) -> Shown:
    """One data set: the rows of its leaderboard, the best R@1 first, and its entries with their learning curves."""
    rows = [(entry.scores.get("R1", (-1.0,))[0], entry.line) for entry in shown]
    theirs = published()
    theirs = theirs[(theirs.table == "results") & (theirs.dataset == name)]
    theirs = theirs.groupby(["method", *METRICS], as_index=False, sort=False)["source"].agg(", ".join)
    rows += [(float(row.R1), _published_line(row)) for row in theirs.itertuples()]
    return {"name": name, "entries": shown, "rows": [line for _, line in sorted(rows, key=lambda pair: -pair[0])]}


def _line(entry: Entry, base: Path) -> Shown:
    """An entry's row of the leaderboard."""
    badges = [{"text": "example", "warn": False}] if entry.example else []
    if entry.recipe.select_on == "test":
        badges.append({"text": "selected on test: not comparable", "warn": True})
    if any("pretrained_on" in runs.load_run(folder)["metrics"]["selected"] for folder in entry.folders):
        badges.append({"text": "pretrained weights selected on test: not comparable", "warn": True})
    if not entry.scores:
        badges.append({"text": "no test split", "warn": False})
    if unreadable := max(runs.load_run(folder)["metrics"].get("unreadable_images", 0) for folder in entry.folders):
        badges.append({"text": f"{_count(unreadable, 'unreadable photo')} left out", "warn": True})
    seeds = len(entry.folders)
    return {
        "published": False,
        "name": entry.name,
        "note": f"{entry.recipe.losses}, {_count(seeds, 'seed')}",
        "badges": badges,
        "whisker": _whisker(entry.scores["R1"]) if entry.scores else None,
        "scores": [_score(entry.scores[name]) for name in HEADINGS] if entry.scores else [],
        "sparkline": _sparkline(entry.folders[0]),
        "links": [link for place, folder in enumerate(entry.folders) for link in _links(folder, base, place, seeds)],
    }


def _published_line(row) -> Shown:
    """A published result's row of the leaderboard."""
    return {
        "published": True,
        "name": row.method,
        "note": row.source,
        "whisker": _whisker((row.R1, np.nan, np.nan)),
        "scores": [_score((getattr(row, score), np.nan, np.nan)) for score in HEADINGS],
        "sparkline": None,
        "links": [],
    }


def _links(folder: Path, base: Path, place: int, seeds: int) -> list[Shown]:
    """Links to the executed notebooks in a run's folder, or, without any, to the folder."""
    files = [file for file in sorted(folder.iterdir()) if file.suffix in EXECUTED and not file.name.startswith(".")]
    number = f" {place}" if seeds > 1 else ""
    if not files:
        return [_link(folder, base, f"folder{number}")]
    return [_link(file, base, f"{'html' if file.suffix == '.html' else 'notebook'}{number}") for file in files]


def _link(path: Path, base: Path, label: str) -> Shown:
    """A link from the page to a file below its folder."""
    target = quote(os.path.relpath(path, base).replace(os.sep, "/")) + ("/" if path.is_dir() else "")
    return {"href": target, "label": label}


def _score(value: Interval) -> Shown:
    """A score and its interval as text."""
    score, low, high = value
    return {"value": f"{score:.1f}", "interval": "" if np.isnan(low) else f"{low:.1f} – {high:.1f}"}


def _whisker(value: Interval) -> Shown:
    """The places of a score and its interval on a line from 0 to 100 per cent, and their description."""
    score, low, high = (None if np.isnan(end) else f"{end:.1f}" for end in value)
    title = f"R@1 {score} %" + (f", {low} to {high}" if low else "")
    return {"score": score, "low": low, "high": high, "title": title}


def _validated(history: DataFrame | None) -> str | None:
    """The column with R@1 on the split that was evaluated during training."""
    names = ("val_R1", "test_R1")
    return None if history is None else next((name for name in names if name in history), None)


def _sparkline(folder: Path) -> Shown | None:
    """R@1 on val over the evaluations of a run: the points of a line, and a description of first and last."""
    history = runs.load_run(folder)["history"]
    column = _validated(history)
    if column is None or len(history) < 2:
        return None
    values = history[column].to_numpy(dtype=float)
    span = max(values.max() - values.min(), 1e-9)
    points = [(2 + 60 * i / (len(values) - 1), 18 - 15 * (v - values.min()) / span) for i, v in enumerate(values)]
    title = f"R@1 on {column[:-3]}: {values[0]:.1f} to {values[-1]:.1f} % in {len(values)} evaluations"
    return {"points": " ".join(f"{x:.1f},{y:.1f}" for x, y in points), "title": title}


def _curves(entry: Entry) -> Shown | None:
    """A picture of loss and R@1 over the steps of an entry's runs."""
    histories = {folder: runs.load_run(folder)["history"] for folder in entry.folders}
    histories = {f: history for f, history in histories.items() if history is not None and len(history)}
    if not histories:
        return None
    first = next(iter(histories.values()))
    column = _validated(first)
    figure = Figure(figsize=(9, 2.7), layout="constrained")
    left, right = figure.subplots(1, 2)
    plots.loss_curves(first, ax=left)
    if column:
        seeds = [history.assign(seed=place) for place, history in enumerate(histories.values())]
        plots.metric_curve(pd.concat(seeds), metric=column, hue="seed" if len(seeds) > 1 else None, ax=right)
    else:
        right.set_axis_off()
    return _picture(_svg(figure), f"{entry.name}: curves")


def _svg(figure: Figure) -> bytes:
    """The figure as SVG with its text as text, not as outlines: a tenth of the size."""
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "irra"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _picture(svg: bytes, label: str) -> Shown:
    """An SVG as the source of an image: browsers run no script in it, whatever the file holds."""
    return {"alt": label, "src": f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"}


def _studies(base: Path) -> list[Path]:
    """The folders of studies with a table, `<data set>/studies/<study>`."""
    found = sorted({file.parent for file in files_below(base, ".csv") if file.parent.parent.name == "studies"})
    return [folder for folder in found if folder.relative_to(base).parts[0] != "smoke"]


def _study(folder: Path, base: Path) -> Shown:
    """A study: its tables with verdicts, its figures, and links to all its files."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    figures = [file for file in files if file.suffix == ".svg" and file.stat().st_size <= LARGEST_FIGURE]
    tables = []
    for file in sorted((file for file in files if file.suffix == ".csv"), key=lambda file: file.name != "table.csv"):
        table = pd.read_csv(file)
        if file.name == "table.csv":
            tables.append({"title": ""} | _study_table(table))
        elif 0 < len(table) <= MOST_ROWS:
            tables.append({"title": file.stem} | _study_table(table))
    return {
        "name": folder.name,
        "dataset": folder.parent.parent.name.replace("+", " + "),
        "example": folder.relative_to(base).parts[0] == "example",
        "figures": [_picture(file.read_bytes(), f"{folder.name}: {file.stem}") for file in figures],
        "tables": tables,
        "links": [_link(file, base, file.name) for file in files],
    }


def _study_table(table: DataFrame) -> Shown:
    """The headings and rows of a study's table as text, and the verdicts that follow from it."""
    verdicts: list[str] = []
    if {"variant", "reference", "R1_gain", "status"} <= set(table):
        rows = table.astype({"status": object}).fillna({"status": ""}).to_dict("records")
        verdicts = [comparison.verdict(row) for row in rows]
        table = comparison.readable(table).reset_index()
    elif {"train", "test", "leaks", "R1_low"} <= set(table):
        table = transfer.readable(table)
    else:
        table = table.round(2).astype(object).where(table.notna(), "")
    cells = [[_cell(value) for value in row] for row in table.itertuples(index=False, name=None)]
    return {"verdicts": verdicts, "headings": [str(name) for name in table.columns], "rows": cells}


def _cell(value: Any) -> Shown:
    """A cell's text, and apart from it a score's interval or deviation."""
    split = re.fullmatch(r"(\S+) (\[\S+, \S+\]|± \S+)", str(value))
    return {"value": split[1], "interval": split[2]} if split else {"value": str(value), "interval": ""}


def _other_notebooks(base: Path, known: Iterable[Path]) -> list[Shown]:
    """Links to executed notebooks that belong to no run and no study."""
    known = set(known)
    found = [file for suffix in EXECUTED for file in files_below(base, suffix)]
    links = []
    for file in found:
        place = file.relative_to(base)
        hidden = any(part.startswith(".") for part in place.parts)
        if not hidden and file.parent not in known and place.parts[0] != "smoke" and place.name != "index.html":
            links.append(_link(file, base, str(place)))
    return links


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"
