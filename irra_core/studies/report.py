"""Run folders and studies → one web page: leaderboard, published rows, learning curves, the studies' figures."""

import base64
import html
import importlib.resources
import io
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from pandas import DataFrame

from irra_core import runs
from irra_core.analysis import plots
from irra_core.evaluation import METRICS, Interval
from irra_core.recipes import RECIPES, Recipe
from irra_core.released.published import published
from irra_core.settings import reports_root, smoke
from irra_core.studies import comparison, transfer

HEADINGS = {"R1": "R@1 (%)", "R5": "R@5 (%)", "R10": "R@10 (%)", "mAP": "mAP (%)", "mINP": "mINP (%)"}
LARGEST_FIGURE = 2**20  # bytes; a larger one is linked and not embedded, so that the page stays light
LONGEST_TABLE = 12  # rows; a longer one waits until somebody unfolds it
MOST_ROWS = 40  # of a study's other tables; a longer one is linked
EXECUTED = (".html", ".ipynb")


class Entry(NamedTuple):
    """One line of the leaderboard: the runs of one recipe on the same data, a seed each.

    `cells` are the line's, as HTML, and `curves` its learning curves.
    """

    dataset: str
    name: str
    folders: list[Path]
    recipe: Recipe
    scores: dict[str, Interval]
    example: bool
    cells: dict[str, str]
    curves: str


def write_report(root: str | Path | None = None) -> Path:
    """The page `index.html` in the reports folder, made of every finished run and study below it; its path.

    It needs no other file and no network. With IRRA_SMOKE=1 the page of the shrunken runs is written in their folder;
    without, they are left out. Committed examples are shown, and marked.
    """
    base = reports_root(root) / ("smoke" if smoke() else "")
    base.mkdir(parents=True, exist_ok=True)
    runs.write_text(base / "index.html", page(base))
    return base / "index.html"


def page(base: Path) -> str:
    """The whole page as text."""
    table = runs.collect(base)
    left_out = dict(table.attrs["broken"])
    shown = entries(table, base, left_out)
    names = list(dict.fromkeys(entry.dataset for entry in shown))
    only = sorted(set(published().query("table == 'results'").dataset) - set(names))
    folders = _studies(base)
    studies = []
    for folder in folders:
        with _or_left_out([folder], left_out):
            studies.append(_study(folder, base))
    notebooks = _other_notebooks(base, [folder for entry in shown for folder in entry.folders] + folders)
    sections = [(f"data-{name}", name, _dataset(name, [e for e in shown if e.dataset == name])) for name in names]
    sections += [("studies", "Studies", "".join(studies))] if studies else []
    sections += [("notebooks", "Executed notebooks", notebooks)] if notebooks else []
    sections += [("broken", "Left out", _broken(left_out))] if left_out else []
    sections += [(f"data-{name}", name, _dataset(name, [])) for name in only]
    count = sum(len(entry.folders) for entry in shown)
    style = importlib.resources.files("irra_core.studies").joinpath("report.css").read_text(encoding="utf-8")
    links = "".join(f'<a href="#{_text(anchor)}">{_text(title)}</a>' for anchor, title, _ in sections)
    body = "".join(f'<section id="{_text(a)}"><h2>{_text(t)}</h2>{content}</section>' for a, t, content in sections)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>irra-core: results</title><style>{style}</style></head><body><main>
<h1>Results</h1>
<p>{_count(count, "finished run")} and {_count(len(studies), "study", "studies")}. Scores are on test, text to image, in
per cent; below each its 95&nbsp;% interval, from resampling people and, where there are several, seeds. Two rows whose
intervals overlap may still differ: the studies compare in pairs. Published scores come without intervals.</p>
<nav>{links}</nav>{body}
<footer>Written by <code>make report</code>. Rendered people stand in for photos that cannot be handed on: their scores
show that the method works, not how well it does on real people.</footer>
</main></body></html>
"""


@contextmanager
def _or_left_out(folders: list[Path], left_out: dict[str, str]) -> Iterator[None]:
    """Whatever these folders hold, it costs the page no more than themselves: the reason goes to `left_out`."""
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
    entry = Entry(dataset, _name(folders[0], base), folders, recipe, _scores(kept), example, {}, "")
    return entry._replace(cells=_line(entry, base), curves=_curves(entry))


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
        low, high = comparison.seed_identity_interval(values, tables[0].pid.to_numpy())
        found[name] = (float(values.mean()), low, high)
    return found


def _dataset(name: str, shown: list[Entry]) -> str:
    """One data set: its leaderboard and the learning curves of its runs."""
    rows = [(entry.scores.get("R1", (-1.0,))[0], entry.cells) for entry in shown]
    theirs = published()
    theirs = theirs[(theirs.table == "results") & (theirs.dataset == name)]
    theirs = theirs.groupby(["method", *METRICS], as_index=False, sort=False)["source"].agg(", ".join)
    rows += [(float(row.R1), _published_line(row)) for row in theirs.itertuples()]
    table = DataFrame([line for _, line in sorted(rows, key=lambda pair: -pair[0])]).fillna("")
    board = f'<div class="card">{_html(table)}</div>' if len(table) else ""
    if not shown:
        return f'<p class="quiet">Not run here: only what is published.</p>{board}'
    curves = "".join(entry.curves for entry in shown)
    return f'{board}<div class="card"><h3>Learning curves</h3>{curves}</div>'


def _line(entry: Entry, base: Path) -> dict[str, str]:
    """A leaderboard row's cells, as HTML."""
    marks = ['<span class="badge">example</span>'] if entry.example else []
    if entry.recipe.select_on == "test":
        marks.append('<span class="badge warn">selected on test: not comparable</span>')
    if not entry.scores:
        marks.append('<span class="badge">no test split</span>')
    if unreadable := max(runs.load_run(folder)["metrics"].get("unreadable_images", 0) for folder in entry.folders):
        marks.append(f'<span class="badge warn">{_count(unreadable, "unreadable photo")} left out</span>')
    seeds = len(entry.folders)
    told = f"{entry.recipe.losses}, {_count(seeds, 'seed')}"
    name = f"{_text(entry.name)}<small class='quiet'>{_text(told)}</small>{''.join(marks)}"
    line = {"run": name, "": _whisker(entry.scores["R1"]) if entry.scores else ""}
    line |= {HEADINGS[score]: _score(value) for score, value in entry.scores.items()}
    links = [link for place, folder in enumerate(entry.folders) for link in _links(folder, base, place, seeds)]
    return line | {"R@1 on val": _sparkline(entry.folders[0]), "open": " ".join(links)}


def _published_line(row) -> dict[str, str]:
    """A published row's cells."""
    name = f'<span class="published">published: {_text(row.method)}<small>{_text(row.source)}</small></span>'
    line = {"run": name, "": _whisker((row.R1, np.nan, np.nan))}
    return line | {HEADINGS[score]: f'<span class="published">{getattr(row, score):.1f}</span>' for score in METRICS}


def _links(folder: Path, base: Path, place: int, seeds: int) -> list[str]:
    """Links to what a run's folder keeps for a reader: its notebooks, else the folder."""
    files = [file for file in sorted(folder.iterdir()) if file.suffix in EXECUTED and not file.name.startswith(".")]
    number = f" {place}" if seeds > 1 else ""
    if not files:
        return [_link(folder, base, f"folder{number}")]
    return [_link(file, base, f"{'html' if file.suffix == '.html' else 'notebook'}{number}") for file in files]


def _link(path: Path, base: Path, label: str) -> str:
    """A link from the page to a file below its folder."""
    target = quote(os.path.relpath(path, base).replace(os.sep, "/")) + ("/" if path.is_dir() else "")
    return f'<a href="{target}">{_text(label)}</a>'


def _score(value: Interval) -> str:
    """A score with its interval below it."""
    score, low, high = value
    ends = "" if np.isnan(low) else f"<small>{low:.1f} – {high:.1f}</small>"
    return f"{score:.1f}{ends}"


def _whisker(value: Interval) -> str:
    """A score on a line from 0 to 100 per cent, with its interval, as a small SVG."""
    score, low, high = value
    known = not np.isnan(low)
    ends = f'<path d="M{low:.1f} 7H{high:.1f}" stroke="{plots.PALETTE[0]}" stroke-width="3"/>' if known else ""
    said = f"R@1 {score:.1f} %" + (f", {low:.1f} to {high:.1f}" if known else "")
    dot = f'<circle cx="{score:.1f}" cy="7" r="3.5" fill="{plots.PALETTE[0] if known else plots.QUIET}"/>'
    line = f'<path d="M0 7H100" stroke="{plots.FAINT}"/>'
    return (
        f'<svg class="small" width="104" height="14" viewBox="-2 0 104 14"><title>{said}</title>{line}{ends}{dot}</svg>'
    )


def _validated(history: DataFrame | None) -> str | None:
    """The column with R@1 on the split that was looked at while training."""
    names = ("val_R1", "test_R1")
    return None if history is None else next((name for name in names if name in history), None)


def _sparkline(folder: Path) -> str:
    """R@1 on val over the evaluations of a run, as a small SVG without axes; its title tells first and last."""
    history = runs.load_run(folder)["history"]
    column = _validated(history)
    if column is None or len(history) < 2:
        return ""
    values = history[column].to_numpy(dtype=float)
    span = max(values.max() - values.min(), 1e-9)
    points = [(2 + 60 * i / (len(values) - 1), 18 - 15 * (v - values.min()) / span) for i, v in enumerate(values)]
    drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    said = f"R@1 on {column[:-3]}: {values[0]:.1f} to {values[-1]:.1f} % in {len(values)} evaluations"
    line = f'<polyline points="{drawn}" fill="none" stroke="{plots.PALETTE[0]}" stroke-width="1.5"/>'
    return f'<svg class="small" width="64" height="20" viewBox="0 0 64 20"><title>{said}</title>{line}</svg>'


def _curves(entry: Entry) -> str:
    """Loss and R@1 over the steps of an entry's runs, folded until somebody looks."""
    histories = {folder: runs.load_run(folder)["history"] for folder in entry.folders}
    histories = {f: history for f, history in histories.items() if history is not None and len(history)}
    if not histories:
        return ""
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
    return f"<details><summary>{_text(entry.name)}</summary>{_picture(_svg(figure), f'{entry.name}: curves')}</details>"


def _svg(figure: Figure) -> bytes:
    """The figure as SVG whose words stay words, which makes it small."""
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "irra"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _picture(svg: bytes, label: str) -> str:
    """An SVG as an image: whatever a file holds, a script in it does not run."""
    return f'<img alt="{_text(label)}" src="data:image/svg+xml;base64,{base64.b64encode(svg).decode()}">'


def _studies(base: Path) -> list[Path]:
    """The folders of studies that left a table, `<data set>/studies/<study>`."""
    found = sorted({file.parent for file in base.glob("**/studies/*/*.csv")})
    return [folder for folder in found if folder.relative_to(base).parts[0] != "smoke"]


def _study(folder: Path, base: Path) -> str:
    """A study: verdicts, table, figures, and links to all that it left."""
    place = folder.relative_to(base).parts
    dataset = folder.parent.parent.name.replace("+", " + ")
    marks = ' <span class="badge">example</span>' if place[0] == "example" else ""
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    parts = [f"<h3>{_text(folder.name)} <span class='quiet'>on {_text(dataset)}</span>{marks}</h3>"]
    for file in files:
        if file.suffix == ".svg" and file.stat().st_size <= LARGEST_FIGURE:
            parts.append(_picture(file.read_bytes(), f"{folder.name}: {file.stem}"))
    for file in sorted((file for file in files if file.suffix == ".csv"), key=lambda file: file.name != "table.csv"):
        table = pd.read_csv(file)
        if file.name == "table.csv":
            parts.append(study_table(table))
        elif 0 < len(table) <= MOST_ROWS:
            parts.append(f"<details><summary>{_text(file.stem)}</summary>{study_table(table)}</details>")
    links = " · ".join(_link(file, base, file.name) for file in files)
    return f'<div class="card">{"".join(parts)}<p class="quiet">{links}</p></div>'


def study_table(table: DataFrame) -> str:
    """The table of a study for the eye, as HTML, after the verdicts that it has; a long one is folded."""
    verdicts: Iterable[str] = ()
    if {"variant", "reference", "R1_gain", "status"} <= set(table):
        verdicts = [
            comparison.verdict(row)
            for row in table.astype({"status": object}).fillna({"status": ""}).to_dict("records")
        ]
        table = comparison.readable(table).reset_index()
    elif {"train", "test", "leaks", "R1_low"} <= set(table):
        table = transfer.readable(table)
    else:
        table = table.round(2).astype(object).where(table.notna(), "")
    shown = _html(table.map(_cell).rename(columns=_text))
    if len(table) > LONGEST_TABLE:
        shown = f"<details><summary>all {len(table)} rows</summary>{shown}</details>"
    listed = "".join(f"<li>{_text(line)}</li>" for line in verdicts)
    return (f'<ul class="verdicts">{listed}</ul>' if listed else "") + shown


def _cell(value: Any) -> str:
    """A cell's words, with what a score's interval or deviation is below it."""
    return re.sub(r"^(\S+) (\[\S+, \S+\]|± \S+)$", r"\1 <small>\2</small>", _text(value))


def _other_notebooks(base: Path, known: Iterable[Path]) -> str:
    """Links to executed notebooks that belong to no run and no study."""
    known = set(known)
    found = [file for suffix in EXECUTED for file in sorted(base.glob(f"**/*{suffix}"))]
    links = []
    for file in found:
        place = file.relative_to(base)
        hidden = any(part.startswith(".") for part in place.parts)
        if not hidden and file.parent not in known and place.parts[0] != "smoke" and place.name != "index.html":
            links.append(f"<li>{_link(file, base, str(place))}</li>")
    return f'<div class="card"><ul>{"".join(links)}</ul></div>' if links else ""


def _broken(reasons: Mapping[str, str]) -> str:
    """The folders that cannot be shown, with the reasons."""
    told = [reason if path in reason else f"{path}: {reason}" for path, reason in reasons.items()]
    listed = "".join(f"<li>{_text(each)}</li>" for each in told)
    return f'<div class="card"><p>These folders hold no run and no study that can be shown.</p><ul>{listed}</ul></div>'


def _html(table: DataFrame, index: bool = False) -> str:
    """A table whose cells are HTML already."""
    with pd.option_context("display.max_colwidth", None):
        return table.to_html(escape=False, index=index, border=0, na_rep="")


def _text(value: Any) -> str:
    return html.escape(str(value))


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"
