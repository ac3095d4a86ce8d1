"""A grid's finished runs → one table with intervals, a verdict in words, and what each variant costs."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from pandas import DataFrame, Series

from irra_core.evaluation import METRICS
from irra_core.metrics import bootstrap_interval
from irra_core.recipes import Recipe
from irra_core.released.published import published
from irra_core.settings import unknown
from irra_core.studies import committed
from irra_core.studies.committed import DONE
from irra_core.studies.sizes import DRAWS
from irra_core.synthetic.people import is_rendered, twin_pids


def compare(finished: DataFrame, reference: str, hard: bool | Bool[np.ndarray, " queries"] = False) -> DataFrame:
    """The scores of each variant on test beside the reference: a row a variant, in the plan's order.

    finished: what `run_all` gave. Columns: `variant, reference, status, seeds`; each score in per cent as the mean over
    the seeds with its `_sd`; `R1_gain`, `mAP_gain` over the reference with `_low` and `_high`, the 95 % interval over
    seeds and identities, paired over the seeds that both have; `parameters` (all are trained). `hard`
    keeps the queries whose person has a near-twin in the gallery, or those marked in an array of one truth a
    query. Where nothing finished, or no query is hard, the row's numbers are NaN and its status says why. Raises
    ValueError for an unknown reference, and for runs on different queries.
    """
    names = list(dict.fromkeys(finished.variant))
    if reference not in names:
        raise unknown("reference", reference, names)
    loaded = {name: _variant_runs(finished[finished.variant == name], hard) for name in names}
    rows = []
    for name in names:
        found, mine = loaded[name], finished[finished.variant == name]
        row = {"variant": name, "reference": reference, "status": _status(mine, found), "seeds": len(found)}
        if found:
            row |= _means(found) | _gains(found, loaded[reference], f"{name} and {reference}")
            row["parameters"] = committed.load(mine[mine.status.isin(DONE)].path.iloc[0])["parameters"]
        rows.append(row)
    scored = [f"{score}{end}" for score in METRICS for end in ("", "_sd")]
    gained = [f"{score}_gain{end}" for score in ("R1", "mAP") for end in ("", "_low", "_high")]
    columns = ["variant", "reference", "status", "seeds", *scored, *gained, "parameters"]
    return DataFrame(rows).reindex(columns=columns)


def _variant_runs(rows: DataFrame, hard: bool | np.ndarray) -> dict[int, DataFrame]:
    """Seed → the queries of its finished run, the hard ones alone where so asked; none where there is no such query."""
    found = {}
    for row in rows[rows.status.isin(DONE)].itertuples():
        queries = committed.load(row.path)["queries"]
        if isinstance(hard, np.ndarray):
            queries = queries[hard]
        elif hard:
            queries = queries[queries.hard]
        if len(queries):
            found[row.seed] = queries
    return found


def _status(rows: DataFrame, found: Mapping[int, DataFrame]) -> str:
    """What became of a variant, in a few words."""
    done, total = rows.status[rows.status.isin(DONE)], len(rows)
    if len(done) and not found:
        return "not available: no query is marked as hard"
    name = " and ".join(sorted(set(done), reverse=True)) if len(done) == total else "finished"
    said = name if len(done) == total else f"{len(done)} of {total} finished" if len(done) else "not run"
    reasons = list(dict.fromkeys(error for error in rows.error if error))
    return f"{said}: {'; '.join(reasons)}" if reasons else said


def _means(found: Mapping[int, DataFrame]) -> dict[str, float]:
    """Each score's mean over the seeds and its standard deviation (NaN for one seed)."""
    row = {}
    for score, column in METRICS.items():
        values = [queries[column].mean() for queries in found.values()]
        row[score] = float(np.mean(values))
        row[f"{score}_sd"] = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
    return row


def _gains(found: Mapping[int, DataFrame], base: Mapping[int, DataFrame], names: str) -> dict[str, float]:
    """R1 and mAP over the reference's, each with its interval, on the seeds that both have."""
    changed = list(_changes(found, base, names).values())
    if not changed:
        return {}
    row = {}
    for score in ("R1", "mAP"):
        values = np.stack([queries[METRICS[score]].to_numpy(dtype=np.float64) for queries in changed])
        low, high = bootstrap_interval(values, changed[0].pid.to_numpy(), DRAWS)
        row |= {f"{score}_gain": float(values.mean()), f"{score}_gain_low": low, f"{score}_gain_high": high}
    return row


def _changes(found: Mapping[int, DataFrame], base: Mapping[int, DataFrame], names: str) -> dict[int, DataFrame]:
    """Seed → the queries with their `pid`, R1 and AP less those of the reference, for the seeds that both have."""
    seeds = [seed for seed in found if seed in base]
    pids = base[seeds[0]].pid if seeds else None
    if any(not np.array_equal(side[seed].pid, pids) for seed in seeds for side in (found, base)):
        raise ValueError(f"{names} have different queries: compare runs on the same data")
    columns = [METRICS["R1"], METRICS["mAP"]]
    return {seed: (found[seed][columns] - base[seed][columns]).assign(pid=found[seed].pid) for seed in seeds}


def compare_drops(finished: DataFrame, name: str, other: str, start: str = "0 % wrong") -> DataFrame:
    """How much less `name` loses than `other` between `start` and each other condition of `name`: a row each.

    finished: what `run_all` gave for variants that are named "NAME, CONDITION", as in the study noise. Columns:
    `condition`, `seeds` that all four variants have, and `R1_gain`, `mAP_gain` with `_low` and `_high`: the change of
    `name` from `start` to the condition less that of `other`, in percentage points, with the 95 % interval over seeds
    and identities, paired. Above 0 `name` loses less. Without a seed a row's numbers are NaN.
    """
    runs = {each: _variant_runs(finished[finished.variant == each], False) for each in dict.fromkeys(finished.variant)}
    rows = []
    for condition in [each.removeprefix(f"{name}, ") for each in runs if each.startswith(f"{name}, ")]:
        if condition == start:
            continue
        ours, theirs = (
            _changes(runs.get(f"{each}, {condition}", {}), runs.get(f"{each}, {start}", {}), f"the runs of {each}")
            for each in (name, other)
        )
        seeds = sum(seed in theirs for seed in ours)
        rows.append({"condition": condition, "seeds": seeds} | _gains(ours, theirs, f"{name} and {other}"))
    gained = [f"{score}_gain{end}" for score in ("R1", "mAP") for end in ("", "_low", "_high")]
    return DataFrame(rows, columns=["condition", "seeds", *gained])


def selection_inflation(finished: DataFrame, on_val: str, on_test: str) -> DataFrame:
    """What picking weights on test adds to R@1 on test, a row a seed: the two variants train alike and pick otherwise.

    Columns: `seed`, `evaluations` to pick from, `val_step` and `test_step` that were picked, the test R@1 of both
    (`picked_on_val, picked_on_test`) and `inflation`, their difference in percentage points. It cannot be negative.
    """
    ended = finished[finished.status.isin(DONE)]
    paths = {name: ended[ended.variant == name].set_index("seed").path for name in (on_val, on_test)}
    rows = []
    for seed in [seed for seed in paths[on_val].index if seed in paths[on_test].index]:
        val, test = (committed.load(paths[name][seed]) for name in (on_val, on_test))
        steps = [run["metrics"]["selected"]["step"] for run in (val, test)]
        scores = test["history"].set_index("step").test_R1[steps].tolist()
        rows.append((seed, len(test["history"]), *steps, *scores, scores[1] - scores[0]))
    columns = ["seed", "evaluations", "val_step", "test_step", "picked_on_val", "picked_on_test", "inflation"]
    return DataFrame(rows, columns=columns)


def hard_queries(annotations: DataFrame, made: Recipe, share: float = 0.1) -> Bool[np.ndarray, " queries"]:
    """Which test captions are hard, a truth a query in the order of queries.csv.

    Of rendered people those whose person has a near-twin. Of others the given share that resembles a caption of another
    test person most: the largest cosine of their words, each weighted by log(captions / captions that hold it).
    """
    test = annotations[annotations.split == "test"].dropna(subset="caption").reset_index(drop=True)
    if is_rendered(annotations, made):
        return np.isin(test.pid.to_numpy(), list(twin_pids(annotations, made)))
    likeness = _likeness(list(test.caption), test.pid.to_numpy())
    return likeness >= np.quantile(likeness, 1 - share)


def _likeness(
    captions: list[str], pids: Int[np.ndarray, " captions"], chunk: int = 256
) -> Float[np.ndarray, " captions"]:
    """Of each caption the largest cosine of its weighted words to a caption of another person."""
    words = [set(re.findall(r"\w+", caption.lower())) for caption in captions]
    column = {word: place for place, word in enumerate(sorted(set().union(*words)))}
    holds = np.zeros((len(captions), len(column)), dtype=np.float32)
    for row, found in enumerate(words):
        holds[row, [column[word] for word in found]] = 1
    weighted = holds * np.log(len(captions) / holds.sum(0))
    weighted /= np.maximum(np.linalg.norm(weighted, axis=1, keepdims=True), 1e-12)
    largest = []
    for start in range(0, len(captions), chunk):
        cosine = weighted[start : start + chunk] @ weighted.T
        largest.append(np.where(pids[start : start + chunk, None] == pids, -1.0, cosine).max(1))
    return np.concatenate(largest)


def verdict(row: Series | Mapping[str, Any]) -> str:
    """What a row of `compare` says about R@1, computed from its interval, in percentage points."""
    name, reference = row["variant"], row["reference"]
    if name == reference:
        return f"{name} is the reference" + ("" if row["seeds"] else f", {row['status']}: nothing can be compared")
    if not row["seeds"]:
        return f"{name}: {row['status']}"
    gain, low, high = (row[f"R1_gain{end}"] for end in ("", "_low", "_high"))
    if np.isnan(gain):
        return f"{name}: no run of {reference} with the same seed to compare with"
    if low == high == 0:
        return f"the same: {name} and {reference} give every query the same result"
    caution = " (one seed: other seeds may differ more)" if row["seeds"] == 1 else ""
    if low > 0:
        return f"{name} beats {reference} by {gain:.1f} [{low:.1f}, {high:.1f}]{caution}"
    if high < 0:
        return f"{reference} beats {name} by {-gain:.1f} [{-high:.1f}, {-low:.1f}]{caution}"
    return f"undecided: {name} against {reference} {gain:+.1f} [{low:.1f}, {high:.1f}]{caution}"


def power(table: DataFrame) -> str:
    """A sentence: how wide the 95 % intervals of the gains in R@1 of a table of `compare` are, and what that means."""
    compared = table[(table.variant != table.reference) & table.R1_gain.notna()]
    half = ((compared.R1_gain_high - compared.R1_gain_low) / 2).tolist()
    if not half:
        return "Nothing was compared, so nothing is decided."
    ends = f"±{min(half):.1f}" if f"{min(half):.1f}" == f"{max(half):.1f}" else f"±{min(half):.1f} to ±{max(half):.1f}"
    seeds = int(compared.seeds.min())
    alone = " One seed each: how much other seeds differ is not known." if seeds == 1 else ""
    return f"Intervals of gains in R@1: {ends} points; a smaller difference stays undecided.{alone}"


def readable(table: DataFrame) -> DataFrame:
    """A table of `compare` for the eye: `53.6 ± 0.8`, gains as `+2.1 [0.6, 3.7]`, what is missing as its status."""
    text = DataFrame({"": table.variant})
    for score in METRICS:
        text[f"{score} (%)"] = [_plus_minus(*pair) for pair in zip(table[score], table[f"{score}_sd"])]
    for score in ("R1", "mAP"):
        own = (table.variant == table.reference) & (table.seeds > 0)
        text[f"{score} against {table.reference.iloc[0]}"] = np.where(own, "reference", _gained(table, score))
    text["parameters (M)"] = [_number(value / 1e6, "{:.2f}") for value in table.parameters]
    if "step_seconds" in table:
        text["s per step"] = [_number(value, "{:.3f}") for value in table.step_seconds]
    if "inference_ms" in table:
        text["inference (ms a pair)"] = [_number(value, "{:.2f}") for value in table.inference_ms]
    short = [status.split(":")[0] for status in table.status]  # the reasons are in the table of runs
    text["seeds"] = [_seeds(seeds, said) for seeds, said in zip(table.seeds, short)]
    text.loc[table.seeds == 0, "R1 (%)"] = [said for seeds, said in zip(table.seeds, short) if not seeds]
    return text.set_index("")


def readable_drops(table: DataFrame, name: str, other: str) -> DataFrame:
    """A table of `compare_drops` for the eye: `+2.1 [0.6, 3.7]`, above 0 where `name` loses less than `other`."""
    text = {f"{score}, {name} less {other}": _gained(table, score) for score in ("R1", "mAP")}
    return DataFrame(text | {"seeds": table.seeds.tolist()}, index=table.condition.tolist())


def _gained(table: DataFrame, score: str) -> list[str]:
    """The gains of a table with their intervals as text; "" where there is none."""
    ends = (table[f"{score}_gain{end}"] for end in ("", "_low", "_high"))
    return ["" if np.isnan(gain) else f"{gain:+.1f} [{low:.1f}, {high:.1f}]" for gain, low, high in zip(*ends)]


def _seeds(seeds: int, said: str) -> str:
    """How many seeds a row has, and whether their runs are committed ones, or its status."""
    return str(seeds) if said == "finished" else f"{seeds} ({said})" if said.endswith("committed") else said


def _plus_minus(mean: float, sd: float) -> str:
    return _number(mean, "{:.1f}") + ("" if np.isnan(sd) else f" ± {sd:.1f}")


def _number(value: float, form: str) -> str:
    return "" if np.isnan(value) else form.format(value)


def beside_published(table: DataFrame, planned: DataFrame) -> DataFrame:
    """The published ablations of the plan's data set (CUHK-PEDES for rendered people) beside this study's variants.

    Columns: the published `source, dataset, method, R1, params_m, forward_ms`, and `here`, the R1 of the variant with
    the same losses and interaction encoder as text; "" where the study has none.
    """
    made = planned.drop_duplicates("variant").set_index("variant").recipe
    dataset = made.iloc[0].dataset
    rows = published()
    rows = rows[rows.table.isin(["ablation", "interaction"])]
    rows = rows[rows.dataset == (dataset if (rows.dataset == dataset).any() else "cuhk")]
    measured = table.set_index("variant")
    here = []
    for row in rows.itertuples():
        alike = [
            name
            for name, each in made.items()
            if each.losses == row.losses and ("mlm" not in each.loss_names or each.interaction == row.interaction)
        ]
        found = measured.loc[alike[0]] if alike else None
        here.append("" if found is None else _plus_minus(found.R1, found.R1_sd) or "not run")
    return rows[["source", "dataset", "method", "R1", "params_m", "forward_ms"]].assign(here=here).fillna("")
