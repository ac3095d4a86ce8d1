"""Several processes on one run folder: the run that one process makes; its errors and its bar where it was started."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import irra_core as irra
from irra_core import runs
from irra_core.batches import ALONE, Team
from irra_core.scale import distributed
from irra_core.scale.distributed import launched, prepare_run
from irra_core.training import main, train


@pytest.mark.parametrize(("count", "processes"), [(0, 2), (1, 3), (7, 2), (8, 3), (64, 4), (5, 5)])
def test_shares_are_all_rows_in_order_and_differ_by_at_most_one(count, processes):
    shares = [list(range(count))[Team(process, processes).part(count)] for process in range(processes)]
    assert [row for share in shares for row in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_alone_nothing_is_sent():
    rows = torch.ones(2, 3)
    assert ALONE.gathered(rows, 2) is rows
    assert ALONE.leads
    ALONE.wait()


class Bar:
    """A tqdm-like class that remembers where it has been."""

    seen: list = []  # noqa: RUF012

    def __init__(self, total=None, initial=0, desc=None, **_):
        self.n, self.total, self.desc = initial, total, desc

    def set_postfix(self, *values, **_):
        assert not values or set(values[0]) <= {"loss", "val_R1"}

    def update(self, n=1):
        self.n += n
        self.seen.append((self.desc, self.n, self.total))

    def close(self):
        pass


def same_but_for_rounding(folder, whole):
    """Fail unless two finished runs have the history and the weights of each other."""
    histories = [pd.read_csv(each / "history.csv") for each in (folder, whole)]
    pd.testing.assert_frame_equal(*histories, rtol=1e-4)
    ours, theirs = (load_file(each / runs.WEIGHTS) for each in (folder, whole))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name] - value).abs().max() < 1e-3, name


def test_a_run_of_two_processes_stopped_and_resumed_is_the_run_of_one(annotations, tiny, tmp_path):
    """7 test photos and captions: they do not divide by two."""
    odd = annotations[annotations.image_id != annotations.image_id.max()].reset_index(drop=True)
    recipe = tiny.replace(precision="fp32", adam_eps=1e-4)  # a smaller one makes steps of the keys' biases' rounding
    one = list(train(recipe, odd, tmp_path / "one"))
    stopped = train(recipe, odd, tmp_path / "two", processes=2)
    rows = [next(stopped)]
    stopped.close()  # as a kernel that is interrupted does
    assert not runs.finished(tmp_path / "two")
    Bar.seen.clear()
    rows += list(train(recipe, odd, tmp_path / "two", Bar, processes=2))
    assert Bar.seen[-1] == (f"training {recipe.losses}", 5, 5)
    assert [row["step"] for row in rows] == [row["step"] for row in one]
    for name in one[0]:
        assert [row[name] for row in rows] == pytest.approx([row[name] for row in one], rel=1e-4), name
    same_but_for_rounding(tmp_path / "two", tmp_path / "one")
    queries = [pd.read_csv(tmp_path / folder / "queries.csv") for folder in ("one", "two")]
    assert queries[0][["pid", "image_id", "hard"]].equals(queries[1][["pid", "image_id", "hard"]])
    metrics = [json.loads((tmp_path / folder / "metrics.json").read_text()) for folder in ("one", "two")]
    assert metrics[0]["queries"] == metrics[1]["queries"] == 7
    for score, found in metrics[0]["untrained"].items():
        np.testing.assert_allclose(metrics[1]["untrained"][score], found, err_msg=score)
    assert json.loads((tmp_path / "two" / "machine.json").read_text())["processes"] == 2
    assert not (tmp_path / "two" / runs.TABLE).exists()


def machine(folder, port, output) -> subprocess.Popen:
    """What a cluster starts on each of two machines: torchrun with one process, on the same folder."""
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *meeting]
    command += ["--local-addr", "127.0.0.1", "-m", "irra_core.training", str(folder)]
    return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)


def end(machines) -> None:
    """End every torchrun as a scheduler does: it is asked to, ends its process, and is killed if it takes too long."""
    for each in machines:
        each.terminate()
    for each in machines:
        try:
            each.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(each.pid, signal.SIGKILL)
            each.wait()


@pytest.mark.long
def test_a_run_of_two_machines_that_were_stopped_is_finished_by_one_process_as_one_would(
    annotations, tiny, tmp_path, monkeypatch
):
    recipe = tiny.replace(precision="fp32", adam_eps=1e-4, max_steps=8, epochs=4)
    monkeypatch.setenv("IRRA_REPORTS", str(tmp_path))
    folder = prepare_run(recipe, annotations)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (tmp_path / "output").open("w") as output:
        machines = [machine(folder, port, output) for _ in range(2)]
        try:
            until = time.monotonic() + 240
            while not (folder / runs.STATE).exists() and time.monotonic() < until:
                assert [each.poll() for each in machines] == [None, None], (tmp_path / "output").read_text()
                time.sleep(0.02)
        finally:
            end(machines)
    assert not runs.finished(folder), "the run ended before it could be stopped"
    said = (tmp_path / "output").read_text()
    assert f"{recipe.losses}: " in said, "no bar was shown"
    assert irra.distributed.PREFIX not in said
    kept = pd.read_csv(folder / "history.csv")
    rows = list(train(recipe, annotations, folder))
    assert 0 < kept.step[0] < rows[0]["step"], "it began again"
    list(train(recipe, annotations, tmp_path / "one"))
    same_but_for_rounding(folder, tmp_path / "one")


def test_two_processes_train_adapters_beside_a_frozen_encoder_in_pieces_as_one_does(annotations, tiny, tmp_path):
    changes = {"adapter_rank": 2, "frozen": "text", "micro_batch": 3}
    recipe = tiny.replace(precision="fp32", adam_eps=1e-4, max_steps=3, lr=1e-3, select_on="last", **changes)
    start = irra.build_model(recipe.replace(adapter_rank=0, frozen="none"), 10).state_dict()
    for count in (1, 2):
        list(train(recipe, annotations, tmp_path / str(count), processes=count))
    single, double = (load_file(tmp_path / count / runs.WEIGHTS) for count in "12")
    moved = {name: (single[name] - start[name]).abs().max() for name in start}
    for name, distance in moved.items():
        assert (double[name] - single[name]).abs().max() <= 1e-2 * distance + 1e-6, name
    visual = {name: distance for name, distance in moved.items() if name.startswith("clip.visual.")}
    textual = {name: distance for name, distance in moved.items() if name.startswith("clip.") and name not in visual}
    assert not any(textual.values())
    assert any(visual.values())


def test_two_processes_train_token_selection_on_balanced_noisy_pairs_as_one_does(annotations, tiny, tmp_path):
    switches = {"losses": "tal+tse", "sampler": "identity", "per_identity": 2, "shuffled_captions": 0.5}
    recipe = tiny.replace(precision="fp32", adam_eps=1e-4, word_augmentation=0.3, select_on="last", **switches)
    for count in (1, 2):
        list(train(recipe, annotations, tmp_path / str(count), processes=count))
    same_but_for_rounding(tmp_path / "2", tmp_path / "1")
    one, two = (json.loads((tmp_path / count / "metrics.json").read_text()) for count in "12")
    for score, found in one["untrained"].items():
        np.testing.assert_allclose(two["untrained"][score], found, err_msg=score)


def test_what_stops_the_first_process_is_raised_where_it_was_started(annotations, tiny, tmp_path):
    with runs.locked(tmp_path / "run"), pytest.raises(RuntimeError, match=r"run is being trained by process \d+"):
        list(train(tiny, annotations, tmp_path / "run", processes=2))


SLOW = """
import sys, time
from irra_core import training
quick = training._Run.save_failed
def slow(*given):
    time.sleep(4)  # longer than torchrun lets the first process live when the second one ends
    quick(*given)
training._Run.save_failed = slow
training.main(sys.argv[1:])
"""


@pytest.mark.long
def test_a_loss_that_is_no_number_is_told_and_kept_however_long_the_first_process_writes(
    annotations, tiny, tmp_path, monkeypatch
):
    (tmp_path / "slow_training.py").write_text(SLOW)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("IRRA_REPORTS", str(tmp_path))
    folder = prepare_run(tiny.replace(lr=1e30, max_steps=None, epochs=5), annotations)
    with pytest.raises(FloatingPointError, match="not finite at step"):
        list(launched("slow_training", folder, 2))
    assert (folder / runs.FAILED).exists()
    assert (folder / runs.FAILED_BATCH).exists()


BROKEN = """
import os, sys
from pathlib import Path
from irra_core import objective, training
real, calls = objective.total_loss, []
def broken(*given, **named):  # between the forward pass and the backward pass, in which process 0 waits for process 1
    calls.append(given)
    if os.environ["RANK"] == "1" and len(calls) == 2:
        Path(sys.argv[1], "raised").touch()
        if "killed" in sys.argv[1]:
            os.kill(os.getpid(), 9)
        raise LookupError("the second process is broken")
    return real(*given, **named)
objective.total_loss = broken
training.main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("name", "said"),
    [("run", "the second process is broken"), ("killed", r"process 1 of 2 \(pid \d+\) was ended by SIGKILL, as the")],
)
def test_an_error_of_the_second_process_within_a_step_ends_all_within_30_s_and_is_raised(
    annotations, tiny, tmp_path, monkeypatch, name, said
):
    (tmp_path / "broken_training.py").write_text(BROKEN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(distributed, "launched", lambda module, *given: launched("broken_training", *given))
    with pytest.raises(RuntimeError, match=said):
        list(train(tiny, annotations, tmp_path / name, processes=2))
    assert time.time() - (tmp_path / name / "raised").stat().st_mtime < 30


@pytest.mark.parametrize("processes", [0, -1, 9])
def test_a_number_of_processes_without_pairs_is_refused_before_anything_starts(annotations, tiny, tmp_path, processes):
    with pytest.raises(ValueError, match=rf"processes is {processes}: accepted is from 1 to the batch size, 8"):
        next(train(tiny, annotations, tmp_path / "run", processes=processes))
    assert not (tmp_path / "run").exists()


def test_a_prepared_folder_is_trained_by_the_command_and_a_bare_one_names_what_is_missing(
    annotations, tiny, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("IRRA_REPORTS", str(tmp_path))
    folder = prepare_run(tiny.replace(max_steps=2), annotations)
    main([str(folder)])  # without torchrun's environment: one process
    assert runs.finished(folder)
    main([str(folder)])  # and nothing more to do
    assert prepare_run(tiny.replace(max_steps=2), annotations) == folder
    assert not (folder / runs.TABLE).exists()  # the captions are not left in a finished run
    (folder / "metrics.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"annotations\.parquet is not there: .*prepare_run"):
        main([str(folder)])
    said = capsys.readouterr().out
    assert irra.distributed.PREFIX not in said
    assert f"run folder: {folder}" in said
