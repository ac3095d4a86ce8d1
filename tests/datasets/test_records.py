"""Layouts of the field's data sets, in files made here: each becomes the one table."""

import json

import pytest
import torch
from PIL import Image

import irra_core as irra
from irra_core.annotations import load_annotations
from irra_core.evaluation import encode_images, encode_texts, evaluate
from irra_core.images import image_array


def written(folder, content, photos, name="set.json"):
    """The path of an annotation file with its photos beside it."""
    for photo in photos:
        (folder / photo).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 12)).save(folder / photo)
    (folder / name).write_text(json.dumps(content))
    return folder / name


def test_ufine6926_has_two_long_captions_a_photo_in_the_official_schema(tmp_path):
    long = "She wears a white jacket and dark blue tight trousers of ankle length. " * 8
    content = [{"split": "train", "id": 1, "file_path": "images/1.jpg", "captions": [long, long + "Black sandals."]}]
    content += [{"split": "test", "id": 2, "file_path": "images/2.jpg", "captions": [long, "He runs."]}]
    table = load_annotations(written(tmp_path, content, ["images/1.jpg", "images/2.jpg"], "UFine6926.json"))
    assert table.path.unique().tolist() == [str(tmp_path / "images/1.jpg"), str(tmp_path / "images/2.jpg")]
    assert table.caption.tolist() == [long, long + "Black sandals.", long, "He runs."]


def test_ufine3c_is_a_test_split_with_many_captions_a_photo_and_a_source(tmp_path):
    content = [
        {"id": 2250, "source": "UFine6926", "split": "test", "file_path": "images/7.jpg", "captions": list("abcdef")}
    ]
    table = load_annotations(written(tmp_path, content, ["images/7.jpg"], "UFine3C.json"))
    assert (table.pid.unique().tolist(), table.split.unique().tolist()) == ([2250], ["test"])
    assert table.caption.tolist() == list("abcdef")


@pytest.mark.parametrize("several", [True, False], ids=["HAM-PEDES", "LUPerson-MLLM"])
def test_photos_with_their_captions_are_a_person_each_and_a_tenth_is_val(several, tmp_path):
    photos = [f"part{i % 2}/{i}.jpg" for i in range(20)]
    captions = {photo: [f"{photo} one", f"{photo} two"] if several else f"{photo} one" for photo in photos}
    table = load_annotations(written(tmp_path, captions, photos[:1]))
    assert table.caption.tolist() == [
        c for photo in photos for c in ([*captions[photo]] if several else [captions[photo]])
    ]
    assert table.groupby("path").pid.nunique().eq(1).all()
    assert table.pid.nunique() == table.image_id.nunique() == 20
    assert table[table.split == "val"].path.unique().tolist() == [str(tmp_path / photos[i]) for i in (9, 19)]
    assert set(table.split) == {"train", "val"}


def test_mals_has_image_caption_and_image_id(tmp_path):
    photos = [f"gene_crop/c_g_a_0/{i}.jpg" for i in range(12)]
    content = [
        {"image": photo, "caption": f"a man {i}", "image_id": f"c_g_a_0_{i}", "label": [1, 0, -1]}
        for i, photo in enumerate(photos)
    ]
    table = load_annotations(written(tmp_path, content, photos))
    assert table.caption.tolist() == [f"a man {i}" for i in range(12)]
    assert table.pid.tolist() == table.image_id.tolist() == list(range(12))


def test_pairs_without_an_identity_are_one_person_per_photo(tmp_path):
    content = [{"image": f"{i // 2}.jpg", "caption": f"caption {i}"} for i in range(8)]
    table = load_annotations(written(tmp_path, content, ["0.jpg"]))
    assert table.pid.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_of_a_large_set_at_most_a_thousand_people_are_val(tmp_path):
    table = load_annotations(written(tmp_path, {f"{i}.jpg": "a man" for i in range(25_001)}, ["0.jpg"]))
    counts = table.groupby("split").pid.nunique()
    assert counts.to_dict() == {"train": 25_001 - 961, "val": 961}  # every 26th


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"0.jpg": 7}, r"record 1: captions is 7 \(int\): expected is a list of sentences"),
        ({"0.jpg": "a man", "notes": "x"}, r"holds .*dict.*expected is a list of records"),
        ([{"image": "0.jpg", "caption": None}], r"record 1: captions is None"),
        ([{"photo": "0.jpg", "text": "a man"}], r"record 1: field 'file_path' .* the record has 'photo, text'"),
    ],
)
def test_what_fits_no_layout_says_what_it_looks_like(content, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_annotations(written(tmp_path, content, ["0.jpg"]))


def test_a_text_with_several_photos_is_a_query_once_and_trains_with_each_photo(tmp_path):
    photos = [f"{i}.jpg" for i in range(6)]
    content = [
        {"split": "train", "id": 1, "file_path": photos[:2], "captions": ["a", "b"]},
        {"split": "test", "id": 2, "img_path": photos[2:5], "captions": ["c", "d"]},
        {"split": "test", "id": 3, "file_path": photos[5], "captions": ["e"]},
    ]
    table = load_annotations(written(tmp_path, content, photos))
    rows = [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("c", 2), ("d", 2), ("none", 3), ("none", 4), ("e", 5)]
    assert list(zip(table.caption.fillna("none"), table.image_id)) == rows
    assert table.pid.tolist() == [1] * 4 + [2] * 4 + [3]


def test_queries_apart_from_their_gallery_are_dealt_out_to_photos_of_their_person(tmp_path):
    content = {
        "image_pids": [4, 4, 7, 9],
        "img_paths": [["air", "a.jpg"], ["air", "b.jpg"], ["air", "c.jpg"], "d.jpg"],
        "pair_img_paths": ["ignored"],
        "caption_pids": [7, 4, 4, 4, 7],
        "captions": list("vwxyz"),
    }
    photos = ["air/a.jpg", "air/b.jpg", "air/c.jpg", "d.jpg"]
    for name, split in (("agtext_test.json", "test"), ("agtext_val.json", "val")):
        table = load_annotations(written(tmp_path, content, photos, name))
        assert list(zip(table.pid, table.image_id, table.caption.fillna("none"))) == [
            *((4, 0, "w"), (4, 0, "y"), (4, 1, "x"), (7, 2, "v"), (7, 2, "z"), (9, 3, "none"))
        ]
        assert set(table.split) == {split}
    content["caption_pids"][0] = 5
    with pytest.raises(ValueError, match=r"caption 'v' .* is of person 5, who has no photo"):
        load_annotations(written(tmp_path, content, photos))


def test_a_photo_without_a_caption_is_in_the_gallery_and_asks_nothing(tmp_path, annotations):
    table = annotations[annotations.split == "test"].reset_index(drop=True)
    content = [
        {"split": "test", "id": int(row.pid), "file_path": str(row.path), "captions": [row.caption]}
        for row in table.itertuples()
    ]
    content[0]["captions"], content[6]["captions"], content[7]["captions"] = [], [], []  # the last two are one person
    (tmp_path / "set.json").write_text(json.dumps(content))
    found = load_annotations(tmp_path / "set.json", root=table.path[0].rsplit("/", 1)[0])
    model = irra.build_model(irra.recipe(pretrained="none"), 10, device="cpu")
    measured = evaluate(model, found, precision="fp32")
    image = encode_images(model, image_array(table.path, 96, 32).pixels, precision="fp32")
    asked = [1, 2, 3, 4, 5]
    text = encode_texts(model, table.caption[asked].tolist(), precision="fp32")
    pids = torch.tensor(table.pid.to_numpy())
    expected = irra.retrieval_metrics(text @ image.T, pids[asked], pids)
    assert {name: value[0] for name, value in measured.metrics["text_to_image"].items()} == pytest.approx(expected)
    known = list(range(6))
    back = irra.retrieval_metrics((text @ image[known].T).T, pids[known], pids[asked])
    assert {name: value[0] for name, value in measured.metrics["image_to_text"].items()} == pytest.approx(back)
    assert measured.images == 8


def test_a_train_photo_needs_a_caption(tmp_path):
    content = [{"split": "train", "id": 1, "file_path": "0.jpg", "captions": []}]
    with pytest.raises(ValueError, match="record 1: captions is empty: write at least one sentence"):
        load_annotations(written(tmp_path, content, ["0.jpg"]))
