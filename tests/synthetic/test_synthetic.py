"""Rendered people: the data set on disk, its captions, its hard negatives, its ceiling."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from inspect import signature
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from pandas import DataFrame
from PIL import Image

import irra_core as irra
from irra_core.images import open_annotations
from irra_core.synthetic import people as synthetic
from irra_core.synthetic.people import attributes, make_synthetic, near_twins, synthetic_ceiling


def read(folder: Path) -> list[dict]:
    """The records of a folder's annotation file, read without the library."""
    (file,) = (path for path in folder.glob("*.json") if path.name != synthetic.MARKER)
    return json.loads(file.read_text())


def table(folder: Path) -> DataFrame:
    """The annotation table, built without the library."""
    rows = [
        {"pid": r["id"], "image_id": i, "path": str(folder / "imgs" / (r.get("img_path") or r["file_path"]))}
        | {"caption": caption, "split": r["split"]}
        for i, r in enumerate(read(folder))
        for caption in r["captions"]
    ]
    return DataFrame(rows)


def pixels(folder: Path) -> str:
    """One hash over the bytes of every image."""
    files = sorted((folder / "imgs").rglob("*.jpg"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


@pytest.fixture
def sketchy(monkeypatch):
    """Grey photos: enough where the folder matters and not the picture."""
    names = ("hat", "bag", "carried", "hair", "upper", "lower", "shoes")
    grey = Image.new("RGB", (64, 192), "grey"), {name: [0, 0, 9, 9] for name in names}, []
    monkeypatch.setattr(synthetic, "photograph", lambda *_: grey)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_synthetic(tmp_path_factory.mktemp("people"), people=12)


def test_the_default_is_split_fifteen_two_three_with_hard_negatives_in_every_split():
    people = synthetic._people(signature(make_synthetic).parameters["people"].default, "street", 0)
    assert Counter(one["split"] for one in people) == {"train": 2025, "val": 270, "test": 405}
    pairs = Counter(one["split"] for one in people for twin in one["twins"] if people[twin]["split"] == one["split"])
    assert all(pairs[split] >= 2 * 0.2 * size for split, size in {"train": 2025, "val": 270, "test": 405}.items())


def test_the_studies_have_the_default_train_and_val_people_and_a_thousand_test_people():
    count = signature(make_synthetic).parameters["people"].default
    for domain in synthetic.DOMAINS:
        usual, study = (synthetic._people(count, domain, 0, test) for test in (None, synthetic.STUDY_TEST))
        assert [one for one in study if one["split"] != "test"] == [one for one in usual if one["split"] != "test"]
        test = [one for one in study if one["split"] == "test"]
        assert len(test) == 1000
        assert sum(bool(one["twins"]) for one in test) >= 400
        assert all(study[twin]["split"] == "test" for one in test for twin in one["twins"])


@pytest.mark.parametrize("dataset", ["synthetic", "synthetic-study", "synthetic-study-night"])
def test_more_test_people_change_no_other_photo(dataset, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "STUDY_TEST", 3)
    made = make_synthetic(tmp_path, people=12, **synthetic.arguments_of(dataset))
    assert made.name == dataset
    assert irra.load_annotations(dataset, tmp_path).groupby("split").pid.nunique().to_dict() == {
        "train": 8, "val": 2, "test": 2 if dataset == "synthetic" else 3
    }  # fmt: skip
    if "night" not in dataset:
        kept = [record["img_path"] for record in read(made) if record["split"] != "test"]
        assert len(kept) == 40
        assert all((made / "imgs" / name).read_bytes() == (folder / "imgs" / name).read_bytes() for name in kept)


def test_near_twins_are_those_who_differ_in_one_attribute():
    people = synthetic._people(60, "street", 3)
    expected = {i: [] for i in range(60)}
    for i, j in combinations(range(60), 2):
        a, b = people[i], people[j]
        differing = [
            key for key in a["attributes"] | b["attributes"] if a["attributes"].get(key) != b["attributes"].get(key)
        ]
        if a["split"] == b["split"] and len(differing) == 1:
            expected[i].append(j)
            expected[j].append(i)
    assert {i: one["twins"] for i, one in enumerate(people)} == expected


def test_no_two_people_of_a_split_look_alike():
    people = synthetic._people(300, "street", 0)
    looks = [(one["split"], *sorted(one["attributes"].items())) for one in people]
    assert len(set(looks)) == len(looks)


def test_a_seed_gives_the_same_bytes_on_one_core_and_on_two(tmp_path, monkeypatch):
    one, two = tmp_path / "one", tmp_path / "two"
    first = make_synthetic(one, people=12, seed=5)
    monkeypatch.setattr(synthetic, "ALONE", 0)
    monkeypatch.setattr(synthetic, "cores", lambda: 2)
    second = make_synthetic(two, people=12, seed=5)
    assert pixels(first) == pixels(second)
    assert read(first) == read(second)


def test_another_seed_gives_other_people(folder, sketchy, tmp_path):
    other = make_synthetic(tmp_path, people=12, seed=1)
    assert [r["attributes"] for r in read(other)] != [r["attributes"] for r in read(folder)]


def test_images_have_twice_the_size_that_the_small_model_reads_and_show_something(folder):
    small = irra.recipe("synthetic")
    for path in sorted((folder / "imgs").rglob("*.jpg")):
        with Image.open(path) as image:
            assert image.size == (2 * small.image_width, 2 * small.image_height)
            assert np.asarray(image).std() > 15


def test_the_same_people_in_the_size_of_the_paper_are_beside_the_small_ones_and_look_like_them(folder, tmp_path):
    (tmp_path / "synthetic").symlink_to(folder)
    large = make_synthetic(tmp_path, people=12, height=384)
    assert large == tmp_path.resolve() / "384x128" / "synthetic"
    for record, other in zip(read(folder), read(large), strict=True):
        boxes = other.pop("boxes")
        for name, box in record.pop("boxes").items():
            assert box == pytest.approx([number / 2 for number in boxes[name]], abs=1)
        assert record == other  # people, captions, splits, twins
        with (
            Image.open(folder / "imgs" / record["img_path"]) as a,
            Image.open(large / "imgs" / record["img_path"]) as b,
        ):
            assert b.size == (128, 384)
            difference = np.asarray(a, float) - np.asarray(b.resize(a.size, Image.Resampling.BOX), float)
        assert np.abs(difference).mean() < 8
        assert abs(difference.mean()) < 1


@pytest.mark.parametrize(("backbone", "place"), [("small", "synthetic"), ("ViT-B-16-quickgelu", "384x128/synthetic")])
def test_a_recipe_gets_photos_of_the_size_that_its_model_reads(backbone, place, tmp_path, monkeypatch, sketchy):
    monkeypatch.setattr(synthetic, "make_synthetic", partial(make_synthetic, people=12))
    table = open_annotations(irra.recipe("synthetic", backbone=backbone, pretrained="none", _smoke=False), tmp_path)
    assert {Path(path).parents[1] for path in table.path} == {tmp_path.resolve() / place}
    assert [path.name for path in tmp_path.iterdir()] == [place.split("/")[0]]


def test_captions_state_what_is_true_of_the_person(folder):
    for record in read(folder):
        assert len(set(record["captions"])) == len(record["caption_attributes"]) == 2
        for stated in record["caption_attributes"]:
            assert stated.items() <= record["attributes"].items()


@pytest.mark.parametrize(
    ("layout", "place", "field", "first"),
    [
        ("cuhk", "CUHK-PEDES/reid_raw.json", "file_path", 1),
        ("icfg", "ICFG-PEDES/ICFG-PEDES.json", "file_path", 0),
        ("rstp", "RSTPReid/data_captions.json", "img_path", 0),
    ],
)
def test_a_layout_is_that_of_the_official_files(sketchy, tmp_path, layout, place, field, first):
    folder = make_synthetic(tmp_path, layout, people=12)
    records = json.loads((tmp_path / place).read_text())
    assert folder == (tmp_path / place).parent
    assert {r["id"] for r in records} == set(range(first, first + 12))
    assert all((folder / "imgs" / r[field]).is_file() for r in records)
    assert {len(r["captions"]) for r in records} == {1 if layout == "icfg" else 2}
    assert {r["split"] for r in records} == ({"train", "test"} if layout == "icfg" else {"train", "val", "test"})
    if layout == "cuhk":
        assert len({Path(r[field]).parent for r in records}) > 2


def test_people_that_are_there_are_not_drawn_again(folder, monkeypatch):
    monkeypatch.setattr(synthetic, "_write", lambda *_: pytest.fail("drawn again"))
    assert make_synthetic(folder.parent, people=12) == folder


def test_other_people_and_real_photos_are_never_overwritten(folder, tmp_path):
    with pytest.raises(ValueError, match=r"holds people 12 where people 20 was asked for.*another root"):
        make_synthetic(folder.parent, people=20)
    real = tmp_path / "RSTPReid" / "imgs" / "0.jpg"
    real.parent.mkdir(parents=True)
    real.write_bytes(b"a photo")
    with pytest.raises(ValueError, match="RSTPReid holds no rendered people"):
        make_synthetic(tmp_path, "rstp", people=12)
    assert real.read_bytes() == b"a photo"


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "photograph", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_synthetic(tmp_path, people=12)
    assert list(tmp_path.iterdir()) == []


def test_sigterm_ends_rendering_at_once_and_leaves_nothing(tmp_path):
    lines = f"from irra_core.synthetic import make_synthetic; make_synthetic({str(tmp_path)!r})"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    rendering = subprocess.Popen([sys.executable, "-c", lines], env=environment, start_new_session=True)
    while not list(tmp_path.glob(".synthetic-*/imgs/*.jpg")):
        assert rendering.poll() is None
        time.sleep(0.1)
    rendering.send_signal(signal.SIGTERM)
    assert rendering.wait(60) == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []
    for _ in range(100):
        try:
            os.killpg(rendering.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("a process that rendered is still there")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"layout": "rtsp"}, "did you mean 'rstp'"),
        ({"domain": "nigth"}, "did you mean 'night'"),
        ({"people": 11}, "12 or more"),
        ({"height": 200}, "height 200: accepted are multiples of 3"),
        ({"test": 1}, "test 1: accepted is 2 or more people"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, wrong, said):
    with pytest.raises(ValueError, match=said):
        make_synthetic(tmp_path, **wrong)


def test_progress_counts_every_image(sketchy, tmp_path):
    class Bar:
        def __init__(self, total, **_):
            Bar.total, Bar.done = total, 0

        def update(self, n):
            Bar.done += n

        def close(self):
            pass

    make_synthetic(tmp_path, people=12, progress=Bar)
    assert Bar.total == Bar.done == 48


def test_attributes_and_near_twins_are_those_of_the_file(folder):
    records, rows = read(folder), attributes(table(folder))
    assert len(rows) == len(records) == 48
    for record, row in zip(records, rows.itertuples(), strict=True):
        assert (row.pid, row.attributes, row.boxes) == (record["id"], record["attributes"], record["boxes"])
    assert near_twins(table(folder)) == {r["id"]: r["near_twins"] for r in records}


def test_attributes_of_other_images_are_refused(tmp_path):
    rows = [{"pid": 0, "image_id": 0, "path": str(tmp_path / "a.jpg"), "caption": "A man.", "split": "test"}]
    with pytest.raises(ValueError, match=r"a\.jpg is not a rendered image"):
        attributes(DataFrame(rows))


def test_the_ceiling_is_the_mean_share_of_right_images_among_those_that_fit(folder):
    test = [r for r in read(folder) if r["split"] == "test"]
    shares = []
    for record in test:
        for stated in record["caption_attributes"]:
            fitting = [r["id"] for r in test if stated.items() <= r["attributes"].items()]
            shares.append(fitting.count(record["id"]) / len(fitting))
    assert synthetic_ceiling(table(folder)) == pytest.approx(100 * np.mean(shares))


def test_a_caption_that_says_nothing_leaves_chance(folder):
    records = read(folder)
    nobody = [r | {"caption_attributes": [{}, {}]} for r in records]
    file = folder / "annotations.json"
    before = file.read_text()
    try:
        file.write_text(json.dumps(nobody))
        identities = len({r["id"] for r in records if r["split"] == "test"})
        assert synthetic_ceiling(table(folder)) == pytest.approx(100 / identities)
    finally:
        file.write_text(before)


def test_stated_attributes_are_those_recorded_beside_each_caption(folder):
    rows = table(folder).sample(frac=1, random_state=0)
    recorded = {
        (r["img_path"], caption): stated
        for r in read(folder)
        for caption, stated in zip(r["captions"], r["caption_attributes"], strict=True)
    }
    expected = [recorded[Path(path).name, caption] for path, caption in zip(rows.path, rows.caption, strict=True)]
    assert synthetic.stated_attributes(rows) == expected
    assert any(expected)
