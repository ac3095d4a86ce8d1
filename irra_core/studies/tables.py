"""Run folders and metrics → tables: all runs, a run beside the published results, its gains over where it began."""

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pandas import DataFrame

from irra_core.evaluation import METRICS, readable, scores_table
from irra_core.recipes import Recipe
from irra_core.released.published import published
from irra_core.runs import load_run
from irra_core.settings import reports_root


def collect(root: str | Path | None = None) -> DataFrame:
    """Every finished run below the reports folder, one row per run: dataset, run, the recipe's fields, the test scores.

    A folder that cannot be read is left out, with a warning; `attrs["broken"]` is path → reason.
    """
    rows, broken = [], {}
    for file in files_below(reports_root(root), "/metrics.json"):
        try:
            rows.append(_row(file.parent))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            broken[str(file.parent)] = str(error)
            warnings.warn(f"a run is left out: {error}", stacklevel=2)
    table = DataFrame(rows)
    table.attrs["broken"] = broken
    return table


def files_below(root: str | Path, ending: str) -> list[Path]:
    """The files with this ending in a folder, at any depth, also behind linked folders; each once, in sorted order.

    A folder that is there by itself and by a link, such as `latest`, has the path without the link.
    """
    found, seen, plain, linked = [], set(), [Path(root)], []
    while plain or linked:
        folder = plain.pop() if plain else linked.pop(0)
        if (real := os.path.realpath(folder)) in seen or not folder.is_dir():
            continue
        seen.add(real)
        for entry in sorted(folder.iterdir()):
            if entry.is_dir():
                (linked if entry.is_symlink() else plain).append(entry)
            elif f"/{entry.name}".endswith(ending):
                found.append(entry)
    return sorted(found)


def _row(path: Path) -> dict[str, Any]:
    """A run's row in the table of all runs."""
    run = load_run(path)
    row = {"dataset": path.parent.name, "run": path.name, "path": str(path)}
    row |= {name: value for name, value in json.loads(run["recipe"].to_json()).items() if name != "dataset"}
    for name, (value, low, high) in run["metrics"].get("text_to_image", {}).items():
        row |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return row


def beside_published(metrics: Mapping[str, Any], recipe: Recipe) -> DataFrame:
    """A run's test scores with their intervals, and its data set's published rows with the difference, as text."""
    names = {"text_to_image": "this run", "pretrained": "its CLIP before fine-tuning", "untrained": "random weights"}
    measured = {label: metrics[name] for name, label in names.items() if name in metrics}
    if "hard_negatives" in metrics:
        measured["this run, people with a near-twin only"] = metrics["hard_negatives"]["text_to_image"]
    table = readable(scores_table(measured))
    if "ceiling_R1" in metrics:
        table.loc["the best that the captions allow", "R1 (%)"] = f"{metrics['ceiling_R1']:.1f}"
    rows = published()
    for row in rows[(rows.table == "results") & (rows.dataset == recipe.dataset)].itertuples():
        label = f"published: {row.method} ({row.source})"
        pairs = [(getattr(row, name), metrics["text_to_image"][name][0]) for name in METRICS]
        table.loc[label] = [f"{theirs:.1f} (this run {ours - theirs:+.1f})" for theirs, ours in pairs]
    return table.fillna("")


def gains(metrics: Mapping[str, Any]) -> DataFrame:
    """The trained model's paired gains on the same captions over the models it began from, as text."""
    names = {"gain_over_pretrained": "over its CLIP before fine-tuning", "gain_over_untrained": "over random weights"}
    return readable(scores_table({label: metrics[name] for name, label in names.items() if name in metrics}))


def seconds_per_step(run: Mapping[str, Any]) -> float:
    """Training seconds per step of a run, as load_run gives it."""
    return run["machine"]["seconds"]["training"] / int(run["history"].step.iloc[-1])
