"""Rendered people: the data set on disk, its captions, its hard negatives, its ceiling."""

import hashlib
import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from pandas import DataFrame
from PIL import Image

from irra_core import synthetic
from irra_core.drawing import COLOURS, HEIGHT, WIDTH
from irra_core.synthetic import attributes, make_synthetic, near_twins, synthetic_ceiling


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_synthetic(tmp_path_factory.mktemp("people"), people=16)


def test_the_default_is_split_five_one_two_with_hard_negatives_in_every_split():
    people = synthetic._people(800, "street", 0)
    assert Counter(one["split"] for one in people) == {"train": 500, "val": 100, "test": 200}
    pairs = Counter(one["split"] for one in people for twin in one["twins"] if people[twin]["split"] == one["split"])
    assert sum(pairs.values()) >= 2 * 150
    assert pairs["test"] >= 2 * 30
    assert pairs["val"] >= 2 * 15


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
    people = synthetic._people(300, "general", 0)
    looks = [(one["split"], *sorted(one["attributes"].items())) for one in people]
    assert len(set(looks)) == len(looks)


def test_a_seed_gives_the_same_bytes_on_one_core_and_on_two(tmp_path, monkeypatch):
    one, two = tmp_path / "one", tmp_path / "two"
    monkeypatch.setattr(synthetic, "_cores", lambda: 1)
    first = make_synthetic(one, people=30, seed=5)
    monkeypatch.setattr(synthetic, "_cores", lambda: 2)
    second = make_synthetic(two, people=30, seed=5)
    assert pixels(first) == pixels(second)
    assert read(first) == read(second)


def test_another_seed_gives_other_people(folder, tmp_path):
    other = make_synthetic(tmp_path, people=16, seed=1)
    assert [r["attributes"] for r in read(other)] != [r["attributes"] for r in read(folder)]


def test_images_have_the_size_of_the_paper_and_show_something(folder):
    for path in sorted((folder / "imgs").rglob("*.jpg")):
        with Image.open(path) as image:
            assert image.size == (WIDTH, HEIGHT) == (128, 384)
            assert np.asarray(image).std() > 15


def test_boxes_lie_inside_the_image_and_name_what_the_person_has(folder):
    for record in read(folder):
        boxes = record["boxes"]
        assert {"head", "torso", "upper", "left arm", "right leg"} <= set(boxes)
        for x0, y0, x1, y1 in boxes.values():
            assert 0 <= x0 < x1 <= WIDTH
            assert 0 <= y0 < y1 <= HEIGHT
        assert ("hat" in boxes) == (record["attributes"]["hat"] != "none")
        assert boxes["head"][3] < boxes["shoes"][1]


def test_the_box_of_a_plain_garment_holds_its_colour(folder):
    distances, strangers = [], []
    for record in read(folder):
        person = record["attributes"]
        if person.get("pattern", "plain") != "plain" or person["bag"] != "none":
            continue
        with Image.open(folder / "imgs" / record["img_path"]) as image:
            x0, y0, x1, y1 = record["boxes"]["torso"]
            middle = np.asarray(image)[(2 * y0 + y1) // 3 : (y0 + 2 * y1) // 3, (2 * x0 + x1) // 3 : (x0 + 2 * x1) // 3]
        seen = np.median(middle.reshape(-1, 3), axis=0)
        away = {name: np.abs(seen - rgb).sum() for name, rgb in COLOURS.items()}
        distances.append(away[person["upper_colour"]])
        strangers.append(np.mean(list(away.values())))
    assert np.mean(distances) < 0.6 * np.mean(strangers)


def test_captions_state_what_is_true_and_differ(folder):
    for record in read(folder):
        assert len(set(record["captions"])) == 2
        for caption, stated in zip(record["captions"], record["caption_attributes"], strict=True):
            assert stated.items() <= record["attributes"].items()
            assert re.fullmatch(r"[A-Z][A-Za-z ,.-]+\.", caption), caption
            assert not re.search(r"\ba [aeio]|\ban [^aeio]|\s\s|\s[,.]", caption), caption
            for key, value in stated.items():
                words = synthetic.WORDS["colour" if key.endswith("colour") else key][value]
                assert any(all(part in caption.lower() for part in word.split("{}")) for word in words), (caption, key)


def test_a_photo_from_behind_tells_no_face_and_no_chest():
    person = {"gender": "man", "hair": "bald", "upper": "t-shirt", "upper_colour": "red", "pattern": "logo"}
    person |= {"lower": "jeans", "lower_colour": "blue", "shoes": "boots", "shoe_colour": "black", "bag": "none"}
    person |= {"hat": "none", "glasses": "yes", "carried": "phone"}
    body = synthetic._body(person, np.random.default_rng(0))
    stated = {}
    for seed in range(6):
        rng = np.random.default_rng(seed)
        _, boxes, hidden = synthetic.photograph(synthetic._dressed(person, body), "back", "street", rng)
        for _ in range(10):
            stated |= synthetic._caption(person, synthetic._hidden_in("back", person, hidden, boxes), "street", rng)[1]
    assert stated["lower_colour"] == "blue"
    assert not {"glasses", "pattern", "carried"} & set(stated)


@pytest.mark.parametrize(
    ("layout", "place", "field", "first"),
    [
        ("cuhk", "CUHK-PEDES/reid_raw.json", "file_path", 1),
        ("icfg", "ICFG-PEDES/ICFG-PEDES.json", "file_path", 0),
        ("rstp", "RSTPReid/data_captions.json", "img_path", 0),
    ],
)
def test_a_layout_is_that_of_the_official_files(tmp_path, layout, place, field, first):
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
    assert make_synthetic(folder.parent, people=16) == folder


def test_other_people_and_real_photos_are_never_overwritten(folder, tmp_path):
    with pytest.raises(ValueError, match=r"holds people 16 where people 20 was asked for.*another root"):
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


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"layout": "rtsp"}, "did you mean 'rstp'"),
        ({"domain": "nigth"}, "did you mean 'night'"),
        ({"people": 11}, "12 or more"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, wrong, said):
    with pytest.raises(ValueError, match=said):
        make_synthetic(tmp_path, **wrong)


def test_progress_counts_every_image(tmp_path):
    class Bar:
        def __init__(self, total, **_):
            Bar.total, Bar.done = total, 0

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, n):
            Bar.done += n

    make_synthetic(tmp_path, people=12, progress=Bar)
    assert Bar.total == Bar.done == 48


def test_attributes_and_near_twins_are_those_of_the_file(folder):
    records, rows = read(folder), attributes(table(folder))
    assert len(rows) == len(records) == 64
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
