"""Photos decoded in the background of a step: the same batches and runs as with the decoded array, bit for bit."""

import multiprocessing
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import irra_core as irra
from irra_core.batches import Batches
from irra_core.datasets import streaming
from irra_core.datasets.streaming import StreamedPixels
from irra_core.images import UnreadableImages, image_array
from irra_core.text import tokenize
from irra_core.training import train

pytestmark = pytest.mark.usefixtures("narrow")


@pytest.fixture
def streamed(monkeypatch):
    """Nothing fits the array."""
    monkeypatch.setenv("IRRA_ARRAY_GB", "0")


def pixels_of(annotations):
    return image_array(list(annotations.path), 96, 32).pixels


def batches_of(annotations, pixels, recipe):
    rows = annotations[annotations.split == "train"].reset_index(drop=True)
    return Batches(rows, pixels, tokenize(rows.caption.tolist()), recipe)


def same(one, other) -> bool:
    tensors = [{n: v for n, v in vars(batch).items() if isinstance(v, torch.Tensor)} for batch in (one, other)]
    return tensors[0].keys() == tensors[1].keys() and all(torch.equal(v, tensors[1][n]) for n, v in tensors[0].items())


def test_the_array_is_used_up_to_the_limit(annotations, monkeypatch):
    size = 3 * 96 * 32 * len(annotations)
    for limit, kind in ((size / 1e9, np.ndarray), ((size - 1) / 1e9, StreamedPixels)):
        monkeypatch.setenv("IRRA_ARRAY_GB", repr(limit))
        assert isinstance(pixels_of(annotations), kind)
    monkeypatch.setenv("IRRA_ARRAY_GB", "much")
    with pytest.raises(ValueError, match="IRRA_ARRAY_GB is 'much': accepted is a number of gigabytes"):
        pixels_of(annotations)


@pytest.mark.parametrize(
    "index",
    [3, slice(2, 7), [5, 1, 1], np.array([], int), np.array([[1, 2], [3, 4]]), (4, 0), ([1, 2], slice(None), 5)],
)
def test_indexing_gives_the_pixels_of_the_decoded_array(index, annotations, monkeypatch):
    expected = np.array(pixels_of(annotations))
    monkeypatch.setenv("IRRA_ARRAY_GB", "0")
    found = pixels_of(annotations)
    assert (found.shape, found.dtype, found.nbytes) == (expected.shape, expected.dtype, expected.nbytes)
    assert np.array_equal(np.asarray(found[index]), expected[index])


def test_batches_are_those_of_the_array_in_any_order_of_steps(annotations, tiny, monkeypatch):
    plain = batches_of(annotations, pixels_of(annotations), tiny)
    monkeypatch.setenv("IRRA_ARRAY_GB", "0")
    found = batches_of(annotations, pixels_of(annotations), tiny)
    for step in (0, 1, 2, 3, 4, 1, 1, 2, 7):  # over an epoch's end, back, again, and forward
        assert same(found.at(step), plain.at(step)), step


@pytest.mark.parametrize("processes", [2, 7])
def test_each_process_streams_its_part(processes, annotations, tiny, monkeypatch):
    plain = batches_of(annotations, pixels_of(annotations), tiny)
    monkeypatch.setenv("IRRA_ARRAY_GB", "0")
    for process in range(processes):
        found = batches_of(annotations, pixels_of(annotations), tiny)
        for step in (1, 2):  # the last batch of the epoch has fewer rows than processes
            assert same(found.at(step, process, processes), plain.at(step, process, processes))


def test_the_next_steps_are_decoded_in_the_background(annotations, tiny, streamed, monkeypatch):
    batches = batches_of(annotations, pixels_of(annotations), tiny)
    batches.at(0)
    monkeypatch.setattr(streaming, "_decoded", lambda *_, **__: pytest.fail("a step decoded its photos itself"))
    for step in (1, 2, 3):
        batches.at(step)


def test_a_run_has_the_history_of_the_run_on_the_array_and_resumes(annotations, tiny, tmp_path, monkeypatch):
    recipe = tiny.replace(precision="fp32", max_steps=3, losses="sdm")
    whole = list(train(recipe, annotations, tmp_path / "array"))
    before = set(multiprocessing.active_children())
    monkeypatch.setenv("IRRA_ARRAY_GB", "0")
    first = next(train(recipe, annotations, tmp_path / "streamed"))
    rest = list(train(recipe, annotations, tmp_path / "streamed"))
    assert [first, *rest] == whole
    assert set(multiprocessing.active_children()) <= before  # the workers ended with the run
    names = [folder / "weights.safetensors" for folder in sorted(tmp_path.iterdir())]
    one, other = (irra.load_checkpoint(file)[0].state_dict() for file in names)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_photo_that_cannot_be_read_stops_the_step_that_needs_it(annotations, tiny, streamed, tmp_path):
    table = annotations.copy()
    broken = str(tmp_path / "broken.png")
    with open(broken, "wb") as file:
        file.write(b"no picture")
    table.loc[table.image_id == 5, "path"] = broken
    batches = batches_of(table, pixels_of(table), tiny)
    with pytest.raises(UnreadableImages, match=r"broken\.png: its content is no image"):
        list(map(batches.at, range(batches.steps_per_epoch)))
    table.loc[0, "path"] = str(tmp_path / "absent.png")
    with pytest.raises(UnreadableImages, match=r"absent\.png: No such file"):
        pixels_of(table)


def test_the_digest_is_of_names_and_sizes(annotations, streamed, tmp_path):
    def digest(folder, change=b""):
        folder.mkdir()
        for path in annotations.path:
            (folder / os.path.basename(path)).write_bytes(Path(path).read_bytes() + change)
        return image_array([folder / os.path.basename(path) for path in annotations.path], 96, 32).digest

    one = digest(tmp_path / "one")
    assert one == digest(tmp_path / "two")
    assert one != digest(tmp_path / "three", b"x")
    assert one != image_array(pd.Series(sorted(annotations.path, reverse=True)), 96, 32).digest
