"""A training's weights, optimiser and history → its files, written in the background; and back from them."""

import concurrent.futures
import json
import os
import signal
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pandas import DataFrame
from torch import Tensor

from irra_core import runs
from irra_core.backbone import read_weights
from irra_core.checkpoints import description, save_tensors, weights_of
from irra_core.model import IRRA
from irra_core.recipes import Recipe

SLAB = 2**26  # bytes: torch rounds each allocation of pinned memory up to a power of two


class Saver:
    """Saves a run's progress in a thread while training goes on; at most one save is under way.

    The next save, `wait`, the end of the context and SIGTERM wait for it. An error of the thread, such as a full disk,
    is raised where the run waits next.
    """

    def __init__(self, folder: Path, recipe: Recipe):
        self.folder, self.recipe, self.host = folder, recipe, HostCopies()
        self.thread = concurrent.futures.ThreadPoolExecutor(1, "saving")
        self.under_way: concurrent.futures.Future | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *_) -> None:
        try:
            self.wait()
        finally:
            self.thread.shutdown()

    def save(self, model: IRRA, optimiser: torch.optim.Optimizer, about: Mapping[str, Any]) -> None:
        """Copy the run's state and start to write it; `about` holds JSON values: step, best, history and others.

        If the step is the best so far, the weights are written too. They are a part of the state, unless the model has
        adapters, whose merged matrices are copied beside it.
        """
        self.wait()
        step, state = about["step"], state_tensors(model, optimiser)
        selected = step == about["best"][0]
        weights = {f"model.{name}": value for name, value in weights_of(model).items()} if selected else {}
        copies, copied = self.host.of(state | weights)
        history, said = DataFrame(about["history"]).to_csv(index=False, lineterminator="\n"), json.dumps(about)
        described = _described(model, self.recipe, step)

        def write() -> None:
            copied()
            runs.write_text(self.folder / "history.csv", history)
            kept = {name: copies[name] for name in state}
            save_tensors(kept, self.folder / runs.STATE, {"run": said}, keep=self.folder / runs.STATE_BEFORE)
            if selected:  # after the state: a process killed between the two finds the weights in the state
                best = {name.removeprefix("model."): copies[name] for name in weights}
                save_tensors(best, self.folder / runs.WEIGHTS, described)

        self.under_way = self.thread.submit(write)
        if _in_main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._end)

    def check(self) -> None:
        """Raise the error of a save that has failed since it was started; does not wait."""
        if self.under_way and self.under_way.done():
            self.wait()

    def wait(self) -> None:
        """Return once no save is under way. Raises the OSError of one that failed."""
        if (started := self.under_way) is None:
            return
        concurrent.futures.wait([started])  # an interrupt of this line leaves the save under way
        self.under_way = None
        if _in_main_thread() and signal.getsignal(signal.SIGTERM) == self._end:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        started.result()

    def _end(self, number: int, _) -> None:
        """End this process by SIGTERM, as without this handler, but after the save that is under way."""
        concurrent.futures.wait([self.under_way] if self.under_way else [])
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def save_weights(model: IRRA, recipe: Recipe, folder: Path, step: int) -> None:
    """Write a model's weights as the selected ones of a run, those of this step; returns when they are on the disk."""
    save_tensors(weights_of(model), folder / runs.WEIGHTS, _described(model, recipe, step))


def _described(model: IRRA, recipe: Recipe, step: int) -> dict[str, str]:
    """The metadata of a run's weights: with their step, so that a resume sees whether they are the selected ones."""
    return description(model, recipe) | {"step": str(step)}


def _in_main_thread() -> bool:
    """True where Python allows to set signal handlers."""
    return threading.current_thread() is threading.main_thread()


class HostCopies:
    """Copies of tensors in host memory, which the next copies of the same names use again; pinned for a GPU's."""

    def __init__(self):
        self.buffers: dict[str, Tensor] = {}
        self.free = torch.empty(0, dtype=torch.uint8)  # what is left of the last allocation

    def of(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Callable[[], None]]:
        """The copies by name, and a function to call before they are read: it waits until a GPU has made them.

        This function itself does not wait for a GPU: what training does next to the tensors comes after the copies.
        """
        gpu = next((value.device for value in tensors.values() if value.device.type == "cuda"), None)
        copies = {name: self._buffer(name, value, gpu is not None) for name, value in tensors.items()}
        for name, value in tensors.items():
            copies[name].copy_(value, non_blocking=gpu is not None)
        return copies, torch.cuda.current_stream(gpu).record_event().synchronize if gpu else lambda: None

    def _buffer(self, name: str, tensor: Tensor, pinned: bool) -> Tensor:
        """Host memory of this name in the tensor's shape and dtype."""
        if name not in self.buffers:
            size = -(-tensor.nbytes // 64) * 64  # so that every buffer is aligned
            if len(self.free) < size:
                slab = torch.empty(max(size, SLAB), dtype=torch.uint8)
                self.free = slab.pin_memory() if pinned else slab
            mine, self.free = self.free[:size], self.free[size:]
            self.buffers[name] = mine[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        return self.buffers[name]


class State(NamedTuple):
    """What an interrupted training resumes from; `about` holds JSON values."""

    weights: dict[str, Tensor]
    moments: dict[int, dict[str, Tensor]]  # of the optimiser, by the parameter's number
    about: dict[str, Any]
    selected: bool = False  # its weights are the selected ones, whose own file is lost


def state_tensors(model: torch.nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors of a training's state, by the names that they have in its file."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for index, moments in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{index}.{name}": value for name, value in moments.items()}
    return tensors


def load_state(path: Path) -> State:
    """The state in a file that a `Saver` wrote. Raises ValueError if the file is damaged."""
    tensors, metadata = read_weights(path)
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimiser."):
            _, index, moment = name.split(".")
            # A copy: the optimiser takes it as it is, and would keep the file mapped, which the next save replaces.
            moments.setdefault(int(index), {})[moment] = tensor.clone()
    weights = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    try:
        return State(weights, moments, json.loads(metadata["run"]))
    except KeyError as error:
        raise ValueError(f"{path} is not a training's state: its metadata has no {error}") from error


def last_state(folder: Path) -> State | None:
    """The state from which the run in a folder resumes; None where it begins at step 0.

    Warns of damaged files. Selected weights are lost if their file is damaged, absent or of another step than the state
    says, as after a resume from an earlier state. Those of the state's own step are in the state.
    """
    if (state := _newest(folder / runs.STATE, folder / runs.STATE_BEFORE)) is None:
        return None
    step, (best, _), weights = state.about["step"], state.about["best"], folder / runs.WEIGHTS
    if not best:  # no weights were selected so far
        return state
    lost, damaged = f"{weights} is not there", False
    if weights.exists():
        try:
            if (found := read_weights(weights)[1].get("step")) == str(best):
                return state
            lost = f"{weights} is of step {found}"
        except (OSError, ValueError) as error:
            lost, damaged = str(error), True
    if best != step:
        told = f"{lost}. The selected weights were of step {best}: training begins again at step 0"
        warnings.warn(told, stacklevel=4)
        return None
    if damaged:
        warnings.warn(f"{lost}. They are those of the kept state, and written again", stacklevel=4)
    return state._replace(selected=True)


def _newest(*files: Path) -> State | None:
    """The first intact state among the files, newest first, if there is one; warns of the damaged ones before it."""
    damaged = []
    for file in files:
        if not file.exists():
            continue
        try:
            state = load_state(file)
        except ValueError as error:
            damaged.append(str(error))
            continue
        if damaged:
            step = state.about["step"]
            warnings.warn(f"{damaged[0]}. Going on from the state before it, of step {step}", stacklevel=4)
        return state
    if damaged:
        warnings.warn(f"{'; '.join(damaged)}. No state is whole: training begins again at step 0", stacklevel=4)
    return None
