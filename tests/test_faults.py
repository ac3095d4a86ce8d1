"""Training processes killed with SIGKILL at random moments end, started again, bit for bit as an unharmed one does."""

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest
import torch
from conftest import NARROW
from safetensors.torch import load_file
from tqdm import tqdm

import irra_core as irra
from irra_core import backbone, images, runs, training
from irra_core.backbone import read_weights
from irra_core.evaluation import METRICS
from irra_core.scale import distributed, saving
from irra_core.training import train

PROJECT = Path(__file__).parent.parent
PHASES = ("images", "step", "state", "weights", "metrics")  # what a process may be doing when it is killed
FILES = {runs.STATE: "state", runs.WEIGHTS: "weights"}  # begun in the background, state first
SENDING = threading.Lock()  # a pipe is for one thread at a time
KEPT = "kept.safetensors"  # beside a run folder: its last state, which a run that ends well deletes
LONGEST = {"images": 0.05, "step": 0.3, "state": 0.1, "weights": 0.05, "metrics": 0.3}  # seconds in it before the kill
TINY = {"pretrained": "none", "batch_size": 8, "epochs": 2, "max_steps": 5, "evaluate_every": 2}

# A server that has imported torch and never computed: each process that it forks begins where a new one would.
FORKS = multiprocessing.get_context("forkserver")


def tell(pipe, named, function):
    """The function, which says through the pipe that it begins: a name, or one that depends on its arguments."""

    def told(*args, **kwargs):
        with SENDING:
            pipe.send(named if isinstance(named, str) else named(*args))
        return function(*args, **kwargs)

    return told


def trained(table: str, folder: str, cache: str, pipe=None) -> None:
    """What a child process does: one whole training; it tells through the pipe what it is about to do."""
    os.environ["IRRA_CACHE"] = cache
    torch.set_num_threads(1)
    real = training._Run.finish

    def finish(run, *args):
        shutil.copyfile(run.folder / runs.STATE, run.folder.parent / KEPT)
        real(run, *args)

    training._Run.finish = finish
    if pipe:
        images._write = tell(pipe, "images", images._write)
        training.optimise = tell(pipe, "step", training.optimise)
        saving.save_tensors = tell(pipe, lambda tensors, path, metadata: FILES[path.name], saving.save_tensors)
        training._Run.finish = tell(pipe, "metrics", training._Run.finish)
    recipe = irra.recipe(**TINY)
    for _ in train(recipe, pd.read_parquet(table), folder):
        pass


def attempt(table, folder, cache, kill: tuple[str, int, float] | None = None) -> bool:
    """One process that trains; killed so many seconds after it begins a phase the n-th time. True where it was.

    The 0-th time is the process's own beginning, whatever the phase.
    """
    ours, theirs = FORKS.Pipe()
    process = FORKS.Process(target=trained, args=(str(table), str(folder), str(cache), theirs if kill else None))
    process.start()
    theirs.close()
    seen = 0
    while kill and seen < kill[1]:
        try:
            seen += ours.recv() == kill[0]
        except EOFError:  # it ended before
            break
    if kill and seen == kill[1]:
        time.sleep(kill[2])
        process.kill()
    process.join(300)
    assert process.exitcode in ((0, -signal.SIGKILL) if kill else (0,)), process.exitcode
    return process.exitcode == -signal.SIGKILL


class Whole(NamedTuple):
    """A run that nobody stopped: the table's file, its folder, and how long its process lived."""

    table: Path
    folder: Path
    seconds: float


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory, annotations) -> Whole:
    base = tmp_path_factory.mktemp("faults")
    annotations.to_parquet(base / "table.parquet")
    FORKS.set_forkserver_preload(["irra_core.training", "irra_core.model"])
    first = FORKS.Process()  # for it the server imports torch, so that the seconds below are a run's own
    first.start()
    first.join()
    began = time.monotonic()
    assert not attempt(base / "table.parquet", base / "whole", base / "cache")
    return Whole(base / "table.parquet", base / "whole", time.monotonic() - began)


@pytest.fixture
def one_thread():
    """As the unharmed run had: sums over two threads round differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def same_tensors(file: Path, expected: Path) -> None:
    """Fail unless two safetensors files hold the same bits under the same names."""
    ours, theirs = load_file(file), load_file(expected)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def same_state(file: Path, expected: Path) -> None:
    """Fail unless two states have the same weights, moments of the optimiser, step and history."""
    same_tensors(file, expected)
    ours, theirs = (json.loads(read_weights(path)[1]["run"]) for path in (file, expected))
    assert sum(name.startswith("optimiser.") for name in load_file(file)) > 100
    for name in ("step", "best", "history"):
        assert ours[name] == theirs[name], name


def same(folder: Path, whole: Path) -> None:
    """Fail unless two finished runs have equal weights, and equal bytes in what they measured."""
    same_tensors(folder / runs.WEIGHTS, whole / runs.WEIGHTS)
    for name in ("history.csv", "metrics.json", "queries.csv", "recipe.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    left = [path.name for path in folder.iterdir() if path.name.startswith((".", "state"))]
    assert left == [], "something half written was left"


def kills(count: int, seed: int) -> list[tuple[str, int, float]]:
    """A phase, its how-manieth begin and the seconds after it, so many times; every phase comes in turn."""
    draw = random.Random(seed)
    most = {"images": 1, "step": 2, "state": 1, "weights": 1, "metrics": 1}
    phases = [PHASES[number % len(PHASES)] for number in range(count)]
    return [(phase, draw.randint(1, most[phase]), draw.uniform(0, LONGEST[phase])) for phase in phases]


def anywhen(count: int, seed: int, seconds: float) -> list[tuple[str, int, float]]:
    """So many moments in the life of a process, each as likely as any other."""
    draw = random.Random(seed)
    return [("any", 0, draw.uniform(0, seconds)) for _ in range(count)]


def killed_and_finished(unharmed: Whole, folder: Path, moments) -> int:
    """How many processes were killed at the moments before one, undisturbed, finished the same run."""
    count = sum(attempt(unharmed.table, folder / "run", folder / "cache", moment) for moment in moments)
    assert not attempt(unharmed.table, folder / "run", folder / "cache")
    same(folder / "run", unharmed.folder)
    same_state(folder / KEPT, unharmed.folder.parent / KEPT)
    return count


def test_kills_while_it_decodes_steps_saves_and_scores_change_no_bit(unharmed, tmp_path):
    moments = [moment for moment in kills(5, seed=0) if moment[0] != "weights"]  # the fifth is the notebook's, below
    assert killed_and_finished(unharmed, tmp_path, moments) >= 3


@pytest.mark.long
def test_fifty_kills_at_chosen_and_at_any_moments_change_no_bit(unharmed, tmp_path, capsys):
    aimed = anywhere = 0
    for seed in range(1, 9):
        aimed += killed_and_finished(unharmed, tmp_path / f"aimed-{seed}", kills(5, seed))
    for seed in range(1, 7):
        moments = anywhen(4, seed, unharmed.seconds)
        anywhere += killed_and_finished(unharmed, tmp_path / f"any-{seed}", moments)
    with capsys.disabled():
        print(
            f"\n{aimed + anywhere} training processes were killed: {aimed} in chosen phases, {anywhere} at any moment"
        )
    assert aimed + anywhere >= 50
    assert anywhere >= 12


def test_the_second_process_in_a_run_folder_is_refused_and_told_who_is_there(unharmed, annotations, tmp_path):
    ours, theirs = FORKS.Pipe()
    arguments = (str(unharmed.table), str(tmp_path / "run"), str(tmp_path / "cache"), theirs)
    process = FORKS.Process(target=trained, args=arguments)
    process.start()
    theirs.close()  # so that its death would end the next line
    while ours.recv() != "step":
        pass
    os.kill(process.pid, signal.SIGSTOP)  # however slow this machine is, it is still there
    try:
        with pytest.raises(RuntimeError, match=rf"run is being trained by process {process.pid} on .*wait for it"):
            next(train(irra.recipe(**TINY), annotations, tmp_path / "run"))
    finally:
        process.kill()
        process.join()
    assert next(train(irra.recipe(**TINY), annotations, tmp_path / "run"))["step"] == 2  # the lock went with it


@pytest.mark.parametrize("processes", [1, 2])
def test_who_needs_the_same_run_waits_for_the_process_that_trains_it_and_takes_it(
    processes, unharmed, annotations, tmp_path, monkeypatch
):
    monkeypatch.setenv("IRRA_REPORTS", str(tmp_path))
    recipe, said = irra.recipe(**TINY), []
    folder = runs.run_folder(recipe, runs.data_digest(annotations, recipe)).path
    ours, theirs = FORKS.Pipe()
    arguments = (str(unharmed.table), str(folder), str(tmp_path / "cache"), theirs)
    process = FORKS.Process(target=trained, args=arguments)
    process.start()
    theirs.close()
    while ours.recv() != "step":
        pass

    class Bar(tqdm):
        def __init__(self, *given, desc=None, **named):
            said.append(desc)
            super().__init__(*given, desc=desc, disable=True, **named)

    monkeypatch.setattr(training, "_Run", None)  # whoever trains here, fails
    monkeypatch.setattr(distributed, "launched", None)
    if processes == 1:
        assert training.trained_run(recipe, annotations, progress=Bar) == folder
    else:
        rows = list(train(recipe, annotations, folder, Bar, processes, wait=True))
        assert rows == pd.read_csv(folder / "history.csv").to_dict("records")
    process.join()
    assert [desc for desc in said if f"is being trained by process {process.pid} on" in desc] == said[-1:]
    same(folder, unharmed.folder)


def until_saved(folder: Path) -> None:
    """Return once a run's first save is on the disk; the selected weights are its last file."""
    until = time.monotonic() + 60
    while not (folder / runs.WEIGHTS).exists():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_disk_that_is_full_is_one_error_and_the_last_state_stays_whole(unharmed, one_thread, annotations, tmp_path):
    resource = pytest.importorskip("resource")
    recipe, folder = irra.recipe(**TINY), tmp_path / "run"
    running = train(recipe, annotations, folder)
    next(running)
    until_saved(folder)
    before = (folder / runs.STATE).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))  # no file may grow beyond 1 MiB
    try:
        with pytest.raises(OSError, match=r"safetensors cannot be written .*make room.*intact"):
            list(running)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (folder / runs.STATE).read_bytes() == before
    list(train(recipe, annotations, folder))
    same_tensors(folder / runs.WEIGHTS, unharmed.folder / runs.WEIGHTS)


@pytest.mark.parametrize(
    ("selected", "harm", "said"),
    [("last", "torn", "written again"), ("val", "gone", "training begins again at step 0")],
)
def test_selected_weights_that_are_lost_before_the_end_are_said_out_loud_and_come_back(
    selected, harm, said, annotations, tmp_path, monkeypatch
):
    """They are those of the last state, or else of an earlier evaluation, which only a new beginning reaches again."""
    recipe = irra.recipe(**TINY, select_on=selected)
    monkeypatch.setattr(
        training, "scores", lambda queries: dict.fromkeys(METRICS, (50.0, 50.0, 50.0))
    )  # step 2 is best
    list(train(recipe, annotations, tmp_path / "whole"))
    running = train(recipe, annotations, tmp_path / "run")
    assert [next(running)["step"], next(running)["step"]] == [2, 4]
    running.close()
    weights = tmp_path / "run" / runs.WEIGHTS
    weights.unlink() if harm == "gone" else os.truncate(weights, weights.stat().st_size // 2)
    with pytest.warns(UserWarning, match=said):
        list(train(recipe, annotations, tmp_path / "run"))
    same(tmp_path / "run", tmp_path / "whole")


def test_a_lock_that_is_a_link_or_that_the_disk_does_not_know_is_refused(annotations, tmp_path, monkeypatch):
    victim, folder = tmp_path / "victim", tmp_path / "run"
    victim.write_text("precious")
    folder.mkdir()
    (folder / runs.LOCK).symlink_to(victim)
    with pytest.raises(OSError, match=r"run folder .*run cannot be locked .*delete \.lock if it is a link"):
        next(train(irra.recipe(**TINY), annotations, folder))
    assert victim.read_text() == "precious"
    (folder / runs.LOCK).unlink()

    fcntl = pytest.importorskip("fcntl")  # what filelock calls here

    def refused(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refused)
    with (
        pytest.raises(OSError, match=r"cannot be locked \(No locks available\).*IRRA_REPORTS to a local disk"),
        runs.locked(folder),
    ):
        pass


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root, to become somebody else")
def test_a_read_only_folder_is_one_error_that_names_it():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        (Path(folder) / "metrics.json").write_text("before")
        locked = runs.locked(Path(folder))
        os.seteuid(65534)
        try:
            with pytest.raises(PermissionError, match=r"metrics\.json cannot be written .*grant access in .*intact"):
                runs.write_text(Path(folder) / "metrics.json", "after")
            with pytest.raises(PermissionError, match=r"run folder .* cannot be made .*IRRA_REPORTS"):
                runs.begin(Path(folder) / "run", irra.recipe(**TINY), "digest")
            with pytest.raises(PermissionError, match=r"run folder .* cannot be locked .*grant access"), locked:
                pass
        finally:
            os.seteuid(0)
        assert (Path(folder) / "metrics.json").read_text() == "before"


def notebook(reports: Path, shared: Path) -> subprocess.Popen:
    """`papermill notebooks/train.ipynb` as a user types it, with its reports in a folder."""
    environment = os.environ | {"IRRA_SMOKE": "1", "IRRA_REPORTS": str(reports), "PYTHONPATH": str(PROJECT)}
    environment |= {"IRRA_DATA": str(shared / "data"), "IRRA_CACHE": str(reports / "cache")}
    reports.mkdir(parents=True, exist_ok=True)
    parameters = ["-p", "pretrained", "none", "-p", "evaluate_every", "1"]
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", "notebooks/train.ipynb", reports / "out.ipynb"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([*command, *parameters], env=environment, cwd=PROJECT, **pipes)


def kernel_killed(running: subprocess.Popen, reports: Path, dead: set[int], began, wait: float = 0.0) -> bool:
    """Kill the kernel of a running notebook so long after its run folder satisfies `began`; False if it ended before.

    Its own papermill then ends with an error. `dead` are the kernels that were killed before: a lock still names them.
    """
    while running.poll() is None:
        for lock in reports.glob("smoke/*/*/.lock"):
            if began(lock.parent) and holder(lock) not in dead | {None}:
                time.sleep(wait)
                if kernel := holder(lock):
                    os.kill(kernel, signal.SIGKILL)
                    dead.add(kernel)
                    assert running.wait(300) != 0
                    return True
        time.sleep(0.01)
    return False


def holder(lock: Path) -> int | None:
    """The process that a lock names; None while it names nobody, or is gone."""
    words = lock.read_text().split() if lock.exists() else []
    return int(words[1]) if len(words) > 1 else None


def same_notebooks(cut: Path, whole: Path) -> None:
    """Fail unless two report folders hold the same run."""
    (ours,), (theirs,) = (list(path.glob("smoke/synthetic/*/metrics.json")) for path in (cut, whole))
    same(ours.parent, theirs.parent)


@pytest.mark.notebook
def test_a_notebook_whose_kernel_is_killed_ends_the_same_when_it_is_run_again(tmp_path):
    assert notebook(tmp_path / "whole", tmp_path).wait(300) == 0
    running = notebook(tmp_path / "cut", tmp_path)
    assert kernel_killed(running, tmp_path / "cut", set(), lambda run: (run / runs.STATE).exists())
    assert notebook(tmp_path / "cut", tmp_path).wait(300) == 0
    same_notebooks(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.long
def test_papermill_killed_at_any_moment_of_its_run_ends_the_same_when_it_is_started_again(tmp_path, capsys):
    """At least 50 times in all, up to six times a run."""
    assert notebook(tmp_path / "whole", tmp_path).wait(300) == 0
    draw, dead, rounds = random.Random(0), set(), 0
    while len(dead) < 50 and rounds < 30:
        rounds += 1
        cut = tmp_path / f"cut-{rounds}"
        for _ in range(6):
            running = notebook(cut, tmp_path)
            if not kernel_killed(running, cut, dead, lambda run: True, wait=draw.uniform(0, 1.5)):
                break  # it ended before
        assert notebook(cut, tmp_path).wait(300) == 0
        same_notebooks(cut, tmp_path / "whole")
    with capsys.disabled():
        print(f"\n{len(dead)} kernels of papermill train.ipynb were killed, in {rounds} runs")
    assert len(dead) >= 50


def test_a_fresh_process_with_another_hash_seed_writes_the_same_bytes(unharmed, tmp_path):
    program = "import sys; sys.path.insert(0, sys.argv.pop(1)); from test_faults import trained; trained(*sys.argv[1:])"
    arguments = [Path(__file__).parent, unharmed.table, tmp_path / "run", tmp_path / "cache"]
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(PROJECT)}
    subprocess.run([sys.executable, "-c", program, *map(str, arguments)], env=environment, check=True)
    same(tmp_path / "run", unharmed.folder)
    same_state(tmp_path / KEPT, unharmed.folder.parent / KEPT)
    for name in (runs.WEIGHTS, "history.csv"):
        assert (tmp_path / "run" / name).read_bytes() == (unharmed.folder / name).read_bytes(), name


def measured(table: str, folder: str, cache: str, pipe) -> None:
    """What a child process does: 10,000 steps; at each evaluation it tells the step, its memory and its open files."""
    os.environ["IRRA_CACHE"] = cache
    torch.set_num_threads(1)
    backbone.SMALL_CLIP = NARROW
    recipe = irra.recipe(**TINY | {"batch_size": 4, "epochs": 10_000, "max_steps": 10_000, "evaluate_every": 1000})
    recipe = recipe.replace(image_height=32, image_width=16, interaction_depth=1)
    for row in train(recipe, pd.read_parquet(table), folder):
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        pipe.send((row["step"], resident / 2**20, len(os.listdir("/proc/self/fd"))))


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to see memory and open files")
def test_ten_thousand_steps_take_no_more_memory_and_no_more_files(unharmed, tmp_path, capsys):
    ours, theirs = FORKS.Pipe()
    arguments = (str(unharmed.table), str(tmp_path / "run"), str(tmp_path / "cache"), theirs)
    process = FORKS.Process(target=measured, args=arguments)
    process.start()
    theirs.close()
    rows = [ours.recv() for _ in range(10)]
    process.join()
    found = pd.DataFrame(rows, columns=["step", "resident MiB", "open files"]).set_index("step")
    with capsys.disabled():
        print(f"\n{found.round(1).to_string()}")
    assert process.exitcode == 0
    assert found.index[-1] == 10_000
    later = found.loc[2000:]
    assert later["resident MiB"].max() - later["resident MiB"].iloc[0] < 8
    assert later["open files"].nunique() == 1
