"""A gallery's folder: parts of both formats, damage, interruptions, and several processes that fill it."""

import json
import multiprocessing
import os
import pickle
import platform
import random
import shutil
import threading
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from pandas import DataFrame
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch
from test_retrieval import QUERIES, Interrupted, RandomModel, brute_force, model, photos, same_ranking, shard

from irra_core.batches import ALONE, Team
from irra_core.checkpoints import save_tensors
from irra_core.retrieval import Gallery
from irra_core.search import encoding
from irra_core.search import folder as folders
from irra_core.search.folder import HEAD, _read_part, _write_part, begin_folder, building
from irra_core.search.hnsw import GRAPH
from irra_core.search.photo_table import photo_id
from irra_core.search.stores import model_fingerprint

__all__ = ["model", "photos"]  # fixtures


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


def part(folder: Path) -> Path:
    """The only part of a saved gallery."""
    return folder / "part-00000.safetensors"


def test_a_part_is_one_file_of_plain_arrays_that_can_be_mapped(model, photos, tmp_path):
    gallery = Gallery.build(model, photos, folder=tmp_path / "gallery")
    assert sorted(path.name for path in (tmp_path / "gallery").iterdir()) == [HEAD, "part-00000.safetensors"]
    arrays, table = load_file(part(tmp_path / "gallery")), photos.drop_duplicates("image_id")
    paths, offsets = arrays["paths"].tobytes(), arrays["offsets"]
    assert [paths[a:b].decode() for a, b in pairwise(offsets)] == list(table.path)
    assert arrays["image_id"].tolist() == list(table.image_id)
    assert arrays["pid"].tolist() == list(table.pid)
    assert arrays["pid_known"].all()
    content = part(tmp_path / "gallery").read_bytes()
    begins = 8 + int.from_bytes(content[:8], "little")
    begins += json.loads(content[8:begins])["features"]["data_offsets"][0]
    mapped = np.memmap(part(tmp_path / "gallery"), np.float32, "r", begins, (30, 16))
    assert begins % 4 == 0
    assert np.array_equal(mapped, gallery._store.features)


def test_names_in_any_script_and_unknown_people_come_back(tmp_path):
    rows, features = shard(5)
    rows["path"] = pd.array(["写真/赤.png", "", "über alles.jpg", "🙂", "plain.png"], "str")
    rows["pid"] = pd.array([0, pd.NA, -1, -(2**63), 2**63 - 1], "Int64")
    _write_part(tmp_path, rows, features)
    (found, again) = _read_part(part(tmp_path), 24)
    pd.testing.assert_frame_equal(found, rows)
    assert np.array_equal(again, features)


def as_format_1(folder: Path) -> None:
    """Rewrite a gallery's folder as the library wrote it before format 2: rows in Parquet, a graph of arrays."""
    for path in folder.glob("part-*.safetensors"):
        arrays = load_torch(path)
        photos = _read_part(path, arrays["features"].shape[1])[0]
        photos.to_parquet(path.with_suffix(".parquet"))
        save_tensors({name: arrays[name] for name in ("features", "image_id")}, path)
    if (folder / GRAPH).exists():
        save_file({"levels": np.ones(3, np.int32), "offsets": np.zeros(4, np.uint64)}, folder / GRAPH)
    _head(format=1)(folder)


def _head(**changes):
    def damage(folder):
        path = folder / HEAD
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def _truncate(folder):
    part(folder).write_bytes(part(folder).read_bytes()[:-40])


def _flip(name):
    """Change the lowest bit of the first byte of an array: the features stay unit vectors."""

    def damage(folder):
        content = bytearray(part(folder).read_bytes())
        begins = 8 + int.from_bytes(content[:8], "little")
        content[begins + json.loads(content[8:begins])[name]["data_offsets"][0]] ^= 1
        part(folder).write_bytes(content)

    return damage


def _arrays(**changes):
    """Write changed arrays, as another program would: without a checksum."""

    def damage(folder):
        arrays = load_file(part(folder))
        save_file({name: changes.get(name, lambda a: a)(array) for name, array in arrays.items()}, part(folder))

    return damage


def _resaved(**changes):
    """Write changed arrays with the checksum that belongs to them."""

    def damage(folder):
        arrays = {name: changes.get(name, lambda a: a)(array) for name, array in load_torch(part(folder)).items()}
        save_tensors({name: array for name, array in arrays.items() if array is not None}, part(folder))

    return damage


def _table(**changes):
    def damage(folder):
        file = part(folder).with_suffix(".parquet")
        table = pd.read_parquet(file)
        table.assign(**{name: change(table[name]) for name, change in changes.items()}).to_parquet(file)

    return damage


def _two(folder):
    """The same part twice, the second time with another path of its first photo."""
    for file in folder.glob("part-00000.*"):
        shutil.copy(file, folder / f"part-00001{file.suffix}")
    if (table := folder / "part-00001.parquet").exists():
        rows = pd.read_parquet(table)
        rows.assign(path=["elsewhere.png", *rows.path[1:]]).to_parquet(table)
    else:
        arrays = load_torch(folder / "part-00001.safetensors")
        arrays["paths"][0] += 1
        save_tensors(arrays, folder / "part-00001.safetensors")


DAMAGES = {
    "truncated features": _truncate,
    "no checksum": _arrays(),
    "features of another width": _resaved(features=lambda a: torch.hstack([a, a])),
    "float64 features": _resaved(features=lambda a: a.double()),
    "a missing row": _resaved(features=lambda a: a[:-1]),
    "fewer ids": _resaved(image_id=lambda a: a[:-1]),
    "fewer paths": _resaved(offsets=lambda a: a[:-1]),
    "paths that are not UTF-8": _resaved(paths=lambda a: a + 100),
    "no features": _resaved(features=lambda a: None),
    "no pids": _resaved(pid=lambda a: None),
    "neither paths nor a table": _resaved(paths=lambda a: None),
    "a head that is none": lambda folder: (folder / HEAD).write_text("[1, 2"),
    "a head without a model": lambda folder: (folder / HEAD).write_text('{"format": 2}'),
    "a head of a list": lambda folder: (folder / HEAD).write_text("[]"),
    "a head of pairs": lambda folder: (folder / HEAD).write_text('[["format", 2]]'),
    "a deeply nested head": lambda folder: (folder / HEAD).write_text("[" * 100_000),
    "a later format": _head(format=3),
    "a format that is no number": _head(format=[2]),
    "a huge width": _head(dim=10**9),
    "a width beyond all integers": _head(dim=2**40, index="hnsw"),
    "half the photos that it says": _head(photos=60),
    "photos that are no number": _head(photos="30"),
    "a part less": lambda folder: part(folder).unlink(),
    "a pipe in a part's place": lambda folder: [part(folder).unlink(), os.mkfifo(part(folder))],
    "an unknown index": _head(index="magic"),
    "the same photo under two names": _two,
} | {
    f"one changed bit of {name}": _flip(name)
    for name in ("features", "image_id", "pid", "pid_known", "paths", "offsets")
}

DAMAGES_1 = {
    "truncated features": _truncate,
    "float64 features": _arrays(features=lambda a: a.astype(np.float64)),
    "a missing row": _arrays(features=lambda a: a[:-1].copy()),
    "another width": _arrays(features=lambda a: np.hstack([a, a])),
    "NaN": _arrays(features=lambda a: np.where(a == a.max(), np.float32("nan"), a)),
    "other ids": _arrays(image_id=lambda a: a[::-1].copy()),
    "no table": lambda folder: part(folder).with_suffix(".parquet").unlink(),
    "a table that is none": lambda folder: part(folder).with_suffix(".parquet").write_bytes(b"PAR1 no PAR1"),
    "a table with a pickle inside": lambda folder: part(folder).with_suffix(".parquet").write_bytes(pickle.dumps([])),
    "a table of other columns": lambda folder: DataFrame({"a": [1]}).to_parquet(folder / "part-00000.parquet"),
    "one changed bit": _flip("features"),
    "features of eight bits": lambda folder: save_torch(
        {name: a.to(torch.float8_e4m3fn) for name, a in load_torch(part(folder)).items()}, part(folder)
    ),
    "ids that are no integers": _arrays(image_id=lambda a: a.astype(np.float64)),
    "paths that are no text": _table(path=lambda column: range(len(column))),
    "paths of lists": _table(path=lambda column: [["a"]] * len(column)),
    "a missing path": _table(path=lambda column: [None, *column[1:]]),
    "ids that are times": _table(image_id=pd.to_datetime),
    "people that are no numbers": _table(pid=lambda column: ["x"] * len(column)),
    "fractions of people": _table(pid=lambda column: [1.0] * len(column)),
    "the same photo under two names": _two,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_gallery_is_refused(model, photos, tmp_path, damage):
    Gallery.build(model, photos).save(tmp_path / "gallery")
    damage(tmp_path / "gallery")
    with pytest.raises(ValueError, match=r"/gallery|index 'magic'") as found:
        Gallery.load(tmp_path / "gallery", model)
    assert "build" in str(found.value) or "index 'magic'" in str(found.value)


def flipped(content: bytes, bit: int) -> bytes:
    """The bytes with one bit changed."""
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.fixture
def large(tmp_path) -> tuple[Path, DataFrame]:
    """The only part of a folder of 1,024 photos whose ids are hashes of their paths, and its rows."""
    rows, features = shard(1024)
    rows["path"] = pd.array([f"/data/photos/{number % 37:03}/{number:05}.jpg" for number in range(1024)], "str")
    rows["image_id"], rows["pid"] = rows.path.map(photo_id), pd.array(np.arange(1024) // 3, "Int64")
    _write_part(tmp_path, rows, features)
    return part(tmp_path), rows


def test_no_single_bit_flip_of_a_part_is_loaded(large):
    path, rows = large
    content, draw = path.read_bytes(), random.Random(0)
    for _ in range(400):
        bit = draw.randrange(8 * len(content))
        path.write_bytes(flipped(content, bit))
        with pytest.raises(ValueError, match=r"part-00000\.safetensors is damaged"):
            _read_part(path, 24)
    path.write_bytes(content)
    pd.testing.assert_frame_equal(_read_part(path, 24)[0], rows)


def test_a_bit_flip_in_the_table_of_a_part_of_format_1_is_named_or_changes_what_nothing_tells(large):
    """A Parquet file has no checksum: of its values, pids cannot be compared with anything, a path with its hash."""
    path, rows = large
    save_tensors({name: array for name, array in load_torch(path).items() if name in ("features", "image_id")}, path)
    table, draw, outcomes = path.with_suffix(".parquet"), random.Random(0), Counter()
    rows.to_parquet(table)
    content = table.read_bytes()
    for _ in range(400):
        table.write_bytes(flipped(content, draw.randrange(8 * len(content))))
        try:
            found, _ = _read_part(path, 24)
        except ValueError as error:
            outcomes["named" if "part-00000.safetensors is damaged" in str(error) else "unnamed"] += 1
        else:
            assert found.image_id.equals(rows.image_id)
            outcomes["same" if found.equals(rows) else "pid" if found.path.equals(rows.path) else "path"] += 1
    assert outcomes["unnamed"] == 0
    assert outcomes["path"] <= 4  # where the flip changed the beginning of all paths alike
    assert outcomes["pid"] < 40, outcomes


def test_an_error_of_arrow_that_is_no_value_error_names_the_part(large, monkeypatch):
    from pyarrow import ArrowNotImplementedError, parquet

    path, rows = large
    save_tensors({name: array for name, array in load_torch(path).items() if name in ("features", "image_id")}, path)
    rows.to_parquet(path.with_suffix(".parquet"))

    def refuse(*_, **__):
        raise ArrowNotImplementedError("Unsupported cast")

    monkeypatch.setattr(parquet, "read_table", refuse)
    with pytest.raises(ValueError, match=r"part-00000\.safetensors is damaged .*part-00000\.parquet: Unsupported cast"):
        _read_part(path, 24)


@pytest.mark.parametrize("earlier", [False, True], ids=["format 2", "format 1"])
def test_a_row_that_two_processes_wrote_is_there_once(model, photos, tmp_path, earlier):
    gallery = Gallery.build(model, photos)
    gallery.save(tmp_path / "gallery")
    if earlier:
        as_format_1(tmp_path / "gallery")
    for file in (tmp_path / "gallery").glob("part-00000.*"):
        shutil.copy(file, tmp_path / "gallery" / f"part-00001{file.suffix}")
    loaded = Gallery.load(tmp_path / "gallery", model)
    pd.testing.assert_frame_equal(loaded.images, gallery.images)
    assert np.array_equal(loaded._store.features, gallery._store.features)


@pytest.mark.parametrize("damage", DAMAGES_1.values(), ids=DAMAGES_1.keys())
def test_a_damaged_gallery_of_format_1_is_refused(model, photos, tmp_path, damage):
    Gallery.build(model, photos).save(tmp_path / "gallery")
    as_format_1(tmp_path / "gallery")
    damage(tmp_path / "gallery")
    with pytest.raises(ValueError, match=r"(?s)/gallery.*build") as found:
        Gallery.load(tmp_path / "gallery", model)
    assert "part-0" in str(found.value) or "is there twice" in str(found.value)


def test_the_gallery_of_another_model_of_the_same_photos_gives_no_part(model, photos, tmp_path):
    """A part says nothing of its model, but its width is compared."""
    Gallery.build(RandomModel(dim=8), photos).save(tmp_path / "narrow")
    Gallery.build(model, photos).save(tmp_path / "gallery")
    shutil.copy(part(tmp_path / "narrow"), part(tmp_path / "gallery"))
    with pytest.raises(ValueError, match=r"part-00000\.safetensors is damaged \(features are float32 \(30, 8\), exp"):
        Gallery.load(tmp_path / "gallery", model)


@pytest.mark.parametrize("index", ["exact", "hnsw"])
@pytest.mark.parametrize("checked", [True, False], ids=["with checksum", "without"])
def test_a_gallery_of_format_1_is_loaded(model, photos, tmp_path, index, checked):
    gallery = Gallery.build(model, photos.drop(columns="pid"), index=index)
    gallery.save(tmp_path / "gallery")
    as_format_1(tmp_path / "gallery")
    if not checked:
        head = json.loads((tmp_path / "gallery" / HEAD).read_text())
        del head["photos"]  # the earliest version of format 1 had neither
        (tmp_path / "gallery" / HEAD).write_text(json.dumps(head))
        _arrays()(tmp_path / "gallery")
    loaded = Gallery.load(tmp_path / "gallery", model)
    pd.testing.assert_frame_equal(loaded.images, gallery.images)
    pd.testing.assert_frame_equal(loaded.search(QUERIES, k=30), gallery.search(QUERIES, k=30))
    loaded.save(tmp_path / "gallery")
    assert json.loads((tmp_path / "gallery" / HEAD).read_text())["format"] == 2
    assert not list((tmp_path / "gallery").glob("*.parquet"))
    pd.testing.assert_frame_equal(Gallery.load(tmp_path / "gallery", model).images, gallery.images)


@pytest.mark.parametrize("index", ["exact", "hnsw"])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_folder_of_format_1_is_filled_up_in_format_2_and_loses_nothing(
    model, photos, tmp_path, monkeypatch, index, processes
):
    monkeypatch.setattr(encoding, "SHARD", 8)
    folder = tmp_path / "gallery"
    Gallery.build(model, photos[:24], index=index, folder=folder)
    as_format_1(folder)
    (folder / "part-00002.parquet").write_bytes(b"what an interrupted build of format 1 leaves")
    earlier = {path.name: path.read_bytes() for path in folder.glob("part-*")}
    model.encoded = 0
    with pytest.raises(KeyboardInterrupt):
        Gallery.build(model, photos, index=index, folder=folder, progress=Interrupted)
    assert json.loads((folder / HEAD).read_text())["format"] == 2  # before its first part of format 2
    for process in range(processes):
        Gallery.build(model, photos, index=index, folder=folder, process=process, processes=processes)
    assert model.encoded == 30 - 12
    assert {name: (folder / name).read_bytes() for name in earlier} == earlier
    assert (folder / GRAPH).exists() == (index == "hnsw" and processes == 1)
    loaded = Gallery.load(folder, model)
    assert (len(loaded), loaded._store.index) == (30, index)
    same_ranking(loaded.search(QUERIES, k=30), brute_force(model, photos, QUERIES, 30))
    assert dict(zip(loaded.images.image_id, loaded.images.pid, strict=True)) == dict(
        zip(photos.image_id, photos.pid, strict=True)
    )


@pytest.mark.parametrize("index", ["exact", "hnsw"])
def test_a_deleted_part_is_missed_and_a_second_build_makes_it_again(model, photos, tmp_path, monkeypatch, index):
    monkeypatch.setattr(encoding, "SHARD", 8)
    Gallery.build(model, photos, index=index, folder=tmp_path / "gallery")
    (tmp_path / "gallery" / "part-00001.safetensors").unlink()
    with pytest.raises(ValueError, match=r"gallery has 22 of its 30 photos, a part is missing: .*Gallery\.build"):
        Gallery.load(tmp_path / "gallery", model)
    model.encoded = 0
    Gallery.build(model, photos, index=index, folder=tmp_path / "gallery")
    assert model.encoded == 8
    loaded = Gallery.load(tmp_path / "gallery", model)
    same_ranking(loaded.search(QUERIES, k=30), brute_force(model, photos, QUERIES, 30))


@pytest.mark.parametrize("index", ["exact", "hnsw"])
def test_an_interrupted_build_goes_on_where_it_was(model, photos, tmp_path, monkeypatch, index):
    monkeypatch.setattr(encoding, "SHARD", 8)
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
    encoding.SHARD = 2
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
                begin_folder(tmp_path / "other", model, "exact")
                (tmp_path / "other" / HEAD).replace(folder / HEAD)
        return found

    monkeypatch.setattr(Path, "is_file", asked)
    assert len(Gallery.build(model, photos, folder=folder, process=0, processes=2)) == 15
    assert json.loads((folder / HEAD).read_text())["model"] == model_fingerprint(model)


def test_what_another_model_begins_at_the_same_moment_is_refused(model, photos, tmp_path, monkeypatch):
    def late(folder, model, index):
        begin_folder(folder, model, index)
        begin_folder(folder, RandomModel(seed=1), index)

    monkeypatch.setattr(folders, "begin_folder", late)
    with pytest.raises(ValueError, match="was built by model"):
        Gallery.build(model, photos, folder=tmp_path / "gallery", process=0, processes=2)
    assert not list((tmp_path / "gallery").glob("part-*"))


def test_shares_without_a_place_to_meet_and_a_process_too_many_are_refused(model, photos, tmp_path):
    with pytest.raises(ValueError, match=r"processes is 2, but their shares would meet nowhere: give a folder or"):
        Gallery.build(model, photos, process=1, processes=2)
    with pytest.raises(ValueError, match=r"process is 2 of 2: accepted is 0 to"):
        Gallery.build(model, photos, folder=tmp_path / "shared", process=2, processes=2)


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (ALONE, ALONE, "is being built by"),
        (Team(1, 2), Team(1, 2), "is being built as process 1 by"),
        (Team(1, 2), ALONE, "is being built as process 1 by"),
        (ALONE, Team(1, 2), "is being built by"),
    ],
)
def test_a_second_build_of_the_same_share_stops_at_once_and_names_the_first(
    model, photos, tmp_path, first, second, said
):
    with (
        building(tmp_path / "gallery", first),
        pytest.raises(RuntimeError, match=f"gallery {said} process {os.getpid()} on {platform.node()}: wait for it"),
    ):
        Gallery.build(model, photos, folder=tmp_path / "gallery", process=second.process, processes=second.processes)
    assert list((tmp_path / "gallery").iterdir()) == []
    build = Gallery.build(
        model, photos, folder=tmp_path / "gallery", process=second.process, processes=second.processes
    )
    assert len(build) == 30 // second.processes


def rival(table: str, folder: str, processes: int, together, pipe) -> None:
    """What a child process does: it builds the same share of the same folder as all others, at the same moment."""
    torch.set_num_threads(1)
    encoding.SHARD = 2
    together.wait()
    try:
        pipe.send(len(Gallery.build(RandomModel(), pd.read_parquet(table), folder=folder, processes=processes)))
    except RuntimeError as error:
        pipe.send(str(error))


@pytest.mark.parametrize("processes", [1, 2])
def test_of_builds_of_one_share_at_once_one_makes_it_and_the_others_stop(model, photos, tmp_path, processes):
    photos.to_parquet(tmp_path / "table.parquet")
    FORKS.set_forkserver_preload(["irra_core.retrieval"])
    together, pipes, children = FORKS.Barrier(4, timeout=240), [], []
    for _ in range(4):
        ours, theirs = FORKS.Pipe(duplex=False)
        arguments = (str(tmp_path / "table.parquet"), str(tmp_path / "gallery"), processes, together, theirs)
        children.append(FORKS.Process(target=rival, args=arguments))
        children[-1].start()
        theirs.close()
        pipes.append(ours)
    answers = [pipe.recv() for pipe in pipes]
    for child in children:
        child.join(240)
    made = [answer for answer in answers if isinstance(answer, int)]
    assert made.count(30 // processes) == len(made) >= 1
    assert all("is being built" in answer for answer in answers if isinstance(answer, str))
    loaded = Gallery.load(tmp_path / "gallery", model)
    assert (len(loaded), loaded.images.image_id.is_unique) == (30 // processes, True)


def test_a_gallery_is_loaded_while_others_save_it(model, photos, tmp_path):
    gallery, done = Gallery.build(model, photos), threading.Event()
    gallery.save(tmp_path / "gallery")

    def save():
        while not done.is_set():
            gallery.save(tmp_path / "gallery")

    saver = threading.Thread(target=save)
    saver.start()
    try:
        for _ in range(100):
            pd.testing.assert_frame_equal(Gallery.load(tmp_path / "gallery", model).images, gallery.images)
    finally:
        done.set()
        saver.join()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gallery", "photos"]


def test_what_a_killed_save_left_is_named_and_then_removed(model, photos, tmp_path, monkeypatch):
    gallery = Gallery.build(model, photos)
    gallery.save(tmp_path / "gallery")
    (tmp_path / "gallery").rename(tmp_path / "gallery.old-123")
    monkeypatch.setattr(folders, "PATIENCE", 0.1)
    with pytest.raises(FileNotFoundError, match=r"gallery is not there and .*gallery\.old-123 is: .*Rename"):
        Gallery.load(tmp_path / "gallery", model)
    gallery.save(tmp_path / "gallery")
    (tmp_path / "gallery.partial-124").mkdir()
    gallery.save(tmp_path / "gallery")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gallery", "photos"]
