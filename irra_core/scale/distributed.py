"""torchrun → the processes of one run: starts and connects them, and passes on their rows, bars and errors."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.distributed as dist
import torch.distributed.nn  # before any group is there: its functions keep the group that they find, see `joined`
from pandas import DataFrame

from irra_core import runs
from irra_core.batches import ALONE, Team
from irra_core.checkpoints import replaced
from irra_core.recipes import Recipe, check_processes
from irra_core.scale import progress as bars
from irra_core.scale.summary import summary
from irra_core.settings import default_device

PATIENCE = timedelta(hours=12)  # one process decodes a data set while the others wait
PREFIX = "irra-core: "  # prefix of the lines of JSON that process 0 writes for the process that started torchrun
# In a line of torchrun's log: SIGBUS, SIGKILL, SIGSEGV or SIGTERM. SIGABRT follows from an error that was reported.
KILLED = re.compile(r"failed \(exitcode: -(7|9|11|15)\) local_rank: (\d+) \(pid: (\d+)\)")
RAISED = {kind.__name__: kind for kind in (ValueError, TypeError, RuntimeError, FloatingPointError, OSError)}


def prepare_run(recipe: Recipe, annotations: DataFrame, progress=None) -> Path:
    """The run folder of a recipe, ready for `torchrun … -m irra_core.training FOLDER` on one machine or many.

    The folder and the photos must have the same paths on every machine.
    """
    data = runs.data_digest(annotations, recipe, progress)
    folder = runs.run_folder(recipe, data).path
    runs.begin(folder, recipe, data)
    if not runs.finished(folder):
        write_table(folder, annotations)
    return folder


def write_table(folder: Path, annotations: DataFrame) -> None:
    """Write a run's annotations into its folder, for the processes that torchrun starts."""
    with replaced(Path(folder) / runs.TABLE) as aside:
        annotations.to_parquet(aside)


def read_table(folder: Path) -> DataFrame:
    """The annotations that `write_table` wrote. Raises FileNotFoundError if there is no such file."""
    if not (file := Path(folder) / runs.TABLE).is_file():
        raise FileNotFoundError(f"{file} is not there: irra.distributed.prepare_run(recipe, annotations) writes it")
    return pd.read_parquet(file)


def run_process(train: Callable[..., Iterator[dict[str, Any]]], arguments: list[str] | None) -> None:
    """Train a prepared run as one of torchrun's processes; process 0 reports to `launched`, or prints a summary.

    `train` yields the rows of this process's part of the run.
    """
    parser = argparse.ArgumentParser(prog="torchrun … -m irra_core.training")
    parser.add_argument("folder", type=Path, help="a run folder, from irra.distributed.prepare_run")
    parser.add_argument("--tell", action="store_true", help="write rows, bar and errors as lines of JSON")
    given = parser.parse_args(arguments)
    if runs.finished(given.folder):
        return
    recipe, annotations = runs.load_run(given.folder)["recipe"], read_table(given.folder)
    with joined() as team, telling_errors(given.tell, team):
        check_processes(team.processes, recipe)
        progress = (ToldBar if given.tell else bars.progress) if team.leads else None
        if team.leads:
            runs.begin(given.folder, recipe, runs.data_digest(annotations, recipe, progress))
        team.wait()
        for row in train(recipe, annotations, given.folder, progress, team):
            if given.tell and team.leads:
                tell("row", row)
        if team.leads and not given.tell:
            sys.stdout.write(summary(given.folder) + "\n")


@contextmanager
def joined() -> Iterator[Team]:
    """Yields this process's team from torchrun's environment, connected by NCCL for GPU tensors, gloo for others.

    Yields ALONE without that environment. Each process uses the GPU whose number is LOCAL_RANK. Nothing may keep the
    group: gloo's threads would outlive it, and one of them now and then ends Python with SIGABRT as it exits.
    """
    if "RANK" not in os.environ:
        yield ALONE
        return
    if cuda := default_device().type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    yield Team(dist.get_rank(), dist.get_world_size())
    dist.destroy_process_group()  # not after an error: NCCL would wait for processes that wait for this one


def tell(kind: str, value: Any) -> None:
    """Write one message for `launched` as a line of JSON."""
    sys.stdout.write(f"{PREFIX}{json.dumps({kind: value}, default=str)}\n")
    sys.stdout.flush()


class ToldBar:
    """A progress bar with the methods that training uses; it writes its state for `launched`, which shows it."""

    def __init__(self, total: int | None = None, initial: int = 0, desc: str | None = None, **other: Any):
        self.state = {"total": total, "initial": initial, "desc": desc, "n": initial, "postfix": {}}
        self.time = 0.0
        self.shown = "leave" not in other  # the short bars of an evaluation are not shown

    def set_postfix(self, values: dict[str, Any], refresh: bool = True) -> None:
        self.state["postfix"] = dict(values)
        self.tell()

    def update(self, n: int = 1) -> None:
        self.state["n"] += n
        if time.monotonic() - self.time > 0.2 or self.state["n"] == self.state["total"]:
            self.tell()

    def tell(self) -> None:
        if self.shown:
            self.time = time.monotonic()
            tell("bar", self.state)

    def close(self) -> None:
        """Does nothing: the last update wrote the final state."""


@contextmanager
def telling_errors(wanted: bool, team: Team) -> Iterator[None]:
    """Context manager that with `wanted` reports an error to `launched` before it raises the error here too.

    All processes but the first wait 2 s before they raise, because torchrun ends all processes when one ends.
    """
    try:
        yield
    except Exception as error:
        if wanted:
            tell("error", [type(error).__name__, str(error)])
        if not team.leads:
            time.sleep(2)
        raise


def launched(module: str, folder: Path, processes: int, progress=None) -> Iterator[dict[str, Any]]:
    """Run a module on a folder in several processes of this machine with torchrun; yields the rows that it reports.

    Shows their progress bar with `progress`. Raises RuntimeError for a process that was killed, else the first error
    that a process reports, since errors of the others follow from it, or RuntimeError with the last lines of output if
    a process failed in another way. All processes end when the iteration ends.
    """
    if 0 < torch.cuda.device_count() < processes:
        raise ValueError(f"processes is {processes}: this machine has only {torch.cuda.device_count()} GPUs")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    package = str(Path(__file__).parent.parent.parent)
    threads = max(1, torch.get_num_threads() // processes)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
    }
    started = subprocess.Popen(
        [*command, "-m", module, str(folder), "--tell"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    bar, last, error, killed = _OthersBar(progress), deque(maxlen=30), None, None
    try:
        for line in started.stdout:
            if not line.startswith(PREFIX):
                killed = killed or KILLED.search(line)
                last.append(line)
                continue
            report = json.loads(line.removeprefix(PREFIX))
            if "row" in report:
                yield report["row"]
            error = error or report.get("error")
            bar.show(report.get("bar"))
        if started.wait():
            if killed:  # the others then report that their connection to it was lost
                error = "RuntimeError", _killed(*map(int, killed.groups()), processes)
            kind, message = error or ("RuntimeError", f"one of {processes} processes failed:\n{''.join(last)}")
            raise RAISED.get(kind, RuntimeError)(message)
    finally:
        bar.close()
        _end(started)


def _killed(number: int, process: int, pid: int, processes: int) -> str:
    """The error message for a process that a signal ended."""
    return (
        f"process {process} of {processes} (pid {pid}) was ended by {signal.Signals(number).name}, as the system does "
        "where memory is full: take fewer processes or a smaller micro_batch, and start the run again; it continues "
        "from its last evaluation"
    )


class _OthersBar:
    """Shows the progress bars that another process reports, one at a time."""

    def __init__(self, progress):
        self.progress, self.bar, self.title = progress, None, None

    def show(self, state: dict[str, Any] | None) -> None:
        """Set the bar to a reported state; a new title or total opens a new bar."""
        if not (self.progress and state):
            return
        if self.title != (state["desc"], state["total"]):
            self.close()
            self.title = (state["desc"], state["total"])
            self.bar = self.progress(total=state["total"], initial=state["initial"], desc=state["desc"], unit="step")
        self.bar.set_postfix(state["postfix"], refresh=False)
        self.bar.update(state["n"] - self.bar.n)

    def close(self) -> None:
        if self.bar:
            self.bar.close()


def _end(started: subprocess.Popen) -> None:
    """End torchrun, which ends its processes, and wait for it."""
    started.terminate()
    try:
        started.wait(30)
    except subprocess.TimeoutExpired:
        started.kill()
        started.wait()
    started.stdout.close()
