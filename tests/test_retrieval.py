"""Galleries: every ranking against a brute-force one, and what becomes of damage, doubles and interruptions."""

import json
import multiprocessing
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
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch
from torch import nn

import irra_core as irra
from irra_core import retrieval
from irra_core.evaluation import encode_images, encode_texts
from irra_core.retrieval import HEAD, Gallery, _begin_folder, model_fingerprint
from irra_core.search.nearest import GRAPH, Memory

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


@pytest.mark.parametrize("index", ["exact", "hnsw"])
def test_a_saved_gallery_comes_back_as_it_was(model, photos, tmp_path, index):
    gallery = Gallery.build(model, photos, index=index)
    gallery.remove([100, 121])
    for _ in range(2):  # the second replaces the first
        gallery.save(tmp_path / "gallery")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gallery", "photos"]
    loaded = Gallery.load(tmp_path / "gallery", RandomModel())
    pd.testing.assert_frame_equal(loaded.images, gallery.images)
    pd.testing.assert_frame_equal(loaded.search(QUERIES, k=30), gallery.search(QUERIES, k=30))
    loaded.add(photos)
    same_ranking(loaded.search(QUERIES, k=30), brute_force(model, photos, QUERIES, 30))


def test_another_models_gallery_is_not_loaded(model, photos, tmp_path):
    Gallery.build(model, photos).save(tmp_path / "gallery")
    other = RandomModel(seed=1)
    with pytest.raises(ValueError, match=r"built by model .* and this is model .*load the checkpoint that built it"):
        Gallery.load(tmp_path / "gallery", other)
    assert model_fingerprint(other) != model_fingerprint(model) == model_fingerprint(RandomModel())
    with pytest.raises(ValueError, match="built by model"):
        Gallery.build(other, photos, folder=tmp_path / "gallery")


def test_saving_never_replaces_what_is_no_gallery(model, photos, tmp_path):
    gallery = Gallery.build(model, photos)
    for place in (tmp_path / "photos", tmp_path / "photos" / "00.png"):
        with pytest.raises(ValueError, match="holds something that is no gallery"):
            gallery.save(place)
        with pytest.raises(ValueError, match="holds something that is no gallery"):
            Gallery.build(model, photos, folder=place)
    assert len(list((tmp_path / "photos").iterdir())) == 30


def _truncate(folder):
    path = folder / "part-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-40])


def _arrays(**changes):
    def damage(folder):
        path = folder / "part-00000.safetensors"
        arrays = load_file(path)
        save_file({name: changes.get(name, lambda a: a)(array) for name, array in arrays.items()}, path)

    return damage


def _flip(folder):
    path = folder / "part-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-30 * 16 * 2] ^= 1  # the lowest byte of a feature in the middle: still a unit vector
    path.write_bytes(content)


def _table(**changes):
    def damage(folder):
        table = pd.read_parquet(folder / "part-00000.parquet")
        table.assign(**{name: change(table[name]) for name, change in changes.items()}).to_parquet(
            folder / "part-00000.parquet"
        )

    return damage


def _head(**changes):
    def damage(folder):
        path = folder / "gallery.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


DAMAGES = {
    "truncated features": _truncate,
    "float64 features": _arrays(features=lambda a: a.astype(np.float64)),
    "a missing row": _arrays(features=lambda a: a[:-1].copy()),
    "another width": _arrays(features=lambda a: np.hstack([a, a])),
    "NaN": _arrays(features=lambda a: np.where(a == a.max(), np.float32("nan"), a)),
    "other ids": _arrays(image_id=lambda a: a[::-1].copy()),
    "no table": lambda folder: (folder / "part-00000.parquet").unlink(),
    "a table that is none": lambda folder: (folder / "part-00000.parquet").write_bytes(b"PAR1 no PAR1"),
    "a table of other columns": lambda folder: DataFrame({"a": [1]}).to_parquet(folder / "part-00000.parquet"),
    "a head that is none": lambda folder: (folder / "gallery.json").write_text("[1, 2"),
    "a head without a model": lambda folder: (folder / "gallery.json").write_text('{"format": 1}'),
    "a head of a list": lambda folder: (folder / "gallery.json").write_text("[]"),
    "a deeply nested head": lambda folder: (folder / "gallery.json").write_text("[" * 100_000),
    "another format": _head(format=2),
    "a huge width": _head(dim=10**9),
    "a width beyond all integers": _head(dim=2**40, index="hnsw"),
    "half the photos that it says": _head(photos=60),
    "photos that are no number": _head(photos="30"),
    "a part less": lambda folder: (folder / "part-00000.safetensors").unlink(),
    "a pipe in a part's place": lambda folder: [
        (folder / "part-00000.safetensors").unlink(),
        os.mkfifo(folder / "part-00000.safetensors"),
    ],
    "one changed bit": _flip,
    "features of eight bits": lambda folder: save_torch(
        {name: a.to(torch.float8_e4m3fn) for name, a in load_torch(folder / "part-00000.safetensors").items()},
        folder / "part-00000.safetensors",
    ),
    "ids that are no integers": _arrays(image_id=lambda a: a.astype(np.float64)),
    "paths that are no text": _table(path=lambda column: range(len(column))),
    "paths of lists": _table(path=lambda column: [["a"]] * len(column)),
    "ids that are times": _table(image_id=pd.to_datetime),
    "people that are no numbers": _table(pid=lambda column: ["x"] * len(column)),
    "fractions of people": _table(pid=lambda column: [1.0] * len(column)),
    "an unknown index": _head(index="magic"),
    "the same part twice": lambda folder: [
        shutil.copy(folder / f"part-00000.{kind}", folder / f"part-00001.{kind}") for kind in ("safetensors", "parquet")
    ],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_gallery_is_refused(model, photos, tmp_path, damage):
    Gallery.build(model, photos).save(tmp_path / "gallery")
    damage(tmp_path / "gallery")
    with pytest.raises(ValueError, match=r"/gallery|index 'magic'") as found:
        Gallery.load(tmp_path / "gallery", model)
    assert "build" in str(found.value) or "index 'magic'" in str(found.value)


def test_a_gallery_of_an_earlier_version_is_loaded(model, photos, tmp_path):
    Gallery.build(model, photos).save(tmp_path / "gallery")
    head = json.loads((tmp_path / "gallery" / HEAD).read_text())
    del head["photos"]
    (tmp_path / "gallery" / HEAD).write_text(json.dumps(head))
    _arrays()(tmp_path / "gallery")  # written anew, without a checksum
    same_ranking(Gallery.load(tmp_path / "gallery", model).search(QUERIES, 9), brute_force(model, photos, QUERIES, 9))


@pytest.mark.parametrize("index", ["exact", "hnsw"])
def test_a_deleted_part_is_missed_and_a_second_build_makes_it_again(model, photos, tmp_path, monkeypatch, index):
    monkeypatch.setattr(retrieval, "SHARD", 8)
    Gallery.build(model, photos, index=index, folder=tmp_path / "gallery")
    (tmp_path / "gallery" / "part-00001.safetensors").unlink()
    with pytest.raises(ValueError, match=r"gallery has 22 of its 30 photos, a part is missing: .*Gallery\.build"):
        Gallery.load(tmp_path / "gallery", model)
    model.encoded = 0
    Gallery.build(model, photos, index=index, folder=tmp_path / "gallery")
    assert model.encoded == 8
    loaded = Gallery.load(tmp_path / "gallery", model)
    same_ranking(loaded.search(QUERIES, k=30), brute_force(model, photos, QUERIES, 30))


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


@pytest.mark.parametrize("index", ["exact", "hnsw"])
def test_an_interrupted_build_goes_on_where_it_was(model, photos, tmp_path, monkeypatch, index):
    monkeypatch.setattr(retrieval, "SHARD", 8)
    with pytest.raises(KeyboardInterrupt):
        Gallery.build(model, photos, index=index, folder=tmp_path / "gallery", progress=Interrupted)
    assert model.encoded == 16
    gallery = Gallery.build(model, photos, index=index, folder=tmp_path / "gallery")
    assert model.encoded == 30
    same_ranking(gallery.search(QUERIES, k=9), brute_force(model, photos, QUERIES, 9))
    model.encoded = 0
    again = Gallery.build(model, photos, index=index, folder=tmp_path / "gallery")
    assert model.encoded == 0
    pd.testing.assert_frame_equal(again.search(QUERIES, k=9), gallery.search(QUERIES, k=9))


def shard(count: int, dim: int = 24, seed: int = 0) -> tuple[DataFrame, np.ndarray]:
    """Unit vectors in 40 clumps, as people's photos are, under ids that are no row numbers."""
    draw = np.random.default_rng(seed)
    features = draw.standard_normal((40, dim))[draw.integers(0, 40, count)] + 0.5 * draw.standard_normal((count, dim))
    features = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)
    ids = draw.permutation(10 * count)[:count]
    rows = DataFrame({"image_id": ids, "path": [f"{i}.jpg" for i in ids]}).assign(pid=pd.array(ids, "Int64"))
    return rows.astype({"path": "str"}), features


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_the_shares_of_three_processes_are_the_gallery_of_one(model, photos, tmp_path, order):
    alone = Gallery.build(model, photos)
    for process in order:
        Gallery.build(model, photos, folder=tmp_path / "shared", process=process, processes=3)
    whole = Gallery.load(tmp_path / "shared", model)
    assert sorted(whole.images.image_id) == sorted(photos.image_id.unique())
    columns = ["query", "rank", "image_id"]
    queries = ["a red coat", "a blue shirt"]
    assert whole.search(queries, k=5)[columns].equals(alone.search(queries, k=5)[columns])
    parts = len(list((tmp_path / "shared").glob("part-*.safetensors")))
    assert len(Gallery.build(model, photos, folder=tmp_path / "shared")) == len(alone) == 30
    assert len(list((tmp_path / "shared").glob("part-*.safetensors"))) == parts == 3


FORKS = multiprocessing.get_context("forkserver")


def shared_out(table: str, folder: str, process: int, processes: int, together, pipe) -> None:
    """What a child process does: its share of one gallery after another, each begun at the same moment by all."""
    torch.set_num_threads(1)
    retrieval.SHARD = 2
    photos, model = pd.read_parquet(table), RandomModel()
    for index in ("hnsw", "exact"):
        together.wait()
        gallery = Gallery.build(
            model, photos, index=index, folder=f"{folder}/{index}", process=process, processes=processes
        )
        pipe.send(list(gallery.unreadable.path))


@pytest.fixture
def filled(photos, tmp_path):
    """Two folders that four processes have filled at the same time, and what each process could not read."""
    (tmp_path / "photos" / "broken.png").write_bytes(b"no photo")
    broken = photos[:1].assign(image_id=1, path=str(tmp_path / "photos" / "broken.png"))
    photos = pd.concat([photos, broken], ignore_index=True)
    photos.to_parquet(tmp_path / "table.parquet")
    FORKS.set_forkserver_preload(["irra_core.retrieval"])
    together, pipes, children = FORKS.Barrier(4, timeout=240), [], []
    for process in range(4):
        ours, theirs = FORKS.Pipe(duplex=False)
        arguments = (str(tmp_path / "table.parquet"), str(tmp_path), process, 4, together, theirs)
        children.append(FORKS.Process(target=shared_out, args=arguments))
        children[-1].start()
        theirs.close()
        pipes.append(ours)
    try:
        for child in children:
            child.join(240)
        assert [child.exitcode for child in children] == [0] * 4
    finally:
        for child in children:
            child.kill()
    return photos, [[pipe.recv() for _ in range(2)] for pipe in pipes]


def test_four_processes_at_once_fill_the_gallery_of_one_and_a_last_call_completes_it(model, filled, tmp_path):
    photos, unreadable = filled
    broken = photos.path.iloc[-1]
    assert unreadable == [[[], []], [[], []], [[], []], [[broken], [broken]]]
    alone = Gallery.build(model, photos)
    for index in ("exact", "hnsw"):
        whole = Gallery.load(tmp_path / index, model)
        assert (len(whole), whole._store.index) == (30, index)
        same_ranking(whole.search(QUERIES, k=9), alone.search(QUERIES, k=9))
        features = {gallery: gallery._store.features_of(alone.images.image_id.to_numpy()) for gallery in (whole, alone)}
        np.testing.assert_allclose(features[whole], features[alone], atol=1e-6)
    assert not (tmp_path / "hnsw" / GRAPH).exists()
    model.encoded = 0
    last = Gallery.build(model, photos, index="hnsw", folder=tmp_path / "hnsw")
    assert (model.encoded, list(last.unreadable.path)) == (0, [broken])
    assert (tmp_path / "hnsw" / GRAPH).exists()


@pytest.mark.parametrize("answer", [1, 2])
def test_a_folder_that_another_process_begins_between_two_looks_at_it_is_a_gallery(
    model, photos, tmp_path, monkeypatch, answer
):
    """The head appears just after this process was told for the first or the second time that it is not there."""
    folder, told, ask = tmp_path / "gallery", [], Path.is_file
    folder.mkdir()  # the other one's first act

    def asked(path):
        found = ask(path)
        if path == folder / HEAD and not found:
            told.append(path)
            if len(told) == answer:
                _begin_folder(tmp_path / "other" / HEAD, model, "exact")
                (tmp_path / "other" / HEAD).replace(folder / HEAD)
        return found

    monkeypatch.setattr(Path, "is_file", asked)
    assert len(Gallery.build(model, photos, folder=folder, process=0, processes=2)) == 15
    assert json.loads((folder / HEAD).read_text())["model"] == model_fingerprint(model)


def test_what_another_model_begins_at_the_same_moment_is_refused(model, photos, tmp_path, monkeypatch):
    def late(head, model, index):
        _begin_folder(head, model, index)
        _begin_folder(head, RandomModel(seed=1), index)

    monkeypatch.setattr(retrieval, "_begin_folder", late)
    with pytest.raises(ValueError, match="was built by model"):
        Gallery.build(model, photos, folder=tmp_path / "gallery", process=0, processes=2)
    assert not list((tmp_path / "gallery").glob("part-*"))


def test_shares_without_a_place_to_meet_and_a_process_too_many_are_refused(model, photos, tmp_path):
    with pytest.raises(ValueError, match=r"processes is 2, but their shares would meet nowhere: give a folder or"):
        Gallery.build(model, photos, process=1, processes=2)
    with pytest.raises(ValueError, match=r"process is 2 of 2: accepted is 0 to"):
        Gallery.build(model, photos, folder=tmp_path / "shared", process=2, processes=2)


@pytest.fixture(scope="module")
def graph() -> Memory:
    """3,000 vectors in an HNSW graph, 100 of them removed again."""
    memory = Memory(24, "hnsw")
    memory.extend([shard(3000)])
    memory.remove(memory.images.image_id.to_numpy()[::30])
    return memory


def test_hnsw_finds_nearly_all_that_exact_search_finds_and_nothing_removed(graph):
    rows, features = shard(3000)
    stays = np.arange(3000) % 30 != 0
    queries = shard(200, seed=1)[1]
    true = rows.image_id.to_numpy()[stays][np.argsort(-(queries @ features[stays].T), axis=1)[:, :10]]
    scores, found = graph.nearest(queries, 10)
    assert np.mean([np.isin(t, f).mean() for t, f in zip(true, found, strict=True)]) > 0.95
    assert not np.isin(found, rows.image_id[~stays]).any()
    cosine = (features * queries[0]).sum(1)[pd.Index(rows.image_id).get_indexer(found[0])]
    assert np.allclose(scores[0], cosine, atol=1e-6)
    assert np.array_equal(graph.nearest(queries, 10, exact=True)[1], true)


def test_recall_is_the_share_of_the_true_best_that_was_found(model, photos):
    gallery = Gallery.build(model, photos)
    assert gallery.recall(k=5, queries=QUERIES) == gallery.recall(k=5) == 1.0
    blind = gallery._store.nearest  # an index that misses the best of every query
    gallery._store.nearest = lambda q, k, exact=False: blind(q, k) if exact else [a[:, 1:] for a in blind(q, k + 1)]
    assert gallery.recall(k=5, queries=QUERIES) == 0.8


def test_a_saved_graph_gives_the_same_results_and_goes_on_growing(graph, tmp_path):
    graph.save_graph(tmp_path)
    loaded = Memory(24, "hnsw")
    loaded.extend([(graph.images, graph.features)], tmp_path / "hnsw.safetensors")
    queries = shard(50, seed=1)[1]
    for before, after in zip(graph.nearest(queries, 10), loaded.nearest(queries, 10), strict=True):
        assert np.array_equal(before, after)
    more, features = shard(200, seed=2)
    loaded.extend([(more.assign(image_id=more.image_id + 10**6), features)])
    assert np.isin(more.image_id + 10**6, loaded.nearest(features, 1)[1]).mean() > 0.99


def _set(name, place, value):
    def damage(arrays):
        arrays[name][place] = value

    return damage


GRAPH_DAMAGES = {
    "a neighbour outside": _set("neighbors", 0, 3000),
    "a neighbour far below": _set("neighbors", 0, -2),
    "an entry outside": _set("entry", 0, 10**6),
    "an entry on no such layer": _set("entry", 1, 9),
    "a node with too many layers": _set("levels", 0, 100),
    "a node of no layer": _set("levels", 0, 0),
    "offsets past the end": _set("offsets", -1, 10**9),
    "offsets that overlap": _set("offsets", 5, 0),
    "a place outside": _set("places", 0, 3000),
    "a place twice": _set("places", 0, 2),
    "wide levels": lambda arrays: arrays.update(levels=arrays["levels"].astype(np.int64)),
    "missing places": lambda arrays: arrays.pop("places"),
    "removed features of another width": lambda arrays: arrays.update(removed=np.zeros((100, 3), np.float32)),
    "a neighbour that lives lower": lambda arrays: arrays["neighbors"].__setitem__(
        int(arrays["offsets"][arrays["levels"].argmax()]) + 64, int((arrays["levels"] == 1).argmax())
    ),
}


@pytest.mark.parametrize("damage", GRAPH_DAMAGES.values(), ids=GRAPH_DAMAGES.keys())
def test_a_damaged_graph_is_refused_before_faiss_follows_it(graph, tmp_path, damage):
    graph.save_graph(tmp_path)
    arrays = load_file(tmp_path / "hnsw.safetensors")
    damage(arrays)
    save_file(arrays, tmp_path / "hnsw.safetensors")
    with pytest.raises(ValueError, match=r"hnsw\.safetensors is damaged"):
        Memory(24, "hnsw").extend([(graph.images, graph.features)], tmp_path / "hnsw.safetensors")


TOGETHER = """
import threading
import {first}, {second}
import numpy as np
x = np.random.default_rng(0).standard_normal((2000, 64)).astype("float32")
def search():
    for _ in range(20):
        faiss.knn(x[:50], x, 5, metric=faiss.METRIC_INNER_PRODUCT)
def multiply():
    for _ in range(20):
        torch.from_numpy(x) @ torch.from_numpy(x).T
for work in (search, multiply, search):
    work()
threads = [threading.Thread(target=work) for work in (search, multiply)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""


@pytest.mark.parametrize(("first", "second"), [("torch", "faiss"), ("faiss", "torch")])
def test_torch_and_faiss_work_in_one_process_whichever_comes_first(first, second):
    subprocess.run([sys.executable, "-c", TOGETHER.format(first=first, second=second)], check=True, timeout=120)
