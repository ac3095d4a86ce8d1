"""A study's table and runs → the one picture that a lecture would show of its question."""

from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pandas import DataFrame

from irra_core.analysis import plots
from irra_core.studies import committed
from irra_core.studies.committed import DONE


def picture(study: str, table: DataFrame, hard: DataFrame, finished: DataFrame) -> Figure:
    """The figure of a study: what its question is about, with 95 % intervals of paired gains where there are gains.

    table and hard: what `comparison.compare` gave for all queries and for the hard ones; rq4's has the column
    `step_seconds`. finished: what `run_all` gave. A study without a picture of its own gets its gains.
    """
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    draw = PICTURES.get(study, _gains)
    draw(table, hard, finished, figure.subplots())
    return figure


def _gains(table: DataFrame, hard: DataFrame, finished: DataFrame, ax: Axes) -> None:
    """Gains over the reference."""
    plots.gain_dots(table, ax=ax)


def _losses(table: DataFrame, hard: DataFrame, finished: DataFrame, ax: Axes) -> None:
    """R@1 without and with MLM: one line per base, its slope is what MLM adds; dots are seeds."""
    scores = _seed_scores(finished)
    bases = [name for name in table.variant if f"{name}+mlm" in set(table.variant)]
    for base, color in zip(bases, plots.PALETTE):
        for place, name in enumerate((base, f"{base}+mlm")):
            ax.plot(
                [place] * len(scores.get(name, [])), scores.get(name, []), "o", color=color, alpha=0.35, markersize=4
            )
        means = [np.mean(scores[name]) if name in scores else np.nan for name in (base, f"{base}+mlm")]
        ax.plot([0, 1], means, "-o", color=color, label=base, markersize=7)
    masked = [name for name in table.variant if name.endswith("masked captions")]
    for name in masked:
        ax.plot([1.08], [np.mean(scores.get(name, [np.nan]))], "D", color=plots.QUIET, label=name)
    ax.set(xticks=[0, 1], xticklabels=["without MLM", "with MLM"], xlim=(-0.3, 1.4), ylabel="R@1 on test (%)")
    title = "Small dots are seeds."
    for row in table[(table.variant == "sdm+id") & (table.reference == "sdm+id+mlm")].itertuples():
        if not np.isnan(row.R1_gain):  # the reference has MLM: what it adds is the gain with the other sign
            added = f"{-row.R1_gain:+.1f} [{-row.R1_gain_high:.1f}, {-row.R1_gain_low:.1f}]"
            title = f"MLM adds {added} to SDM + ID (95 % interval). {title}"
    ax.set_title(title, fontsize=11)
    ax.legend(frameon=False)
    ax.grid(axis="y", color=plots.FAINT)


def _near_twins(table: DataFrame, hard: DataFrame, finished: DataFrame, ax: Axes) -> None:
    """Gains over the reference for all captions and for the hard ones."""
    both = pd.concat([table.assign(queries="all"), hard.assign(queries="hard")])
    plots.gain_dots(both[both.variant != both.reference], hue="queries", ax=ax)
    ax.set_title(f"Gain over {table.reference.iloc[0]}, 95 % intervals", fontsize=11)


def _learning(table: DataFrame, hard: DataFrame, finished: DataFrame, ax: Axes) -> None:
    """R@1 on the split that selected, over the steps, averaged over the seeds."""
    curves = []
    for row in finished[finished.status.isin(DONE)].itertuples():
        history = committed.load(row.path)["history"]
        column = next((name for name in ("val_R1", "test_R1") if name in history), None)
        if column:
            curves.append(history[["step"]].assign(val_R1=history[column], variant=row.variant))
    if curves:
        means = pd.concat(curves).groupby(["variant", "step"], sort=False, as_index=False).val_R1.mean()
        plots.metric_curve(means, metric="val_R1", hue="variant", ax=ax)
        ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))  # outside: no line below it
    ax.set_title("What is the pretrained start worth?", fontsize=11)


def _cost(table: DataFrame, hard: DataFrame, finished: DataFrame, ax: Axes) -> None:
    """Gain in R@1 against the seconds of a training step."""
    for row, color in zip(table.itertuples(), plots.PALETTE):
        gain, low, high = (0.0 if np.isnan(end) else end for end in (row.R1_gain, row.R1_gain_low, row.R1_gain_high))
        ax.errorbar(row.step_seconds, gain, yerr=[[max(gain - low, 0)], [max(high - gain, 0)]], fmt="o", color=color,
                    capsize=3)  # fmt: skip
        ax.annotate(row.variant, (row.step_seconds, gain), xytext=(7, 5), textcoords="offset points", fontsize=10)
    ax.axhline(0, color=plots.QUIET, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    ax.margins(x=0.3)
    ax.set(xlabel="seconds per training step, measured alone", ylabel="R@1 gained (percentage points)")
    ax.set_title(f"Gain over {table.reference.iloc[0]} and its cost, 95 % intervals", fontsize=11)
    ax.grid(color=plots.FAINT)


def _seed_scores(finished: DataFrame) -> dict[str, list[float]]:
    """Variant → R@1 on test of each of its seeds."""
    scores: dict[str, list[float]] = {}
    for row in finished[finished.status.isin(DONE)].itertuples():
        scores.setdefault(row.variant, []).append(float(committed.load(row.path)["queries"].R1.mean()))
    return scores


PICTURES: Mapping[str, Callable[[DataFrame, DataFrame, DataFrame, Axes], None]] = {
    "rq1": _losses,
    "rq2": _near_twins,
    "rq3": _learning,
    "rq4": _cost,
}
