"""Photos of two tables → the pairs that show the same photo, found by perceptual hash."""

import functools
import io
import tempfile
from collections.abc import Iterable
from pathlib import Path

import faiss
import numpy as np
import pandas as pd
from jaxtyping import Float, Int, UInt8
from pandas import DataFrame
from PIL import Image

from irra_core.annotations import photo_table
from irra_core.images import UnreadableImages, decode_images, open_photo
from irra_core.settings import progress_bar

SIDE = 16  # the hash uses the SIDE × SIDE lowest frequencies
SIZE = (4 * SIDE, 2 * SIDE)  # pixels, height and width: upright like the photos
# Measured on rendered photos of 384×128 (`sensitivity` measures any photos): copies that were saved again or resized
# differ in at most 6 bits; copies cropped by 2 % at each side differ in 36 bits (median), and 98 % of them in at most
# 48. Of 5.1 million pairs of photos of different people none differs in 48 bits or fewer; the nearest pair differs in
# 60. The usual hash of 64 bits is too short: the same crops need a limit of 8 bits, and 42 of these pairs differ in 8
# or fewer.
SAME = 48
GREY = np.array([0.299, 0.587, 0.114])  # weights of red, green and blue in the perceived brightness


def photo_hashes(paths: Iterable[str | Path], progress=None) -> UInt8[np.ndarray, "photos 32"]:
    """255 bits (and a padding zero) per photo: which of its low frequencies lie above their median.

    The bits come from the cosine transform of the grey photo, resized to SIZE, without the mean brightness. Copies that
    were saved again, resized or slightly cropped have mostly the same bits; mirrored copies do not. Raises
    UnreadableImages, naming every file.
    """
    files = [str(path) for path in paths]
    hashes = np.zeros((len(files), SIDE**2 // 8), dtype=np.uint8)
    unreadable = {}
    with progress_bar(progress, total=len(files), desc="hashing photos", unit="photo") as bar:
        for row, (file, decoded) in enumerate(zip(files, decode_images(files, *SIZE))):
            if isinstance(decoded, str):
                unreadable[file] = decoded
            else:
                hashes[row] = _hash(decoded[0])
            bar.update(1)
    if unreadable:
        raise UnreadableImages(unreadable)
    return hashes


def _hash(pixels: UInt8[np.ndarray, "3 h w"]) -> UInt8[np.ndarray, " 32"]:
    """The bits of one small photo."""
    grey = np.tensordot(GREY, pixels, 1)
    low = (_cosines(SIZE[0]) @ grey @ _cosines(SIZE[1]).T).ravel()[1:]
    return np.packbits(low > np.median(low))


@functools.cache
def _cosines(n: int) -> Float[np.ndarray, "16 n"]:
    """The first SIDE rows of the discrete cosine transform of n numbers, without normalisation."""
    return np.cos(np.pi / n * np.arange(SIDE)[:, None] * (np.arange(n) + 0.5))


def same_photos(train: DataFrame, test: DataFrame, distance: int = SAME, progress=None) -> DataFrame:
    """The photos of `test` that are also in `train`, one row per pair: both image_ids, pids and paths, and `distance`.

    train, test: columns `image_id, pid, path`. The column `distance` is the number of the 255 bits that differ; the
    argument is its maximum. The nearest pairs come first. Raises UnreadableImages.
    """
    tables = [photo_table(table).reset_index(drop=True) for table in (train, test)]
    hashes = [photo_hashes(table.path, progress) for table in tables]
    return pairs(*tables, *hashes, distance)


def pairs(
    train: DataFrame,
    test: DataFrame,
    train_hashes: UInt8[np.ndarray, "train 32"],
    test_hashes: UInt8[np.ndarray, "test 32"],
    distance: int = SAME,
) -> DataFrame:
    """`same_photos` of tables with one row per photo, whose hashes are given."""
    index = faiss.IndexBinaryFlat(8 * test_hashes.shape[1])
    index.add(np.ascontiguousarray(train_hashes))
    ends, bits, neighbours = index.range_search(np.ascontiguousarray(test_hashes), distance + 1)  # faiss: below
    query = np.repeat(np.arange(len(test)), np.diff(ends.astype(np.int64)))
    columns = {}
    for name, table, rows in (("test", test, query), ("train", train, neighbours)):
        for column in ("image_id", "pid", "path"):
            columns[f"{name}_{column}"] = table[column].to_numpy()[rows]
    listed = DataFrame({**columns, "distance": bits.astype(np.int64)})
    return listed.sort_values(["distance", "test_image_id", "train_image_id"], ignore_index=True)


def nearest(
    train_hashes: UInt8[np.ndarray, "train 32"], test_hashes: UInt8[np.ndarray, "test 32"]
) -> Int[np.ndarray, " test"]:
    """For each test photo, the number of bits in which the nearest train photo differs."""
    index = faiss.IndexBinaryFlat(8 * test_hashes.shape[1])
    index.add(np.ascontiguousarray(train_hashes))
    return index.search(np.ascontiguousarray(test_hashes), 1)[0][:, 0]


def sensitivity(paths: Iterable[str | Path], distance: int = SAME) -> DataFrame:
    """Distances between photos and copies of them, one row per kind of copy: `copy, median, largest, found`.

    `found` is the share of copies, in per cent, that a search with this `distance` finds.
    """
    paths = list(paths)
    hashes, rows = photo_hashes(paths), []
    with tempfile.TemporaryDirectory() as folder:
        copies = [_copies(path) for path in paths]
        for name in copies[0] if copies else ():
            files = [Path(folder) / f"{row}.jpg" for row in range(len(paths))]
            for file, copy in zip(files, copies):
                file.write_bytes(copy[name])
            bits = np.unpackbits(hashes ^ photo_hashes(files), axis=1).sum(1)
            share = 100 * float((bits <= distance).mean())
            rows.append({"copy": name, "median": float(np.median(bits)), "largest": int(bits.max()), "found": share})
    return DataFrame(rows, columns=["copy", "median", "largest", "found"])


def _copies(path: str | Path) -> dict[str, bytes]:
    """Copies of a photo as another data set may hold them, each as the bytes of a JPEG file."""
    photo = open_photo(path)
    wide, high = photo.size
    x, y = round(0.02 * wide), round(0.02 * high)
    return {
        "saved again, JPEG quality 50": _jpeg(photo, 50),
        "half as large": _jpeg(photo.resize((max(wide // 2, 1), max(high // 2, 1))), 90),
        "half again as large": _jpeg(photo.resize((wide * 3 // 2, high * 3 // 2)), 80),
        "2 % cut off each side": _jpeg(photo.crop((x, y, wide - x, high - y)), 85),
    }


def _jpeg(photo: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    photo.save(file, "JPEG", quality=quality)
    return file.getvalue()


def without(annotations: DataFrame, leaked: Iterable[int]) -> DataFrame:
    """The table without the photos of these image_ids and their captions."""
    return annotations[~annotations.image_id.isin(pd.Index(list(leaked)))]
