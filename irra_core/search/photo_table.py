"""A table or a folder of photos → one row per photo: image_id, path, pid."""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pandas import DataFrame

from irra_core.text import whole_characters

PHOTO_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".jp2", ".heic", ".avif")


def photo_table(images: DataFrame | str | Path) -> tuple[DataFrame, list[tuple[str, str]]]:
    """One row per photo (image_id, path, pid), and the files whose names cannot be stored, with the reason.

    Without a column image_id, a photo's image_id is a hash of its path. Raises ValueError for values that cannot be
    stored unchanged.
    """
    if not isinstance(images, DataFrame):
        images = DataFrame({"path": _photo_files(Path(images))}, dtype=object)
    elif "path" not in images:
        raise ValueError(f"the table has no column 'path', only {', '.join(map(str, images.columns))}")
    images, misnamed = _named(images)
    photos = DataFrame({"path": images.path.map(os.fspath).astype("str")})
    photos["image_id"] = _whole_numbers(images.image_id) if "image_id" in images else photos.path.map(photo_id)
    if photos.image_id.isna().any():
        raise ValueError(f"{photos.path[photos.image_id.isna()].iloc[0]} has no image_id: give each photo a number")
    photos["pid"] = _whole_numbers(images.pid) if "pid" in images else pd.array([pd.NA] * len(photos), "Int64")
    photos = photos.drop_duplicates(["image_id", "path"]).reset_index(drop=True)
    if photos.image_id.duplicated().any():
        twice = photos[photos.image_id == photos.image_id[photos.image_id.duplicated()].iloc[0]]
        raise ValueError(
            f"image_id {twice.image_id.iloc[0]} has two photos, {' and '.join(twice.path[:2])}: rename one"
        )
    return photos[["image_id", "path", "pid"]].astype({"image_id": np.int64}), misnamed


def _photo_files(source: Path) -> list[str]:
    """The absolute path of a file, or of all files below a folder that have an image suffix and are not hidden."""
    if source.is_file():
        return [os.path.abspath(source)]
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is no folder of photos: looked for {source.absolute()}")
    paths = []
    for folder, below, files in os.walk(os.path.abspath(source)):
        below[:] = [name for name in below if not name.startswith(".")]
        pictures = (name for name in files if name.lower().endswith(PHOTO_ENDINGS) and not name.startswith("."))
        paths += [os.path.join(folder, name) for name in pictures]
    return sorted(paths)


def _named(images: DataFrame) -> tuple[DataFrame, list[tuple[str, str]]]:
    """The rows whose paths are UTF-8, and the other paths with the reason: tables and JSON files cannot store them."""
    for row, path in enumerate(images.path):
        if not isinstance(path, str | Path):
            raise ValueError(f"row {row} of the table has path {path!r}: accepted are paths as text")
    paths = [os.fspath(path) for path in images.path]
    named = np.array([whole_characters(path) == path for path in paths], bool)
    escaped = (path.encode("utf-8", "backslashreplace").decode() for path in np.array(paths, object)[~named])
    return images[named], [(path, "its name is not UTF-8: rename the file") for path in escaped]


def _whole_numbers(column: pd.Series) -> pd.Series:
    """The column as Int64, <NA> where it is empty. Raises ValueError rather than round a value."""
    try:
        return column.astype("Int64")
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"column {column.name!r} of the table has values that are not whole numbers, such as "
            f"{_first_unwhole(column)!r}: number the {'people' if column.name == 'pid' else 'photos'} from 0"
        ) from error


def _first_unwhole(column: pd.Series) -> Any:
    """The first value that is not a whole number."""
    whole = [pd.isna(value) or (isinstance(value, float | int | np.number) and value == value // 1) for value in column]
    return next((value for value, is_whole in zip(column, whole, strict=True) if not is_whole), column.iloc[0])


def photo_id(path: str) -> int:
    """53 bits of the path's hash: equal in every process and on every machine, and exact as a JavaScript number."""
    return int.from_bytes(hashlib.blake2b(os.fsencode(path), digest_size=8).digest(), "big") >> 11


def nothing_to_read(images: DataFrame | str | Path, unreadable: DataFrame) -> ValueError:
    """The error to raise when no photo can be read: the number of photos, and the first three reasons."""
    reasons = "".join(f"; {row.path}: {row.reason}" for row in unreadable[:3].itertuples())
    source = "the table" if isinstance(images, DataFrame) else images
    return ValueError(f"{source} has no photo that can be read ({len(unreadable)} unreadable{reasons})")


def check_paths(photos: DataFrame, stored: DataFrame) -> None:
    """Raise ValueError if an image_id of `photos` is stored with another path."""
    paths: dict[int, str] = dict(zip(stored.image_id, stored.path, strict=True))
    for row in photos[photos.image_id.isin(stored.image_id)].itertuples():
        if paths[row.image_id] != row.path:
            raise ValueError(
                f"image_id {row.image_id} is {paths[row.image_id]} in the gallery and {row.path} in the images "
                "to add: give them different image_ids, or build another gallery"
            )
