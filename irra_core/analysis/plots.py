"""Tidy tables → matplotlib axes (`ax=` in, `ax` out, as seaborn does)."""

import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from jaxtyping import Float
from jinja2 import Template
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator
from pandas import DataFrame
from PIL import Image

from irra_core.checkpoints import replaced
from irra_core.images import open_photo
from irra_core.recipes import LOSS_NAMES

# The colours of Okabe & Ito, safe for colour-blind readers; green and vermilion are reserved for right and wrong.
PALETTE = ("#0072B2", "#E69F00", "#CC79A7", "#56B4E9", "#5B5B5B", "#F0E442")
RIGHT, WRONG = "#009E73", "#D55E00"
INK, QUIET, FAINT = "#222222", "#6B6B6B", "#E4E4E4"
WIDTH = 11.0  # inches: the column of a notebook at JupyterLab's default zoom
LETTER = 0.0072  # inches: mean width of a letter of DejaVu Sans, per point of its size
MASKED_CAPTION = """\
<p style='line-height:2.2;margin:0'>
{%- for word, answer in pairs %}
{%- if answer %}<ruby style='background:{{ background }};padding:0 .25em;border-radius:.2em'>{{ word -}}
<rt style='color:{{ blue }};font-size:.8em'>{{ answer }}</rt></ruby>
{%- else %}{{ word }}{% endif %}{{ " " if not loop.last }}{% endfor %}</p>"""


def save(figure: Figure, path: str | Path, **options: Any) -> None:
    """Write a figure to a file, complete or not at all; `options` go to matplotlib's savefig."""
    with replaced(path) as aside:
        figure.savefig(aside, format=Path(path).suffix[1:], **options)


def people(annotations: DataFrame, *, n: int = 6, views: int = 2, seed: int = 0, ax: Axes | None = None) -> Axes:
    """Axes with n people drawn at random: up to `views` photos of each and, below, the first photo's first caption.

    annotations: columns `pid, path, caption`. Without `ax` a new figure of notebook width is made.
    """
    pids = annotations["pid"].drop_duplicates()
    pids = pids.sample(min(n, len(pids)), random_state=seed)
    shown = annotations[annotations["pid"].isin(pids)].drop_duplicates("path").groupby("pid").head(views)
    tall = _cell_height(shown["path"])
    step = views + 0.5  # half a photo between two people
    wide = len(pids) * step - 0.5
    letters = int(_inches(ax) * views / wide / (9 * LETTER))
    captions = [
        _wrap(text, letters, most=10)
        for text in shown.drop_duplicates("pid").set_index("pid")["caption"].fillna("")[pids]
    ]
    ax = _picture_axes(ax, wide, 0.0, tall, 0.4 + 0.18 * max(text.count("\n") + 1 for text in captions))
    for place, (pid, caption) in enumerate(zip(pids, captions, strict=True)):
        for view, path in enumerate(shown.loc[shown["pid"] == pid, "path"]):
            _draw_photo(ax, path, place * step + view, 0.0, tall)
        _write(ax, place * step, 0.0, -6, caption, size=9, linespacing=1.35)
        _write(ax, place * step, tall, 5, f"identity {pid}", size=8, color=QUIET)
    return ax


def ranking(results: DataFrame, *, truth: str | Path | None = None, columns: int = 10, ax: Axes | None = None) -> Axes:
    """Axes with one query's ranking: its text, the photo that it describes, and the ranked photos, best first.

    results: one query's rows of `Gallery.search`: columns `query, rank, score, path`; with a column `right`
    (bool), photos are framed green and ticked, or red and crossed; a column `pid` is written below. `truth` is the
    path of the query's own photo. Without `ax` a new figure of notebook width is made. Raises ValueError for a table
    of several queries.
    """
    queries = results["query"].unique()
    if len(queries) != 1:
        raise ValueError(
            f"results hold {len(queries)} queries: ranking draws one, as results[results['query'] == text]"
        )
    results = results.sort_values("rank")
    tall = _cell_height([*results["path"], *([] if truth is None else [truth])])
    left = 0.0 if truth is None else 1.45
    lines = math.ceil(len(results) / columns)
    wide, line_height = columns * 1.14 - 0.14 + left, tall + 0.95
    text = _wrap(f"“{queries[0]}”", int(_inches(ax) / (12 * LETTER)), most=6)
    ax = _picture_axes(ax, wide, (1 - lines) * line_height, tall, 1 + 0.23 * text.count("\n"))
    if truth is not None:
        _draw_photo(ax, truth, 0.0, 0.0, tall)
        _write(ax, 0.0, tall, 5, "its photo", size=10, color=QUIET)
        ax.plot([1.225, 1.225], [(1 - lines) * line_height, tall], color=FAINT, linewidth=1)
    for place, row in enumerate(results.itertuples()):
        _draw_result(ax, row, left + place % columns * 1.14, -(place // columns) * line_height, tall)
    ax.set_title(text, loc="left", fontsize=12, color=INK, pad=28, linespacing=1.4, parse_math=False)
    return ax


def _draw_result(ax: Axes, row, x: float, y: float, tall: float) -> None:
    """Draw one row of a ranking: rank and verdict above the photo, score and identity below."""
    verdict = getattr(row, "right", None)
    known = verdict is not None and not pd.isna(verdict)
    color = QUIET if not known else RIGHT if verdict else WRONG
    _draw_photo(ax, row.path, x, y, tall, frame=color if known else None)
    mark = "" if not known else "  ✓" if verdict else "  ✗"
    _write(ax, x, y + tall, 5, f"{row.rank}{mark}", size=10, color=color if known else INK, weight="bold")
    _write(ax, x, y, -5, f"{row.score:.3f}".replace("-", "−"), size=9)
    if "pid" in row._fields and not pd.isna(row.pid):
        _write(ax, x, y, -18, f"id {row.pid}", size=8, color=QUIET)


def attention(
    photo: str | Path | Image.Image, weights: Float[np.ndarray, "rows cols"], *, word: str = "", ax: Axes | None = None
) -> Axes:
    """Axes with a photo lit by the attention of a word: bright at the largest weight, dim at zero.

    weights: any non-negative numbers on a grid over the photo, as one word's `IRRA.attention`. They are drawn
    relative to the largest: two pictures compare where a word attends, not how strongly.
    """
    ax = plt.gca() if ax is None else ax
    grey = np.asarray(_photo(photo).convert("L"), dtype=np.float32) / 255
    light = Image.fromarray(np.asarray(weights / max(weights.max(), 1e-12), dtype=np.float32))
    light = np.asarray(light.resize(grey.shape[::-1], Image.Resampling.BICUBIC)).clip(0, 1)
    glow = plt.get_cmap("inferno")(light)[..., :3]
    lit = 0.7 * grey[..., None] * (1 - light[..., None]) + glow * (0.35 + 0.65 * grey[..., None])
    ax.imshow(lit.clip(0, 1))
    ax.set_title(word, fontsize=10, color=INK, parse_math=False)
    ax.set_axis_off()
    return ax


def loss_curves(
    history: DataFrame, *, x: str = "step", parts: Sequence[str] | None = None, ax: Axes | None = None
) -> Axes:
    """Axes with one line per part of the loss over training.

    history: one row per evaluation, one column per part in nats (`parts`, else every loss name that is a column).
    """
    ax = plt.gca() if ax is None else ax
    parts = [name for name in LOSS_NAMES if name in history] if parts is None else list(parts)
    for name, color in zip(parts, PALETTE, strict=False):
        ax.plot(history[x], history[name], color=color, label=name.upper(), marker=_marker(history))
    ax.set(xlabel=x, ylabel="loss (nats)")
    ax.set_ylim(bottom=0)
    ax.legend(frameon=False, title=None)
    return _finish(ax, grid="y")


def metric_curve(
    history: DataFrame, *, metric: str = "R1", x: str = "step", hue: str | None = None, ax: Axes | None = None
) -> Axes:
    """Axes with a metric in per cent over training, one line per value of `hue`.

    history: columns `x` and `metric`; with `metric`_low and `metric`_high, the interval is shaded.
    """
    ax = plt.gca() if ax is None else ax
    runs = [(None, history)] if hue is None else list(history.groupby(hue, sort=False))
    for (name, rows), color in zip(runs, PALETTE, strict=False):
        ax.plot(rows[x], rows[metric], color=color, label=name, marker=_marker(rows))
        if f"{metric}_low" in rows:
            ax.fill_between(
                rows[x], rows[f"{metric}_low"], rows[f"{metric}_high"], color=color, alpha=0.15, linewidth=0
            )
    ax.set(xlabel=x, ylabel=f"{_spoken(metric)} (%)")
    if hue is not None:
        ax.legend(frameon=False, title=hue)
    return _finish(ax, grid="y")


def interval_dots(
    results: DataFrame,
    *,
    metric: str = "R1",
    by: str = "losses",
    hue: str | None = None,
    references: Mapping[str, float] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Axes with one dot per row and its 95 % interval, the largest on top; with `hue`, one colour per value of it.

    results: columns `by`, `metric`, `metric`_low and `metric`_high, in per cent; rows without an interval are a
    dot. With `hue`, the rows of one `by` share a line, each hue a little lower, and lines are ordered by the first
    hue. `references` are named values in per cent, drawn as vertical lines: chance, the ceiling, a published score.
    """
    ax = plt.gca() if ax is None else ax
    parts = [(None, results)] if hue is None else list(results.groupby(hue, sort=False))
    lines = parts[0][1].sort_values(metric)
    places = {name: place for place, name in enumerate(lines[by])}
    for number, ((name, rows), color, shape) in enumerate(zip(parts, PALETTE, "oDs^vP", strict=False)):
        rows = lines if hue is None else rows[rows[by].isin(places)]
        heights = np.arange(len(rows)) if hue is None else rows[by].map(places) + 0.15 * ((len(parts) - 1) / 2 - number)
        bars = _bars(rows, metric)
        ax.errorbar(rows[metric], heights, xerr=bars, fmt=shape, capsize=3, color=color, markersize=6, linewidth=1.5,
                    label=name)  # fmt: skip
    ax.set_yticks(np.arange(len(lines)), [str(name) for name in lines[by]])
    ax.set_ylim(-0.6, len(lines) - 0.4)
    for name, value in (references or {}).items():
        ax.axvline(value, color=QUIET, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        ax.annotate(name, (value, 1), xycoords=("data", "axes fraction"), xytext=(0, 4), textcoords="offset points",
                    ha="center", fontsize=8, color=QUIET)  # fmt: skip
    ax.set(xlabel=f"{_spoken(metric)} (%)", ylabel="")
    if hue is not None:
        ax.legend(frameon=False, title=None)
    return _finish(ax, grid="x")


def similarities(pairs: DataFrame, *, hue: str = "kind", ax: Axes | None = None) -> Axes:
    """Axes with the distribution of cosine similarity, one outline per value of `hue`, all of the same area.

    pairs: columns `similarity` and `hue`, one row per pair of sentence and photo.
    """
    ax = plt.gca() if ax is None else ax
    sns.histplot(pairs, x="similarity", hue=hue, palette=PALETTE[: pairs[hue].nunique()], stat="density", bins=60,
                 common_norm=False, element="step", alpha=0.15, ax=ax)  # fmt: skip
    ax.set(xlabel="cosine similarity", ylabel="density")
    ax.get_legend().set(frame_on=False)
    ax.get_legend().set_title(None)
    return _finish(ax, grid="y")


def distribution(shares: Float[np.ndarray, "rows cols"], *, top: float | None = None, ax: Axes | None = None) -> Axes:
    """Axes with a matrix whose rows are probabilities: dark is large; small matrices show their numbers.

    Numbers are in per cent; those that round to 0 are omitted. `top` is the darkest share (default: the largest): set
    it to compare two matrices.
    """
    ax = plt.gca() if ax is None else ax
    top = float(shares.max()) if top is None else top
    ax.imshow(shares, cmap="Blues", vmin=0, vmax=top)
    if len(shares) <= 12:
        for (row, column), share in np.ndenumerate(shares):
            if round(100 * share):
                color = "white" if share > 0.6 * top else INK
                ax.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=9, color=color)
    ax.set(xlabel="sentence", ylabel="photo")
    ax.set_xticks(range(shares.shape[1]) if len(shares) <= 12 else [])
    ax.set_yticks(range(len(shares)) if len(shares) <= 12 else [])
    return ax


def score_matrix(cells: DataFrame, *, metric: str = "R1", ax: Axes | None = None) -> Axes:
    """Axes with a heat map of a metric in per cent, 0 to 100, for each pair of training and test set, and its interval.

    cells: one row per pair, columns `train, test`, `metric` and, optionally, `metric`_low and `metric`_high. Data sets
    are in the order of their first appearance; a cell without a value is hatched and says "not run".
    """
    ax = plt.gca() if ax is None else ax
    rows, columns = list(cells["train"].unique()), list(cells["test"].unique())
    values = cells.pivot(index="train", columns="test", values=metric).loc[rows, columns].to_numpy(dtype=float)
    ax.imshow(values, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    found = {(cell.train, cell.test): cell for cell in cells.itertuples()}
    for y, x in np.ndindex(values.shape):
        cell, value = found.get((rows[y], columns[x])), values[y, x]
        if np.isnan(value):
            ax.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor="white", edgecolor=FAINT, hatch="////"))
            text, color = "not run", QUIET
        else:
            low, high = (getattr(cell, f"{metric}{end}", np.nan) for end in ("_low", "_high"))
            text = f"{value:.1f}" + ("" if np.isnan(low) else f"\n[{low:.1f}, {high:.1f}]")
            color = "white" if value > 60 else INK
        ax.text(x, y, text, ha="center", va="center", fontsize=8, color=color, linespacing=1.4)
    broken = [re.sub(r"(?<=[^-]{9})-", "-\n", str(name)) for name in columns]  # long names in lines below each other
    ax.set_xticks(range(len(columns)), broken, fontsize=8, parse_math=False)
    ax.set_yticks(range(len(rows)), rows, fontsize=8, parse_math=False)
    ax.set_xlabel("tested on", fontsize=9)
    ax.set_ylabel("trained on", fontsize=9)
    ax.set_title(f"{_spoken(metric)} (%)", fontsize=10)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return ax


def gain_dots(
    results: DataFrame, *, metric: str = "R1", by: str = "variant", hue: str | None = None, ax: Axes | None = None
) -> Axes:
    """Axes with the gain of each row over the reference, in percentage points, and its 95 % interval; 0 is marked.

    results: columns `by`, `metric`_gain, `metric`_gain_low and `metric`_gain_high; rows keep their order, first on top;
    rows of one name with different values of `hue` are drawn below each other. A row without numbers says "not run".
    """
    ax = plt.gca() if ax is None else ax
    names = list(dict.fromkeys(results[by]))
    parts = [(None, results)] if hue is None else list(results.groupby(hue, sort=False))
    gain = f"{metric}_gain"
    for part, ((label, rows), color) in enumerate(zip(parts, PALETTE, strict=False)):
        known = rows[rows[gain].notna()]
        places = [names.index(name) + 0.22 * (part - (len(parts) - 1) / 2) for name in known[by]]
        bars = _bars(known, gain)
        ax.errorbar(known[gain], places, xerr=bars, fmt="osD"[part], capsize=3, color=color, label=label, markersize=5)
    for place, name in enumerate(names):
        if results.loc[results[by] == name, gain].isna().all():
            ax.annotate("not run", (0, place), xytext=(6, 0), textcoords="offset points", va="center", color=QUIET)
    ax.axvline(0, color=QUIET, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set(xlabel=f"{_spoken(metric)} gained (percentage points)", ylabel="")
    if hue is not None:
        ax.legend(frameon=False, title=hue, loc="upper left", bbox_to_anchor=(1.0, 1.0))  # outside: no dot below it
    return _finish(ax, grid="x")


def speedups(results: DataFrame, *, ax: Axes | None = None) -> Axes:
    """Axes with the speedup of each workload over its reference, and its target as a tick; 1 is marked.

    results: columns `what, ratio, target`, drawn in the order of the rows, first on top; without a target (NaN) the
    bar is grey.
    """
    ax = plt.gca() if ax is None else ax
    reached = (results["ratio"] >= results["target"]).where(results["target"].notna())
    colors = [QUIET if pd.isna(met) else RIGHT if met else WRONG for met in reached]
    places = np.arange(len(results))
    ax.barh(places, results["ratio"] - 1, left=1, height=0.55, color=colors)
    ax.plot(results["target"], places, "|", color=INK, markersize=20, markeredgewidth=2, label="target")
    for place, ratio in zip(places, results["ratio"], strict=True):
        side, align = (5, "left") if ratio >= 1 else (-5, "right")
        text = f"{ratio:.2g}×" if ratio < 100 else f"{ratio:.0f}×"
        ax.annotate(text, (ratio, place), (side, 9), textcoords="offset points", ha=align, fontsize=9, color=INK)
    ax.axvline(1, color=QUIET, linewidth=1.2)
    ax.set_xscale("log")
    ax.margins(x=0.16)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    ax.xaxis.set_minor_formatter(lambda value, _: "")
    ax.set_yticks(places, [_wrap(name, 44, most=2) for name in results["what"]])
    ax.invert_yaxis()
    ax.set(xlabel="times as fast", ylabel="")
    if results["target"].notna().any():
        ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return _finish(ax, grid="x")


def time_parts(parts: DataFrame, *, hue: str | None = None, ax: Axes | None = None) -> Axes:
    """Axes with the time of each part of a workload in milliseconds, one bar per value of `hue`, and its share.

    parts: columns `part, seconds, share` (per cent) and `hue`, drawn in the order of the rows, first on top.
    """
    ax = plt.gca() if ax is None else ax
    names = list(dict.fromkeys(parts["part"]))
    groups = [(None, parts)] if hue is None else list(parts.groupby(hue, sort=False))
    height = 0.8 / len(groups)
    for number, ((label, rows), color) in enumerate(zip(groups, PALETTE, strict=False)):
        places = [names.index(name) + height * (number - (len(groups) - 1) / 2) for name in rows["part"]]
        bars = ax.barh(places, 1000 * rows["seconds"], height=0.9 * height, color=color, label=label)
        ax.bar_label(bars, [f"{share:.0f} %" for share in rows["share"]], padding=4, fontsize=8, color=INK)
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.margins(x=0.1)
    ax.set(xlabel="milliseconds", ylabel="")
    if hue is not None:
        ax.legend(frameon=False, title=hue, loc="upper right")
    return _finish(ax, grid="x")


def caption_lengths(
    annotations: DataFrame,
    *,
    x: str = "words",
    limit: int | None = None,
    hue: str | None = "split",
    ax: Axes | None = None,
) -> Axes:
    """Axes with the distribution of caption length in words, or in the unit of column `x`, per split.

    annotations: columns `caption` and `hue`, and `x` unless it is words. A line marks the `limit`, if there is one.
    """
    ax = plt.gca() if ax is None else ax
    words = annotations[x] if x in annotations else annotations["caption"].str.split().str.len().rename(x)
    table = words.to_frame() if hue is None else words.to_frame().assign(**{hue: annotations[hue]})
    colors = None if hue is None else PALETTE[: table[hue].nunique()]
    sns.histplot(table, x=x, hue=hue, palette=colors, color=PALETTE[0], stat="percent", common_norm=False,
                 discrete=True, element="step", fill=hue is None, ax=ax)  # fmt: skip
    ax.set(xlabel=f"{x} in a caption", ylabel="captions (%)" if hue is None else f"captions of the {hue} (%)")
    if limit is not None:
        ax.axvline(limit, color=QUIET, linestyle="--", label="_limit")
    if ax.get_legend() is not None:
        ax.get_legend().set(frame_on=False)
    return _finish(ax, grid="y")


def masked_caption(words: Sequence[str], answers: Sequence[str]) -> str:
    """HTML of a caption as MLM reads it, with the word to predict above each mask; `answers` has "" for other words."""
    pairs = list(zip(words, answers, strict=True))
    return Template(MASKED_CAPTION, autoescape=True).render(pairs=pairs, background=FAINT, blue=PALETTE[0])


def _picture_axes(ax: Axes | None, wide: float, bottom: float, top: float, words: float) -> Axes:
    """The axes given, or a new figure's, with photos one unit wide and `words` inches left for text around them."""
    if ax is None:
        figure = plt.figure(figsize=(WIDTH, WIDTH * (top - bottom) / wide + words), layout="constrained")
        ax = figure.subplots()
    ax.set_axis_off()
    ax.set(xlim=(-0.03, wide + 0.03), ylim=(bottom, top), aspect="equal", anchor="NW")
    return ax


def _photo(photo: str | Path | Image.Image) -> Image.Image:
    """The photo upright, in RGB."""
    if isinstance(photo, Image.Image):
        return photo.convert("RGB")
    return open_photo(photo)


def _cell_height(paths: Iterable[str | Path]) -> float:
    """The tallest photo's height over its width, at most the 3:1 of pedestrian crops."""
    sizes = [_photo(path).size for path in set(paths)]
    return min(3.0, max((height / width for width, height in sizes), default=3.0))


def _draw_photo(ax: Axes, path: str | Path, x: float, y: float, tall: float, frame: str | None = None) -> None:
    """Draw a photo as large as fits into the cell of width 1 with its lower left corner at (x, y)."""
    photo = _photo(path)
    scale = min(1 / photo.width, tall / photo.height)
    wide, high = photo.width * scale, photo.height * scale
    left, bottom = x + (1 - wide) / 2, y + (tall - high) / 2
    photo.thumbnail((256, 512))  # more than a figure resolves, and small in the notebook file
    ax.imshow(photo, extent=(left, left + wide, bottom, bottom + high))
    if frame is not None:
        ax.add_patch(Rectangle((left, bottom), wide, high, fill=False, edgecolor=frame, linewidth=3, joinstyle="miter"))


def _write(ax: Axes, x: float, y: float, points: int, text: str, color: str = INK, **style) -> None:
    """Write text `points` above (negative: below) the point (x, y); a $ is a dollar, not a formula."""
    ax.annotate(text, (x, y), xytext=(0, points), textcoords="offset points", color=color, parse_math=False,
                va="bottom" if points > 0 else "top", annotation_clip=False, **style)  # fmt: skip


def _wrap(text: str, letters: int, most: int) -> str:
    """The text in at most `most` lines of `letters` characters; a longer text ends in an ellipsis."""
    return "\n".join(textwrap.wrap(text, max(letters, 8), max_lines=most, placeholder=" …")) or " "


def _inches(ax: Axes | None) -> float:
    """The width of the axes within the layout, or of a new figure's axes."""
    if ax is None:
        return WIDTH
    place = ax.get_subplotspec()
    share = ax.get_position().width if place is None else len(place.colspan) / place.get_gridspec().ncols
    return 0.98 * share * ax.figure.get_figwidth()


def _marker(rows: DataFrame) -> str:
    """The marker of a curve: dots if there are few points."""
    return "o" if len(rows) <= 20 else ""


def _bars(rows: DataFrame, value: str) -> list[pd.Series]:
    """The lengths of the error bars below and above the value; 0 if the value is outside its interval (few samples)."""
    lengths = [rows[value] - rows[f"{value}_low"], rows[f"{value}_high"] - rows[value]]
    return [length.clip(lower=0) for length in lengths]


def _spoken(metric: str) -> str:
    """The usual name of a score: R1 is R@1, val_R1 is R@1 on val."""
    split, name = re.fullmatch(r"(?:(train|val|test)_)?(.*)", metric).groups()
    return re.sub(r"^R(\d+)$", r"R@\1", name) + (f" on {split}" if split else "")


def _finish(ax: Axes, grid: str) -> Axes:
    """The axes in the style of all charts: two spines, a grid; a $ in a text is a dollar, not a formula."""
    legend = ax.get_legend()
    words = [*ax.texts, ax.title, ax.xaxis.label, ax.yaxis.label]
    words += [] if legend is None else [*legend.get_texts(), legend.get_title()]
    for axis in (ax.xaxis, ax.yaxis):
        if isinstance(axis.get_major_locator(), FixedLocator):  # names; numbers may be powers of ten
            words += axis.get_ticklabels()
    for text in words:
        text.set_parse_math(False)
    sns.despine(ax=ax)
    ax.grid(axis=grid, color=FAINT, linewidth=0.8)
    ax.set_axisbelow(True)
    return ax
