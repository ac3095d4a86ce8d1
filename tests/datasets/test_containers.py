"""Photos inside Arrow, Parquet and tar files: the table, the pixels and the errors, compared with photos in files."""

import io
import json
import os
import tarfile

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

import irra_core as irra
from irra_core import runs
from irra_core.analysis.checks import check_annotations
from irra_core.annotations import load_annotations
from irra_core.datasets import members
from irra_core.images import UnreadableImages, forget, image_array, open_photo
from irra_core.training import train

COUNT = 12


def jpeg(number: int) -> bytes:
    """A photo of its own noise."""
    pixels = np.random.default_rng(number).integers(0, 255, (24, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def luperson_t(rows: range, split: str) -> pd.DataFrame:
    """Rows as LUPerson-T has them: bytes, a list of captions, the photo's name, the split."""
    return pd.DataFrame(
        {
            "image": [jpeg(i) for i in rows],
            "caption": [[f"caption {i} one", f"caption {i} two"] for i in rows],
            "image_id": [f"person_{i}.jpg" for i in rows],
            "split": split,
        }
    )


def arrow(file, frame, kind="file"):
    table = pa.Table.from_pandas(frame)
    with pa.OSFile(str(file), "wb") as sink:
        writer = (pa.ipc.new_file if kind == "file" else pa.ipc.new_stream)(sink, table.schema)
        with writer:
            writer.write_table(table, max_chunksize=3)


def shard(file, samples):
    """A tar file of {member: bytes}."""
    with tarfile.open(file, "w") as opened:
        for name, content in samples.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            opened.addfile(about, io.BytesIO(content))


def in_files(folder):
    """The pixels of the same photos in files of their own."""
    (folder / "files").mkdir()
    for number in range(COUNT):
        (folder / "files" / f"{number}.jpg").write_bytes(jpeg(number))
    return np.array(image_array([folder / "files" / f"{number}.jpg" for number in range(COUNT)], 24, 8).pixels)


@pytest.mark.parametrize("kind", ["file", "stream", "parquet"])
def test_a_folder_in_the_layout_of_luperson_t_is_a_table_of_its_photos(kind, tmp_path):
    home = tmp_path / "LUPerson-T"
    home.mkdir()
    for split, rows in {"train": range(8), "val": range(8, 9), "restval": range(9, 10), "test": range(10, 12)}.items():
        frame = luperson_t(rows, split)
        if kind == "parquet":
            parquet.write_table(pa.Table.from_pandas(frame), home / f"LUPerson_{split}.parquet", row_group_size=3)
        else:
            arrow(home / f"LUPerson_{split}.arrow", frame, kind)
    table = load_annotations(home)
    assert len(table) == 2 * COUNT
    assert table.groupby("image_id").caption.agg(list).tolist() == [
        [f"caption {i} one", f"caption {i} two"]
        for i in [9, 10, 11, *range(8), 8]  # by the files' names
    ]
    assert table.pid.nunique() == COUNT
    assert table.groupby("split").image_id.nunique().to_dict() == {"train": 8, "val": 2, "test": 2}
    photos = table.drop_duplicates("image_id").path.tolist()
    expected = in_files(tmp_path)[[9, 10, 11, *range(8), 8]]
    assert np.array_equal(image_array(photos, 24, 8).pixels, expected)
    assert open_photo(photos[0]).size == (8, 24)
    assert not (check_annotations(table).severity == "error").any()


def test_a_folder_of_shards_is_a_table_of_its_samples(tmp_path):
    for part in range(2):
        samples = {}
        for i in range(6 * part, 6 * part + 6):
            about = {"caption": f"caption {i}", "url": "ignored"}
            samples |= {f"{i:06}.jpg": jpeg(i)}
            samples |= (
                {f"{i:06}.json": json.dumps(about).encode()} if part else {f"{i:06}.txt": f"caption {i}".encode()}
            )
        shard(tmp_path / f"{part:05}.tar", samples)
    table = load_annotations(tmp_path)
    assert table.caption.tolist() == [f"caption {i}" for i in range(COUNT)]
    assert table.pid.tolist() == table.image_id.tolist() == list(range(COUNT))
    assert table.split.tolist() == ["train"] * 9 + ["val"] + ["train"] * 2
    assert np.array_equal(image_array(table.path, 24, 8).pixels, in_files(tmp_path))


def test_the_index_of_a_shard_is_made_once_and_again_when_the_shard_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("IRRA_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "x.tar"
    shard(file, {"a.jpg": jpeg(1), "folder/b.jpg": jpeg(2)})
    index = members.tar_index(str(file))
    assert {name: file.read_bytes()[p.offset :][: p.size] for name, p in index.items()} == {
        "a.jpg": jpeg(1),
        "folder/b.jpg": jpeg(2),
    }
    members._tar_index.cache_clear()  # as in another process
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", lambda *_, **__: pytest.fail("the tar file was read again"))
        assert members.tar_index(str(file)) == index
    pixels = np.array(image_array([file / "a.jpg"], 24, 8).pixels)
    shard(file, {"a.jpg": jpeg(5), "c.jpg": jpeg(3)})
    os.utime(file, ns=(1, 1))
    forget()
    assert members.member(str(file / "c.jpg"), 10**6) == jpeg(3)
    assert not np.array_equal(image_array([file / "a.jpg"], 24, 8).pixels, pixels)


def test_a_damaged_index_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("IRRA_CACHE", str(tmp_path / "cache"))
    shard(tmp_path / "x.tar", {"a.jpg": jpeg(1)})
    members.tar_index(str(tmp_path / "x.tar"))
    (kept,) = (tmp_path / "cache" / "tars").iterdir()
    kept.write_text('{"a.jpg": 7}')
    members._tar_index.cache_clear()
    assert members.member(str(tmp_path / "x.tar" / "a.jpg"), 10**6) == jpeg(1)


def test_what_is_not_in_a_container_is_an_unreadable_photo(tmp_path):
    shard(tmp_path / "x.tar", {"a.jpg": jpeg(1), "big.jpg": jpeg(1) * 3})
    arrow(tmp_path / "y.arrow", luperson_t(range(2), "train"))
    assert members.member(str(tmp_path / "x.tar" / "big.jpg"), 500).startswith(
        f"has {3 * len(jpeg(1)):,} bytes, at most 500"
    )
    paths = [
        tmp_path / "x.tar" / "b.jpg",
        tmp_path / "y.arrow" / "2",
        tmp_path / "y.arrow" / "x",
        tmp_path / "z.tar" / "a",
    ]
    with pytest.raises(UnreadableImages) as error:
        image_array([*paths, tmp_path / "x.tar" / "a.jpg"], 24, 8)
    reasons = list(error.value.files.values())
    assert reasons[:3] == ["is not in x.tar", "is no row of y.arrow", "is no row of y.arrow"]
    assert "No such file" in reasons[3]


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ({"a.jpg": b""}, r"record 1: sample 'a' has \.jpg: expected are a photo"),
        ({"a.txt": b"a man"}, r"record 1: sample 'a' has \.txt: expected are a photo"),
        ({"a.jpg": b"", "a.json": b"[1]"}, r"sample 'a': its \.json holds no fields"),
        ({"a.jpg": b"", "a.json": b"{}"}, r"captions is None .*expected is a list of sentences"),
    ],
)
def test_a_sample_that_fits_nothing_says_what_it_has(samples, message, tmp_path):
    shard(tmp_path / "x.tar", samples)
    with pytest.raises(ValueError, match=message):
        load_annotations(tmp_path / "x.tar")


@pytest.mark.parametrize("read", [load_annotations, irra.recipe], ids=["table", "recipe"])
def test_a_folder_whose_files_are_one_level_below_is_refused_and_the_message_says_where_they_must_be(read, tmp_path):
    (tmp_path / "set" / "train").mkdir(parents=True)
    parquet.write_table(pa.Table.from_pandas(luperson_t(range(3), "train")), tmp_path / "set" / "train" / "0.parquet")
    with pytest.raises(ValueError, match=r"folder with \.parquet, \.arrow, \.tar files in it, not in its subfolders"):
        read(str(tmp_path / "set"))
    assert len(load_annotations(tmp_path / "set" / "train")) == 6


@pytest.mark.parametrize("name", ["x.tar", "x.arrow", "x.parquet"])
def test_a_damaged_container_is_named(name, tmp_path):
    (tmp_path / name).write_bytes(b"no container " * 100)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        load_annotations(tmp_path / name)


def test_arrow_columns_of_another_layout_are_listed(tmp_path):
    arrow(tmp_path / "x.arrow", pd.DataFrame({"photo": ["a.jpg"], "text": ["a man"]}))
    with pytest.raises(ValueError, match=r"x\.arrow cannot be read .*expected are the columns image"):
        load_annotations(tmp_path / "x.arrow")


@pytest.mark.usefixtures("narrow")
def test_a_run_on_shards_has_the_losses_of_a_run_on_the_same_files(tiny, tmp_path):
    lines = {f"{i}.jpg": f"a person with number {i}" for i in range(24)}
    (tmp_path / "files").mkdir()
    for i, name in enumerate(lines):
        (tmp_path / "files" / name).write_bytes(jpeg(i))
    (tmp_path / "files" / "set.json").write_text(json.dumps(lines))
    (tmp_path / "shards").mkdir()
    parts = {
        f"{i}.{end}": jpeg(i) if end == "jpg" else lines[f"{i}.jpg"].encode()
        for i in range(24)
        for end in ("jpg", "txt")
    }
    shard(tmp_path / "shards" / "0.tar", parts)
    found = []
    for dataset in (tmp_path / "files" / "set.json", tmp_path / "shards"):
        steps = {"batch_size": 8, "max_steps": 2, "evaluate_every": 2, "losses": "sdm", "precision": "fp32"}
        recipe = irra.recipe(str(dataset), backbone="small", pretrained="none", **steps)
        table = irra.open_annotations(recipe)
        data = runs.data_digest(table, recipe)
        rows = list(train(recipe, table, runs.run_folder(recipe, data, tmp_path / "reports").path))
        found.append([(row["step"], row["loss"], row["val_R1"]) for row in rows])
    assert found[0] == found[1]
