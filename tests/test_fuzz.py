"""Damaged files by the thousand: each is read as it was, or refused in a sentence that names it; nothing crashes.

`make test` takes 100 of each kind from one seed, `make test-long` thousands from others.
"""

import json
import random
import time

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from test_retrieval import RandomModel

import irra_core as irra
from irra_core.annotations import load_annotations
from irra_core.backbone import learned
from irra_core.datasets.photos import Photo, read_photo
from irra_core.search.folder import HEAD

SECONDS = 3.0  # that a photo may cost, on a machine that does other work too twice as many


def damaged(content: bytes, chance: random.Random) -> bytes:
    """The content after one to four accidents: a bit flipped, a piece foreign, lost, doubled, zeroed or cut off."""
    spoilt = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        start = chance.randrange(len(spoilt) + 1)
        if chance.random() < 0.4:  # headers are short, and most of a file is not header
            start = chance.randrange(min(len(spoilt), 200) + 1)
        size = min(len(spoilt) - start, int(2 ** chance.uniform(0, 8)))
        piece = bytes(spoilt[start : start + size])
        match chance.choice(("flip", "foreign", "lose", "double", "zero", "cut")):
            case "flip" if size:
                spoilt[start] ^= 1 << chance.randrange(8)
            case "foreign":
                spoilt[start : start + size] = chance.randbytes(size)
            case "lose":
                del spoilt[start : start + size]
            case "double":
                spoilt[start:start] = piece * chance.randint(1, 3)
            case "zero":
                spoilt[start : start + size] = bytes(size)
            case "cut" if chance.random() < 0.3:
                del spoilt[start:]
    return bytes(spoilt)


def outcome(read):
    """What a reader returns, and the words of its error."""
    try:
        return read(), ""
    except (ValueError, OSError) as error:
        return None, str(error) or "no words"


short_and_long = pytest.mark.parametrize(
    ("count", "seed"), [(100, "short"), pytest.param(4000, "long", marks=pytest.mark.long)]
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "gif", "bmp", "tif"])
@short_and_long
def test_a_damaged_photo_is_a_picture_or_a_reason(tmp_path, ending, count, seed):
    chance, file = random.Random(f"{ending} {seed}"), tmp_path / f"photo.{ending}"
    noise = np.random.default_rng(0).integers(0, 256, (40, 24, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((48, 96)).save(file, **({"progressive": True} if ending == "jpg" else {}))
    content = file.read_bytes()
    for number in range(count // 6 + 1):
        file.write_bytes(damaged(content, chance))
        began = time.process_time()
        found = read_photo(str(file))
        assert time.process_time() - began < 2 * SECONDS, number
        if isinstance(found, Photo):
            assert (found.image.mode, min(found.image.size) > 0) == ("RGB", True), number
        else:
            assert isinstance(found, str), number
            assert 0 < len(found) < 600, number


def table() -> pd.DataFrame:
    splits = ("train", "val", "test")
    rows = [(f"{i}.jpg", i // 2, f"a man in a red coat, no. {i}", splits[i // 4 % 3]) for i in range(24)]
    return pd.DataFrame(rows, columns=["path", "id", "caption", "split"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ending", ["json", "csv", "parquet"])
@short_and_long
def test_damaged_annotations_are_a_table_or_an_error_that_names_the_file(tmp_path, ending, count, seed):
    chance, file = random.Random(f"{ending} {seed}"), tmp_path / f"mine.{ending}"
    if ending == "json":
        records = [
            {"img_path": row.path, "id": row.id, "captions": [row.caption], "split": row.split}
            for row in table().itertuples()
        ]
        file.write_text(json.dumps(records))
    else:
        (table().to_csv if ending == "csv" else table().to_parquet)(file, index=False)
    for number in range(24):
        Image.new("RGB", (4, 8)).save(tmp_path / f"{number}.jpg")
    content = file.read_bytes()
    assert len(load_annotations(file)) == 24
    for number in range(count // 3 + 1):
        file.write_bytes(damaged(content, chance))
        found, said = outcome(lambda: load_annotations(file))
        if said:
            assert file.name in said, number
            assert len(said) < 3000, number
        else:
            assert {"pid", "image_id", "path", "caption", "split"} <= set(found), number
            assert set(found.split) <= {"train", "val", "test"}, number


@pytest.mark.parametrize("index", ["exact", "hnsw"])
@short_and_long
def test_a_damaged_gallery_is_the_one_that_was_saved_or_an_error(tmp_path, index, count, seed):
    model, chance = RandomModel(), random.Random(f"{index} {seed}")
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(12):
        Image.new("RGB", (8, 16), (number * 20, 0, 255 - number * 20)).save(folder / f"{number}.png")
    irra.Gallery.build(model, folder, index=index).save(tmp_path / "gallery")
    saved = irra.Gallery.load(tmp_path / "gallery", model)
    files = sorted(file for file in (tmp_path / "gallery").iterdir() if not file.name.startswith("."))
    assert HEAD in {file.name for file in files}
    for number in range(count // 2):
        file = chance.choice(files)
        content = file.read_bytes()
        file.write_bytes(damaged(content, chance))
        found, said = outcome(lambda: irra.Gallery.load(tmp_path / "gallery", model))
        if said:
            assert "gallery" in said, number
        else:
            assert found.images.equals(saved.images), number
            assert np.array_equal(found._store.features, saved._store.features), number
            assert found.search("red", k=12).path.isin(saved.images.path).all(), number
        file.write_bytes(content)


@short_and_long
def test_a_damaged_checkpoint_is_the_model_that_was_saved_or_an_error_that_names_the_file(
    tmp_path, count, seed, narrow
):
    recipe, chance = irra.recipe(pretrained="none", losses="itc"), random.Random(seed)
    file = tmp_path / "mine.safetensors"
    model = irra.build_model(recipe, 1, device="cpu")
    irra.save_checkpoint(model, recipe, file)
    content, saved = file.read_bytes(), learned(model.state_dict())
    for number in range(count // 2):
        spoilt = damaged(content[: 8 + int.from_bytes(content[:8], "little")], chance)
        tail = content[8 + int.from_bytes(content[:8], "little") :]
        if number % 4 == 0:  # the numbers, behind a sound header
            at, spoilt = chance.randrange(len(tail)), content[: len(content) - len(tail)]
            tail = tail[:at] + damaged(tail[at : at + 400], chance) + tail[at + 400 :]
        file.unlink()
        file.write_bytes(spoilt + tail)
        found, said = outcome(lambda: irra.load_checkpoint(file, device="cpu"))
        if said:
            assert file.name in said, number
            assert len(said) < 3000, number
        else:
            state = learned(found[0].state_dict())
            assert found[1] == recipe, number
            assert all(torch.equal(value, saved[name]) for name, value in state.items()), number
