"""Decoding against torchvision, the array's completeness under kills and races, augmentation against torchvision."""

import errno
import hashlib
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from pandas import DataFrame
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional

from irra_core import images as module
from irra_core.analysis.checks import check_annotations
from irra_core.annotations import hold_out
from irra_core.augmentation import MEAN, STD, augment, draw_augmentation, load_images, normalise
from irra_core.datasets import photos as reader
from irra_core.images import (
    UnreadableImages,
    decode_images,
    forget,
    image_array,
    leave_out_unreadable,
    left_out,
    open_annotations,
    open_photo,
)
from irra_core.recipes import recipe as make_recipe
from irra_core.runs import data_digest
from irra_core.settings import cache_root

HEIGHT, WIDTH = 24, 8


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("IRRA_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache" / "images"
    forget()


def kept(cache: Path) -> list[str]:
    """The kinds of files in the cache, without the locks, which stay."""
    return sorted(path.suffix for path in cache.iterdir() if path.suffix != ".lock")


def beside(array: Path, suffix: str) -> Path:
    """The file of this kind that belongs to an array's file, whose name ends in a version."""
    return array if suffix == ".npy" else array.with_name(array.name.split(".")[0] + suffix)


@pytest.fixture
def recipe():
    return make_recipe("synthetic", erase_probability=0.5, crop_padding=3)


def smooth(seed: int, height: int = 90, width: int = 60) -> Image.Image:
    """A picture with structure, so that resizing filters and wrong axes differ."""
    rough = np.random.default_rng(seed).integers(0, 256, (9, 6, 3), dtype=np.uint8)
    return Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)


def photos(folder: Path, count: int = 5, kind: str = "png") -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [str(folder / f"{number}.{kind}") for number in range(count)]
    for number, path in enumerate(paths):
        smooth(number, 90 + number, 60 - number).save(path)
    return paths


def resized(image: Image.Image, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """torchvision's Resize of the released code, as [3, height, width]."""
    return np.asarray(transforms.Resize((height, width))(image.convert("RGB"))).transpose(2, 0, 1)


# Decoding


@pytest.mark.parametrize("kind", ["png", "jpg"])
@pytest.mark.parametrize("size", [(24, 8), (96, 32), (200, 150)])
def test_the_array_is_torchvisions_resize_of_each_file_in_order(tmp_path, kind, size):
    paths = photos(tmp_path, kind=kind)
    pixels = image_array(paths, *size).pixels
    assert pixels.dtype == np.uint8
    for path, image in zip(paths, pixels, strict=True):
        assert np.array_equal(image, resized(Image.open(path), *size))


def test_a_large_jpeg_is_decoded_in_full_and_not_drafted(tmp_path):
    smooth(1, 1200, 800).save(tmp_path / "large.jpg", quality=60)
    pixels = image_array([tmp_path / "large.jpg"], HEIGHT, WIDTH).pixels
    assert np.array_equal(pixels[0], resized(Image.open(tmp_path / "large.jpg")))


def test_load_images_equals_torchvisions_evaluation_transform(tmp_path, recipe):
    paths = photos(tmp_path)
    size = (recipe.image_height, recipe.image_width)
    transform = transforms.Compose(
        [transforms.Resize(size), transforms.ToTensor(), transforms.Normalize(list(MEAN), list(STD))]
    )
    expected = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
    assert (load_images(paths, recipe) - expected).abs().max() < 1e-5
    assert load_images([], recipe).shape == (0, 3, *size)


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "RGBA", "LA", "YCbCr"])
def test_every_mode_is_seen_as_pillows_convert_shows_it_to_the_released_code(tmp_path, mode):
    image = smooth(3).convert(mode)
    if "A" in mode:
        image.putalpha(Image.new("L", image.size, 40))
    path = tmp_path / ("image.jpg" if mode in ("CMYK", "YCbCr") else "image.png")
    image.save(path)
    with Image.open(path) as saved:
        assert np.array_equal(image_array([path], HEIGHT, WIDTH).pixels[0], resized(saved))


def test_a_palette_with_transparent_entries_is_read_without_a_warning(tmp_path, recwarn):
    smooth(3).convert("P").save(tmp_path / "image.png", transparency=bytes(range(200)))
    expected = resized(smooth(3).convert("P"))
    assert np.array_equal(image_array([tmp_path / "image.png"], HEIGHT, WIDTH).pixels[0], expected)
    assert not recwarn.list


def test_16_bit_greys_keep_their_high_byte(tmp_path):
    grey = np.asarray(smooth(3).convert("L"))
    Image.fromarray(grey.astype(np.uint16) * 256 + 17).save(tmp_path / "image.png")
    expected = resized(Image.fromarray(grey))
    assert np.array_equal(image_array([tmp_path / "image.png"], HEIGHT, WIDTH).pixels[0], expected)
    assert expected.min() < 200  # Pillow's own convert makes all of it 255


def test_an_animation_is_its_first_frame(tmp_path):
    frames = [smooth(number).quantize(64) for number in range(3)]
    frames[0].save(tmp_path / "image.gif", save_all=True, append_images=frames[1:])
    pixels = image_array([tmp_path / "image.gif"], HEIGHT, WIDTH).pixels
    assert np.array_equal(pixels[0], resized(frames[0]))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_with_an_exif_orientation_stands_upright(tmp_path, orientation):
    stored = smooth(3).transpose(Image.Transpose.ROTATE_90) if orientation > 4 else smooth(3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "image.png", exif=exif)
    # The EXIF standard: where the stored picture's first row and first column belong.
    array = np.asarray(stored)
    upright = {
        1: array,
        2: array[:, ::-1],
        3: array[::-1, ::-1],
        4: array[::-1],
        5: array.transpose(1, 0, 2),
        6: array[::-1].transpose(1, 0, 2),
        7: array[::-1, ::-1].transpose(1, 0, 2),
        8: array[:, ::-1].transpose(1, 0, 2),
    }[orientation]
    expected = resized(Image.fromarray(np.ascontiguousarray(upright)))
    assert np.array_equal(image_array([tmp_path / "image.png"], HEIGHT, WIDTH).pixels[0], expected)


def test_a_broken_exif_entry_leaves_the_pixels_as_they_are(tmp_path):
    smooth(3).save(tmp_path / "image.jpg", exif=b"Exif\0\0nonsense")
    with Image.open(tmp_path / "image.jpg") as saved:
        assert np.array_equal(image_array([tmp_path / "image.jpg"], HEIGHT, WIDTH).pixels[0], resized(saved))


def test_one_pixel_fills_the_whole_image(tmp_path):
    Image.new("RGB", (1, 1), (10, 20, 30)).save(tmp_path / "image.png")
    pixels = image_array([tmp_path / "image.png"], HEIGHT, WIDTH).pixels[0]
    assert (pixels == np.array([10, 20, 30], np.uint8)[:, None, None]).all()


def test_an_image_20000_pixels_high_is_read(tmp_path):
    smooth(3, 20_000, 40).save(tmp_path / "image.png")
    with Image.open(tmp_path / "image.png") as saved:
        assert np.array_equal(image_array([tmp_path / "image.png"], HEIGHT, WIDTH).pixels[0], resized(saved))


def truncated(path: Path) -> None:
    smooth(3, 300, 200).save(path, format="JPEG")
    path.write_bytes(path.read_bytes()[:2000])


def bomb(path: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(path, format="PNG")


def large(path: Path) -> None:
    Image.new("1", (10_000, 9_000)).save(path, format="PNG")


def vast(path: Path) -> None:
    smooth(3).save(path, format="PNG")
    os.truncate(path, 2**30 + 1)


def floating(path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).random((9, 6), dtype=np.float32)).save(path, format="TIFF")


def deep(path: Path) -> None:
    Image.fromarray(np.full((9, 6), 70_000, dtype=np.int32)).save(path, format="TIFF")


def postscript(path: Path) -> None:
    smooth(3).save(path, format="EPS")


BAD = {
    "missing": (lambda path: None, "No such file"),
    "empty": (lambda path: path.touch(), r"\(0 bytes\)"),
    "a folder": (Path.mkdir, "no regular file"),
    "a pipe": (os.mkfifo, "no regular file"),
    "text": (lambda path: path.write_text("not an image"), r"no image \(12 bytes\)"),
    "truncated": (truncated, r"truncated.*\(2,000 bytes\)"),
    "a bomb": (bomb, "400000000 pixels"),
    "just too large": (large, "90,?000,?000 pixels"),
    "too many bytes": (vast, "1,073,741,825 bytes"),
    "floating point": (floating, "8 bits a channel"),
    "32 bits": (deep, "8 bits a channel"),
    "postscript": (postscript, "no image"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("reader", ["array", "load", "open"])
@pytest.mark.parametrize("what", BAD)
def test_an_unusable_file_is_named_with_its_reason_and_remedy(tmp_path, what, reader, recipe):
    path, (make, reason) = tmp_path / "broken.jpg", BAD[what]
    make(path)
    paths = [*photos(tmp_path / "good"), str(path)]
    readers = {
        "array": lambda: image_array(paths, HEIGHT, WIDTH),
        "load": lambda: load_images(paths, recipe),
        "open": lambda: [open_photo(path) for path in paths],
    }
    with pytest.raises(UnreadableImages, match=reason) as error:
        readers[reader]()
    assert list(error.value.files) == [str(path)]
    assert "copy again, or drop" in str(error.value)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_check_annotations_names_the_files_that_the_array_refuses_and_no_other(tmp_path):
    paths = photos(tmp_path, 3)
    for place, (make, _) in enumerate(BAD.values()):
        paths.append(str(tmp_path / f"{place}.bad"))
        make(Path(paths[-1]))
    smooth(3).convert("I;16").save(tmp_path / "sound.tiff")
    with pytest.raises(UnreadableImages) as error:
        image_array([*paths, tmp_path / "sound.tiff"], HEIGHT, WIDTH)
    refused = []
    for path in [*paths, str(tmp_path / "sound.tiff")]:  # a finding names the first five files only
        found = check_annotations(of_people([path])).finding
        if found.str.contains("an image file (?:is missing|cannot be read)").any():
            refused.append(path)
    assert refused == list(error.value.files) == paths[3:]


def test_a_path_with_a_nul_is_an_unusable_file(tmp_path):
    with pytest.raises(UnreadableImages, match="null"):
        image_array([*photos(tmp_path), "a\0b.png"], HEIGHT, WIDTH)


def digest_of(paths: list[str], height: int = HEIGHT, width: int = WIDTH) -> str:
    """The digest that runs are named by: of each file's digest, the array's shape and version 2."""
    files = b"".join(hashlib.sha256(Path(path).read_bytes()).digest() for path in paths)
    return hashlib.sha256(f"2 {(len(paths), 3, height, width)}".encode() + files).hexdigest()


def test_all_unusable_files_are_listed_at_once_and_the_array_of_the_others_is_kept(tmp_path, cache, monkeypatch):
    paths = photos(tmp_path, 40)
    broken, sound = [paths[3], paths[17]], [path for path in paths if path not in (paths[3], paths[17])]
    for path in broken:
        truncated(Path(path))
    with pytest.raises(UnreadableImages, match="2 images") as error:
        image_array(paths, HEIGHT, WIDTH)
    assert list(error.value.files) == broken
    assert kept(cache) == [".json", ".json", ".npy"]
    monkeypatch.setattr(module, "_decode", None)  # a second decoding would fail
    found = image_array(sound, HEIGHT, WIDTH)
    assert np.array_equal(found.pixels, [resized(Image.open(path)) for path in sound])
    assert found.digest == digest_of(sound)


def test_an_absent_and_a_broken_file_are_listed_at_once_in_their_order(tmp_path, cache):
    paths = photos(tmp_path, 12)
    truncated(Path(paths[3]))
    os.remove(paths[9])
    with pytest.raises(UnreadableImages, match="2 images") as error:
        image_array(paths, HEIGHT, WIDTH)
    assert list(error.value.files) == [paths[3], paths[9]]


def test_files_of_which_none_can_be_read_leave_nothing_behind(tmp_path, cache):
    paths = [str(tmp_path / "absent.png"), str(tmp_path / "broken.png")]
    truncated(Path(paths[1]))
    with pytest.raises(UnreadableImages, match="2 images") as error:
        image_array(paths, HEIGHT, WIDTH)
    assert list(error.value.files) == paths
    assert kept(cache) == []


def test_photos_that_change_while_others_cannot_be_read_make_no_array(tmp_path, cache, monkeypatch):
    paths, decode = photos(tmp_path), module._decode
    os.remove(paths[3])

    def meanwhile(file, *size):
        smooth(99).save(paths[0])  # as a copy that is still under way
        return decode(file, *size)

    monkeypatch.setattr(module, "_decode", meanwhile)
    with pytest.raises(RuntimeError, match="changed while they were decoded"):
        image_array(paths, HEIGHT, WIDTH)
    assert kept(cache) == []


def of_people(paths: list[str]) -> DataFrame:
    """A table of these photos, two captions each."""
    numbers = np.repeat(np.arange(len(paths)), 2)
    captions = [f"caption {number}" for number in range(len(numbers))]
    split = np.where(numbers % 3 == 0, "test", "train")
    where = [paths[number] for number in numbers]
    return DataFrame({"pid": numbers, "image_id": numbers, "path": where, "caption": captions, "split": split})


def three_hundred(folder: Path, absent: list[int], broken: list[int]) -> list[str]:
    """The paths of 300 small photos, some of them absent or broken."""
    paths = [str(folder / f"{number}.png") for number in range(300)]
    for number, path in enumerate(paths):
        Image.new("RGB", (2, 6), (number % 256, number // 256, 9)).save(path)
    for number in absent:
        os.remove(paths[number])
    for number in broken:
        Path(paths[number]).write_bytes(b"\x89PNG junk")
    return paths


def test_an_absent_and_a_broken_photo_of_300_are_left_out_together(tmp_path):
    paths = three_hundred(tmp_path, [7], [9])
    small = make_recipe("cuhk", image_height=16, image_width=16)
    with pytest.warns(
        UserWarning, match=r"2 of 300 photos are left out with their 4 captions \(unreadable=.*: 2 images"
    ):
        table = leave_out_unreadable(of_people(paths), small)
    expected = [path for place, path in enumerate(paths) if place not in (7, 9)]
    assert table.path.drop_duplicates().tolist() == expected
    assert sorted(set(table.image_id)) == list(range(298))
    assert left_out(table).path.tolist() == [paths[7], paths[9]]
    assert "No such file" in left_out(table).reason[0]
    assert image_array(table.path.drop_duplicates(), 16, 16).pixels.shape == (298, 3, 16, 16)


def test_a_small_data_set_may_lose_a_few_photos_but_not_more_than_a_quarter(tmp_path):
    paths = three_hundred(tmp_path, [0], [1, 2, 3])
    small = make_recipe("cuhk", image_height=16, image_width=16)
    said = r"3 of 12 photos are left out with their 6 captions \(unreadable='stop' would stop instead\): 3 images"
    with pytest.warns(UserWarning, match=said):
        assert leave_out_unreadable(of_people(paths[1:13]), small).path.nunique() == 9
    for more in (paths[:16], paths[2:9]):  # four of 16; two of seven
        with pytest.raises(UnreadableImages):
            leave_out_unreadable(of_people(more), small)


def test_a_table_keeps_what_was_left_out_of_it_through_parquet_and_selections(tmp_path):
    paths = three_hundred(tmp_path, [7], [9])
    small = make_recipe("cuhk", image_height=16, image_width=16)
    with pytest.warns(UserWarning, match="2 images"):
        table = leave_out_unreadable(of_people(paths), small)
    assert left_out(of_people(paths)).empty
    assert left_out(table).path.tolist() == [paths[7], paths[9]]
    table.to_parquet(tmp_path / "table.parquet")
    read = pd.read_parquet(tmp_path / "table.parquet")
    for later in (read, table[table.split == "test"], hold_out(table), table.assign(split="train")):
        assert left_out(later).equals(left_out(table))


def test_of_the_photos_that_could_not_be_decoded_those_alone_are_tried_again(tmp_path, monkeypatch):
    paths = three_hundred(tmp_path, [], [])
    small = make_recipe("cuhk", image_height=16, image_width=16)

    def write(path: str, content: bytes) -> None:
        Path(path).write_bytes(content)
        os.utime(path, (0, 0))  # for the cache one file, whatever its content

    whole = {path: Path(path).read_bytes() for path in (paths[9], paths[30])}
    for path, content in whole.items():
        write(path, bytes(len(content)))
    with pytest.warns(UserWarning, match="2 images"):
        first = leave_out_unreadable(of_people(paths), small)
    image_array(first.path.drop_duplicates(), 16, 16)  # as a run does
    tried, read = [], reader.read_photo
    forget()
    with monkeypatch.context() as patch:
        patch.setattr(module, "_decode", None)  # decoding all of them again would fail
        patch.setattr(reader, "read_photo", lambda file: tried.append(file) or read(file))
        with pytest.warns(UserWarning, match="2 images"):
            assert leave_out_unreadable(of_people(paths), small).equals(first)
        image_array(first.path.drop_duplicates(), 16, 16)
    assert tried == list(whole)
    write(paths[9], whole[paths[9]])
    others = [path for path in paths if path != paths[30]]
    expected = image_array(others, 16, 16).digest
    assert module.readable_images(paths, 16, 16).digest == expected == digest_of(others, 16, 16)
    with pytest.warns(UserWarning, match="1 image"):
        leave_out_unreadable(of_people(paths), small)
    write(paths[30], whole[paths[30]])
    assert leave_out_unreadable(of_people(paths), small).path.tolist() == of_people(paths).path.tolist()


def test_a_photo_that_breaks_after_another_is_left_out_with_it(tmp_path):
    paths = three_hundred(tmp_path, [], [9])
    small = make_recipe("cuhk", image_height=16, image_width=16)
    with pytest.raises(UnreadableImages, match="1 image"):
        image_array(paths, 16, 16)
    found = os.stat(paths[30])
    Path(paths[30]).write_bytes(bytes(found.st_size))
    os.utime(paths[30], ns=(found.st_atime_ns, found.st_mtime_ns))  # as a disk breaks: for the cache the same file
    (next((cache_root() / "images").glob("*.npy"))).unlink()  # so that they are decoded again
    with pytest.warns(UserWarning, match="2 images"):
        table = leave_out_unreadable(of_people(paths), small)
    assert image_array(table.path.drop_duplicates(), 16, 16).pixels.shape == (298, 3, 16, 16)


@pytest.mark.parametrize("content", ["null", "5", '"ab"', "[1]", '["elsewhere.png"]', "[", "link"])
def test_a_list_of_unreadable_photos_that_is_none_of_ours_is_not_believed(tmp_path, cache, content):
    paths = photos(tmp_path)
    whole = Path(paths[2]).read_bytes()
    Path(paths[2]).write_bytes(bytes(len(whole)))
    with pytest.raises(UnreadableImages, match="1 image"):
        image_array(paths, HEIGHT, WIDTH)
    (listed,) = (path for path in cache.glob("*.json") if json.loads(path.read_text())["unreadable"])
    about = json.loads(listed.read_text())
    precious = tmp_path / "precious.txt"
    precious.write_text("[]")
    listed.unlink()
    if content == "link":
        listed.symlink_to(precious)
    else:
        inside = json.dumps(about).replace(json.dumps(about["unreadable"]), content)
        listed.write_text(content if content == "null" else inside)
    with pytest.raises(UnreadableImages, match="1 image") as error:
        image_array(paths, HEIGHT, WIDTH)
    assert list(error.value.files) == [paths[2]]
    assert json.loads(listed.read_text()) | {"array": ""} == about | {"array": ""}  # a new version has a new name
    assert precious.read_text() == "[]"


def test_absent_and_broken_photos_of_which_each_alone_would_be_few_are_too_many_together(tmp_path):
    paths = three_hundred(tmp_path, [7, 200], [9, 30])
    small = make_recipe("cuhk", image_height=16, image_width=16)
    with pytest.raises(UnreadableImages, match="4 images") as error:
        leave_out_unreadable(of_people(paths), small)
    assert list(error.value.files) == [paths[place] for place in (7, 9, 30, 200)]


def test_a_table_that_no_run_would_take_opens_as_it_is_written(tmp_path):
    paths = photos(tmp_path, 12)
    for number in (3, 6, 7):
        os.remove(paths[number])
    truncated(Path(paths[5]))
    records = [
        {"id": number, "captions": ["a man"], "file_path": f"{number}.png", "split": "test"} for number in range(12)
    ]
    (tmp_path / "own.json").write_text(json.dumps(records))
    own = make_recipe(str(tmp_path / "own.json"))
    with pytest.raises(UnreadableImages, match="4 images"):
        open_annotations(own)
    table = open_annotations(own, leave_out=False)
    assert table.path.tolist() == paths
    where = " ".join(check_annotations(table).query("severity == 'error'")["where"])
    assert paths[3] in where
    assert paths[5] in where


def test_names_beyond_ascii_are_read(tmp_path):
    smooth(3).save(tmp_path / "人 é.png")
    assert image_array([tmp_path / "人 é.png"], HEIGHT, WIDTH).pixels.shape == (1, 3, HEIGHT, WIDTH)


def test_no_paths_are_an_error():
    with pytest.raises(ValueError, match="no paths"):
        image_array([], HEIGHT, WIDTH)


# The array on the disk


def test_the_array_is_made_once(tmp_path, monkeypatch):
    paths = photos(tmp_path)
    first = image_array(paths, HEIGHT, WIDTH)
    monkeypatch.setattr(module, "_decode", None)  # a second decoding would fail
    forget()
    second = image_array(paths, HEIGHT, WIDTH)
    assert np.array_equal(first.pixels, second.pixels)
    assert first.digest == second.digest


def own_data(folder: Path, count: int) -> str:
    """An annotation file of some photos, one caption each."""
    photos(folder, count)
    splits = ["train", "train", "train", "val", "val", "test", "test"]
    records = [
        {"id": number % 7, "captions": ["a man"], "file_path": f"{number}.png", "split": splits[number % 7]}
        for number in range(count)
    ]
    (folder / "own.json").write_text(json.dumps(records))
    return str(folder / "own.json")


def test_a_process_opens_the_array_once_and_looks_at_each_photo_once(tmp_path, cache, monkeypatch):
    """What a notebook does: it opens the table, names the run by the data's digest, and trains on the array."""
    own = make_recipe(own_data(tmp_path, 28), image_height=32, image_width=16)
    open_annotations(own)  # an earlier process decodes
    forget()
    stats, opened = Counter(), []
    real_stat, real_load = os.stat, np.load

    def counted(path, *args, **named):
        stats[str(path)] += 1
        return real_stat(path, *args, **named)

    monkeypatch.setattr(module.os, "stat", counted)
    monkeypatch.setattr(module.np, "load", lambda *args, **named: opened.append(args) or real_load(*args, **named))
    open_annotations(own, leave_out=False)
    before = stats.copy()  # looks at some of the photos to find their folder
    table = open_annotations(own)
    digests = {data_digest(table, own) for _ in range(2)}
    array = image_array(list(table.path), 32, 16)
    assert len(digests) == len(opened) == 1
    looked = {path: stats[path] - 2 * before[path] for path in table.path}
    assert looked == dict.fromkeys(table.path, 1)
    assert array.digest == digest_of(list(table.path), 32, 16)


def test_a_process_sees_photos_as_they_were_until_it_forgets(tmp_path):
    paths = photos(tmp_path)
    first = image_array(paths, HEIGHT, WIDTH)
    smooth(99).save(paths[0])
    assert image_array(paths, HEIGHT, WIDTH) is first
    forget()
    assert np.array_equal(image_array(paths, HEIGHT, WIDTH).pixels[0], resized(smooth(99)))


def test_a_process_keeps_few_arrays_open_and_none_of_another_cache_folder(tmp_path, monkeypatch):
    sets = [photos(tmp_path / str(number), 2) for number in range(module.REMEMBERED + 3)]
    arrays = [image_array(paths, HEIGHT, WIDTH) for paths in sets]
    assert len(module._opened) == module.REMEMBERED
    assert image_array(sets[-1], HEIGHT, WIDTH) is arrays[-1]
    assert image_array(sets[0], HEIGHT, WIDTH) is not arrays[0]
    monkeypatch.setenv("IRRA_CACHE", str(tmp_path / "another"))
    image_array(sets[-1], HEIGHT, WIDTH)
    assert kept(tmp_path / "another" / "images") == [".json", ".npy"]


def test_the_array_cannot_be_written_to(tmp_path):
    pixels = image_array(photos(tmp_path), HEIGHT, WIDTH).pixels
    assert isinstance(pixels, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        pixels[0] = 0


@pytest.mark.parametrize("size", [(1, 1), (128, 384), (33, 7), (2500, 2000)])  # the last lies in several pieces
def test_pixels_are_laid_out_in_bands(tmp_path, size):
    drawn = np.random.default_rng(0).integers(0, 256, (2, size[1], size[0], 3), np.uint8)
    paths = [tmp_path / f"{number}.png" for number in range(len(drawn))]
    for path, image in zip(paths, drawn):
        Image.fromarray(image).save(path)
    assert np.array_equal(image_array(paths, *size[::-1]).pixels, drawn.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("change", ["content", "time", "order", "size", "folder"])
def test_another_array_is_made_when_the_files_change(tmp_path, change):
    paths, size = photos(tmp_path / "one"), (HEIGHT, WIDTH)
    image_array(paths, *size)
    if change == "content":
        smooth(99, 70, 50).save(paths[0])
    elif change == "time":
        os.utime(paths[0], ns=(1, 1))
    elif change == "order":
        paths = paths[::-1]
    elif change == "size":
        size = (WIDTH, HEIGHT)
    else:
        paths = photos(tmp_path / "two")
    forget()
    expected = [resized(Image.open(path), *size) for path in paths]
    assert np.array_equal(image_array(paths, *size).pixels, expected)
    assert len(list((cache_root() / "images").glob("*.npy"))) == 2


def test_the_digest_depends_on_the_files_contents_their_order_and_the_size(tmp_path):
    one, two = photos(tmp_path / "one"), photos(tmp_path / "two")
    digest = image_array(one, HEIGHT, WIDTH).digest
    assert image_array(two, HEIGHT, WIDTH).digest == digest
    assert image_array(one[::-1], HEIGHT, WIDTH).digest != digest
    assert image_array(one, WIDTH, HEIGHT).digest != digest
    assert digest == digest_of(one)
    smooth(99).save(two[4])
    forget()
    assert image_array(two, HEIGHT, WIDTH).digest != digest


def test_images_keep_their_order_whichever_thread_decodes_them(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "AHEAD", 2)
    monkeypatch.setattr(module, "cores", lambda: 3)
    paths, decode = photos(tmp_path, 23), module._decode

    def slow(file, *size):
        time.sleep(0.01 * (int(Path(file).stem) % 3 == 0))  # so that later ones are ready first
        return decode(file, *size)

    monkeypatch.setattr(module, "_decode", slow)
    assert np.array_equal(image_array(paths, HEIGHT, WIDTH).pixels, [resized(Image.open(path)) for path in paths])


def test_photos_are_decoded_in_as_many_threads_as_there_are_cores_and_not_far_ahead(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "AHEAD", 2)
    monkeypatch.setattr(module, "cores", lambda: 3)
    paths, decode, begun, all_three = photos(tmp_path, 30), module._decode, [], threading.Barrier(3)

    def together(file, *size):
        begun.append(file)
        if len(begun) <= 3:
            all_three.wait(20)  # fails with fewer than three threads
        return decode(file, *size)

    monkeypatch.setattr(module, "_decode", together)
    decoded = decode_images(paths, HEIGHT, WIDTH)
    assert np.array_equal(next(decoded)[0], resized(Image.open(paths[0])))
    decoded.close()
    assert set(begun) <= set(paths[:6])


@pytest.mark.parametrize("damage", ["short", "empty", "no digest", "torn digest", "other shape"])
def test_a_damaged_array_is_made_again(tmp_path, cache, damage):
    paths = photos(tmp_path)
    expected = image_array(paths, HEIGHT, WIDTH)
    before = np.array(expected.pixels)
    array, about = next(cache.glob("*.npy")), next(cache.glob("*.json"))
    if damage == "short":
        array.write_bytes(array.read_bytes()[:-1])
    elif damage == "empty":
        array.write_bytes(b"")
    elif damage == "no digest":
        about.unlink()
    elif damage == "torn digest":
        about.write_text(about.read_text()[:10])
    else:
        np.save(array, np.zeros((2, 3, HEIGHT, WIDTH), np.uint8))
    forget()
    again = image_array(paths, HEIGHT, WIDTH)
    assert np.array_equal(again.pixels, before)
    assert again.digest == expected.digest == json.loads(about.read_text())["digest"]


FORK = multiprocessing.get_context("fork")  # a process that need not import torch again


class SlowBuild:
    """A process that makes an array slowly, and is in the middle of it once this is made."""

    def __init__(self, paths: list[str], seconds: float):
        decoding, self.digest = FORK.Event(), FORK.SimpleQueue()
        decode = module._decode

        def slow(*arguments):
            decoding.set()
            time.sleep(seconds)
            return decode(*arguments)

        def build():
            module._decode = slow  # in the new process only
            self.digest.put(image_array(paths, HEIGHT, WIDTH).digest)

        self.process = FORK.Process(target=build)
        self.process.start()
        assert decoding.wait(20)


def kill_a_build(paths: list[str]) -> None:
    building = SlowBuild(paths, 60).process
    building.kill()
    building.join()


def test_a_killed_build_is_never_taken_for_complete_and_its_remains_go(tmp_path, cache):
    forgotten, paths = photos(tmp_path / "one"), photos(tmp_path / "two")
    kill_a_build(forgotten)
    (remains,) = cache.glob("*.partial")
    kill_a_build(paths)
    assert not remains.exists()  # though nobody asked for that array again
    assert kept(cache) == [".partial"]
    assert np.array_equal(image_array(paths, HEIGHT, WIDTH).pixels, [resized(Image.open(path)) for path in paths])
    assert kept(cache) == [".json", ".npy"]


def test_who_waits_for_a_build_that_is_killed_makes_the_array(tmp_path, cache):
    paths = photos(tmp_path)
    building = SlowBuild(paths, 60).process
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(image_array, paths, HEIGHT, WIDTH)
        time.sleep(0.3)
        assert not waiting.done()
        building.kill()
        building.join()
        found = waiting.result(20)
    assert np.array_equal(found.pixels, [resized(Image.open(path)) for path in paths])
    assert kept(cache) == [".json", ".npy"]


def test_a_living_build_is_left_alone_by_others_and_waited_for_by_its_like(tmp_path, cache, monkeypatch):
    paths, others = photos(tmp_path / "one", 2), photos(tmp_path / "two")
    building = SlowBuild(paths, 0.5)
    image_array(others, HEIGHT, WIDTH)
    assert len(list(cache.glob("*.partial"))) == 1
    monkeypatch.setattr(module, "_decode", None)  # decoding here would fail: the other process does it
    found = image_array(paths, HEIGHT, WIDTH)
    assert building.digest.get() == found.digest
    building.process.join()
    assert np.array_equal(found.pixels, [resized(Image.open(path)) for path in paths])


def test_many_builds_at_once_give_one_whole_array(tmp_path, cache):
    paths = photos(tmp_path)
    with ThreadPoolExecutor(8) as pool:  # each opens and locks for itself, as processes do
        arrays = list(pool.map(lambda _: image_array(paths, HEIGHT, WIDTH), range(8)))
    assert len({array.digest for array in arrays}) == 1
    assert all(np.array_equal(array.pixels, arrays[0].pixels) for array in arrays)
    assert kept(cache) == [".json", ".npy"]


def test_a_build_that_took_over_from_a_killed_one_starts_from_nothing(tmp_path, cache):
    paths = photos(tmp_path)
    expected = image_array(paths, HEIGHT, WIDTH)
    array = next(cache.glob("*.npy"))
    array.unlink()
    beside(array, ".partial").write_bytes(b"remains" * 10_000)
    forget()
    again = image_array(paths, HEIGHT, WIDTH)
    assert again.digest == expected.digest
    (array,) = cache.glob("*.npy")
    assert array.stat().st_size == np.load(array, mmap_mode="r").offset + expected.pixels.nbytes


@pytest.mark.parametrize("kind", [".partial", ".json", ".npy"])
def test_nothing_is_written_through_a_link_in_the_place_of_a_file(tmp_path, cache, kind):
    paths = photos(tmp_path)
    pixels = np.array(image_array(paths, HEIGHT, WIDTH).pixels)
    array = next(cache.glob("*.npy"))
    target = tmp_path / "precious"
    target.write_text("precious")
    array.unlink()
    beside(array, kind).unlink(missing_ok=True)
    beside(array, kind).symlink_to(target)
    forget()
    assert np.array_equal(image_array(paths, HEIGHT, WIDTH).pixels, pixels)
    assert kept(cache) == [".json", ".npy"]
    assert not any(path.is_symlink() for path in cache.iterdir())
    assert target.read_text() == "precious"


def test_a_link_in_the_place_of_a_lock_is_named_and_not_followed(tmp_path, cache):
    paths, others = photos(tmp_path / "one"), photos(tmp_path / "two")
    image_array(paths, HEIGHT, WIDTH)
    array = next(cache.glob("*.npy"))
    target = tmp_path / "precious"
    target.write_text("precious")
    array.unlink()
    beside(array, ".partial").write_text("abandoned")
    beside(array, ".lock").unlink()
    beside(array, ".lock").symlink_to(target)
    forget()
    with pytest.raises(
        OSError, match=rf"cannot be made in {cache} .*delete {beside(array, '.lock').name} there"
    ) as error:
        image_array(paths, HEIGHT, WIDTH)
    assert error.value.errno == errno.ELOOP
    assert image_array(others, HEIGHT, WIDTH).pixels.shape == (5, 3, HEIGHT, WIDTH)
    assert beside(array, ".lock").is_symlink()
    assert target.read_text() == "precious"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_named_with_the_way_out(tmp_path, cache, monkeypatch, number):
    fcntl = pytest.importorskip("fcntl")  # what filelock calls here

    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match=rf"cannot be made in {cache} .*no locks: set IRRA_CACHE to .* local disk"):
        image_array(photos(tmp_path), HEIGHT, WIDTH)
    assert kept(cache) == []


def test_a_full_disk_is_named_before_anything_is_decoded(tmp_path, cache, monkeypatch):
    paths = photos(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: type("usage", (), {"free": 100}))
    monkeypatch.setattr(module, "_decode", None)
    with pytest.raises(OSError, match=r"2,880 bytes cannot be made in .*No space left.*IRRA_CACHE"):
        image_array(paths, HEIGHT, WIDTH)
    assert kept(cache) == []


def test_a_disk_that_fills_while_the_array_is_written_is_named_and_cleared(tmp_path, cache, monkeypatch):
    def write(file, *_):
        file.write(b"the first bytes")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "_write", write)
    with pytest.raises(OSError, match=r"cannot be made in .*No space left.*IRRA_CACHE") as error:
        image_array(photos(tmp_path), HEIGHT, WIDTH)
    assert error.value.errno == errno.ENOSPC
    assert kept(cache) == []


def test_a_write_that_is_cut_short_is_named_and_cleared(tmp_path, cache):
    paths = photos(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, limits[1]))  # the system takes 1,000 bytes, then refuses
    try:
        with pytest.raises(OSError, match=r"cannot be made in .*too large.*IRRA_CACHE") as error:
            image_array(paths, HEIGHT, WIDTH)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno == errno.EFBIG
    assert kept(cache) == []


def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("IRRA_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"file/images.*IRRA_CACHE"):
        image_array(photos(tmp_path), HEIGHT, WIDTH)


def test_a_finished_array_is_found_in_a_read_only_folder(tmp_path, cache):
    paths = photos(tmp_path)
    image_array(paths, HEIGHT, WIDTH)
    before = {path: path.stat().st_mtime_ns for path in (cache, *cache.iterdir())}
    forget()
    image_array(paths, HEIGHT, WIDTH)
    assert {path: path.stat().st_mtime_ns for path in (cache, *cache.iterdir())} == before


def test_progress_counts_every_image(tmp_path):
    counted = []

    class Bar:
        def __init__(self, total, **_):
            self.total = total

        def update(self, count):
            counted.append(count)

        def close(self):
            counted.append(f"of {self.total}")

    image_array(photos(tmp_path), HEIGHT, WIDTH, progress=Bar)
    assert counted.pop() == "of 5"
    assert sum(counted) == 5


def test_no_file_stays_open(tmp_path):
    image_array(photos(tmp_path / "first"), HEIGHT, WIDTH)
    forget()
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for number in range(5):
        image_array(photos(tmp_path / str(number)), HEIGHT, WIDTH)
    forget()
    after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert after == before


def test_the_cache_is_irra_cache_or_the_users(tmp_path, monkeypatch):
    assert cache_root() == tmp_path / "cache"
    monkeypatch.delenv("IRRA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    assert cache_root() == tmp_path / "user" / "irra-core"


@pytest.mark.skipif(not hasattr(os, "setuid") or os.getuid() != 0, reason="only root becomes a user without a home")
def test_a_user_without_a_home_folder_is_told_to_name_one_for_the_cache():
    lines = (
        "import os, platformdirs; from irra_core.settings import cache_root; platformdirs.user_cache_path('')\n"
        "os.setuid(54321); cache_root()"
    )
    environment = {
        name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME", "IRRA_CACHE")
    }
    environment |= {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", lines], env=environment, capture_output=True, text=True)
    assert "this user has no home folder for the cache: set IRRA_CACHE to a folder" in done.stderr


# Augmentation


def test_normalise_equals_torchvisions():
    pixels = torch.arange(256, dtype=torch.uint8).expand(2, 3, 4, 256)
    expected = functional.normalize(pixels / 255, list(MEAN), list(STD))
    assert (normalise(pixels) - expected).abs().max() < 2e-6


def released(image: torch.Tensor, flip: bool, top: int, left: int, box: list[int], padding: int) -> torch.Tensor:
    """The released code's transforms, one image, with torchvision's functions and given draws."""
    height, width = image.shape[1:]
    picture = functional.to_pil_image(image)
    if flip:
        picture = functional.hflip(picture)
    picture = functional.crop(functional.pad(picture, [padding]), top, left, height, width)
    tensor = functional.normalize(functional.to_tensor(picture), list(MEAN), list(STD))
    return functional.erase(tensor, *box, torch.tensor(MEAN)[:, None, None])


@pytest.mark.parametrize("padding", [0, 3, 10, 40])
def test_augment_does_to_each_image_what_torchvision_does_for_the_same_draws(recipe, padding):
    recipe = recipe.replace(crop_padding=padding)
    generator = torch.Generator().manual_seed(padding)
    pixels = torch.randint(0, 256, (32, 3, recipe.image_height, recipe.image_width), generator=generator).byte()
    drawn = draw_augmentation(32, recipe, generator)
    columns = [part.tolist() for part in drawn]
    expected = [released(image, *draws, padding) for image, *draws in zip(pixels, *columns, strict=True)]
    assert (augment(pixels, drawn, recipe) - torch.stack(expected)).abs().max() < 2e-6
    assert 0 < sum(columns[0]) < 32
    assert 0 < sum(box[2] > 0 for box in columns[3]) < 32


def test_without_probabilities_and_padding_augment_is_normalise(recipe):
    recipe = recipe.replace(flip_probability=0.0, erase_probability=0.0, crop_padding=0)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (4, 3, recipe.image_height, recipe.image_width), generator=generator).byte()
    assert torch.equal(augment(pixels, draw_augmentation(4, recipe, generator), recipe), normalise(pixels))


def test_a_part_is_augmented_as_in_the_whole_batch(recipe):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (7, 3, recipe.image_height, recipe.image_width), generator=generator).byte()
    drawn = draw_augmentation(7, recipe, generator)
    parts = [slice(0, 3), slice(3, 3), slice(3, 7)]
    whole = torch.cat([augment(pixels[rows], drawn.part(rows), recipe) for rows in parts])
    assert torch.equal(whole, augment(pixels, drawn, recipe))


def test_augment_leaves_its_arguments_as_they_were(recipe):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (4, 3, recipe.image_height, recipe.image_width), generator=generator).byte()
    drawn = draw_augmentation(4, recipe, generator)
    kept = [part.clone() for part in (pixels, *drawn)]
    augment(pixels, drawn, recipe)
    assert all(torch.equal(now, before) for now, before in zip((pixels, *drawn), kept, strict=True))


def test_the_draws_come_from_the_generator_alone(recipe):
    state = torch.get_rng_state()
    one, same, other = (draw_augmentation(50, recipe, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(*pair) for pair in zip(one, same, strict=True))
    assert not any(torch.equal(*pair) for pair in zip(one, other, strict=True))
    assert torch.equal(state, torch.get_rng_state())


def torchvisions_boxes(count: int, height: int, width: int) -> np.ndarray:
    """The boxes that RandomErasing erases, [count, 4], found from its output; zeros where it erases nothing."""
    erasing = transforms.RandomErasing(p=0.5, scale=(0.02, 0.4), value=1.0)
    boxes = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(count):
            erased = erasing(torch.zeros(1, height, width))[0].bool()
            rows, columns = erased.any(1).nonzero(), erased.any(0).nonzero()
            boxes.append([int(rows[0]), int(columns[0]), len(rows), len(columns)] if len(rows) else [0, 0, 0, 0])
    return np.array(boxes)


def distance(one: np.ndarray, two: np.ndarray) -> float:
    """Kolmogorov and Smirnov's: the largest difference of two distribution functions."""
    where = np.union1d(one, two)
    one, two = (np.searchsorted(np.sort(each), where, side="right") / len(each) for each in (one, two))
    return float(np.abs(one - two).max())


@pytest.mark.parametrize("size", [(96, 32), (384, 128)])
def test_erased_boxes_are_distributed_as_torchvisions(recipe, size):
    recipe = recipe.replace(image_height=size[0], image_width=size[1])
    count, theirs = 100_000, torchvisions_boxes(4000, *size)
    ours = draw_augmentation(count, recipe, torch.Generator().manual_seed(0)).boxes.numpy()
    assert (ours[:, 2] > 0).mean() == pytest.approx(0.5, abs=0.01)
    assert (theirs[:, 2] > 0).mean() == pytest.approx(0.5, abs=0.03)
    ours, theirs = ours[ours[:, 2] > 0], theirs[theirs[:, 2] > 0]
    area, share = ours[:, 2] * ours[:, 3], size[0] * size[1]
    assert area.min() > 0.015 * share
    assert area.max() < 0.42 * share
    assert ours[:, :2].min() == 0  # to the very edges
    assert (ours[:, :2] + ours[:, 2:]).max(0).tolist() == list(size)
    found = {
        "area": lambda box: box[:, 2] * box[:, 3],
        "aspect": lambda box: box[:, 2] / box[:, 3],
        "height": lambda box: box[:, 2],
        "width": lambda box: box[:, 3],
        "top, as a share of its range": lambda box: box[:, 0] / (size[0] - box[:, 2]),
        "left, as a share of its range": lambda box: box[:, 1] / (size[1] - box[:, 3]),
    }
    limit = 1.95 / len(theirs) ** 0.5  # of the distance, passed by equal distributions once in 1,000
    assert dict.fromkeys(found, True) == {name: distance(of(ours), of(theirs)) < limit for name, of in found.items()}


def test_a_box_that_never_fits_is_not_erased(recipe):
    recipe = recipe.replace(image_height=800, image_width=8)
    ours = draw_augmentation(20_000, recipe, torch.Generator().manual_seed(0)).boxes
    assert 0 < (ours[:, 2] > 0).float().mean() < 0.3  # wider than 8 pixels, most of them
    assert (ours[:, 3] < 8).all()


def test_flips_and_offsets_are_distributed_as_torchvisions(recipe):
    recipe, count = recipe.replace(crop_padding=10, flip_probability=0.5), 100_000
    drawn = draw_augmentation(count, recipe, torch.Generator().manual_seed(0))
    assert drawn.flip.float().mean().item() == pytest.approx(0.5, abs=0.008)
    size = (recipe.image_height, recipe.image_width)
    padded = torch.zeros(3, size[0] + 20, size[1] + 20)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = np.array([transforms.RandomCrop.get_params(padded, size)[:2] for _ in range(4000)])
    for ours, their in zip((drawn.top, drawn.left), theirs.T, strict=True):
        assert (int(ours.min()), int(ours.max())) == (their.min(), their.max()) == (0, 20)
        assert np.bincount(ours) == pytest.approx(count / 21, rel=0.06)
        assert distance(ours.numpy(), their) < 1.95 / 4000**0.5
    assert abs(np.corrcoef(drawn.top, drawn.left)[0, 1]) < 0.01
    assert abs(np.corrcoef(drawn.top, drawn.flip)[0, 1]) < 0.01


@pytest.mark.parametrize("probability", [0.0, 0.2, 1.0])
def test_the_recipes_probabilities_are_used(recipe, probability):
    recipe = recipe.replace(flip_probability=probability, erase_probability=probability)
    drawn = draw_augmentation(20_000, recipe, torch.Generator().manual_seed(0))
    assert drawn.flip.float().mean().item() == pytest.approx(probability, abs=0.015)
    assert (drawn.boxes[:, 2] > 0).float().mean().item() == pytest.approx(probability, abs=0.015)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_augment_on_the_gpu_equals_the_cpus(recipe):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (8, 3, recipe.image_height, recipe.image_width), generator=generator).byte()
    drawn = draw_augmentation(8, recipe, generator)
    assert torch.allclose(augment(pixels.cuda(), drawn, recipe).cpu(), augment(pixels, drawn, recipe), atol=1e-6)
