"""torchrun → the processes of one run: started from here, joined there, their rows and errors passed on."""

import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from irra_core.batches import ALONE, Team

PATIENCE = timedelta(hours=12)  # one process decodes a data set or pretrains the small CLIP while the others wait


@contextmanager
def joined() -> Iterator[Team]:
    """This process's team as torchrun's environment tells it, connected: NCCL for what lies on GPUs, gloo for the rest.

    Without that environment, alone. Each process takes the GPU of its local number.
    """
    if "RANK" not in os.environ:
        yield ALONE
        return
    if cuda := torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    try:
        yield Team(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


TOLD = "irra-core: "  # begins the lines in which process 0 tells the one that started it; what follows is JSON
RAISED = {kind.__name__: kind for kind in (ValueError, TypeError, RuntimeError, FloatingPointError, OSError)}


def tell(kind: str, said: Any) -> None:
    """One line for `launched`."""
    sys.stdout.write(f"{TOLD}{json.dumps({kind: said}, default=str)}\n")
    sys.stdout.flush()


@contextmanager
def telling_errors(wanted: bool = True) -> Iterator[None]:
    """An error within is told before it is raised, so that the process that started this one can raise it too.

    The others wait a moment: torchrun ends all when one ends, and the same error is to be told before.
    """
    try:
        yield
    except Exception as error:
        if wanted:
            tell("error", [type(error).__name__, str(error)])
        elif "RANK" in os.environ:
            time.sleep(2)
        raise


def launched(module: str, folder: Path, processes: int, progress=None) -> Iterator[dict[str, Any]]:
    """The rows that a module tells that torchrun runs on a folder in several processes of this machine.

    Their bar is shown as one of `progress`. Raises what process 0 raised, or RuntimeError with the last lines of output
    where a process ended in another way; they all end when the iteration does.
    """
    if 0 < torch.cuda.device_count() < processes:
        raise ValueError(f"processes is {processes}: this machine has {torch.cuda.device_count()} GPUs, one for each")
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
        text=True,
    )
    bar, last, error = _Shown(progress), deque(maxlen=30), None
    try:
        for line in started.stdout:
            if not line.startswith(TOLD):
                last.append(line)
                continue
            told = json.loads(line.removeprefix(TOLD))
            if "row" in told:
                yield told["row"]
            error = told.get("error", error)
            bar.show(told.get("bar"))
        if started.wait():
            kind, message = error or ("RuntimeError", f"one of {processes} processes ended:\n{''.join(last)}")
            raise RAISED.get(kind, RuntimeError)(message)
    finally:
        bar.close()
        _end(started)


class _Shown:
    """The bars of another process, as they are told: one at a time."""

    def __init__(self, progress):
        self.progress, self.bar, self.title = progress, None, None

    def show(self, said: dict[str, Any] | None) -> None:
        """Bring the bar to where the other one stands."""
        if not (self.progress and said):
            return
        if self.title != (said["desc"], said["total"]):
            self.close()
            self.title = (said["desc"], said["total"])
            self.bar = self.progress(total=said["total"], initial=said["initial"], desc=said["desc"], unit="step")
        self.bar.set_postfix(said["postfix"], refresh=False)
        self.bar.update(said["n"] - self.bar.n)

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
