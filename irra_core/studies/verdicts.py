"""The primary hypotheses and their runs → paired gains, Holm-adjusted p-values, verdicts, the power reached."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from pandas import DataFrame

from irra_core import runs
from irra_core.evaluation import METRICS
from irra_core.metrics import INTERVAL, bootstrap_means
from irra_core.recipes import RENDERED, Recipe
from irra_core.settings import reports_root
from irra_core.studies import committed, transfer
from irra_core.studies.grid import plan, plan_domains
from irra_core.studies.sizes import DRAWS, MORE_SEEDS, sized
from irra_core.studies.tables import files_below

LEVEL = 0.05  # of the five verdicts together


@dataclass(frozen=True)
class Hypothesis:
    """One question's primary hypothesis: `variant` has a higher score than `reference`.

    `planned` is the half-width of the 95 % interval that the design asks for, in percentage points. In the study
    `transfer` variant and reference are what a model was trained on: a data set's name, BEFORE (the CLIP before
    fine-tuning), or ELSEWHERE (each other data set); the score is the mean over all data sets that it was tested on.
    """

    study: str
    claim: str
    variant: str
    reference: str
    planned: float
    metric: str = "R1"


ELSEWHERE = "another data set"
PRIMARY: dict[str, Hypothesis] = {
    "rq1": Hypothesis("rq1", "MLM with its interaction encoder adds to SDM + ID", "sdm+id+mlm", "sdm+id", 0.8),
    "rq2": Hypothesis("rq2", "SDM aligns better than InfoNCE", "sdm", "itc", 1.2),
    "rq3": Hypothesis("rq3", "pretrained encoders beat random ones", "both pretrained", "from scratch", 1.2),
    "rq4": Hypothesis("rq4", "cross-attention beats co-attention", "cross", "co", 0.8),
    "rq5": Hypothesis("transfer", "fine-tuning on another data set beats none", ELSEWHERE, transfer.BEFORE, 1.2),
}


def verdict_table(
    size: str = "full", primary: Mapping[str, Hypothesis] = PRIMARY, root: Path | None = None
) -> DataFrame:
    """One row per question, from finished runs of the reports folder and committed ones, without data or training.

    Committed runs are below `root` (default: `committed.committed_root()`).

    Columns: `question, claim, variant, reference, metric, gain, low, high, p, p_holm, verdict, half_width, planned,
    seeds, people, queries, hours, command`. `gain` is in percentage points, paired over captions and seeds, `low` and
    `high` its unadjusted 95 % interval (`paired_bootstrap`), `half_width` half of its width, beside the `planned` one.
    `p_holm` adjusts over all hypotheses; one without runs has the verdict "not run" and counts as p 1. Before all seeds
    have run that the comparison needs (see MORE_SEEDS and `more_runs`), the verdict is their number. `hours` are those
    of the question's runs added up; questions share runs.
    """
    known = _finished_here()
    rows = [_row(name, each, size, known, root) for name, each in primary.items()]
    adjusted = holm([1.0 if np.isnan(row["p"]) else row["p"] for row in rows])
    for row, p in zip(rows, adjusted):
        row["p_holm"] = float("nan") if np.isnan(row["p"]) else p
        if np.isnan(row["p"]):
            row["verdict"] = "not run"
        elif row["seeds"] < row["needed"]:
            row["verdict"] = f"{row['seeds']} of {row['needed']} seeds"
        else:
            row["verdict"] = decided(row["gain"], p)
    columns = ["question", "claim", "variant", "reference", "metric", "gain", "low", "high", "p", "p_holm", "verdict"]
    columns += ["half_width", "planned", "seeds", "people", "queries", "hours", "command"]
    return DataFrame(rows).reindex(columns=columns)


def decided(gain: float, p: float) -> str:
    """The verdict on "the variant is better": supported, contradicted (it is worse) or undecided."""
    if p >= LEVEL:
        return "undecided"
    return "supported" if gain > 0 else "contradicted"


def _finished_here() -> dict[str, str]:
    """`run_key` → folder of each finished run on rendered people below the reports folder."""
    found = {}
    for file in files_below(reports_root(), f"/{runs.WEIGHTS}"):
        if not runs.finished(file.parent):
            continue
        run = runs.load_run(file.parent)
        recipe, tested = run["recipe"], run["metrics"].get("identities")
        if recipe.dataset in RENDERED and committed.tested_people(recipe) in (None, tested):
            found.setdefault(committed.run_key(recipe), str(file.parent))
    return found


def more_runs(size: str = "full", primary: Mapping[str, Hypothesis] = PRIMARY, root: Path | None = None) -> DataFrame:
    """The runs that the primary comparisons need beside those of `grid.plan_all`, as that gives them (MORE_SEEDS)."""
    known = _finished_here()
    parts = [_on_top(name, asked, size, known, root).assign(study=asked.study) for name, asked in primary.items()]
    return pd.concat(parts, ignore_index=True)[["study", "variant", "seed", "recipe"]]


def with_more_seeds(planned: DataFrame, study: str, size: str = "full", root: Path | None = None) -> DataFrame:
    """The plan of a study in a size with the runs of `more_runs` that it needs; any other plan as it is."""
    for name, asked in PRIMARY.items():
        if asked.study == study and set(planned.recipe) == set(_planned(asked, size, sized(size)["seeds"]).recipe):
            return pd.concat([planned, _on_top(name, asked, size, _finished_here(), root)], ignore_index=True)
    return planned


def _on_top(name: str, asked: Hypothesis, size: str, known: Mapping[str, str], root: Path | None) -> DataFrame:
    """Both sides' runs of the seeds beyond those of the size."""
    planned = _planned(asked, size, _row(name, asked, size, known, root)["needed"])
    return planned[planned.seed >= sized(size)["seeds"]]


def _row(name: str, asked: Hypothesis, size: str, known: Mapping[str, str], root: Path | None) -> dict:
    """A question's row without what depends on the other questions; `needed` is the number of seeds for a verdict."""
    always, if_wide = MORE_SEEDS.get(size, (0, 0))
    seeds = sized(size)["seeds"] + always
    row = _with_seeds(asked, size, seeds, known, root)
    if if_wide and row.get("seeds") == seeds and row["half_width"] > asked.planned:
        seeds += if_wide
        row = _with_seeds(asked, size, seeds, known, root)
    row |= {"question": name, "claim": asked.claim, "variant": asked.variant, "reference": asked.reference}
    row |= {"metric": asked.metric, "planned": asked.planned, "needed": seeds}
    notebook = "transfer.ipynb" if asked.study == "transfer" else "ablation.ipynb"
    chosen = "" if asked.study == "transfer" else f" -p study {asked.study}"
    row["command"] = f"papermill notebooks/{notebook} out.ipynb{chosen}{'' if size == 'full' else f' -p size {size}'}"
    return row


def _with_seeds(asked: Hypothesis, size: str, seeds: int, known: Mapping[str, str], root: Path | None) -> dict:
    """What the runs of these seeds say: gain, interval, p, their numbers, and the hours of the study's runs."""
    planned = _planned(asked, size, seeds)
    found = planned.assign(path=[_folder(recipe, known, root) for recipe in planned.recipe])
    have = found.dropna(subset="path")
    paired = _transferred(asked, have) if asked.study == "transfer" else _compared(asked, have)
    row = {"hours": sum(committed.run_seconds(path) for path in dict.fromkeys(have.path)) / 3600}
    if paired is None:
        return row | dict.fromkeys(("gain", "low", "high", "p", "half_width"), float("nan"))
    values, pids = paired
    gain, low, high, p = paired_bootstrap(values, pids)
    row |= {"gain": gain, "low": low, "high": high, "p": p, "half_width": (high - low) / 2}
    return row | {"seeds": len(values), "people": len(np.unique(pids)), "queries": len(pids)}


def _planned(asked: Hypothesis, size: str, seeds: int) -> DataFrame:
    """The study's runs; of seeds beyond those of its size only the two sides that are compared."""
    if asked.study == "transfer":
        return plan_domains(size, seeds=seeds)
    planned = plan(asked.study, **sized(size, seeds=seeds))
    return planned[(planned.seed < sized(size)["seeds"]) | planned.variant.isin([asked.variant, asked.reference])]


def _folder(recipe: Recipe, known: Mapping[str, str], root: Path | None) -> str | None:
    """The folder of a run that is finished here, else committed."""
    here, there = known.get(committed.run_key(recipe)), committed.find(recipe, root=root)
    return here or (None if there is None else str(there))


Paired = tuple[Float[np.ndarray, "seeds queries"], Int[np.ndarray, " queries"]]


def _compared(asked: Hypothesis, have: DataFrame) -> Paired | None:
    """The gain of each query for each seed that both variants have, and the queries' people."""
    sides = [have[have.variant == name].set_index("seed").path for name in (asked.variant, asked.reference)]
    seeds = [seed for seed in sides[0].index if seed in sides[1].index]
    values, pids = [], None
    for seed in seeds:
        ours, theirs = (committed.load(side[seed])["queries"] for side in sides)
        values.append((ours[METRICS[asked.metric]] - theirs[METRICS[asked.metric]]).to_numpy(dtype=np.float64))
        if pids is not None and not np.array_equal(ours.pid, pids):
            raise ValueError(f"{asked.study}: the seeds {seeds} were asked different queries")
        pids = ours.pid.to_numpy()
    return (np.stack(values), pids) if values else None


def _transferred(asked: Hypothesis, have: DataFrame) -> Paired | None:
    """As `_compared` for runs on other data sets: per test set the mean over what was trained on, all sets in a row."""
    names = list(dict.fromkeys(have.variant))
    seeds = sorted(set.intersection(*(set(have[have.variant == name].seed) for name in names))) if names else []
    values, people, offset = [], [], 0
    for test in names:
        column = METRICS[asked.metric]
        ours, theirs = ([_asked(side, test, seed, have) for seed in seeds] for side in (asked.variant, asked.reference))
        if not seeds or any(table is None for table in (*ours, *theirs)):
            return None
        values.append(np.stack([(a[column] - b[column]).to_numpy(np.float64) for a, b in zip(ours, theirs)]))
        pids = np.unique(ours[0].pid, return_inverse=True)[1]
        people.append(pids + offset)
        offset += int(pids.max()) + 1
    return (np.concatenate(values, axis=1), np.concatenate(people)) if len(values) > 1 else None


def _asked(side: str, test: str, seed: int, have: DataFrame) -> DataFrame | None:
    """What the runs of a side got on a test set with one seed: the mean over the runs, query by query."""
    mine = have[have.seed == seed].set_index("variant").path
    if side == transfer.BEFORE:
        first = have[have.variant == test].sort_values("seed").path.iloc[0]
        files = [transfer.results_file(first, test, before=True)]
    else:
        trained = [name for name in mine.index if (name != test if side == ELSEWHERE else name == side)]
        files = [transfer.results_file(mine[name], test) for name in trained if name != test]
        if test in trained:
            return committed.load(mine[test])["queries"]
    if not files or not all(file.is_file() for file in files):
        return None
    tables = [committed.read_ranks(file) for file in files]
    return tables[0].assign(**{column: sum(t[column] for t in tables) / len(tables) for column in METRICS.values()})


def paired_bootstrap(
    values: Float[np.ndarray, "seeds queries"], pids: Int[np.ndarray, " queries"]
) -> tuple[float, float, float, float]:
    """Mean of paired gains, low and high end of its 95 % interval, and the two-sided p-value of "no gain".

    One row per seed, one column per query. A draw of the bootstrap (`metrics.bootstrap_means`) takes people with all
    their queries, and seeds, both with replacement. p inverts the interval: twice the smaller of the two shares of
    draws on either side of 0, the observed gain counted as one draw more, at most 1. So p < 0.05 where the interval
    excludes 0. Draws of 3 seeds see two thirds of their variance, of 5 four fifths: p is too small where seeds differ
    more than people do.
    """
    means = bootstrap_means(values[..., None], pids, draws=DRAWS)[:, 0]
    low, high = np.quantile(means, INTERVAL)
    beyond = min(int((means <= 0).sum()), int((means >= 0).sum()))
    return float(values.mean()), float(low), float(high), min(1.0, 2 * (beyond + 1) / (DRAWS + 1))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (Scand. J. Statist. 6, 1979): the chance of any false verdict stays below the level."""
    order = np.argsort(p, kind="stable")
    scaled = np.asarray(p, dtype=float)[order] * np.arange(len(p), 0, -1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return adjusted.tolist()


def to_markdown(table: DataFrame) -> str:
    """The table of `verdict_table` in Markdown: verdict, figure with interval, power reached and planned, cost."""
    head = ["question", "hypothesis", "verdict", "gain [95 % interval], points", "p, Holm", "half-width, planned"]
    head += ["seeds × people × captions", "hours of runs", "command"]
    lines = [head, ["---"] * len(head)]
    for row in table.itertuples():
        ran = row.verdict != "not run"
        metric = {"R1": "R@1", "R5": "R@5", "R10": "R@10"}.get(row.metric, row.metric)
        cells = [row.question, f"{row.claim} ({metric}: {row.variant} > {row.reference})", row.verdict]
        cells += [f"{row.gain:+.2f} [{row.low:.2f}, {row.high:.2f}]" if ran else "", f"{row.p_holm:.4f}" if ran else ""]
        cells += [f"{row.half_width:.2f}, {row.planned:.2f}" if ran else f"–, {row.planned:.2f}"]
        cells += [f"{row.seeds:.0f} × {row.people:,.0f} × {row.queries:,.0f}" if ran else "", f"{row.hours:.1f}"]
        lines.append([*cells, f"`{row.command}`"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(to_markdown(verdict_table(*sys.argv[1:2])))
