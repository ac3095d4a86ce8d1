"""A question → a grid of runs; the grid's runs → one table with intervals, and a verdict."""

import itertools
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import nbformat
import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from pandas import DataFrame, Series
from safetensors import safe_open

from irra_core import runs
from irra_core.annotations import hold_out
from irra_core.backbone import WEIGHT_SUFFIXES, configuration, download, learned, patch_grid
from irra_core.checkpoints import load_checkpoint
from irra_core.evaluation import METRICS
from irra_core.images import open_annotations
from irra_core.interaction import build_interaction
from irra_core.recipes import PRESETS, Recipe, project_root, recipe, smoke, unknown
from irra_core.synthetic import is_rendered, twin_pids
from irra_core.text import VOCABULARY
from irra_core.training import pretrained_general

ROUGH_STEP_SECONDS = {"small": {True: 0.25, False: 0.1}}  # with and without MLM; measured on two cores of a server CPU
ROUGH_RUN_SECONDS = 25.0  # of a run outside its steps on two cores: kernel, imports, evaluations, pictures
LOOK_EVERY = 0.5  # seconds between two looks at the running notebooks


@dataclass(frozen=True)
class Study:
    """One question, and the recipes whose comparison answers it: name → what sets each apart from the base."""

    question: str
    reference: str
    variants: Mapping[str, Mapping[str, Any]]


def _losses(*names: str) -> dict[str, dict[str, Any]]:
    """Variants that are called by their losses."""
    return {name: {"losses": name} for name in names}


_SWITCHES = {name: value for name, value in PRESETS["released"].items() if name != "cmpm_target"}

STUDIES: dict[str, Study] = {
    "rq1": Study(
        "What do the identity loss, MLM with its interaction encoder, and SDM each add?",
        "sdm+id+mlm",
        _losses("itc", "itc+mlm", "sdm", "sdm+mlm", "sdm+id", "sdm+id+mlm")
        | {"sdm+id+mlm, masked captions": {"losses": "sdm+id+mlm", "mask_captions": True}},
    ),
    "rq2": Study(
        "Which loss aligns sentences and photos best, over all queries and against near-twins?",
        "sdm",
        _losses("sdm", "itc", "cmpm", "cmpm+cmpc", "tal")
        | {f"sdm, temperature {t}": {"losses": "sdm", "temperature": t} for t in (0.01, 0.05)},
    ),
    "rq3": Study(
        "How much hangs on the pretrained encoders?",
        "both pretrained",
        {
            "both pretrained": {},
            "image encoder only": {"pretrained_towers": "image"},
            "text encoder only": {"pretrained_towers": "text"},
            "from scratch": {"pretrained": "none"},
            "from scratch, itc": {"pretrained": "none", "losses": "itc"},
            "both pretrained, itc": {"losses": "itc"},
        },
    ),
    "rq4": Study(
        "Which interaction encoder teaches most, and at what cost?",
        "cross",
        {name: {"losses": "sdm+id+mlm", "interaction": name} for name in ("cross", "co", "merged")}
        | {"none (sdm+id)": {"losses": "sdm+id"}},
    ),
    "released": Study(
        "What does each departure of the released code change?",
        "paper",
        {"paper": {}}
        | {f"{name} {value}": {name: value} for name, value in _SWITCHES.items()}
        | {"all but fp16": {name: value for name, value in _SWITCHES.items() if name != "precision"}}
        | {"all": _SWITCHES}
        | {f"cmpm, target by {target}": {"losses": "cmpm", "cmpm_target": target} for target in ("sum", "l2")},
    ),
    "selection": Study(  # for short runs, which have few epochs to pick from
        "How much does picking the best evaluation on test inflate the result?",
        "picked on val",
        {f"picked on {on}": {"losses": "sdm", "evaluate_every": 10, "select_on": on} for on in ("val", "test")},
    ),
}


def plan(study: str | Study, dataset: str = "synthetic", seeds: int = 3, **overrides: Any) -> DataFrame:
    """The runs of a study, a row each: `variant, seed, recipe`.

    Rendered data sets take the preset `study`, others `paper`, unless one is given. With IRRA_SMOKE=1 the reference,
    one other variant and one seed are left. Raises ValueError for an unknown study, or an override of what it varies.
    """
    if isinstance(study, str):
        if study not in STUDIES:
            raise unknown("study", study, STUDIES)
        study = STUDIES[study]
    base = {name: value for name, value in overrides.items() if value is not None}
    varied = {"seed"}.union(*study.variants.values())
    for name in base:
        if name in varied:
            raise ValueError(f"{name} {base[name]!r} cannot be given: the study varies it; leave it out")
    base.setdefault("preset", "study" if dataset.startswith("synthetic") else "paper")
    variants = dict(study.variants)
    if smoke():
        other = next(name for name in variants if name != study.reference)
        variants, seeds = {name: variants[name] for name in (study.reference, other)}, 1
    rows = [
        (variant, seed, recipe(dataset, **(base | dict(changes)), seed=seed))
        for variant, changes in variants.items()
        for seed in range(seeds)
    ]
    return DataFrame(rows, columns=["variant", "seed", "recipe"])


@dataclass
class _Job:
    """One run of the grid: where it lives and how far it is."""

    recipe: Recipe
    folder: Path | None = None
    steps: int = 0
    status: str = "not run"
    error: str = ""
    process: subprocess.Popen | None = None
    log: BinaryIO | None = None
    began: float = 0.0
    seconds: float = float("nan")


def _jobs(recipes: Iterable[Recipe], data_root: str | Path | None, progress) -> dict[Recipe, _Job]:
    """A job a different recipe, with its folder; data are rendered and decoded here, once, where they are not yet.

    A job whose data cannot be read is failed, and says why.
    """
    tables: dict[tuple, DataFrame] = {}
    digests: dict[tuple, str] = {}
    jobs = {}
    for made in dict.fromkeys(recipes):
        job = jobs[made] = _Job(made)
        data = (made.dataset, made.identities)
        pixels = (*data, made.image_height, made.image_width)
        try:
            if data not in tables:
                tables[data] = open_annotations(made, data_root, progress)
            if pixels not in digests:
                digests[pixels] = runs.data_digest(tables[data], made, progress)
            job.steps = _steps(made, tables[data])
            job.folder = runs.run_folder(made, digests[pixels]).path
        except (OSError, ValueError) as error:
            job.status, job.error = "failed", f"{type(error).__name__}: {error}"
            continue
        if runs.finished(job.folder):
            job.status, job.seconds = "finished", _seconds(job.folder)
        elif made.precision == "fp16" and not torch.cuda.is_available():
            job.error = "fp16 needs a GPU"
    return jobs


def _steps(made: Recipe, annotations: DataFrame) -> int:
    """The optimiser's steps of a run."""
    table = hold_out(annotations) if made.select_on == "val" else annotations
    captions = int((table.split == "train").sum())
    steps = made.epochs * -(-captions // made.batch_size)
    return min(steps, made.max_steps or steps)


def _seconds(folder: Path) -> float:
    """How long a finished run took: its whole notebook where that is there, else its training and evaluations."""
    notebook = folder / "train.ipynb"
    if notebook.exists():
        duration = nbformat.read(notebook, 4).metadata.get("papermill", {}).get("duration")
        if duration is not None:
            return float(duration)
    machine = runs.load_run(folder)["machine"]
    return float(sum(machine["seconds"].values())) if machine else float("nan")


def estimate(planned: DataFrame, data_root: str | Path | None = None, workers: int = 1, progress=None) -> str:
    """How many runs a plan needs, how many are there, and about how long the rest takes, as a sentence.

    Seconds a step are those of finished runs with the same network, losses and device; without one, a rough figure.
    """
    jobs = _jobs(planned.recipe, data_root, progress)
    left = [job for job in jobs.values() if job.status == "not run" and not job.error]
    known = sum(job.status == "finished" for job in jobs.values())
    said = (
        f"{len(jobs)} different runs, {known} of them finished" if len(jobs) > 1 else f"1 run, {known} of them finished"
    )
    if refused := [job for job in jobs.values() if job.error]:
        said += f"; {len(refused)} cannot be run here ({'; '.join(dict.fromkeys(job.error for job in refused))})"
    if not left:
        return f"{said}; nothing is left to run."
    measured = _measured_steps()
    each = [(job, *_step_seconds(job.recipe, measured)) for job in left]
    if any(step is None for _, step, _ in each):
        return f"{said}; {len(left)} are left, with no finished run of their network on this device to judge time by."
    total = sum(job.steps * step + ROUGH_RUN_SECONDS for job, step, _ in each) / min(workers, max(_gpus(), 1))
    basis = "measured" if all(told for *_, told in each) else "rough figures, nothing like some of them has run yet"
    range_ = sorted({round(step, 2) for _, step, _ in each})
    steps = f"{range_[0]}" if len(range_) == 1 else f"{range_[0]} to {range_[-1]}"
    return f"{said}; the other {len(left)} take about {_spoken(total)} ({steps} s a step: {basis})."


def _measured_steps() -> dict[tuple, float]:
    """What `_alike` makes of a recipe → median training seconds a step of the finished runs on this device."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    found: dict[tuple, list[float]] = {}
    for file in runs.reports_root().glob("**/metrics.json"):
        try:
            run = runs.load_run(file.parent)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a folder of another version tells nothing
        if run["machine"] and run["machine"]["device"] == device and run["history"] is not None:
            found.setdefault(_alike(run["recipe"]), []).append(_seconds_a_step(run))
    return {key: statistics.median(values) for key, values in found.items()}


def _seconds_a_step(run: Mapping[str, Any]) -> float:
    return run["machine"]["seconds"]["training"] / int(run["history"].step.iloc[-1])


def _alike(made: Recipe) -> tuple:
    """What a step's time depends on."""
    names = ("backbone", "image_height", "image_width", "stride", "frozen", "adapter_rank", "losses", "interaction")
    names += ("batch_size", "precision")
    return tuple(getattr(made, name) for name in names)


def _step_seconds(made: Recipe, measured: Mapping[tuple, float]) -> tuple[float | None, bool]:
    """Seconds a step, None where nothing is known, and whether they were measured."""
    if (key := _alike(made)) in measured:
        return measured[key], True
    return ROUGH_STEP_SECONDS.get(made.backbone, {}).get("mlm" in made.loss_names), False


def _spoken(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def run_all(
    planned: DataFrame,
    data_root: str | Path | None = None,
    workers: int = 1,
    progress=None,
    notebook: str | Path | None = None,
) -> DataFrame:
    """Make the runs of a plan that are not there yet: the plan with `path, status, seconds, error` of every run.

    Each run is `notebook` (default: notebooks/train.ipynb) under papermill in a process of its own, `workers` at a
    time; they share the CPU's threads, and several GPUs are dealt out in turn. The executed notebook ends up in the
    run's folder as train.ipynb. A finished run is not started again, and one recipe in two rows runs once. A run that
    fails is listed with the last line of its error (and its notebook as failed.ipynb), and the others go on. What all
    share is made first: rendered data, decoded photos, pretrained weights. An interrupt ends the running notebooks;
    the next call resumes them. `status` is finished, failed or "not run"; `progress` is a tqdm-like class.
    """
    jobs = _jobs(planned.recipe, data_root, progress)
    waiting = [job for job in jobs.values() if job.status == "not run" and not job.error]
    _make_weights(waiting, progress)
    waiting = [job for job in waiting if not job.error]
    notebook = Path(notebook or project_root() / "notebooks" / "train.ipynb").resolve()
    slots: list[_Job | None] = [None] * max(workers, 1)
    bar = _Bar(jobs.values(), progress)
    try:
        while waiting or any(slots):
            for slot, job in enumerate(slots):
                if job is not None and job.process.poll() is not None:
                    _end(job)
                    slots[slot] = job = None
                if job is None and waiting:
                    slots[slot] = _start(waiting.pop(0), notebook, data_root, slot, len(slots))
            bar.move()
            if any(slots):
                time.sleep(LOOK_EVERY)
    finally:
        _stop([job for job in slots if job is not None])
        bar.close()
    made = [jobs[each] for each in planned.recipe]
    paths = [None if job.folder is None else str(job.folder) for job in made]
    ended = {name: [getattr(job, name) for job in made] for name in ("status", "seconds", "error")}
    return planned.assign(path=paths, **ended)


def _make_weights(waiting: list[_Job], progress) -> None:
    """Pretrained weights that are not there yet, before several runs would make or download them at once."""
    wanted: dict[tuple[str, str], list[_Job]] = {}
    for job in waiting:
        wanted.setdefault((job.recipe.backbone, job.recipe.pretrained), []).append(job)
    for (backbone, weights), needing in wanted.items():
        if weights == "none" or Path(weights).suffix in WEIGHT_SUFFIXES:
            continue
        try:
            pretrained_general(progress) if weights == "general" else download(backbone, weights)
        except (OSError, ValueError) as error:
            for job in needing:
                job.status, job.error = "failed", f"{type(error).__name__}: {error}"


def _start(job: _Job, notebook: Path, data_root: str | Path | None, slot: int, workers: int) -> _Job:
    """Start a run's notebook; its process is in a session of its own, so that an interrupt reaches it through _stop."""
    job.folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", str(notebook), str(job.folder / ".train.ipynb")]
    given = {"dataset": job.recipe.dataset} | job.recipe.differences()
    given |= {} if data_root is None else {"data_root": str(data_root)}
    for name, value in given.items():
        command += ["-r" if isinstance(value, str) else "-p", name, str(value)]
    threads = int(os.environ.get("OMP_NUM_THREADS") or 0) or len(os.sched_getaffinity(0))
    environment = os.environ | {"OMP_NUM_THREADS": str(max(threads // workers, 1))}
    if (gpus := _gpus()) > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[slot % gpus]
    job.log, job.began = tempfile.TemporaryFile(), time.perf_counter()  # noqa: SIM115 (closed when the run ends)
    job.process = subprocess.Popen(
        command,
        cwd=project_root(),
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=job.log,
        start_new_session=True,
    )
    return job


def _gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _end(job: _Job) -> None:
    """Write down how a run ended, and keep its executed notebook."""
    job.log.seek(0)
    lines = [line.strip() for line in job.log.read().decode(errors="replace").splitlines() if line.strip()]
    job.log.close()
    executed, job.seconds = job.folder / ".train.ipynb", time.perf_counter() - job.began
    ok = job.process.returncode == 0 and runs.finished(job.folder)
    job.status = "finished" if ok else "failed"
    if not ok:
        silent = f"the notebook ended with status {job.process.returncode} and left no finished run in {job.folder}"
        job.error = lines[-1] if lines and job.process.returncode else silent
    if executed.exists():
        os.replace(executed, job.folder / ("train.ipynb" if ok else "failed.ipynb"))
    if ok:
        (job.folder / "failed.ipynb").unlink(missing_ok=True)


def _stop(running: list[_Job]) -> None:
    """End running notebooks: papermill takes its kernel with it when it is asked to end."""
    for job in running:
        job.process.terminate()
    for job in running:
        try:
            job.process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            job.process.kill()
            job.process.wait()
        job.log.close()
        (job.folder / ".train.ipynb").unlink(missing_ok=True)


class _Bar:
    """One bar over the steps of all runs; it moves when a run has evaluated, and says how many runs are done."""

    def __init__(self, jobs: Iterable[_Job], progress):
        self.jobs = list(jobs)
        self.shown = None
        self.bar = progress(total=self.total(), initial=self.done(), unit="step", desc="runs") if progress else None

    def total(self) -> int:
        """Steps of all runs that can end; a failed one counts no more."""
        return sum(job.steps for job in self.jobs if not job.error)

    def done(self) -> int:
        return sum(job.steps if job.status == "finished" else _reached(job) for job in self.jobs if not job.error)

    def move(self) -> None:
        ended = [sum(job.status == status for job in self.jobs) for status in ("finished", "failed")]
        now = (self.done(), *ended)
        if self.bar is None or now == self.shown:
            return
        self.shown, self.bar.total = now, self.total()
        self.bar.set_postfix_str(f"{ended[0]} of {len(self.jobs)} runs finished, {ended[1]} failed", refresh=False)
        self.bar.update(max(now[0] - self.bar.n, 0))
        self.bar.refresh()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _reached(job: _Job) -> int:
    """The step of a running job's last evaluation."""
    history = job.folder / "history.csv" if job.folder else None
    if job.process is None or not history.exists():
        return 0
    return int(pd.read_csv(history, usecols=["step"]).step.iloc[-1])


def compare(finished: DataFrame, reference: str, hard: bool | Bool[np.ndarray, " queries"] = False) -> DataFrame:
    """The scores of each variant on test beside the reference: a row a variant, in the plan's order.

    finished: what `run_all` gave. Columns: `variant, reference, status, seeds`; each score in per cent as the mean over
    the seeds with its `_sd`; `R1_gain`, `mAP_gain` over the reference with `_low` and `_high`, the 95 % interval of
    `seed_identity_interval`, paired over the seeds that both have; `parameters` (all are trained); `step_seconds`.
    `hard` keeps the queries whose person has a near-twin in the gallery, or those marked in an array of one truth a
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
            row |= _costs(mine[mine.status == "finished"].path)
        rows.append(row)
    scored = [f"{score}{end}" for score in METRICS for end in ("", "_sd")]
    gained = [f"{score}_gain{end}" for score in ("R1", "mAP") for end in ("", "_low", "_high")]
    columns = ["variant", "reference", "status", "seeds", *scored, *gained, "parameters", "step_seconds"]
    return DataFrame(rows).reindex(columns=columns)


def _variant_runs(rows: DataFrame, hard: bool | np.ndarray) -> dict[int, DataFrame]:
    """Seed → the queries of its finished run, the hard ones alone where so asked; none where there is no such query."""
    found = {}
    for row in rows[rows.status == "finished"].itertuples():
        queries = pd.read_csv(Path(row.path) / "queries.csv")
        if isinstance(hard, np.ndarray):
            queries = queries[hard]
        elif hard:
            queries = queries[queries.hard]
        if len(queries):
            found[row.seed] = queries
    return found


def _status(rows: DataFrame, found: Mapping[int, DataFrame]) -> str:
    """What became of a variant, in a few words."""
    finished, total = int((rows.status == "finished").sum()), len(rows)
    if finished and not found:
        return "not available: no query is marked as hard"
    said = "finished" if finished == total else f"{finished} of {total} finished" if finished else "not run"
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
    seeds = [seed for seed in found if seed in base]
    if not seeds:
        return {}
    pids = base[seeds[0]].pid.to_numpy()
    if any(not np.array_equal(side[seed].pid.to_numpy(), pids) for seed in seeds for side in (found, base)):
        raise ValueError(f"{names} have different queries: compare runs on the same data")
    row = {}
    for score in ("R1", "mAP"):
        column = METRICS[score]
        values = np.stack([(found[seed][column] - base[seed][column]).to_numpy(dtype=np.float64) for seed in seeds])
        low, high = seed_identity_interval(values, pids)
        row |= {f"{score}_gain": float(values.mean()), f"{score}_gain_low": low, f"{score}_gain_high": high}
    return row


def _costs(paths: Iterable[str]) -> dict[str, int | float]:
    """Trained numbers of the network, and the median over the seeds of the seconds a training step took."""
    paths = list(paths)
    with safe_open(Path(paths[0]) / runs.WEIGHTS, "pt") as weights:
        shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118 (not a dict)
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    parameters = sum(tensor.numel() for tensor in learned(tensors).values())
    steps = [_seconds_a_step(run) for run in map(runs.load_run, paths) if run["machine"]]
    return {"parameters": parameters, "step_seconds": statistics.median(steps) if steps else float("nan")}


def seed_identity_interval(
    values: Float[np.ndarray, "seeds queries"], pids: Int[np.ndarray, " queries"], draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Low and high end of the 95 % interval of the mean of `values`, by resampling seeds and identities together.

    A draw is as many seeds and as many identities as there are, both with replacement, each identity with all its
    queries; the ends are the 2.5 and 97.5 percentiles of the draws' means. With one seed it is the interval of
    `metrics.bootstrap_interval`. Few seeds make it too narrow: of three, the draws see two thirds of the variance.
    """
    _, person = np.unique(pids, return_inverse=True)
    sizes = np.bincount(person)
    sums = np.stack([np.bincount(person, row, minlength=len(sizes)) for row in values])
    generator = np.random.default_rng(seed)
    people = _counts(generator.integers(len(sizes), size=(draws, len(sizes)), dtype=np.int32), len(sizes))
    seeds = _counts(generator.integers(len(values), size=(draws, len(values)), dtype=np.int32), len(values))
    means = ((seeds @ sums) * people).sum(1) / (len(values) * (people @ sizes))
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _counts(drawn: Int[np.ndarray, "draws n"], n: int) -> Float[np.ndarray, "draws n"]:
    """How often each draw holds each of 0 … n - 1."""
    rows = np.arange(len(drawn))[:, None] * n
    return np.bincount((rows + drawn).ravel(), minlength=len(drawn) * n).reshape(len(drawn), n).astype(np.float64)


def selection_inflation(finished: DataFrame, on_val: str, on_test: str) -> DataFrame:
    """What picking weights on test adds to R@1 on test, a row a seed: the two variants train alike and pick otherwise.

    Columns: `seed`, `evaluations` to pick from, `val_step` and `test_step` that were picked, the test R@1 of both
    (`picked_on_val, picked_on_test`) and `inflation`, their difference in percentage points. It cannot be negative.
    """
    ended = finished[finished.status == "finished"]
    paths = {name: ended[ended.variant == name].set_index("seed").path for name in (on_val, on_test)}
    rows = []
    for seed in [seed for seed in paths[on_val].index if seed in paths[on_test].index]:
        val, test = (runs.load_run(paths[name][seed]) for name in (on_val, on_test))
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
    test = annotations[annotations.split == "test"].reset_index(drop=True)
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


def readable(table: DataFrame) -> DataFrame:
    """A table of `compare` for the eye: `53.6 ± 0.8`, gains as `+2.1 [0.6, 3.7]`, what is missing as its status."""
    text = DataFrame({"": table.variant})
    for score in METRICS:
        text[f"{score} (%)"] = [_plus_minus(*pair) for pair in zip(table[score], table[f"{score}_sd"])]
    for score in ("R1", "mAP"):
        ends = (table[f"{score}_gain{end}"] for end in ("", "_low", "_high"))
        cells = ["" if np.isnan(gain) else f"{gain:+.1f} [{low:.1f}, {high:.1f}]" for gain, low, high in zip(*ends)]
        own = table.variant == table.reference
        text[f"{score} against {table.reference.iloc[0]}"] = np.where(own & (table.seeds > 0), "reference", cells)
    text["parameters (M)"] = [_number(value / 1e6, "{:.2f}") for value in table.parameters]
    text["s a step"] = [_number(value, "{:.3f}") for value in table.step_seconds]
    if "inference_ms" in table:
        text["inference (ms a pair)"] = [_number(value, "{:.2f}") for value in table.inference_ms]
    short = [status.split(":")[0] for status in table.status]  # the reasons are in the table of runs
    text["seeds"] = [str(seeds) if said == "finished" else said for seeds, said in zip(table.seeds, short)]
    text.loc[table.seeds == 0, "R1 (%)"] = [said for seeds, said in zip(table.seeds, short) if not seeds]
    return text.set_index("")


def _plus_minus(mean: float, sd: float) -> str:
    return _number(mean, "{:.1f}") + ("" if np.isnan(sd) else f" ± {sd:.1f}")


def _number(value: float, form: str) -> str:
    return "" if np.isnan(value) else form.format(value)


def inference_ms(finished: DataFrame, batch_size: int = 32, repeats: int = 5) -> dict[str, float]:
    """Variant → milliseconds to encode one photo and one sentence, in batches on this machine; finished variants only.

    The variants take turns, and the median of the repeats counts, so that a busy moment is nobody's alone.
    """
    firsts = finished[finished.status == "finished"].drop_duplicates("variant")
    models = {row.variant: _timed_model(Path(row.path)) for row in firsts.itertuples()}
    tokens = torch.randint(1, VOCABULARY - 2, (batch_size, 32), generator=torch.Generator().manual_seed(0))
    tokens[:, -1] = VOCABULARY - 1

    def encode(model) -> Callable[[], Any]:
        device = next(model.parameters()).device
        images, words = torch.zeros(batch_size, 3, *model.image_size, device=device), tokens.to(device)
        return lambda: (model.encode_image(images), model.encode_text(words))

    seconds = _interleaved({name: encode(model) for name, model in models.items()}, repeats)
    return {name: 1000 * value / batch_size for name, value in seconds.items()}


def _timed_model(folder: Path) -> torch.nn.Module:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_checkpoint(folder / runs.WEIGHTS)[0].eval().to(device)


def interaction_costs(
    made: Recipe, width: int | None = None, batch_size: int = 8, words: int = 77, repeats: int = 5
) -> DataFrame:
    """The three interaction encoders side by side: parameters, and the median time of a forward pass on one batch.

    Columns `interaction, parameters, forward_ms, times`, the last against `cross`. The batch has random tokens: as many
    words as given and the recipe's image tokens; `width` is the backbone's unless given, the depth the recipe's.
    """
    config = configuration(made.backbone)
    width = width or config["embed_dim"]
    grid = patch_grid((made.image_height, made.image_width), config["vision_cfg"]["patch_size"], made.stride)
    generator = torch.Generator().manual_seed(made.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = (words, grid[0] * grid[1] + 1)
    text, image = (torch.randn(batch_size, size, width, generator=generator).to(device) for size in sizes)
    encoders = {
        kind: build_interaction(kind, width, made.interaction_depth).eval().to(device)
        for kind in ("cross", "co", "merged")
    }
    calls = {kind: (lambda encoder=encoder: encoder(text, image)) for kind, encoder in encoders.items()}
    seconds = _interleaved(calls, repeats)
    rows = [
        (kind, sum(p.numel() for p in encoder.parameters()), 1000 * seconds[kind], seconds[kind] / seconds["cross"])
        for kind, encoder in encoders.items()
    ]
    return DataFrame(rows, columns=["interaction", "parameters", "forward_ms", "times"])


def _interleaved(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each call; they take turns, after one turn that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for turn, (name, call) in itertools.product(range(repeats + 1), calls.items()):
            began = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def beside_published(table: DataFrame, planned: DataFrame) -> DataFrame:
    """The published ablations of the plan's data set (CUHK-PEDES for rendered people) beside this study's variants.

    Columns: the published `source, dataset, method, R1, params_m, forward_ms`, and `here`, the R1 of the variant with
    the same losses and interaction encoder as text; "" where the study has none.
    """
    made = planned.drop_duplicates("variant").set_index("variant").recipe
    dataset = made.iloc[0].dataset
    rows = runs.published()
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


def study_folder(study: str, dataset: str) -> Path:
    """Where a study's table and figure are kept: `studies/<study>` below its data set's reports."""
    return runs.reports_root() / ("smoke" if smoke() else "") / runs.dataset_name(dataset) / "studies" / study


def save_study(folder: Path, tables: Mapping[str, DataFrame], figures: Mapping[str, Any] | None = None) -> list[str]:
    """Write tables as csv and matplotlib figures as svg and png, by their names; the files' names."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, table in tables.items():
        runs.write_text(folder / f"{name}.csv", table.to_csv(index=False))
        written.append(f"{name}.csv")
    for name, figure in (figures or {}).items():
        for suffix in ("svg", "png"):
            figure.savefig(folder / f"{name}.{suffix}", dpi=150)
            written.append(f"{name}.{suffix}")
    return written
