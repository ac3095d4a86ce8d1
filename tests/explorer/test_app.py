"""The page that says what it does while it loads, and what it loads."""

import json
import re
import shutil
import time
from pathlib import Path

import nbformat
import pytest

import irra_core as irra
from irra_core.explorer import app


@pytest.fixture
def checkpoint(tmp_path):
    recipe = irra.recipe(pretrained="none", losses="itc")
    irra.save_checkpoint(irra.build_model(recipe, 5), recipe, tmp_path / "weights.safetensors")
    return str(tmp_path / "weights.safetensors")


@pytest.fixture
def photos(annotations, tmp_path):
    """A folder of four photos and a file that is none."""
    (tmp_path / "photos").mkdir()
    for path in annotations.path.unique()[:4]:
        (tmp_path / "photos" / Path(path).name).write_bytes(Path(path).read_bytes())
    (tmp_path / "photos" / "broken.png").write_bytes(b"no photo")
    return tmp_path / "photos"


@pytest.fixture
def csv(annotations, tmp_path):
    """The data set in a file of its own, beside its photos."""
    shutil.copytree(Path(annotations.path[0]).parent, tmp_path / "people")
    table = annotations.assign(id=annotations.pid, path=[Path(path).name for path in annotations.path])
    table[["path", "caption", "id", "split"]].to_csv(tmp_path / "people" / "people.csv", index=False)
    return str(tmp_path / "people" / "people.csv")


def test_a_folder_is_searched_and_the_page_says_what_is_wrong_with_model_and_photos(checkpoint, photos):
    said = []
    explorer, remarks = app.load({"photos": str(photos), "dataset": None, "models": [("", checkpoint)]}, said.append)
    explorer.query = "a person in red"
    assert {Path(path).name for path in explorer.results.path} == {"00-0.png", "00-1.png", "01-0.png", "01-1.png"}
    assert [remark.split(" ")[0] for remark in remarks] == ["This", "1"]
    assert "rendered people only" in remarks[0]
    assert remarks[1] == "1 of the photos cannot be read and are left out."
    for words in ("Loading the model", "Opening the photos", "Photos: 5 of 5"):
        assert any(line.startswith(words) for line in said), words
    assert not any(str(photos.parent) in line for line in said)


def test_a_data_set_is_searched_in_its_test_split_by_each_model(checkpoint, csv, annotations):
    settings = {"photos": None, "dataset": csv, "models": [("A: one", checkpoint), ("B: two", checkpoint)]}
    explorer, remarks = app.load(settings, lambda words: None)
    people = annotations[annotations.split == "test"]
    explorer.query = people.caption.iloc[0]
    assert {Path(path).name for path in explorer.results.path} == {Path(path).name for path in people.path}
    assert list(explorer.results.gallery.unique()) == ["A: one", "B: two"]
    assert explorer.view["truth"] is not None
    assert remarks == []


def page_of(settings, monkeypatch):
    monkeypatch.setenv(app.SETTINGS, json.dumps(settings))
    box = app.page()
    head, status = box.children
    assert "<h1>Find a person by a description</h1>" in head.value
    assert re.match('<p role="(status|alert)"', status.value)
    end = time.monotonic() + 60
    while status in box.children and 'role="status"' in status.value:
        assert time.monotonic() < end
        time.sleep(0.02)
    return box


def test_the_page_is_there_at_once_and_then_holds_the_explorer(checkpoint, csv, monkeypatch):
    box = page_of({"photos": None, "dataset": csv, "models": [["", checkpoint]]}, monkeypatch)
    assert isinstance(box.children[-1], irra.QueryExplorer)


def test_what_cannot_be_loaded_is_one_sentence_on_the_page(csv, tmp_path, monkeypatch):
    missing = str(tmp_path / "<b>no.safetensors")
    box = page_of({"photos": None, "dataset": csv, "models": [["", missing]]}, monkeypatch)
    assert 'role="alert"' in box.children[1].value
    assert "no weights are at" in box.children[1].value
    assert "<b>" not in box.children[1].value


def test_the_notebook_is_one_cell_that_shows_the_page():
    notebook = nbformat.read(Path(app.__file__).with_name("app.ipynb"), 4)
    (cell,) = notebook.cells
    assert cell.source == "from irra_core.explorer.app import page\n\npage()"
    assert cell.outputs == []
    assert notebook.metadata.title == app.TITLE


def test_progress_is_a_line_of_words():
    said = []
    bar = app._Bar(said.append, total=2000, desc="photos", unit="photo")
    bar.update(1000)
    bar.refresh()
    bar.close()
    assert any(line.startswith("Photos: 1,000 of 2,000") for line in said)
