"""A study → a grid of runs, each executed once by the train notebook."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pandas as pd
import torch
from pandas import DataFrame

from irra_core import runs
from irra_core.analysis import plots
from irra_core.annotations import hold_out
from irra_core.backbone import WEIGHT_SUFFIXES
from irra_core.batches import steps_per_epoch
from irra_core.hub.tags import download
from irra_core.images import open_annotations
from irra_core.recipes import PRESETS, RENDERED, Recipe, recipe
from irra_core.settings import (
    cores,
    default_device,
    notebooks_root,
    project_root,
    put_in_place,
    reports_root,
    runs_root,
    smoke,
    unknown,
)
from irra_core.studies import committed
from irra_core.studies.committed import DONE
from irra_core.studies.sizes import domains, sized
from irra_core.studies.tables import files_below, seconds_per_step

ROUGH_STEP_SECONDS = {"small": {True: 0.25, False: 0.1}}  # with and without MLM; measured on two cores of a server CPU
ROUGH_RUN_SECONDS = 25.0  # time of a run besides its steps, on two cores: kernel, imports, evaluations, figures
LOOK_EVERY = 0.5  # seconds between two checks of the running notebooks


@dataclass(frozen=True)
class Study:
    """One question, and the recipes whose comparison answers it: name → the fields that differ from the base."""

    question: str
    reference: str
    variants: Mapping[str, Mapping[str, Any]]


def _losses(*names: str) -> dict[str, dict[str, Any]]:
    """Variants named after their losses."""
    return {name: {"losses": name} for name in names}


_SWITCHES = {name: value for name, value in PRESETS["released"].items() if name != "cmpm_target"}
_WITHOUT_HALF = {name: value for name, value in _SWITCHES.items() if name != "precision"}
_EPS = {"adam_eps": _SWITCHES["adam_eps"]}  # half precision needs it
_IRRA, _RDE = {"losses": "sdm+id+mlm"}, {"losses": "tal+tse"}
_TBPS = ("losses", "temperature", "learned_temperature", "word_deletion")  # of its preset, what is no number of epochs

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
        "How much do the pretrained encoders contribute?",
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
        "Which interaction encoder improves retrieval most, and at what cost?",
        "cross",
        {name: {"losses": "sdm+id+mlm", "interaction": name} for name in ("cross", "co", "merged")}
        | {"none (sdm+id)": {"losses": "sdm+id"}},
    ),
    "released": Study(
        "What does each departure of the released code change?",
        "paper",
        {"paper": {}}
        | {f"{name} {value}": {name: value} for name, value in _WITHOUT_HALF.items()}
        | {f"adam_eps {_EPS['adam_eps']}, precision fp16": _EPS | {"precision": "fp16"}}
        | {"all but fp16": _WITHOUT_HALF}
        | {"all": _SWITCHES}
        | {f"cmpm, target by {target}": {"losses": "cmpm", "cmpm_target": target} for target in ("sum", "l2")},
    ),
    "selection": Study(  # for short runs, which have few epochs to pick from
        "How much does picking the best evaluation on test inflate the result?",
        "picked on val",
        {f"picked on {on}": {"losses": "sdm", "evaluate_every": 50, "select_on": on} for on in ("val", "test")},
    ),
    "plugins": Study(
        "What does each idea of a later paper change in IRRA?",
        "sdm+id+mlm",
        {
            "sdm+id+mlm": _IRRA,
            "identity sampler": _IRRA | {"sampler": "identity"},
            "word augmentation": _IRRA | {"word_augmentation": 0.2},
            "ibm for sdm": {"losses": "ibm+id+mlm"},
            "token selection": {"losses": "sdm+id+mlm+tse"},
            "token selection, layers": {"losses": "sdm+id+mlm+tse", "token_selection": "layers"},
            "rde": _RDE | {"word_augmentation": 0.2},
            "tbps": {name: PRESETS["tbps"][name] for name in _TBPS},
        },
    ),
    "noise": Study(
        "What do captions at wrong photos cost IRRA and RDE?",
        "irra, 0 % wrong",
        {
            f"{name}, {100 * share:.0f} % wrong": losses | {"shuffled_captions": share}
            for name, losses in (("irra", _IRRA), ("rde", _RDE))
            for share in (0.0, 0.2, 0.5)
        },
    ),
}


def plan_transfer(datasets: Iterable[str], seeds: int = 3, **overrides: Any) -> DataFrame:
    """The runs of the study of transfer, as `plan` gives them: each data set's own recipe; `variant` is its name."""
    names = tuple(datasets)
    own = Study("Does it generalise to other data sets?", names[0] if names else "", {"": {}})
    parts = [plan(own, name, seeds, **overrides).assign(variant=name) for name in names]
    table = pd.concat(parts, ignore_index=True) if parts else DataFrame(columns=["variant", "seed", "recipe"])
    return table.head(2) if smoke() else table


def plan_domains(size: str = "full", **given: Any) -> DataFrame:
    """The runs of the study of transfer over the rendered domains of a size of SIZES."""
    others = {name: value for name, value in sized(size, **given).items() if name != "dataset"}
    return plan_transfer(domains(size), **others)


def plan_all(size: str = "full", **given: Any) -> DataFrame:
    """The runs of every study in a size of SIZES, with the column `study` first, seed by seed.

    Several rows may share a recipe, which `run_all` runs once. `verdicts.more_runs` has the primary pairs' other seeds.
    """
    parts = [plan(name, **sized(size, **given)).assign(study=name) for name in STUDIES]
    parts.append(plan_domains(size, **given).assign(study="transfer"))
    table = pd.concat(parts)[["study", "variant", "seed", "recipe"]]
    return table.sort_values("seed", kind="stable", ignore_index=True)


def plan(study: str | Study, dataset: str = "synthetic", seeds: int = 3, **overrides: Any) -> DataFrame:
    """The runs of a study, one row per run: `variant, seed, recipe`.

    Rendered data sets use the preset `study`, others `paper`, unless a preset is given. With IRRA_SMOKE=1 the plan has
    only the reference, one other variant and one seed. Raises ValueError for an unknown study, or an override of a
    field that the study varies.
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
    if smoke() and len(variants) > 1:
        other = next(name for name in variants if name != study.reference)
        variants = {name: variants[name] for name in (study.reference, other)}
    seeds = 1 if smoke() else seeds
    rows = [
        (variant, seed, recipe(dataset, **(base | dict(changes)), seed=seed))
        for variant, changes in variants.items()
        for seed in range(seeds)
    ]
    return DataFrame(rows, columns=["variant", "seed", "recipe"])


@dataclass
class _Job:
    """One run of the grid: its folder and its progress."""

    recipe: Recipe
    folder: Path | None = None
    steps: int = 0
    status: str = "not run"
    error: str = ""
    committed: str = ""
    process: subprocess.Popen | None = None
    log: BinaryIO | None = None
    began: float = 0.0
    seconds: float = float("nan")


def _jobs(recipes: Iterable[Recipe], data_root: str | Path | None, progress, use: bool = True) -> dict[Recipe, _Job]:
    """One job per distinct recipe, with its folder; renders and decodes missing data, once.

    A job whose data cannot be read has the status `failed` and the error. With `use` a committed run ends a job that no
    finished run here ends; nothing is rendered for it alone.
    """
    tables: dict[tuple, DataFrame] = {}
    digests: dict[tuple, str] = {}
    jobs = {}
    for planned in dict.fromkeys(recipes):
        job = jobs[planned] = _Job(planned)
        data = (planned.dataset, planned.identities)
        pixels = (*data, planned.image_height, planned.image_width, planned.pretrained == "general")
        absent = planned.dataset in RENDERED and not committed.rendered_here(planned, data_root)
        if use and absent and _take_committed(job, ""):
            continue
        try:
            if data not in tables:
                tables[data] = open_annotations(planned, data_root, progress)
            if pixels not in digests:
                digests[pixels] = runs.data_digest(tables[data], planned, progress)
            job.steps = _steps(planned, tables[data])
            job.folder = runs.run_folder(planned, digests[pixels]).path
        except (OSError, ValueError) as error:
            job.status, job.error = "failed", f"{type(error).__name__}: {error}"
            continue
        if runs.finished(job.folder):
            job.status, job.seconds = "finished", committed.run_seconds(job.folder)
        elif use and _take_committed(job, digests[pixels]):
            pass
        elif planned.precision == "fp16" and not torch.cuda.is_available():
            job.error = "fp16 needs a GPU"
    return jobs


def _take_committed(job: _Job, data: str) -> bool:
    """True, and the job's status is "committed", where a run with its recipe and data is committed."""
    folder = committed.find(job.recipe, data)
    if folder is not None:
        job.folder, job.status, job.seconds = folder, "committed", committed.run_seconds(folder)
        job.steps = int(committed.load(folder)["history"].step.iloc[-1])
    return folder is not None


def _steps(recipe: Recipe, annotations: DataFrame) -> int:
    """The number of optimiser steps of a run."""
    table = hold_out(annotations) if recipe.select_on == "val" else annotations
    pids = torch.tensor(table[table.split == "train"].pid.to_numpy())
    steps = recipe.epochs * steps_per_epoch(pids, recipe)
    return min(steps, recipe.max_steps or steps)


def estimate(
    planned: DataFrame, data_root: str | Path | None = None, workers: int = 1, progress=None, use_committed: bool = True
) -> str:
    """A sentence: how many runs a plan needs, how many are finished, and about how long the rest takes.

    Seconds per step are those of finished runs with the same network, losses and device; without any, a rough figure.
    """
    jobs = _jobs(planned.recipe, data_root, progress, use_committed)
    left = [job for job in jobs.values() if job.status == "not run" and not job.error]
    known = sum(job.status == "finished" for job in jobs.values())
    said = (
        f"{len(jobs)} different runs, {known} of them finished" if len(jobs) > 1 else f"1 run, {known} of them finished"
    )
    if taken := sum(job.status == "committed" for job in jobs.values()):
        said += f", {taken} committed"
    if refused := [job for job in jobs.values() if job.error]:
        said += f"; {len(refused)} cannot be run here ({'; '.join(dict.fromkeys(job.error for job in refused))})"
    if not left:
        return f"{said}; nothing is left to run."
    measured = _measured_steps()
    each = [(job, *_step_seconds(job.recipe, measured)) for job in left]
    if any(step is None for _, step, _ in each):
        return f"{said}; {len(left)} are left, of unknown duration: no run of their network on this device is finished."
    total = sum(job.steps * step + ROUGH_RUN_SECONDS for job, step, _ in each) / min(workers, max(_gpus(), 1))
    all_measured = all(is_measured for *_, is_measured in each)
    basis = "measured" if all_measured else "a rough figure where no similar run is finished"
    range_ = sorted({round(step, 2) for _, step, _ in each})
    steps = f"{range_[0]}" if len(range_) == 1 else f"{range_[0]} to {range_[-1]}"
    return f"{said}; the other {len(left)} take about {_spoken(total)} ({steps} s per step: {basis})."


def _measured_steps() -> dict[tuple, float]:
    """`_alike` of a recipe → median training seconds per step of the finished runs on this device."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else default_device().type
    seconds: dict[tuple, list[float]] = {}
    for file in files_below(reports_root(), "/metrics.json"):
        try:
            run = runs.load_run(file.parent)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a run of another version
        if run["machine"] and run["machine"]["device"] == device and run["history"] is not None:
            seconds.setdefault(_alike(run["recipe"]), []).append(seconds_per_step(run))
    return {key: statistics.median(values) for key, values in seconds.items()}


def _alike(recipe: Recipe) -> tuple:
    """The fields that a step's duration depends on."""
    names = ("backbone", "image_height", "image_width", "stride", "frozen", "adapter_rank", "losses", "interaction")
    names += ("interaction_depth", "batch_size", "micro_batch", "precision", "compile", "token_selection")
    return tuple(getattr(recipe, name) for name in names)


def _step_seconds(recipe: Recipe, measured: Mapping[tuple, float]) -> tuple[float | None, bool]:
    """Seconds per step, None if unknown, and whether they were measured."""
    if (key := _alike(recipe)) in measured:
        return measured[key], True
    return ROUGH_STEP_SECONDS.get(recipe.backbone, {}).get("mlm" in recipe.loss_names), False


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
    use_committed: bool = True,
    export: bool = False,
) -> DataFrame:
    """Execute the missing runs of a plan; returns the plan with `path, status, seconds, error, committed` of every run.

    Each run executes `notebook` (default: notebooks/train.ipynb) by papermill in its own process, `workers` at a time;
    they share the CPU's threads, and several GPUs are assigned in turn. The executed notebook is saved in the run's
    folder as train.ipynb. A finished run is not started again, and a recipe in two rows runs once. A failed run is
    listed with the last line of its error (its notebook is saved as failed.ipynb), and the others continue. Data that
    runs share are prepared first: rendered data, decoded photos, pretrained weights. An interrupt ends the running
    notebooks; the next call resumes them. `status` is finished, committed, failed or "not run"; `progress` is a
    tqdm-like class.

    A run that is committed (`committed.find`) is not started; `path` is then the folder of its committed files, and
    `use_committed=False` ignores them. With `export` the small files of each finished run are written there as it
    comes in. `committed` says of a finished run that is committed too whether they agree, or how they differ.
    """
    jobs = _jobs(planned.recipe, data_root, progress, use_committed)
    waiting = [job for job in jobs.values() if job.status == "not run" and not job.error]
    _download_weights(waiting)
    waiting = [job for job in waiting if not job.error]
    notebook = Path(notebook or notebooks_root() / "train.ipynb").resolve()
    slots: list[_Job | None] = [None] * max(workers, 1)
    bar = _Bar(jobs.values(), progress)
    for job in jobs.values():
        _commit(job, export)
    try:
        while waiting or any(slots):
            for slot, job in enumerate(slots):
                if job is not None and job.process.poll() is not None:
                    _end(job)
                    _commit(job, export)
                    slots[slot] = job = None
                if job is None and waiting:
                    slots[slot] = _start(waiting.pop(0), notebook, data_root, slot, len(slots))
            bar.move()
            if any(slots):
                time.sleep(LOOK_EVERY)
    finally:
        _stop([job for job in slots if job is not None])
        bar.close()
    row_jobs = [jobs[each] for each in planned.recipe]
    paths = [None if job.folder is None else str(job.folder) for job in row_jobs]
    columns = {name: [getattr(job, name) for job in row_jobs] for name in ("status", "seconds", "error", "committed")}
    return planned.assign(path=paths, **columns)


def _commit(job: _Job, export: bool) -> None:
    """Export a finished run if so asked, and compare it with the committed one."""
    if job.status != "finished":
        return
    if export:
        committed.export_run(job.folder)
    folder = committed.find(job.recipe, runs.load_run(job.folder)["data"])
    job.committed = "" if folder is None else committed.disagreement(job.folder, folder) or "agrees"


def _download_weights(waiting: list[_Job]) -> None:
    """Download missing pretrained weights, before several runs would do so at the same time."""
    wanted: dict[tuple[str, str], list[_Job]] = {}
    for job in waiting:
        wanted.setdefault((job.recipe.backbone, job.recipe.pretrained), []).append(job)
    for (backbone, weights), needing in wanted.items():
        if weights in ("none", "general") or Path(weights).suffix in WEIGHT_SUFFIXES:
            continue
        try:
            download(backbone, weights)
        except (OSError, ValueError) as error:
            for job in needing:
                job.status, job.error = "failed", f"{type(error).__name__}: {error}"


def _start(job: _Job, notebook: Path, data_root: str | Path | None, slot: int, workers: int) -> _Job:
    """Start a run's notebook in a session of its own, so that an interrupt reaches it through _stop only."""
    job.folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", str(notebook), str(job.folder / ".train.ipynb")]
    given = {"dataset": job.recipe.dataset} | job.recipe.differences()
    given |= {} if data_root is None else {"data_root": str(data_root)}
    for name, value in given.items():
        command += ["-r" if isinstance(value, str) else "-p", name, str(value)]
    threads = int(os.environ.get("OMP_NUM_THREADS") or 0) or cores()
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
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # the same on Windows
    )
    return job


def _gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _end(job: _Job) -> None:
    """Record the status, duration and error of an ended run, and save its executed notebook."""
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
        put_in_place(executed, job.folder / ("train.ipynb" if ok else "failed.ipynb"))
    if ok:
        (job.folder / "failed.ipynb").unlink(missing_ok=True)


def _stop(running: list[_Job]) -> None:
    """End running notebooks; a terminated papermill ends its kernel, which on Windows ends by itself."""
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
    """One progress bar over the steps of all runs; it advances after evaluations, and shows how many runs ended."""

    def __init__(self, jobs: Iterable[_Job], progress):
        self.jobs = list(jobs)
        self.shown = None
        self.bar = progress(total=self.total(), initial=self.done(), unit="step", desc="runs") if progress else None

    def total(self) -> int:
        """The steps of all runs without an error."""
        return sum(job.steps for job in self.jobs if not job.error)

    def done(self) -> int:
        return sum(job.steps if job.status in DONE else _reached(job) for job in self.jobs if not job.error)

    def move(self) -> None:
        ended = [sum(job.status in statuses for job in self.jobs) for statuses in (DONE, ("failed",))]
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


def study_folder(study: str, dataset: str) -> Path:
    """The folder of a study's tables and figures: `studies/<study>` below its data set's reports."""
    return runs_root() / runs.dataset_name(dataset) / "studies" / study


def save_study(folder: Path, tables: Mapping[str, DataFrame], figures: Mapping[str, Any] | None = None) -> list[str]:
    """Write tables as csv and matplotlib figures as svg and png, by name; returns the files' names."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, table in tables.items():
        runs.write_text(folder / f"{name}.csv", table.to_csv(index=False, lineterminator="\n"))
        written.append(f"{name}.csv")
    for name, figure in (figures or {}).items():
        for suffix in ("svg", "png"):
            plots.save(figure, folder / f"{name}.{suffix}", dpi=150)
            written.append(f"{name}.{suffix}")
    return written
