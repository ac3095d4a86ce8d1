"""An Arrow, Parquet or tar file that holds photos or their names beside captions → its records."""

import json
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from irra_core.annotations import named
from irra_core.datasets.members import Place, open_table, tar_index
from irra_core.datasets.tables import read_table

PHOTO_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
SPLITS = {"restval": "val"}  # LUPerson-T's fourth split, as COCO's: 5 photos in 10,000


def read_container(file: Path) -> Iterator[dict[str, Any] | ValueError]:
    """Yields a record per row or sample; a ValueError with the reason for a malformed one."""
    if file.suffix.lower() == ".tar":
        yield from _samples(file)
    elif file.suffix.lower() == ".parquet" and not _holds_photos(file):
        yield from read_table(file)
    else:
        yield from _rows(file)


def as_record(row: Mapping[str, Any], photo: str | None = None) -> dict[str, Any]:
    """The record of a row of a pretraining set; `photo` is the name of a photo that the row holds itself.

    Without an identity (`id` or `image_id`) the photo is one of its own.
    """
    name = photo or row["image"]
    captions = row["captions"] if "captions" in row else row.get("caption")
    identity = next((row[field] for field in ("id", "image_id") if row.get(field) is not None), name)
    split = {"split": SPLITS.get(row["split"], row["split"])} if row.get("split") else {}
    return {"file_path": name, "captions": captions, "id": identity} | split


def _holds_photos(file: Path) -> bool:
    """True for a Parquet file with the columns of a pretraining set rather than of a table of your own."""
    from pyarrow import ArrowException, parquet

    try:
        names = parquet.read_schema(file).names
    except (ArrowException, OSError, ValueError):  # read_table says what is wrong
        return False
    return "image" in names and "path" not in names


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    """Yields the records of an Arrow or Parquet file, whose column `image` holds photos or their names."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file) if file.suffix.lower() == ".parquet" else open_table(str(file))
        schema = table.schema_arrow if isinstance(table, parquet.ParquetFile) else table.schema
        kind = schema.field("image").type
        inside = not (pa.types.is_string(kind) or pa.types.is_large_string(kind))
        names = [name for name in schema.names if name in ("captions", "caption", "id", "image_id", "split")]
        names += [] if inside else ["image"]
        whole = isinstance(table, pa.Table)
        batches = table.select(names).to_batches() if whole else table.iter_batches(columns=names)
        number = 0
        for batch in batches:
            for row in batch.to_pylist():
                yield as_record(row, f"{file.name}/{number}" if inside else None)
                number += 1
    except (pa.ArrowException, KeyError, OSError) as error:
        raise ValueError(
            f"{named(file)} cannot be read ({error}): expected are the columns image (the photo's bytes or its name), "
            "caption (a text or a list) and, optionally, image_id and split. Copy or write it again"
        ) from None


def _samples(file: Path) -> Iterator[dict[str, Any] | ValueError]:
    """Yields a record per sample of a WebDataset shard: members of one name with the endings of a photo and a caption.

    KEY.txt holds a caption per line; KEY.json has caption or captions and, optionally, id (or image_id) and split.
    """
    samples: dict[str, dict[str, tuple[str, Place]]] = {}
    try:
        index = tar_index(str(file))
    except tarfile.TarError as error:
        raise ValueError(f"{named(file)} is no tar file without compression ({error}): write it again") from None
    for name, place in index.items():
        folder, slash, base = name.rpartition("/")
        key, _, ending = base.partition(".")
        samples.setdefault(f"{folder}{slash}{key}", {})[f".{ending.lower()}"] = (name, place)
    with file.open("rb") as opened:
        for key, parts in samples.items():
            yield _sample(file, opened, key, parts)


def _sample(
    file: Path, opened: BinaryIO, key: str, parts: Mapping[str, tuple[str, Place]]
) -> dict[str, Any] | ValueError:
    """The record of one sample of a shard, or what is wrong with it."""
    photo = next((parts[ending][0] for ending in PHOTO_ENDINGS if ending in parts), None)
    fields, lines = _text(opened, parts, ".json"), _text(opened, parts, ".txt")
    if photo is None or fields is lines is None:
        wanted = f"a photo ({', '.join(PHOTO_ENDINGS)}) and a .txt or .json with its caption"
        return ValueError(f"sample {key!r} has {', '.join(parts)}: expected are {wanted}")
    try:
        row = {} if fields is None else dict(json.loads(fields))
    except (ValueError, TypeError) as error:
        return ValueError(f"sample {key!r}: its .json holds no fields ({error}): write caption into it")
    if lines is not None:
        row.setdefault("captions", [line for line in lines.splitlines() if line.strip()])
    return as_record(row, f"{file.name}/{photo}")


def _text(opened: BinaryIO, parts: Mapping[str, tuple[str, Place]], ending: str) -> str | None:
    """The text of a sample's part; None without it."""
    if ending not in parts:
        return None
    opened.seek(parts[ending][1].offset)
    return opened.read(parts[ending][1].size).decode("utf-8", errors="replace")
