"""Saves in the background: what is copied, who waits for whom, and where a failed save is raised."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from fake_cuda import fake_cuda, unusable
from safetensors.torch import load_file

import irra_core as irra
from irra_core import runs, training
from irra_core.backbone import read_weights
from irra_core.checkpoints import save_checkpoint, save_tensors
from irra_core.scale import machine, saving
from irra_core.scale.saving import HostCopies, Saver, last_state, load_state, state_tensors
from irra_core.training import build_optimiser, train

pytestmark = pytest.mark.usefixtures("narrow")
needs_fake_gpu = pytest.mark.skipif(unusable() is not None, reason=unusable() or "")


def about(step: int, best: int) -> dict:
    return {"step": step, "best": [best, 50.0], "history": [{"step": step}], "seconds": {"training": 1.0}}


def built(**changes) -> tuple[irra.Recipe, torch.nn.Module]:
    """A recipe and its model, on the CPU."""
    recipe = irra.recipe(pretrained="none", losses="sdm+id", **changes)
    return recipe, irra.build_model(recipe, 3)


def stepped(recipe: irra.Recipe, model: torch.nn.Module) -> torch.optim.Adam:
    """The model's optimiser, after one step."""
    optimiser = build_optimiser(model, recipe)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimiser.step()
    return optimiser


@pytest.fixture
def training_state() -> tuple[irra.Recipe, torch.nn.Module, torch.optim.Adam]:
    recipe, model = built()
    return recipe, model, stepped(recipe, model)


class Gate:
    """`save_tensors` that says when a file is begun and waits until it may be written."""

    def __init__(self, monkeypatch, *names: str):
        self.begun, self.open, self.names = threading.Event(), threading.Event(), names
        monkeypatch.setattr(saving, "save_tensors", self)

    def __call__(self, tensors, path, *given, **named):
        if path.name in self.names:
            self.begun.set()
            assert self.open.wait(60)
        save_tensors(tensors, path, *given, **named)


# copies


def test_copies_are_equal_keep_apart_and_use_their_memory_again():
    strided = torch.randn(6, 4)[:, ::2]
    tensors = {"strided": strided, "number": torch.tensor(3.0), "none": torch.empty(0, 5), "odd": torch.ones(3).half()}
    tensors |= {f"large {n}": torch.randn(3_000_000) for n in range(7)}  # more than one allocation
    host = HostCopies()
    copies, copied = host.of(tensors)
    copied()
    for name, value in tensors.items():
        assert torch.equal(copies[name], value), name
        assert (copies[name].dtype, copies[name].is_contiguous()) == (value.dtype, True)
    addresses = {name: copy.data_ptr() for name, copy in copies.items()}
    again, _ = host.of({name: value + 1 for name, value in tensors.items()})
    assert {name: copy.data_ptr() for name, copy in again.items()} == addresses
    assert all(torch.equal(again[name], value + 1) for name, value in tensors.items())


@needs_fake_gpu
@pytest.mark.parametrize("rank", [0, 2])
def test_a_save_reads_each_tensor_from_the_gpu_once_and_waits_once_in_its_thread(rank, tmp_path):
    recipe, model = built(adapter_rank=rank)
    with fake_cuda() as gpu:
        optimiser = stepped(recipe, model.to("cuda"))
        state = state_tensors(model, optimiser)
        merged = sum(name.endswith(".original") for name in state)
        event = torch.cuda.current_stream().record_event()
        with Saver(tmp_path, recipe) as saver:
            for step in (2, 4):  # the second one uses the buffers of the first
                gpu.clear()
                event.reset_mock()
                saver.save(model, optimiser, about(step, best=step))
                assert len(gpu.reads) == len(state) + merged  # of adapters the merged matrices, else nothing more
                assert (gpu.waits, gpu.slow) == ([], [])
                saver.wait()
                assert event.synchronize.call_count == 1
                assert len(gpu.reads) == len(state) + merged
        assert bool(merged) == bool(rank)
    kept = load_state(tmp_path / runs.STATE)
    assert kept.about["step"] == 4
    assert len(kept.weights) + sum(map(len, kept.moments.values())) == len(state)
    assert not any("parametrizations" in name for name in load_file(tmp_path / runs.WEIGHTS))


@needs_fake_gpu
def test_a_checkpoint_reads_each_tensor_from_the_gpu_once(tmp_path):
    recipe, model = built()
    with fake_cuda() as gpu:
        model.to("cuda")
        gpu.clear()
        save_checkpoint(model, recipe, tmp_path / "model.safetensors")
        assert len(gpu.reads) == len(model.state_dict())


class Forgotten(Exception):
    """Raised by what stands in for `forget_peak`."""


def test_a_run_measures_its_own_peak_memory(tiny, annotations, tmp_path, monkeypatch):
    def forget():
        raise Forgotten

    monkeypatch.setattr(machine, "forget_peak", forget)
    with pytest.raises(Forgotten):
        next(train(tiny, annotations, tmp_path))


@needs_fake_gpu
def test_the_peak_memory_of_a_gpu_is_forgotten_too():
    machine.forget_peak()  # without a GPU there is none
    with fake_cuda():
        machine.forget_peak()
        assert torch.cuda.reset_peak_memory_stats.call_count == 1


# order and content


def test_what_is_written_is_what_was_true_when_the_save_began(training_state, tmp_path, monkeypatch):
    recipe, model, optimiser = training_state
    expected = {name: value.clone() for name, value in state_tensors(model, optimiser).items()}
    gate, said = Gate(monkeypatch, runs.STATE), about(2, best=2)
    with Saver(tmp_path, recipe) as saver:
        saver.save(model, optimiser, said)
        assert gate.begun.wait(60)
        optimiser.step()  # training goes on
        said["history"].append({"step": 4})
        gate.open.set()
    found = load_file(tmp_path / runs.STATE)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert not torch.equal(found["model.classifier.weight"], model.classifier.weight)
    assert load_state(tmp_path / runs.STATE).about == about(2, best=2)
    assert (tmp_path / "history.csv").read_text() == "step\n2\n"
    best, metadata = read_weights(tmp_path / runs.WEIGHTS)
    assert metadata["step"] == "2"
    assert all(torch.equal(value, expected[f"model.{name}"]) for name, value in best.items())
    assert irra.load_checkpoint(tmp_path / runs.WEIGHTS)[1] == recipe


def test_weights_that_are_not_the_best_are_not_written(training_state, tmp_path):
    recipe, model, optimiser = training_state
    with Saver(tmp_path, recipe) as saver:
        saver.save(model, optimiser, about(2, best=1))
    assert (tmp_path / runs.STATE).exists()
    assert not (tmp_path / runs.WEIGHTS).exists()


def test_the_next_save_waits_for_the_one_before(training_state, tmp_path, monkeypatch):
    recipe, model, optimiser = training_state
    gate, events = Gate(monkeypatch, runs.STATE), []
    with Saver(tmp_path, recipe) as saver:
        saver.save(model, optimiser, about(2, best=2))
        assert gate.begun.wait(60)
        saver.check()  # does not wait
        copied = saver.host.of
        monkeypatch.setattr(saver.host, "of", lambda tensors: events.append("copies") or copied(tensors))
        opener = threading.Timer(0.3, lambda: events.append("opens") or gate.open.set())
        opener.start()
        saver.save(model, optimiser, about(4, best=2))
        assert events == ["opens", "copies"]
    assert [load_state(tmp_path / name).about["step"] for name in (runs.STATE, runs.STATE_BEFORE)] == [4, 2]


# who waits


def test_a_row_may_come_before_its_state_and_closing_the_generator_waits_for_it(
    tiny, annotations, tmp_path, monkeypatch
):
    gate = Gate(monkeypatch, runs.STATE)
    running = train(tiny, annotations, tmp_path)
    assert next(running)["step"] == 2
    assert gate.begun.wait(60)
    assert not (tmp_path / runs.STATE).exists()
    threading.Timer(0.3, gate.open.set).start()
    running.close()
    assert load_state(tmp_path / runs.STATE).about["step"] == 2
    assert read_weights(tmp_path / runs.WEIGHTS)[1]["step"] == "2"
    assert not (tmp_path / runs.LOCK).exists()


def test_an_error_of_a_step_waits_for_the_save(tiny, annotations, tmp_path, monkeypatch):
    gate, real = Gate(monkeypatch, runs.STATE), training.optimise

    def failing(*given):
        if gate.begun.is_set():
            threading.Timer(0.3, gate.open.set).start()
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(training, "optimise", failing)
    running = train(tiny, annotations, tmp_path)
    next(running)
    assert gate.begun.wait(60)
    with pytest.raises(KeyboardInterrupt):
        next(running)
    assert load_state(tmp_path / runs.STATE).about["step"] == 2


def test_a_full_disk_is_raised_where_the_run_waits_next(training_state, tmp_path, monkeypatch):
    recipe, model, optimiser = training_state

    def full(*_, **__):
        raise OSError("state.safetensors cannot be written (No space left on device)")

    monkeypatch.setattr(saving, "save_tensors", full)
    for wait in (Saver.wait, lambda saver: saver.save(model, optimiser, about(4, best=4)), checked, left):
        saver = Saver(tmp_path, recipe)
        saver.save(model, optimiser, about(2, best=2))
        with pytest.raises(OSError, match="No space left"):
            wait(saver)
        saver.wait()  # it is raised once
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def checked(saver: Saver) -> None:
    """Ask for errors until there is one, as training does every few steps."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        saver.check()
        time.sleep(0.01)


def left(saver: Saver) -> None:
    with saver:
        pass


ENDED = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
import torch
from irra_core.recipes import recipe
from irra_core.scale import saving
folder, real = Path(sys.argv[1]), saving.save_tensors
def slow(tensors, path, *given, **named):
    (folder / "begun").touch()
    time.sleep(0.5)
    real(tensors, path, *given, **named)
saving.save_tensors = slow
model = torch.nn.Linear(2, 2)
model.classifier = None
optimiser = SimpleNamespace(state_dict=lambda: {"state": {}})
about = {"step": 2, "best": [2, 50.0], "history": [{"step": 2}], "seconds": {}}
with saving.Saver(folder, recipe()) as saver:
    saver.save(model, optimiser, about)
    while True:
        time.sleep(0.01)
"""


def test_sigterm_ends_the_process_after_the_save(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-c", ENDED, str(tmp_path)], env=environment)
    try:
        while not (tmp_path / "begun").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.terminate()
        assert process.wait(30) == -signal.SIGTERM
    finally:
        process.kill()
        process.wait()
    assert load_state(tmp_path / runs.STATE).about["step"] == 2
    assert read_weights(tmp_path / runs.WEIGHTS)[1]["step"] == "2"
    assert not list(tmp_path.glob(".*.part"))


def test_a_programs_own_handler_of_sigterm_is_left_alone(training_state, tmp_path):
    recipe, model, optimiser = training_state
    own = lambda *_: None  # noqa: E731
    before = signal.signal(signal.SIGTERM, own)
    try:
        with Saver(tmp_path, recipe) as saver:
            saver.save(model, optimiser, about(2, best=2))
            assert signal.getsignal(signal.SIGTERM) is own
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)
    with Saver(tmp_path, recipe) as saver:
        saver.save(model, optimiser, about(2, best=2))
        assert signal.getsignal(signal.SIGTERM) == saver._end
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


# back from the files


def saved(folder: Path, training_state, step: int, best: int) -> None:
    """Save a state in a run folder."""
    recipe, model, optimiser = training_state
    with Saver(folder, recipe) as saver:
        saver.save(model, optimiser, about(step, best))


@pytest.mark.parametrize("weights", ["none", "of an earlier step"])
def test_a_process_killed_between_state_and_weights_finds_them_in_the_state(weights, training_state, tmp_path):
    if weights == "of an earlier step":
        saved(tmp_path, training_state, 2, best=2)
        shutil.copyfile(tmp_path / runs.WEIGHTS, tmp_path / "earlier")
    saved(tmp_path, training_state, 4, best=4)
    (tmp_path / runs.WEIGHTS).unlink()
    if weights == "of an earlier step":
        (tmp_path / "earlier").rename(tmp_path / runs.WEIGHTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is damaged
        state = last_state(tmp_path)
    assert (state.about["step"], state.selected) == (4, True)


def test_weights_of_another_step_than_the_selected_one_are_lost(training_state, tmp_path):
    saved(tmp_path, training_state, 6, best=6)
    (tmp_path / runs.WEIGHTS).rename(tmp_path / "later")
    saved(tmp_path, training_state, 4, best=2)
    (tmp_path / "later").rename(tmp_path / runs.WEIGHTS)
    with pytest.warns(UserWarning, match=r"weights\.safetensors is of step 6. .* were of step 2: .* again at step 0"):
        assert last_state(tmp_path) is None


def test_a_state_without_selected_weights_needs_none(training_state, tmp_path):
    saved(tmp_path, training_state, 2, best=0)
    assert last_state(tmp_path).about["step"] == 2
    assert not last_state(tmp_path).selected


def test_a_checkpoint_is_no_state(training_state, tmp_path):
    saved(tmp_path, training_state, 2, best=2)
    with pytest.raises(ValueError, match=r"weights\.safetensors is not a training's state: its metadata has no 'run'"):
        load_state(tmp_path / runs.WEIGHTS)
    assert json.loads(read_weights(tmp_path / runs.STATE)[1]["run"])["step"] == 2
