"""annotations.py on files written by hand in the official layouts and in own ones, sound and damaged."""

import csv
import hashlib
import json
import ntpath
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import irra_core as irra
from irra_core import annotations as module
from irra_core.annotations import DATA_SETS, hold_out, load_annotations, table_digest
from irra_core.recipes import RECIPES
from irra_core.settings import data_root

QUIRKS = {  # field of the path, first id, captions an image, splits
    "cuhk": ("file_path", 1, 2, ("train", "val", "test")),
    "icfg": ("file_path", 0, 1, ("train", "test")),
    "rstp": ("img_path", 0, 2, ("train", "val", "test")),
}


def draw(path: Path, colour: int = 0) -> None:
    """A small image file; another colour gives other bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 12), (colour % 256, colour // 256, 100)).save(path)


def records(dataset: str, people: int = 8) -> list[dict]:
    """Two images a person, in the schema of an official data set."""
    field, first, captions, splits = QUIRKS[dataset]
    return [
        {
            "split": splits[person * len(splits) // people],
            "captions": [f"person {person} view {view} says {number}" for number in range(captions)],
            field: f"cam{view}/{person:04}_{view}.png",
            "id": first + person,
            "processed_tokens": [["ignored"]],
        }
        for person in range(people)
        for view in range(2)
    ]


def write(root: Path, dataset: str, content: list[dict]) -> Path:
    """The annotation file and its images under root, in the official layout; the path of the file."""
    source = DATA_SETS[dataset]
    for number, record in enumerate(content):
        draw(root / source.folder / "imgs" / (record.get("file_path") or record["img_path"]), number)
    file = root / source.folder / source.file
    file.write_text(json.dumps(content))
    return file


def own(folder: Path, content, name: str = "own.json") -> str:
    """The path of an own annotation file with twelve images a.png … beside it."""
    for number, letter in enumerate("abcdefghijkl"):
        draw(folder / f"{letter}.png", number)
    file = folder / name
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(file)


def people(count: int = 12, **extra) -> list[dict]:
    """Own records, one image a person, without splits."""
    letters = "abcdefghijkl"[:count]
    return [{"file_path": f"{x}.png", "captions": [f"person {x}"], "id": i} | extra for i, x in enumerate(letters)]


def table_of(content: list[dict]) -> pd.DataFrame:
    columns = {"path": "file_path", "caption": "captions", "id": "id"}
    return pd.DataFrame({name: [r[field] for r in content] for name, field in columns.items()}).explode("caption")


@pytest.mark.parametrize("dataset", QUIRKS)
def test_an_official_layout_gives_one_row_a_caption_with_its_quirks(dataset, tmp_path):
    content = records(dataset)
    write(tmp_path, dataset, content)
    table = load_annotations(dataset, tmp_path)
    field, first, captions, splits = QUIRKS[dataset]
    expected = [
        (
            record["id"],
            number,
            str(tmp_path / DATA_SETS[dataset].folder / "imgs" / record[field]),
            text,
            record["split"],
        )
        for number, record in enumerate(content)
        for text in record["captions"]
    ]
    assert list(table.itertuples(index=False, name=None)) == expected
    assert list(table.columns) == ["pid", "image_id", "path", "caption", "split"]
    assert (table["pid"].dtype, table["image_id"].dtype) == (np.int64, np.int64)
    assert table.index.equals(pd.RangeIndex(len(expected)))
    assert table["pid"].min() == first
    assert len(table) == 16 * captions
    assert set(table["split"]) == set(splits)
    assert all(map(os.path.isfile, table["path"]))


def test_every_recipe_with_a_name_has_a_layout():
    assert set(DATA_SETS) == set(RECIPES)


@pytest.mark.parametrize("dataset", QUIRKS)
def test_a_missing_data_set_is_one_message_with_tree_paper_and_way_out(dataset, tmp_path):
    source = DATA_SETS[dataset]
    with pytest.raises(FileNotFoundError) as error:
        load_annotations(dataset, tmp_path)
    message = str(error.value)
    for part in (str(tmp_path / source.folder), source.file, "imgs/", source.paper, "-p dataset synthetic"):
        assert part in message
    assert "http" not in message


def test_what_is_missing_of_a_data_set_is_named(tmp_path):
    file = write(tmp_path, "rstp", records("rstp"))
    file.rename(tmp_path / "elsewhere.json")
    with pytest.raises(FileNotFoundError, match=r"data_captions\.json is not there"):
        load_annotations("rstp", tmp_path)
    file.write_text("[]")
    (file.parent / "imgs").rename(tmp_path / "images")
    with pytest.raises(FileNotFoundError, match="imgs is not there"):
        load_annotations("rstp", tmp_path)


@pytest.mark.parametrize("dataset", ["synthetic-night", "synthetic-study-campus"])
def test_missing_synthetic_people_name_the_call_that_renders_them(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("IRRA_SMOKE", "1")
    with pytest.raises(FileNotFoundError) as error:
        load_annotations(dataset, tmp_path)
    call = re.search(r"(irra\.open_annotations\(.*\)) renders it", str(error.value))[1]
    table = eval(call, {"irra": irra})
    assert str(table.path[0]).startswith(f"{tmp_path}/smoke/")
    assert dataset in table.path[0].split("/")


def test_images_that_are_all_missing_stop_at_load_and_a_few_do_not(tmp_path):
    file = write(tmp_path, "rstp", records("rstp"))
    photos = sorted((file.parent / "imgs").rglob("*.png"))
    photos[0].unlink()
    assert len(load_annotations("rstp", tmp_path)) == 32
    for image in photos[1:]:
        image.unlink()
    with pytest.raises(FileNotFoundError, match=r"none of the first images is there.*0000_0\.png"):
        load_annotations("rstp", tmp_path)


def test_an_unknown_data_set_names_the_nearest():
    with pytest.raises(ValueError, match=r"'rtsp' is unknown: did you mean 'rstp'\?"):
        load_annotations("rtsp")
    with pytest.raises(FileNotFoundError, match=r"'nosuch\.csv' is not there"):
        load_annotations("nosuch.csv")


def test_the_data_root_is_given_or_from_the_environment_or_the_projects(monkeypatch, tmp_path):
    monkeypatch.delenv("IRRA_DATA", raising=False)
    project = Path(module.__file__).parent.parent
    assert data_root() == project / "data"
    assert data_root("sets") == project / "sets"
    monkeypatch.setenv("IRRA_DATA", str(tmp_path))
    assert data_root() == tmp_path
    assert data_root("/somewhere") == Path("/somewhere")


def test_own_json_without_splits_is_split_by_identity_5_1_2_and_by_the_seed(tmp_path):
    content = [record | {"id": number % 40} for number, record in enumerate(people(12) * 40)]
    dataset = own(tmp_path, content)
    table = load_annotations(dataset)
    assert table.groupby("split")["pid"].nunique().to_dict() == {"train": 25, "val": 5, "test": 10}
    assert (table.groupby("pid")["split"].nunique() == 1).all()
    assert table.equals(load_annotations(dataset))
    assert not table["split"].equals(load_annotations(dataset, seed=1)["split"])


def test_six_identities_are_enough_to_split_and_five_are_not(tmp_path):
    table = load_annotations(own(tmp_path, people(6)))
    assert table.groupby("split")["pid"].nunique().to_dict() == {"train": 2, "val": 2, "test": 2}
    with pytest.raises(ValueError, match="5 identities are too few"):
        load_annotations(own(tmp_path, people(5)))


def test_own_images_lie_in_imgs_beside_the_file_or_beside_it_or_under_the_given_root(tmp_path):
    beside = own(tmp_path / "beside", people())
    assert load_annotations(beside)["path"][0] == str(tmp_path / "beside" / "a.png")
    draw(tmp_path / "beside" / "imgs" / "a.png")
    assert load_annotations(beside)["path"][0] == str(tmp_path / "beside" / "imgs" / "a.png")
    (tmp_path / "far").mkdir()
    far = tmp_path / "far" / "own.json"
    far.write_text(json.dumps(people()))
    with pytest.raises(FileNotFoundError, match="give their folder as data_root"):
        load_annotations(far)
    assert load_annotations(far, root=tmp_path / "beside")["path"][1] == str(tmp_path / "beside" / "b.png")


@pytest.mark.parametrize(
    ("ids", "pids"),
    [
        ([7, 7, 3, 10**17], [7, 7, 3, 10**17]),
        (["7", "007", " 3", "-1"], [7, 7, 3, -1]),
        (["anna", "bob", "anna", "7"], [0, 1, 0, 2]),
        ([7, "anna", "7", 3], [0, 1, 0, 2]),
        ([str(10**30), "1", "1", "2"], [0, 1, 1, 2]),
    ],
)
def test_integer_ids_stay_and_others_are_numbered_by_first_appearance(ids, pids, tmp_path):
    content = [record | {"id": pid, "split": "test"} for record, pid in zip(people(4), ids, strict=True)]
    assert load_annotations(own(tmp_path, content))["pid"].tolist() == pids


def test_one_file_in_two_records_is_one_image(tmp_path):
    content = people(3, split="test")
    content += [content[0] | {"file_path": "./a.png", "captions": ["again"]}]
    assert load_annotations(own(tmp_path, content))["image_id"].tolist() == [0, 1, 2, 0]


def test_fewer_identities_are_the_first_ones_in_the_splits_proportion(tmp_path):
    write(tmp_path, "cuhk", [r for r in records("cuhk", people=60) if r["split"] != "val" or r["id"] < 26])
    whole = load_annotations("cuhk", tmp_path)
    table = load_annotations("cuhk", tmp_path, identities=12)
    known = {split: sorted(rows.unique()) for split, rows in whole.groupby("split")["pid"]}
    kept = {split: sorted(rows.unique()) for split, rows in table.groupby("split")["pid"]}
    assert {split: len(pids) for split, pids in known.items()} == {"train": 20, "val": 5, "test": 20}
    assert {split: len(pids) for split, pids in kept.items()} == {"train": 5, "val": 2, "test": 5}
    assert all(kept[split] == known[split][: len(kept[split])] for split in kept)
    assert table["image_id"].tolist() == pd.factorize(table["path"])[0].tolist()
    assert table.index.equals(pd.RangeIndex(len(table)))
    assert load_annotations("cuhk", tmp_path, identities=1000).equals(whole)


def test_hold_out_moves_whole_train_identities_once_and_by_the_seed(tmp_path):
    write(tmp_path, "icfg", records("icfg", people=80))
    table = load_annotations("icfg", tmp_path)
    before = table.copy()
    held = hold_out(table, share=0.1, seed=1)
    assert held.groupby("split")["pid"].nunique().to_dict() == {"train": 36, "val": 4, "test": 40}
    assert (held.groupby("pid")["split"].nunique() == 1).all()
    assert held["split"].where(held["split"] != "val", "train").equals(table["split"])
    assert table.equals(before)
    assert hold_out(held) is held
    assert held.equals(hold_out(table, share=0.1, seed=1))
    assert not held.equals(hold_out(table, share=0.1, seed=2))
    assert hold_out(table, share=0.001).query("split == 'val'")["pid"].nunique() == 2


def test_hold_out_leaves_two_to_train_on_or_says_so():
    table = pd.DataFrame({"pid": [0, 1, 2], "split": "train"})
    with pytest.raises(ValueError, match="3 train identities cannot give 2"):
        hold_out(table)


BAD_JSON = {
    "an empty file": (b"", "is empty"),
    "blanks": (b" \n ", "is empty"),
    "a truncated file": (b'[{"id": 1, "cap', "is not JSON: .*line 1 column"),
    "a number of 5,000 digits": (b"[" + b"9" * 5000 + b"]", "is not JSON"),
    "a deep nest": (b"[" * 100_000, "is not JSON"),
    "Latin-1": ('[{"id": "é"}]'.encode("latin-1"), "is not UTF-8 text: byte 9 is 0xe9"),
    "UTF-16": ("[]".encode("utf-16"), "is not UTF-8 text"),
    "a dictionary": ({"images": []}, "holds .*dict.*expected is a list"),
    "a text": ('"hello"', "holds 'hello'"),
    "no records": ([], "has no records"),
    "a record that is a list": ([["a.png"]], "record 1: is "),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_a_damaged_json_file_is_refused_by_name(case, tmp_path):
    content, message = BAD_JSON[case]
    with pytest.raises(ValueError, match=rf"(?s)/own\.json.*{message}"):
        load_annotations(own(tmp_path, content))


BAD_RECORDS = {
    "no path": ({"file_path": ...}, r"field 'file_path' \(or img_path\) is missing"),
    "a misspelt path": ({"file_path": ..., "filepath": "a.png"}, "is it 'filepath'?"),
    "no captions": ({"captions": ...}, "field 'captions' is missing"),
    "one caption": ({"captions": ..., "caption": "a man"}, "is it 'caption'?"),
    "no id": ({"id": ...}, "field 'id' is missing"),
    "captions that are a text": ({"captions": "a man"}, r"captions is 'a man' \(str\): expected is a list"),
    "an empty list of captions": ({"captions": [], "split": "train"}, "captions is empty"),
    "a caption that is null": ({"captions": ["fine", None]}, r"caption is None"),
    "a caption that is a list": ({"captions": [["a", "man"]]}, r"caption is \['a', 'man'\] \(list\)"),
    "a caption with NUL": ({"captions": ["a\0man"]}, r"caption 'a\\x00man' \(str\) holds a NUL"),
    "a caption with half a pair": ({"captions": ["a\ud83d man"]}, r"caption 'a\\ud83d man' .* half a surrogate pair"),
    "a path with NUL": ({"file_path": "a\0.png"}, "path .* holds a NUL"),
    "a path that is a number": ({"file_path": 3}, r"file_path is 3 \(int\)"),
    "a path that is empty": ({"file_path": ""}, "path '' .* names no file inside"),
    "the folder itself": ({"file_path": "."}, "names no file inside"),
    "a path that leads out": ({"file_path": "../a.png"}, "names no file inside"),
    "a path that leads out and on": ({"file_path": "x/../../other/a.png"}, "names no file inside"),
    "a path that leads out by Windows": ({"file_path": "..\\a.png"}, "names no file inside"),
    "an absolute path": ({"file_path": "/etc/passwd"}, "names no file inside"),
    "an absolute path of Windows": ({"file_path": "C:\\imgs\\a.png"}, "names no file inside"),
    "two paths": ({"img_path": "b.png"}, "file_path and img_path differ"),
    "an id that is null": ({"id": None}, "id is None"),
    "an id that is a truth": ({"id": True}, r"id is True \(bool\)"),
    "an id that is a fraction": ({"id": 1.5}, r"id is 1.5 \(float\)"),
    "an id that is empty": ({"id": " "}, "id is empty"),
    "a misspelt split": ({"split": "tset"}, "split 'tset' is unknown: did you mean 'test'?"),
    "a split that is a number": ({"split": 0}, r"split is 0 \(int\)"),
    "no split": ({"split": ...}, "field 'split' is missing"),
}


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_a_bad_record_is_refused_by_file_number_field_and_value(case, tmp_path):
    change, message = BAD_RECORDS[case]
    content = people(4, split="test")
    content[2] = {field: value for field, value in (content[2] | change).items() if value is not ...}
    with pytest.raises(ValueError, match=rf"/own\.json, record 3: .*{message}"):
        load_annotations(own(tmp_path, content))


def test_all_bad_records_are_refused_at_once_each_with_its_first_fault(tmp_path):
    content = people(12, split="test")
    changes = {
        1: {"split": "tset", "id": " "},
        3: {"captions": "a man"},
        4: {"captions": ["a\0b"]},
        6: {"file_path": "../x.png"},
        8: {"id": None},
    }
    for place, change in changes.items():
        content[place] |= change
    with pytest.raises(ValueError, match=r"/own\.json, record 2: ") as error:
        load_annotations(own(tmp_path, content))
    lines = str(error.value).splitlines()
    assert [line.split(":")[0].split()[-1] for line in lines] == ["2", "4", "5", "7", "9"]
    for line, words in zip(lines, ("id is empty", "expected is a list", "NUL", "names no file inside", "id is None")):
        assert words in line


def test_of_many_bad_records_twenty_are_named_and_the_others_counted(tmp_path):
    content = [record | {"split": "test" if place < 5 else "tset"} for place, record in enumerate(people(12) * 3)]
    with pytest.raises(ValueError, match=r"record 6: split 'tset'") as error:
        load_annotations(own(tmp_path, content))
    lines = str(error.value).splitlines()
    assert len(lines) == 21
    assert lines[19].startswith("  record 25: ")
    assert lines[20] == "  … and 11 more records"


def test_an_official_file_without_splits_is_not_split_in_silence(tmp_path):
    write(tmp_path, "cuhk", [{k: v for k, v in r.items() if k != "split"} for r in records("cuhk")])
    with pytest.raises(ValueError, match=r"CUHK-PEDES/reid_raw\.json, record 1: field 'split' is missing"):
        load_annotations("cuhk", tmp_path)


@pytest.mark.parametrize("name", ["caption_all.json", "renamed.json"])
def test_cuhk_pedes_without_its_split_stops_and_names_the_official_file(name, tmp_path):
    folders = ["cam_a", "CUHK01", "CUHK03", "Market", "test_query", "train_query"]
    content = [record | {"file_path": f"{folder}/{i}.png"} for i, (folder, record) in enumerate(zip(folders, people()))]
    for record in content:
        draw(tmp_path / "imgs" / record["file_path"])
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"CUHK-PEDES without its split.*reid_raw\.json.*-p dataset cuhk"):
        load_annotations(tmp_path / name)
    (tmp_path / name).write_text(json.dumps([record | {"split": "test"} for record in content]))
    assert set(load_annotations(tmp_path / name).split) == {"test"}  # a split on purpose


def test_a_byte_order_mark_windows_separators_and_other_alphabets_are_read(tmp_path):
    content = people(3, split="test")
    content[1]["file_path"] = "кам 1\\фото é.png"
    draw(tmp_path / "кам 1" / "фото é.png", 99)
    for name, text in (("own.json", json.dumps(content)), ("own.csv", table_of(content).assign(split="test"))):
        text = text if isinstance(text, str) else text.to_csv(index=False)
        table = load_annotations(own(tmp_path, b"\xef\xbb\xbf" + text.encode(), name))
        assert table["path"].tolist() == [str(tmp_path / x) for x in ("a.png", "кам 1/фото é.png", "c.png")]
        assert all(map(os.path.isfile, table["path"]))


def test_an_absolute_path_inside_the_images_folder_is_read(tmp_path):
    content = people(3, split="test")
    content[1]["file_path"] = str(tmp_path / "b.png")
    assert load_annotations(own(tmp_path, content))["path"][1] == str(tmp_path / "b.png")


def test_empty_and_endless_captions_are_read_as_they_are(tmp_path):
    captions = ["", "word " * 10_000, " \t", "\ufeffa", "👩‍🦰"]
    table = load_annotations(own(tmp_path, [people(1, split="test")[0] | {"captions": captions}]))
    assert table["caption"].tolist() == captions


captions_of_all_kinds = st.lists(
    st.text(max_size=20).filter(lambda text: "\0" not in text and "\r" not in text), min_size=1, max_size=4
)


@settings(deadline=None, max_examples=30, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(captions_of_all_kinds, min_size=1, max_size=6))
def test_any_captions_come_back_from_json_and_csv(tmp_path, captions):
    content = [people(12, split="test")[i] | {"captions": texts} for i, texts in enumerate(captions)]
    expected = [text for texts in captions for text in texts]
    assert load_annotations(own(tmp_path, content))["caption"].tolist() == expected
    with open(tmp_path / "own.csv", "w", encoding="utf-8", newline="") as file:
        rows = [(r["file_path"], text, r["id"], "test") for r in content for text in r["captions"]]
        csv.writer(file).writerows([("path", "caption", "id", "split"), *rows])
    assert load_annotations(tmp_path / "own.csv")["caption"].tolist() == expected


def test_the_digest_is_the_same_on_another_disk_and_differs_for_any_change(tmp_path):
    for disk in ("one", "two/deeper"):
        write(tmp_path / disk, "cuhk", records("cuhk"))
    table, moved = (load_annotations("cuhk", tmp_path / disk) for disk in ("one", "two/deeper"))
    digest = table_digest(table)
    assert digest == table_digest(moved)
    assert len(digest) == len(hashlib.sha256().hexdigest())
    changes = {"pid": 5, "path": table["path"][3], "caption": "other", "split": "val"}
    for column, value in changes.items():
        changed = table.copy()
        changed.loc[0, column] = value
        assert table_digest(changed) != digest
    assert table_digest(table.iloc[::-1]) != digest


def test_photos_on_two_drives_have_no_common_folder(monkeypatch):
    monkeypatch.setattr(module.os, "path", ntpath)
    assert module.common_folder([r"C:\a\b\1.jpg", r"C:\a\c\2.jpg"]) == r"C:\a"
    assert module.common_folder([r"C:\a\1.jpg", r"D:\a\2.jpg"]) == ""
    assert module.common_folder([]) == ""


def test_ten_thousand_records_load_in_less_than_three_seconds(tmp_path):
    content = [
        {
            "split": "train",
            "captions": ["a man in red " * 5, "a tall man " * 5],
            "file_path": f"{i % 7}/{i}.jpg",
            "id": i,
        }
        for i in range(10_000)
    ]
    draw(tmp_path / "0" / "0.jpg")
    dataset = own(tmp_path, content)
    start = time.process_time()
    assert len(load_annotations(dataset)) == 20_000
    assert time.process_time() - start < 3  # about 0.1 s: what others compute meanwhile does not count


def test_the_readers_leave_torch_alone():
    code = "import sys, irra_core.annotations; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
