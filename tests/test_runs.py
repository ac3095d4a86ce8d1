"""Run folders: their names, when a run is the same, and what many of them give."""

import json

import pandas as pd
import pytest

import irra_core as irra
from irra_core import runs
from irra_core.recipes import NEUTRAL
from irra_core.settings import reports_root


def test_the_name_says_what_differs_and_never_the_time():
    assert runs.run_name(irra.recipe("cuhk")) == "default"
    assert runs.run_name(irra.recipe("cuhk", epochs=1, losses="sdm+id")) == "losses=sdm+id,epochs=1"
    assert runs.run_name(irra.recipe("cuhk", preset="released")) == "preset=released"
    assert runs.run_name(irra.recipe("rstp", backbone="small", pretrained="none")) == "backbone=small,pretrained=none"


def test_a_path_in_a_name_is_its_stem_and_a_hash(tmp_path):
    name = runs.run_name(irra.recipe(pretrained=str(tmp_path / "mine.pt")))
    assert name.startswith("pretrained=mine-")
    assert "/" not in name


def test_a_long_name_is_cut_and_still_its_own():
    many = {"lr": 1e-3, "seed": 3, "epochs": 2, "batch_size": 8, "weight_decay": 0.1, "temperature": 0.5}
    many |= {"adam_eps": 1e-4, "crop_padding": 5, "flip_probability": 0.1}
    one, other = runs.run_name(irra.recipe(**many)), runs.run_name(irra.recipe(**many, erase_probability=0.1))
    assert max(len(one), len(other)) <= 120
    assert one != other


def test_smoke_is_part_of_the_name(monkeypatch):
    monkeypatch.setenv("IRRA_SMOKE", "1")
    assert runs.run_name(irra.recipe("cuhk")) == "smoke"
    assert runs.run_name(irra.recipe("cuhk", seed=1)) == "smoke,seed=1"
    assert runs.run_folder(irra.recipe("cuhk"), "data").path.parent == reports_root() / "smoke" / "cuhk"


def test_own_data_are_named_after_their_file_and_content(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text("[]")
    name = runs.dataset_name(str(file))
    assert name.startswith("mine-")
    assert len(name) == len("mine-") + 8
    file.write_text("[ ]")
    assert runs.dataset_name(str(file)) != name


def test_the_same_own_data_by_another_spelling_of_their_path_are_the_same_run(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    file = tmp_path / "mine" / "mine.csv"
    file.write_text("path,id,caption\n")
    monkeypatch.chdir(tmp_path)
    first = runs.run_folder(irra.recipe(str(file)), "data", tmp_path)
    runs.begin(first.path, irra.recipe(str(file)), "data")
    for spelling in ("mine/mine.csv", "./mine/../mine/mine.csv"):
        assert runs.run_folder(irra.recipe(spelling), "data", tmp_path) == first
        assert runs.run_folder(irra.recipe(spelling, seed=1), "data", tmp_path).path != first.path
        assert runs.run_folder(irra.recipe(spelling), "other data", tmp_path).path.name == f"{first.path.name}~2"


def test_the_folder_of_own_data_with_the_longest_file_name_can_be_made(tmp_path):
    file = tmp_path / f"{'m' * 251}.csv"
    file.write_text("path,id,caption\n")
    (tmp_path / runs.dataset_name(str(file))).mkdir()


def test_the_reports_folder_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv("IRRA_REPORTS", "~/kept")
    assert reports_root() == tmp_path / "kept"
    assert reports_root("~/others") == tmp_path / "others"


def test_a_folder_with_another_run_is_passed_over_and_the_difference_named(tmp_path):
    recipe = irra.recipe("cuhk")
    first = runs.run_folder(recipe, "data", tmp_path)
    assert first == (tmp_path / "cuhk" / "default", {})
    runs.begin(first.path, recipe, "data")
    assert runs.run_folder(recipe, "data", tmp_path) == first
    second = runs.run_folder(recipe, "other data", tmp_path)
    assert second.path.name == "default~2"
    assert second.passed_over == {first.path: ["its data (annotations, images or the shipped CLIP) were others"]}
    kept = json.loads((first.path / "recipe.json").read_text())
    (first.path / "recipe.json").write_text(json.dumps(kept | {"format": 0}))
    (reason,) = runs.run_folder(recipe, "data", tmp_path).passed_over[first.path]
    assert reason == f"its format is 0, this version writes {runs.FORMAT}"
    (first.path / "recipe.json").write_text("{")
    assert "cannot be read" in runs.differences(first.path, recipe, "data")[0]
    with pytest.raises(ValueError, match="holds another run"):
        runs.begin(first.path, recipe, "data")


def test_a_run_recorded_before_a_field_existed_is_still_this_run_while_the_field_changes_nothing(tmp_path):
    recipe = irra.recipe("cuhk")
    runs.begin(tmp_path / "run", recipe, "data")
    kept = json.loads((tmp_path / "run" / "recipe.json").read_text())
    for name in NEUTRAL:
        del kept["recipe"][name]
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(kept))
    assert runs.differences(tmp_path / "run", recipe, "data") == []
    assert runs.differences(tmp_path / "run", recipe.replace(adapter_rank=4), "data") == [
        "its adapter_rank is 0, now 4"
    ]
    assert runs.load_run(tmp_path / "run")["recipe"] == recipe


def test_the_data_digest_changes_with_a_caption_and_with_a_pixel(annotations):
    recipe = irra.recipe()
    digest = runs.data_digest(annotations, recipe)
    assert runs.data_digest(annotations.copy(), recipe) == digest
    assert runs.data_digest(annotations.assign(caption=annotations.caption.str.upper()), recipe) != digest
    fewer = annotations[annotations.image_id > 0].assign(image_id=lambda table: table.image_id - 1)
    assert runs.data_digest(fewer, recipe) != digest


def test_a_run_from_another_shipped_clip_is_neither_loaded_nor_resumed(annotations, tmp_path, monkeypatch):
    recipe, scratch = irra.recipe(), irra.recipe(pretrained="none")
    digest, of_scratch = runs.data_digest(annotations, recipe), runs.data_digest(annotations, scratch)
    older = tmp_path / "older.safetensors"
    older.write_bytes(b"other weights")
    with monkeypatch.context() as patched:
        patched.setattr(runs, "GENERAL", older)
        before = runs.data_digest(annotations, recipe)
        assert runs.data_digest(annotations, scratch) == of_scratch
    found = runs.run_folder(recipe, before, tmp_path)
    runs.begin(found.path, recipe, before)
    assert runs.run_folder(recipe, before, tmp_path).path == found.path
    other = runs.run_folder(recipe, digest, tmp_path)
    assert other.path != found.path
    assert other.passed_over == {found.path: ["its data (annotations, images or the shipped CLIP) were others"]}
    with pytest.raises(ValueError, match="the shipped CLIP"):
        next(irra.train(recipe, annotations, found.path))


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    runs.write_text(path, "before")
    monkeypatch.setattr(runs.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        runs.write_text(path, "after")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_made_before_a_field_of_the_recipe_existed_is_still_the_same_run(tmp_path):
    recipe = irra.recipe("cuhk")
    runs.begin(tmp_path / "run", recipe, "data")
    file = tmp_path / "run" / "recipe.json"
    kept = json.loads(file.read_text())
    del kept["recipe"]["unreadable"]
    file.write_text(json.dumps(kept))
    assert runs.differences(tmp_path / "run", recipe, "data") == []
    assert runs.differences(tmp_path / "run", recipe.replace(unreadable="stop"), "data") == [
        "its unreadable is 'leave_out', now 'stop'"
    ]


def test_published_holds_the_papers_main_row():
    rows = irra.published()
    row = rows[(rows.table == "results") & (rows.dataset == "cuhk") & (rows.method == "IRRA")].iloc[0]
    assert row[["R1", "R5", "R10", "mAP", "mINP"]].tolist() == [73.38, 89.93, 93.71, 66.13, 50.24]
    assert isinstance(rows, pd.DataFrame)


def test_the_link_to_the_latest_run_moves():
    for name in ("one", "two"):
        folder = reports_root() / "cuhk" / name
        folder.mkdir(parents=True, exist_ok=True)
        runs.mark_latest(folder)
        assert (reports_root() / "latest").resolve() == folder.resolve()
