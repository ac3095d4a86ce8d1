"""Runs trained on each data set + the tables of all → the scores of every pair, with leaked photos and without."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pandas import DataFrame

from irra_core import evaluation
from irra_core.analysis.leaks import SAME, nearest, pairs, photo_hashes, without
from irra_core.annotations import DATA_SETS, photo_table
from irra_core.backbone import build_model
from irra_core.checkpoints import load_checkpoint
from irra_core.evaluation import METRICS, Interval, evaluate
from irra_core.images import image_array
from irra_core.metrics import bootstrap_interval
from irra_core.recipes import RENDERED
from irra_core.released.published import published
from irra_core.runs import WEIGHTS, data_digest
from irra_core.settings import data_root, runs_root
from irra_core.studies import committed
from irra_core.studies.sizes import domains

REAL = ("cuhk", "icfg", "rstp")
BEFORE = "CLIP before fine-tuning"
PAIR = ["train", "test"]
Hashed = Mapping[tuple[str, str], tuple[DataFrame, np.ndarray]]  # data set, split → a row a photo, hashes


def present(dataset: str, root: str | Path | None = None) -> bool:
    """True when a data set can be had: its annotation file lies below the data root, or it is rendered on first use."""
    source = DATA_SETS[dataset]
    return source.paper is None or (data_root(root) / source.folder / source.file).is_file()


def transfer_domains(root: str | Path | None = None, size: str = "full") -> tuple[str, ...]:
    """The three real data sets if at least one is below the data root, else the three rendered ones of that size."""
    return REAL if any(present(name, root) for name in REAL) else domains(size)


def transfer_folder(datasets: Iterable[str]) -> Path:
    """Where the matrix of these data sets is kept, as studies of one data set are in its own folder."""
    return runs_root() / "+".join(datasets) / "studies" / "transfer"


def hashed_photos(tables: Mapping[str, DataFrame], progress=None) -> Hashed:
    """The photos of train and test of each data set with their perceptual hashes, by name and split."""
    found = {}
    for name, table in tables.items():
        photos = photo_table(table)
        for split in ("train", "test"):
            rows = photos[photos.split == split].reset_index(drop=True)
            found[name, split] = rows, photo_hashes(rows.path, progress)
    return found


def leaked_photos(hashed: Hashed, distance: int = SAME) -> DataFrame:
    """Photos in train of one data set and test of another (or the same): `leaks.same_photos` after `train, test`."""
    names = list(dict.fromkeys(name for name, _ in hashed))
    found = []
    for train in names:
        for test in names:
            (ours, our_bits), (theirs, their_bits) = hashed[train, "train"], hashed[test, "test"]
            listed = pairs(ours, theirs, our_bits, their_bits, distance)
            found.append(listed.assign(train=train, test=test)[[*PAIR, *listed.columns]])
    return pd.concat(found, ignore_index=True)


def nearest_photos(hashed: Hashed) -> DataFrame:
    """How near the nearest train photo of any data set comes to each test photo: columns `test, image_id, distance`."""
    train = np.concatenate([bits for (_, split), (_, bits) in hashed.items() if split == "train"])
    found = [
        DataFrame({"test": name, "image_id": rows.image_id, "distance": nearest(train, bits)})
        for (name, split), (rows, bits) in hashed.items()
        if split == "test"
    ]
    return pd.concat(found, ignore_index=True)


def transfer_queries(
    trained: DataFrame, tables: Mapping[str, DataFrame], leaked: DataFrame | None = None, progress=None
) -> DataFrame:
    """Every run asked the test captions of every data set: a row a query, with R1, R5, R10, AP and INP in per cent.

    trained: columns `train, seed, path` (of the run folder). `leaks` says whether leaked test photos and their
    captions were "kept" or "left out"; `query` counts a data set's test captions, so that runs can be paired. The CLIP
    that the runs began from is asked the same, once per data set, under the name BEFORE, with each run's seed.

    Results are stored in the run's folder, as `results_file` names them, and read from there the next time. A pair
    without stored results whose run has no weights here, as a committed one, is left out.
    """
    firsts = trained.sort_values("seed").drop_duplicates("train")
    jobs = [(run, test, False) for run in trained.itertuples() for test in tables]
    jobs += [(run, run.train, True) for run in firsts.itertuples() if run.train in tables]
    found = []
    for run, test, before in progress(jobs, desc="testing", unit="pair") if progress else jobs:
        here = None if leaked is None or before else leaked[(leaked.train == run.train) & (leaked.test == test)]
        gone = set() if here is None else set(here.test_image_id)
        for leaks in ("kept", "left out"):
            rows = _results(Path(run.path), test, tables[test], gone if leaks == "left out" else set(), before)
            if rows is None:
                continue
            seeds = sorted(set(trained.seed)) if before else [run.seed]
            parts = [rows.assign(train=BEFORE if before else run.train, test=test, seed=seed) for seed in seeds]
            found += [part.assign(leaks=leaks) for part in parts]
    columns = [*PAIR, "seed", "leaks", "query", "pid", "image_id", *METRICS.values()]
    return pd.concat(found, ignore_index=True)[columns] if found else DataFrame(columns=columns)


def results_file(path: str | Path, test: str, before: bool = False, data: str = "") -> Path:
    """Where the results of a run, or of the CLIP before it, on a data set's test captions are stored (see data_key)."""
    name = f"{'before-' if before else ''}{Path(test).stem[:60]}-{committed.data_key(test, data)}"
    return Path(path) / f"queries-{name}.csv.gz"


def _results(path: Path, test: str, table: DataFrame, gone: set[int], before: bool) -> DataFrame | None:
    """What each test caption got, stored or computed; `query` is its row in the table, the same without leaks."""
    run = committed.load(path)
    if before and run["recipe"].pretrained == "none":
        return None
    rest, recipe = without(table, gone) if gone else table, run["recipe"]
    queries = rest.index[rest.split == "test"]
    data = "" if test in RENDERED else data_digest(table, recipe)
    if run["recipe"].dataset == test and not before and not gone and len(run["queries"]) == len(queries):
        return run["queries"].assign(query=queries)
    file = results_file(path, test, before, data)
    if not gone and file.is_file() and len(stored := committed.read_ranks(file)) == len(queries):
        return stored.assign(query=queries)
    if not (path / WEIGHTS).is_file():
        return None
    model = build_model(recipe, 1) if before else load_checkpoint(path / WEIGHTS)[0]
    pixels = image_array(list(photo_table(table).path), *model.image_size).pixels
    found = evaluate(model, rest, "test", pixels=pixels, precision=recipe.precision).text_to_image
    if not gone:
        committed.write_ranks(file, found.assign(hard=False))
    return found.assign(query=queries)


def transfer_matrix(queries: DataFrame, datasets: Iterable[str], trained: DataFrame | None = None) -> DataFrame:
    """A row a pair of data sets and a way with leaks: `seeds, queries`, each score, its `_low` and `_high` in per cent.

    A score is the mean over the seeds; its 95 % interval comes from resampling seeds and identities together. A pair
    that was not run has seeds 0 and NaN. With `trained`, the CLIP that the runs began from is one more row a data set,
    where they keep its scores.
    """
    names, rows = tuple(datasets), []
    for leaks in ("kept", "left out"):
        for train in names:
            for test in names:
                chosen = queries[(queries.train == train) & (queries.test == test) & (queries.leaks == leaks)]
                rows.append({"train": train, "test": test, "leaks": leaks, **_cell(chosen)})
        for test in names if trained is not None else ():
            chosen = queries[(queries.train == BEFORE) & (queries.test == test) & (queries.leaks == leaks)]
            once = chosen[chosen.seed == chosen.seed.min()]  # the seeds have the same CLIP
            cell = _before(test, trained) if once.empty else _cell(once)
            rows.append({"train": BEFORE, "test": test, "leaks": leaks, **cell})
    return DataFrame(rows)


def _cell(queries: DataFrame) -> dict[str, Any]:
    """Seeds, queries and scores of one pair."""
    if queries.empty:
        return {"seeds": 0, "queries": 0} | _named(dict.fromkeys(METRICS, (np.nan,) * 3))
    return {"seeds": queries.seed.nunique(), "queries": queries["query"].nunique()} | _named(_scores(queries))


def _before(test: str, trained: DataFrame) -> dict[str, Any]:
    """The scores of the CLIP that a run on this data set began from, as the run keeps them."""
    for path in trained[trained.train == test].path:
        if "pretrained" in (metrics := committed.load(path)["metrics"]):
            return {"seeds": 1, "queries": metrics["queries"]} | _named(metrics["pretrained"])
    return _cell(DataFrame())


def _scores(queries: DataFrame) -> dict[str, Interval]:
    """Mean over the seeds and interval of each score. Raises ValueError where seeds were not asked the same queries."""
    pids = queries.drop_duplicates("query").sort_values("query").pid.to_numpy()
    found = {}
    for name, column in METRICS.items():
        values = queries.pivot(index="seed", columns="query", values=column).to_numpy(dtype=np.float64)
        if np.isnan(values).any():
            seeds = ", ".join(map(str, queries.seed.unique()))
            raise ValueError(f"the seeds {seeds} were asked different queries: compare runs on the same data")
        found[name] = (float(values.mean()), *bootstrap_interval(values, pids))
    return found


def _named(found: Mapping[str, Collection[float]]) -> dict[str, float]:
    """{R1: (value, low, high)} as {R1, R1_low, R1_high}."""
    return {f"{name}{end}": float(v) for name, cell in found.items() for end, v in zip(("", "_low", "_high"), cell)}


def transfer_losses(queries: DataFrame, datasets: Iterable[str], leaks: str = "kept") -> DataFrame:
    """What training on another data set costs: a row a pair, its scores less those of the test set's own runs, paired.

    The same queries are asked of runs with the same seed, so the interval (of seeds and identities) is that of the
    difference. `verdict` says it in words. Pairs that were not run are not compared.
    """
    chosen, rows, names = queries[queries.leaks == leaks], [], tuple(datasets)
    for test in names:
        own = chosen[(chosen.train == test) & (chosen.test == test)]
        for train in names:
            other = chosen[(chosen.train == train) & (chosen.test == test)]
            difference = _difference(other, own)
            if train != test and len(difference):
                gained = _scores(difference)
                rows.append({"train": train, "test": test, **_named(gained), "verdict": _verdict(train, test, gained)})
    return DataFrame(rows)


def _difference(after: DataFrame, before: DataFrame) -> DataFrame:
    """What the queries that both were asked (leaks differ from one training set to the next) gained, seed by seed."""
    keys, columns = ["seed", "query", "pid"], list(METRICS.values())
    both = after[[*keys, *columns]].merge(before[[*keys, *columns]], on=keys, suffixes=("", "_before"))
    gained = both[columns].to_numpy(np.float64) - both[[f"{name}_before" for name in columns]].to_numpy(np.float64)
    return both[keys].assign(**dict(zip(columns, gained.T)))


def _verdict(train: str, test: str, difference: Mapping[str, Collection[float]]) -> str:
    """One sentence on R@1, decided by its interval."""
    value, low, high = difference["R1"]
    told = f"{abs(value):.1f} [{min(abs(low), abs(high)):.1f}, {max(abs(low), abs(high)):.1f}]"
    if high < 0:
        return f"On {test}, training on {train} instead costs {told} points of R@1."
    if low > 0:
        return f"On {test}, training on {train} instead gains {told} points of R@1."
    return (
        f"On {test}, training on {train} or on {test}: undecided, R@1 differs by {value:.1f} [{low:.1f}, {high:.1f}]."
    )


def published_matrix() -> DataFrame:
    """The published R@1 and mAP of IRRA for each pair of the real data sets, in per cent, without intervals."""
    rows = published()
    cross = rows[rows.table == "transfer"]
    own = rows[(rows.table == "results") & (rows.source == "paper") & (rows.method == "IRRA")]
    table = pd.concat([own, cross]).rename(columns={"train_dataset": "train", "dataset": "test"})
    return table[[*PAIR, "R1", "mAP", "source"]].sort_values(PAIR, ignore_index=True)


def readable(table: DataFrame) -> DataFrame:
    """A table of `transfer_matrix` for the eye: `53.6 [49.2, 57.8]`, one column per score, else "not run"."""
    pairs = DataFrame({"trained on": table.train, "tested on": table.test, "leaks": table.leaks})
    scores = evaluation.readable(table).where(table.seeds > 0, "not run")
    return pairs.join(scores).assign(seeds=table.seeds, queries=table["queries"])
