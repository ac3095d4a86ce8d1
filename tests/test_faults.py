"""Training processes killed with SIGKILL at random moments end, started again, bit for bit as an unharmed one does."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import irra_core as irra
from irra_core import images, runs, training
from irra_core.training import train

PROJECT = Path(__file__).parent.parent
PHASES = ("images", "step", "state", "weights", "metrics")  # what a process may be doing when it is killed
LONGEST = {"images": 0.05, "step": 0.3, "state": 0.1, "weights": 0.05, "metrics": 0.3}  # seconds in it before the kill
TINY = {"pretrained": "none", "batch_size": 8, "epochs": 2, "max_steps": 5, "evaluate_every": 2}

# A server that has imported torch and never computed: each process that it forks begins where a new one would.
FORKS = multiprocessing.get_context("forkserver")


def tell(pipe, name, function):
    """The function, which says through the pipe that it begins."""

    def told(*args, **kwargs):
        pipe.send(name)
        return function(*args, **kwargs)

    return told


def trained(table: str, folder: str, cache: str, pipe=None) -> None:
    """What a child process does: one whole training; it tells through the pipe what it is about to do."""
    os.environ["IRRA_CACHE"] = cache
    torch.set_num_threads(1)
    if pipe:
        images._write = tell(pipe, "images", images._write)
        training._Run.train_step = tell(pipe, "step", training._Run.train_step)
        training.save_tensors = tell(pipe, "state", training.save_tensors)
        training.save_checkpoint = tell(pipe, "weights", training.save_checkpoint)
        training._Run.finish = tell(pipe, "metrics", training._Run.finish)
    recipe = irra.recipe(**TINY)
    for _ in train(recipe, pd.read_parquet(table), folder):
        pass


def attempt(table, folder, cache, kill: tuple[str, int, float] | None = None) -> bool:
    """One process that trains; killed so many seconds after it begins a phase the n-th time. True where it was."""
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


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory, annotations):
    """The table's file and the folder of a run that nobody stopped."""
    base = tmp_path_factory.mktemp("faults")
    annotations.to_parquet(base / "table.parquet")
    FORKS.set_forkserver_preload(["irra_core.training", "irra_core.model"])
    assert not attempt(base / "table.parquet", base / "whole", base / "cache")
    return base / "table.parquet", base / "whole"


def same(folder: Path, whole: Path) -> None:
    """Fail unless two finished runs have equal weights, and equal bytes in what they measured."""
    got, expected = load_file(folder / runs.WEIGHTS), load_file(whole / runs.WEIGHTS)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
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


def killed_and_finished(unharmed, folder: Path, moments) -> int:
    """How many processes were killed at the moments before one, undisturbed, finished the same run."""
    table, whole = unharmed
    count = sum(attempt(table, folder / "run", folder / "cache", moment) for moment in moments)
    assert not attempt(table, folder / "run", folder / "cache")
    same(folder / "run", whole)
    return count


def test_kills_while_it_decodes_steps_saves_and_scores_change_no_bit(unharmed, tmp_path):
    moments = [moment for moment in kills(5, seed=0) if moment[0] != "weights"]  # the fifth is the notebook's, below
    assert killed_and_finished(unharmed, tmp_path, moments) >= 3


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 13))
def test_five_more_kills_change_no_bit(unharmed, tmp_path, seed):
    assert killed_and_finished(unharmed, tmp_path, kills(5, seed)) >= 4


def test_the_second_process_in_a_run_folder_is_refused_and_told_who_is_there(unharmed, annotations, tmp_path):
    table, _ = unharmed
    ours, theirs = FORKS.Pipe()
    arguments = (str(table), str(tmp_path / "run"), str(tmp_path / "cache"), theirs)
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


def test_a_disk_that_is_full_is_one_error_and_the_last_state_stays_whole(unharmed, annotations, tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    recipe, folder = irra.recipe(**TINY), tmp_path / "run"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the unharmed run had: sums over two threads round differently
    running = train(recipe, annotations, folder)
    next(running)
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
    got, expected = load_file(folder / runs.WEIGHTS), load_file(unharmed[1] / runs.WEIGHTS)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root, to become somebody else")
def test_a_read_only_folder_is_one_error_that_names_it():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        (Path(folder) / "metrics.json").write_text("before")
        os.seteuid(65534)
        try:
            with pytest.raises(PermissionError, match=r"metrics\.json cannot be written .*grant access in .*intact"):
                runs.write_text(Path(folder) / "metrics.json", "after")
            with pytest.raises(PermissionError, match=r"run folder .* cannot be made .*IRRA_REPORTS"):
                runs.begin(Path(folder) / "run", irra.recipe(**TINY), "digest")
        finally:
            os.seteuid(0)
        assert (Path(folder) / "metrics.json").read_text() == "before"


def notebook(reports: Path, shared: Path) -> subprocess.Popen:
    """`papermill notebooks/train.ipynb` as a user types it, with its reports in a folder."""
    environment = os.environ | {"IRRA_SMOKE": "1", "IRRA_REPORTS": str(reports), "PYTHONPATH": str(PROJECT)}
    environment |= {"IRRA_DATA": str(shared / "data"), "IRRA_CACHE": str(shared / "cache")}
    reports.mkdir(parents=True, exist_ok=True)
    parameters = ["-p", "pretrained", "none", "-p", "evaluate_every", "1"]
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", "notebooks/train.ipynb", reports / "out.ipynb"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([*command, *parameters], env=environment, cwd=PROJECT, **pipes)


def test_a_notebook_whose_kernel_is_killed_ends_the_same_when_it_is_run_again(tmp_path):
    assert notebook(tmp_path / "whole", tmp_path).wait(300) == 0
    running, killed = notebook(tmp_path / "cut", tmp_path), False
    while running.poll() is None and not killed:
        for lock in (tmp_path / "cut").glob("smoke/*/*/.lock"):
            if (lock.parent / runs.STATE).exists() and (words := lock.read_text().split()):
                os.kill(int(words[1]), signal.SIGKILL)  # the lock names the kernel
                killed = True
        time.sleep(0.01)
    assert running.wait(300) != 0
    assert killed
    assert notebook(tmp_path / "cut", tmp_path).wait(300) == 0
    (whole,), (cut,) = (list((tmp_path / name).glob("smoke/synthetic/*/metrics.json")) for name in ("whole", "cut"))
    assert json.loads(cut.read_text()) == json.loads(whole.read_text())
    same(cut.parent, whole.parent)
