"""Galleries: every ranking against a brute-force one; wrong tables, sentences and models are refused."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from pandas import DataFrame
from PIL import Image
from torch import nn

import irra_core as irra
from irra_core.evaluation import encode_images, encode_texts
from irra_core.retrieval import Gallery

QUERIES = ["a man in a red coat", "a woman with a white bag", "someone on a bicycle", "blue trousers"]


class RandomModel(nn.Module):
    """Two encoders of random weights: fast, deterministic, and of no use but for comparing rankings."""

    image_size = (16, 8)

    def __init__(self, seed: int = 0, dim: int = 16):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.photo = nn.Parameter(torch.randn(3 * 16 * 8, dim, generator=draw))
        self.word = nn.Parameter(torch.randn(49408, dim, generator=draw))
        self.encoded = 0

    def encode_image(self, images):
        self.encoded += len(images)
        return images.flatten(1) @ self.photo

    def encode_text(self, tokens):
        return self.word[tokens].sum(1)


class ColourModel(RandomModel):
    """Sees a photo's mean colour and reads the names of three: enough to find the red one."""

    def __init__(self):
        super().__init__(dim=3)
        self.word.data.zero_()
        for place, colour in enumerate(("red", "green", "blue")):
            self.word.data[irra.tokenize([colour])[0, 1], place] = 1.0

    def encode_image(self, images):
        return images.mean((2, 3))


@pytest.fixture
def model() -> RandomModel:
    return RandomModel()


@pytest.fixture
def photos(tmp_path) -> DataFrame:
    """30 photos of noise, as a table: two captions each, 10 people, ids that are no row numbers."""
    noise, folder = np.random.default_rng(0), tmp_path / "photos"
    folder.mkdir()
    rows = []
    for row in range(30):
        path = folder / f"{row:02}.png"
        Image.fromarray(noise.integers(0, 256, (16, 8, 3), dtype=np.uint8)).save(path)
        rows += [(row // 3, 100 + 7 * row, str(path), caption, "test") for caption in ("one", "two")]
    return DataFrame(rows, columns=["pid", "image_id", "path", "caption", "split"])


def brute_force(model, table: DataFrame, queries: list[str], k: int) -> DataFrame:
    """Every photo decoded by itself, all cosines, a full sort."""
    table = table.drop_duplicates("image_id").reset_index(drop=True)
    pixels = np.stack([np.asarray(Image.open(path)).transpose(2, 0, 1) for path in table.path])
    cosine = encode_texts(model, queries).double().numpy() @ encode_images(model, pixels).double().numpy().T
    parts = []
    for query, scores in zip(queries, cosine, strict=True):
        best = np.argsort(-scores)[:k]
        found = table.loc[best, ["path", "pid", "image_id"]].reset_index(drop=True)
        found.insert(0, "score", scores[best])
        found.insert(0, "rank", np.arange(1, len(best) + 1))
        found.insert(0, "query", query)
        parts.append(found)
    return pd.concat(parts, ignore_index=True).astype({"pid": "Int64"})


def same_ranking(found: DataFrame, expected: DataFrame) -> None:
    pd.testing.assert_frame_equal(found, expected, check_exact=False, atol=1e-5, rtol=0, check_dtype=False)


def test_the_module_loads_no_search_engine():
    code = "import sys, irra_core.retrieval; print([name for name in {} if name in sys.modules])"
    engines = ["irra_core.search", "faiss", "pymilvus", "pyarrow.parquet"]
    command = [sys.executable, "-c", code.format(engines)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_search_ranks_as_sorting_all_cosines_does(model, photos):
    gallery = Gallery.build(model, photos)
    found = gallery.search(QUERIES, k=7)
    same_ranking(found, brute_force(model, photos, QUERIES, 7))
    assert [str(kind) for kind in found.dtypes] == ["str", "int64", "float64", "str", "Int64", "int64"]
    same_ranking(gallery.search(QUERIES[2], k=7), brute_force(model, photos, QUERIES[2:3], 7))


def test_the_little_clip_searches_a_split_of_a_data_set(tiny, annotations):
    model = irra.build_model(tiny, 10)
    test = annotations[annotations.split == "test"]
    gallery = Gallery.build(model, test, tiny)
    assert len(gallery) == test.image_id.nunique()
    pixels = irra.images.image_array(list(test.path.unique()), 96, 32).pixels
    cosine = (encode_texts(model, QUERIES) @ encode_images(model, pixels).T).numpy()
    best = test.image_id.unique()[np.argsort(-cosine, axis=1)[:, :3]]
    assert np.array_equal(gallery.search(QUERIES, k=3).image_id.to_numpy().reshape(4, 3), best)


def test_own_photos_need_no_annotations(tmp_path):
    folder = tmp_path / "my_photos"
    (folder / "more" / ".thumbnails").mkdir(parents=True)
    for name, colour in {"a.PNG": (0, 0, 255), "more/b.jpg": (255, 0, 0), "more/c.webp": (0, 255, 0)}.items():
        Image.new("RGB", (40, 80), colour).save(folder / name)
        Image.new("RGB", (4, 8), colour).save(folder / "more" / ".thumbnails" / f"{colour[0]}.png")
    (folder / "more" / "broken.jpg").write_bytes((folder / "more" / "b.jpg").read_bytes()[:300])
    (folder / "empty.jpeg").touch()
    (folder / "notes.txt").write_text("not a picture")
    gallery = Gallery.build(ColourModel(), folder)
    found = gallery.search("a person in red", k=10)
    assert found.path[0] == str(folder / "more" / "b.jpg")
    assert len(found) == 3
    assert found.pid.isna().all()
    assert sorted(gallery.unreadable.path) == [str(folder / "empty.jpeg"), str(folder / "more" / "broken.jpg")]
    assert gallery.unreadable.reason.str.len().min() > 5
    assert repr(gallery).startswith("Gallery(3 photos, 2 left out: see unreadable, ")


def test_files_whose_names_are_not_utf8_are_listed_and_the_others_searched(photos, tmp_path, model):
    folder = tmp_path / "photos"
    for name in (b"caf\xe9.png", b"\xff.png"):
        shutil.copy(folder / "00.png", os.fsencode(folder) + b"/" + name)
    listed = [str(folder / name) for name in (r"caf\udce9.png", r"\udcff.png")]
    gallery = Gallery.build(model, folder, folder=tmp_path / "gallery")
    assert len(gallery) == 30
    assert list(gallery.unreadable.path) == listed
    assert set(gallery.unreadable.reason) == {"its name is not UTF-8: rename the file"}
    assert gallery.add(folder) == 0
    assert list(gallery.unreadable.path) == listed
    shares = [Gallery.build(model, folder, folder=tmp_path / "two", process=process, processes=2) for process in (0, 1)]
    assert [list(share.unreadable.path) for share in shares] == [listed[:1], listed[1:]]
    assert gallery.add(DataFrame({"path": [str(folder / "00.png"), "\ud83d.png"]}, dtype=object)) == 0
    for path in folder.glob("[0-9]*.png"):
        path.unlink()
    with pytest.raises(ValueError, match=r"2 unreadable; .*caf.udce9\.png: its name is not UTF-8"):
        Gallery.build(model, folder)


@pytest.mark.parametrize(
    ("column", "values", "words"),
    [
        ("image_id", [1.0, 1.5], r"column 'image_id' .* such as 1\.5: number the photos"),
        ("image_id", ["1", "b"], r"column 'image_id' .* such as "),
        ("image_id", [1.0, np.nan], r"01\.png has no image_id"),
        ("pid", [0.5, np.nan], r"column 'pid' .* such as 0\.5: number the people"),
        ("pid", ["p1", None], r"column 'pid' .* such as 'p1'"),
        ("path", [3, "a.png"], "row 0 of the table has path 3"),
        ("path", ["a.png", None], "row 1 of the table has path (nan|None)"),
    ],
)
def test_a_table_whose_values_would_be_changed_is_refused(model, photos, column, values, words):
    table = photos.drop_duplicates("image_id")[:2][["image_id", "path", "pid"]].reset_index(drop=True)
    with pytest.raises(ValueError, match=words):
        Gallery.build(model, table.assign(**{column: values}))
    whole = table.assign(image_id=[4.0, 9.0], pid=[np.nan, 2.0], path=[Path(path) for path in table.path])
    found = Gallery.build(model, whole).images
    assert (list(found.image_id), list(found.path), found.pid[1]) == ([4, 9], list(table.path), 2)
    assert found.pid.isna().tolist() == [True, False]


def test_half_a_character_of_a_sentence_is_a_question_mark(model, photos):
    gallery = Gallery.build(model, photos)
    found = gallery.search(["a \ud83d man", "a man"], k=3)
    pd.testing.assert_frame_equal(found, gallery.search(["a ? man", "a man"], k=3))
    assert gallery.recall(k=3, queries=["a \udc00"]) == 1.0


def test_a_folder_without_a_readable_photo_is_refused_by_name(model, tmp_path):
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(ValueError, match=r"no photo that can be read .*torn\.jpg"):
        Gallery.build(model, tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere is no folder of photos"):
        Gallery.build(model, tmp_path / "nowhere")


def test_more_results_than_photos_are_all_photos(model, photos):
    found = Gallery.build(model, photos).search(QUERIES, k=1000)
    same_ranking(found, brute_force(model, photos, QUERIES, 1000))
    assert len(found) == 4 * 30


@pytest.mark.parametrize(
    ("text", "k", "words"),
    [
        ("", 5, "query 1 is empty"),
        (["a man", " \n"], 5, "query 2 is empty"),
        ([], 5, "no query"),
        ("a man", 0, "k is 0"),
        ("a man", True, "k is True"),
    ],
)
def test_a_senseless_search_says_what_is_wrong(model, photos, text, k, words):
    with pytest.raises(ValueError, match=words):
        Gallery.build(model, photos).search(text, k=k)


@pytest.mark.parametrize("text", ["word " * 500, "🙂🚲", "<script>alert(1)</script>", "رجل يرتدي معطفا", "\x00\u202e"])
def test_strange_sentences_are_searched_for(model, photos, text):
    found = Gallery.build(model, photos).search(text, k=3)
    assert (found["query"] == text).all()
    assert len(found) == 3


def test_damaged_weights_are_refused_not_ranked(model, photos):
    gallery = Gallery.build(model, photos)
    model.word.data[irra.tokenize(["red"])[0, 1]] = float("nan")
    with pytest.raises(ValueError, match=r"1 of 2 features are not unit vectors .*'red'.*damaged"):
        gallery.search(["blue", "red"])
    model.photo.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"30 of 30 features are not unit vectors .*00\.png"):
        Gallery.build(model, photos)


def test_a_model_of_another_width_or_size_is_refused(model, photos, tiny):
    gallery = Gallery.build(model, photos)
    gallery.model = RandomModel(dim=8)
    with pytest.raises(ValueError, match="width 8, the gallery's have 16"):
        gallery.search("a man")
    with pytest.raises(ValueError, match="recipe's photos are 96×32, the model's 16×8"):
        Gallery.build(model, photos, tiny)


@pytest.mark.parametrize("wrong", [100.5, 2**70, "100", None])
def test_what_is_no_image_id_is_not_taken_for_one(model, photos, wrong):
    gallery = Gallery.build(model, photos[:4])
    with pytest.raises(ValueError, match=f"image_id {wrong!r} is not in the gallery: it is no whole number of 64 bits"):
        gallery.remove(iter([wrong]))
    assert len(gallery) == 2


@pytest.mark.parametrize("index", ["exact", "hnsw"])
def test_an_emptied_gallery_is_saved_loaded_and_filled_again(model, photos, tmp_path, index):
    gallery = Gallery.build(model, photos[:4], index=index)
    assert gallery.remove(photos.image_id.unique()[:2]) == 2
    gallery.save(tmp_path / "gallery")
    again = Gallery.load(tmp_path / "gallery", model)
    assert (len(again), len(again.search("red", k=3))) == (0, 0)
    assert again.add(photos[:4]) == 2


@pytest.mark.parametrize("index", ["exact", "hnsw"])
def test_adding_and_removing_leave_the_ranking_that_a_new_gallery_has(model, photos, index):
    gallery = Gallery.build(model, photos[:40], index=index)
    assert gallery.add(photos[20:]) == 10  # 20 captions of 10 photos are there
    gone = photos.image_id.unique()[[0, 3, 29]]
    assert gallery.remove(gone) == 3
    stays = photos[~photos.image_id.isin(gone)]
    same_ranking(gallery.search(QUERIES, k=30), brute_force(model, stays, QUERIES, 30))
    assert gallery.add(photos) == 3
    same_ranking(gallery.search(QUERIES, k=30), brute_force(model, photos, QUERIES, 30))
    assert model.encoded == 20 + 10 + 3 + 2 * 0 + 27 + 30  # brute_force encodes too; no photo is encoded twice


def test_an_id_with_two_photos_and_an_unknown_id_are_refused(model, photos):
    gallery = Gallery.build(model, photos[:4])
    moved = photos[:1].assign(path="elsewhere.png")
    with pytest.raises(ValueError, match=r"image_id 100 is .*00\.png in the gallery and elsewhere\.png"):
        gallery.add(moved)
    with pytest.raises(ValueError, match=r"image_id 100 has two photos, .*00\.png and elsewhere\.png"):
        gallery.add(pd.concat([photos[:1], moved]))
    with pytest.raises(ValueError, match="image_id 5 is not in the gallery"):
        gallery.remove([100, 5])
    assert len(gallery) == 2


@pytest.mark.parametrize("index", ["exact", "hnsw"])
def test_a_photos_neighbours_are_the_others_by_cosine(model, photos, index):
    gallery = Gallery.build(model, photos, index=index)
    features, table = gallery._store.features, gallery.images
    cosine = features @ features[4]
    cosine[4] = -2
    found = gallery.neighbours(128, k=6)
    assert found.image_id.tolist() == table.image_id[np.argsort(-cosine)[:6]].tolist()
    assert found.score.to_numpy() == pytest.approx(np.sort(cosine)[::-1][:6], abs=1e-6)
    assert set(found["query"]) == {table.path[4]}
    assert len(gallery.neighbours(128, k=100)) == 29
    with pytest.raises(ValueError, match="image_id 129 is not in the gallery"):
        gallery.neighbours(129)


class Interrupted:
    """A progress bar during which somebody presses Ctrl-C."""

    def __init__(self, total, **_):
        self.left = 2

    def update(self, count):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt

    def close(self):
        pass


def shard(count: int, dim: int = 24, seed: int = 0) -> tuple[DataFrame, np.ndarray]:
    """Unit vectors in 40 clumps, as people's photos are, under ids that are no row numbers."""
    draw = np.random.default_rng(seed)
    features = draw.standard_normal((40, dim))[draw.integers(0, 40, count)] + 0.5 * draw.standard_normal((count, dim))
    features = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)
    ids = draw.permutation(10 * count)[:count]
    rows = DataFrame({"image_id": ids, "path": [f"{i}.jpg" for i in ids]}).assign(pid=pd.array(ids, "Int64"))
    return rows.astype({"path": "str"}), features


def test_recall_is_the_share_of_the_true_best_that_was_found(model, photos):
    gallery = Gallery.build(model, photos)
    assert gallery.recall(k=5, queries=QUERIES) == gallery.recall(k=5) == 1.0
    blind = gallery._store.nearest  # an index that misses the best of every query
    gallery._store.nearest = lambda q, k, exact=False: blind(q, k) if exact else [a[:, 1:] for a in blind(q, k + 1)]
    assert gallery.recall(k=5, queries=QUERIES) == 0.8
