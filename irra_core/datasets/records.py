"""An annotation file → its records in the schema of the official data sets, whatever layout it has."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from irra_core.annotations import RECORD, named, shown
from irra_core.datasets.tables import read_table, read_text

PHOTO_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
VAL_PHOTOS = 1_000  # of a pretraining set without a split: enough to follow a training


def read_records(file: Path) -> Iterator[Any]:
    """Yields a record per entry, or a ValueError with the reason if the entry is malformed.

    A .json file has a list of records in the official schema (RECORD), whose other fields are ignored, or a pretraining
    set: {photo: caption or captions} as LUPerson-MLLM and HAM-PEDES, or [{"image", "caption", "image_id"}] as MALS.
    Raises ValueError for a file that has another content.
    """
    if file.suffix.lower() != ".json":
        yield from read_table(file)
        return
    content = _read_json(file)
    if isinstance(content, Mapping) and content and all(str(key).lower().endswith(PHOTO_ENDINGS) for key in content):
        yield from _own_identities([(name, captions, name) for name, captions in content.items()])
    elif not isinstance(content, list):
        raise ValueError(f"{named(file)} holds {shown(content)}: expected is a list of records {RECORD}")
    elif content and all(_is_pair(record) for record in content):
        yield from _own_identities([(record["image"], record["caption"], _identity(record)) for record in content])
    else:
        yield from content


def _is_pair(record: Any) -> bool:
    """True for a record of a pretraining set such as MALS: a photo and a caption, and no field of the official ones."""
    return isinstance(record, Mapping) and {"image", "caption"} <= set(record) and "captions" not in record


def _identity(record: Mapping[str, Any]) -> Any:
    """The identity that a pair names, else its photo's name: each photo is a person of its own."""
    return next((record[field] for field in ("id", "image_id") if field in record), record["image"])


def _own_identities(pairs: list[tuple[Any, Any, Any]]) -> Iterator[dict[str, Any]]:
    """Yields the records of (photo, caption or captions, identity): at most VAL_PHOTOS identities are val, no test.

    A pretraining set says nothing of splits. Every n-th identity is val, so that the table depends on nothing but the
    file.
    """
    number = {identity: place for place, identity in enumerate(dict.fromkeys(str(each) for _, _, each in pairs))}
    every = max(10, -(-len(number) // VAL_PHOTOS))
    for name, captions, identity in pairs:
        split = "val" if number[str(identity)] % every == every - 1 else "train"
        captions = [captions] if isinstance(captions, str) else captions
        yield {"file_path": name, "captions": captions, "id": identity, "split": split}


def _read_json(file: Path) -> Any:
    """The content of a JSON file."""
    text = read_text(file)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        size = f"{len(text):,} characters"
        raise ValueError(
            f"{named(file)} is not JSON: {error} (of {size}): copy it again, or correct it there"
        ) from None
