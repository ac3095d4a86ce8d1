"""Photos of two tables → which of them are the same photo, found by perceptual hash."""

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

SIDE = 16  # the hash looks at the SIDE × SIDE lowest frequencies
SIZE = (4 * SIDE, 2 * SIDE)  # pixels, height and width: upright like the photos
# Measured on rendered photos (`sensitivity` measures it on any): copies that were saved again or resized are at most 6
# bits away, those cropped by 2 % at each side 36 in the middle, and 98 of 100 within 48. Of 5.1 million pairs of photos
# of different people none is within 48; the nearest are 60 apart. The usual 64 bits would not do: the same crops need a
# limit of 8, within which 42 of these pairs lie.
SAME = 48
GREY = np.array([0.299, 0.587, 0.114])  # of red, green and blue: brightness as the eye weighs it


def photo_hashes(paths: Iterable[str | Path], progress=None) -> UInt8[np.ndarray, "photos 32"]:
    """255 bits (and a zero) a photo: which of its low frequencies lie above their median.

    The grey photo, resized to SIZE, is cosine-transformed; its mean brightness is left out. Copies that were saved
    again, resized or slightly cropped keep most bits; mirrored ones do not. Raises UnreadableImages, naming every file.
    """
    files = [str(path) for path in paths]
    hashes = np.zeros((len(files), SIDE**2 // 8), dtype=np.uint8)
    bar = progress(total=len(files), desc="hashing photos", unit="photo") if progress else None

    def keep(place: int, pixels: UInt8[np.ndarray, "3 h w"], _: bytes) -> None:
        hashes[place] = _hash(pixels)

    try:
        unreadable = decode_images(files, *SIZE, keep, bar.update if bar else None)
    finally:
        if bar:
            bar.close()
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
    """The first SIDE rows of the discrete cosine transform of n numbers, each up to a factor."""
    return np.cos(np.pi / n * np.arange(SIDE)[:, None] * (np.arange(n) + 0.5))


def same_photos(train: DataFrame, test: DataFrame, distance: int = SAME, progress=None) -> DataFrame:
    """The photos of `test` that also lie in `train`, a row a pair: its two image_ids, pids, paths, the bits between.

    train, test: columns `image_id, pid, path`. Pairs differ in at most `distance` of 255 bits; the nearest come first.
    Raises UnreadableImages.
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
    """`same_photos` of tables with a row a photo, whose hashes are known."""
    index = faiss.IndexBinaryFlat(8 * test_hashes.shape[1])
    index.add(np.ascontiguousarray(train_hashes))
    ends, bits, found = index.range_search(np.ascontiguousarray(test_hashes), distance + 1)  # faiss: nearer than
    query = np.repeat(np.arange(len(test)), np.diff(ends.astype(np.int64)))
    columns = {}
    for name, table, rows in (("test", test, query), ("train", train, found)):
        for column in ("image_id", "pid", "path"):
            columns[f"{name}_{column}"] = table[column].to_numpy()[rows]
    listed = DataFrame({**columns, "distance": bits.astype(np.int64)})
    return listed.sort_values(["distance", "test_image_id", "train_image_id"], ignore_index=True)


def nearest(
    train_hashes: UInt8[np.ndarray, "train 32"], test_hashes: UInt8[np.ndarray, "test 32"]
) -> Int[np.ndarray, " test"]:
    """The bits between each test photo and the train photo that is nearest to it."""
    index = faiss.IndexBinaryFlat(8 * test_hashes.shape[1])
    index.add(np.ascontiguousarray(train_hashes))
    return index.search(np.ascontiguousarray(test_hashes), 1)[0][:, 0]


def sensitivity(paths: Iterable[str | Path], distance: int = SAME) -> DataFrame:
    """How far copies of these photos are from them, a row a way of copying: median and largest distance, found (%).

    `found` is the share of the copies at most `distance` bits away: what a search with it does not miss.
    """
    paths = list(paths)
    hashes, rows = photo_hashes(paths), []
    with tempfile.TemporaryDirectory() as folder:
        copies = [_copies(path) for path in paths]
        for name in copies[0] if copies else ():
            files = [Path(folder) / f"{place}.jpg" for place in range(len(paths))]
            for file, copy in zip(files, copies):
                file.write_bytes(copy[name])
            bits = np.unpackbits(hashes ^ photo_hashes(files), axis=1).sum(1)
            found = 100 * float((bits <= distance).mean())
            rows.append({"copy": name, "median": float(np.median(bits)), "largest": int(bits.max()), "found": found})
    return DataFrame(rows, columns=["copy", "median", "largest", "found"])


def _copies(path: str | Path) -> dict[str, bytes]:
    """What may have happened to a photo on its way into another data set, each as a JPEG file's bytes."""
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
    """The table without the photos of these image_ids and without their captions."""
    return annotations[~annotations.image_id.isin(pd.Index(list(leaked)))]
