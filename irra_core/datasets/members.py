"""A photo inside another file, named FILE.tar/MEMBER or FILE.arrow/ROW, → its bytes.

Such a name is a path like any other for the rest of the library: it is kept in tables and galleries, and read by
`photos.read_photo`. A tar file's members are found by an index of their offsets, made once below `cache_root()`.
"""

import functools
import hashlib
import json
import os
import re
import tarfile
from typing import Any, NamedTuple

from irra_core.settings import cache_root, put_in_place

CONTAINERS = (".tar", ".arrow", ".parquet")
_NAME = re.compile(r"(.+?\.(?:tar|arrow|parquet))[/\\](.+)", re.IGNORECASE | re.DOTALL)
_INDEX_VERSION = 1


class Place(NamedTuple):
    """Where a member's bytes are in its tar file."""

    offset: int
    size: int


def stat_photo(path: str) -> os.stat_result:
    """os.stat of a photo's file, or of the file that it is inside of. Raises OSError where that is absent."""
    try:
        return os.stat(path)
    except (NotADirectoryError, FileNotFoundError):  # the second on Windows
        if (found := _NAME.fullmatch(path)) is None or not os.path.isfile(found[1]):
            raise
        return os.stat(found[1])


def exists(path: str) -> bool:
    """True if a photo's file is there, or the file that should hold it."""
    try:
        stat_photo(path)
    except (OSError, ValueError):  # ValueError: a NUL in the path
        return False
    return True


def member(path: str, most: int) -> bytes | str | None:
    """The bytes of a photo inside another file, or the reason why they cannot be read; None for a file of its own."""
    found = _NAME.fullmatch(path)
    if found is None or not os.path.isfile(found[1]):
        return None
    container, name = found[1], found[2]
    if not container.lower().endswith(".tar"):
        return _row_photo(container, name)
    place = tar_index(container).get(name.replace("\\", "/"))
    if place is None:
        return f"is not in {os.path.basename(container)}"
    if place.size > most:
        return f"has {place.size:,} bytes, at most {most:,} are read: save it smaller"
    with open(container, "rb", buffering=0) as file:
        file.seek(place.offset)
        return file.read(place.size)


def tar_index(container: str) -> dict[str, Place]:
    """Name → place of every regular member of a tar file, in its order; made once, then read from the cache folder."""
    about = os.stat(container)
    return _tar_index(os.path.abspath(container), about.st_size, about.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _tar_index(container: str, size: int, changed: int) -> dict[str, Place]:
    """The index of a tar file of that size and time."""
    asked = f"{_INDEX_VERSION} {size} {changed} {container}".encode(errors="surrogateescape")
    kept = cache_root() / "tars" / f"{hashlib.blake2b(asked, digest_size=16).hexdigest()}.json"
    try:
        return {name: Place(*place) for name, place in json.loads(kept.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError):  # none yet, or damaged
        pass
    with tarfile.open(container, "r:") as file:
        index = {each.name: Place(each.offset_data, each.size) for each in file if each.isfile()}
    kept.parent.mkdir(parents=True, exist_ok=True)
    aside = kept.with_name(f".{kept.name}.{os.getpid()}")
    aside.write_text(json.dumps(index), encoding="utf-8")
    put_in_place(aside, kept)
    return index


def open_table(container: str) -> Any:
    """The pyarrow Table of an Arrow file, memory-mapped: its photos stay on the disk until they are read."""
    import pyarrow as pa

    mapped = pa.memory_map(container)
    try:
        return pa.ipc.open_file(mapped).read_all()
    except pa.ArrowInvalid:  # a stream of batches, which some libraries write
        mapped.seek(0)
        return pa.ipc.open_stream(mapped).read_all()


@functools.lru_cache(maxsize=64)
def _photos(container: str, changed: int) -> Any:
    """The column of photos of an Arrow file."""
    return open_table(container)["image"]


@functools.lru_cache(maxsize=2)
def _row_group(container: str, changed: int, group: int) -> Any:
    """The photos of one row group of a Parquet file."""
    from pyarrow import parquet

    return parquet.ParquetFile(container).read_row_group(group, columns=["image"])["image"]


@functools.lru_cache(maxsize=64)
def _row_groups(container: str, changed: int) -> list[int]:
    """How many rows each row group of a Parquet file has."""
    from pyarrow import parquet

    about = parquet.read_metadata(container)
    return [about.row_group(group).num_rows for group in range(about.num_row_groups)]


def _row_photo(container: str, name: str) -> bytes | str:
    """The bytes in a row of the column `image`, which is binary, or has a field `bytes` (Hugging Face's pictures)."""
    changed = os.stat(container).st_mtime_ns
    row, file = (int(name) if name.isdecimal() else -1), os.path.basename(container)
    if container.lower().endswith(".parquet"):
        for group, count in enumerate(_row_groups(container, changed)):
            if 0 <= row < count:
                column = _row_group(container, changed, group)
                break
            row -= count
        else:
            return f"is no row of {file}"
    else:
        column = _photos(container, changed)
        if not 0 <= row < len(column):
            return f"is no row of {file}"
    value = column[row].as_py()
    content = value.get("bytes") if isinstance(value, dict) else value
    return content if isinstance(content, bytes) else f"holds no picture in {file}, but {type(content).__name__}"
