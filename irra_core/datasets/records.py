"""An annotation file → its records in the schema of the official data sets, whatever layout it has."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from irra_core.annotations import PATH_FIELDS, RECORD, named, shown
from irra_core.datasets.containers import PHOTO_ENDINGS, as_record, read_container
from irra_core.datasets.members import CONTAINERS
from irra_core.datasets.tables import read_table, read_text

QUERIES = ("image_pids", "img_paths", "caption_pids", "captions")  # a gallery and queries listed apart
VAL_PHOTOS = 1_000  # of a pretraining set without a split: enough to follow a training


def read_records(file: Path) -> Iterator[Any]:
    """Yields a record per entry, or a ValueError with the reason if the entry is malformed.

    A .json file has a list of records in the official schema (RECORD), whose other fields are ignored, or a pretraining
    set: {photo: caption or captions} as LUPerson-MLLM and HAM-PEDES, or [{"image", "caption", "image_id"}] as MALS.
    .arrow and .parquet files with a column `image` hold the photos as LUPerson-T does, .tar files as WebDataset does;
    of a folder all of them are read. Raises ValueError for a file that has another content.
    """
    if file.suffix.lower() == ".csv":
        yield from read_table(file)
    elif file.suffix.lower() != ".json":
        parts = sorted(part for part in file.iterdir() if part.suffix in CONTAINERS) if file.is_dir() else [file]
        yield from _own_identities([record for part in parts for record in read_container(part)])
    else:
        yield from _of_json(file, _read_json(file))


def _of_json(file: Path, content: Any) -> Iterator[Any]:
    """Yields the records in the content of a JSON file."""
    if isinstance(content, Mapping) and content and all(str(key).lower().endswith(PHOTO_ENDINGS) for key in content):
        records = [{"file_path": name, "captions": captions, "id": name} for name, captions in content.items()]
        yield from _own_identities(records)
    elif isinstance(content, Mapping) and set(QUERIES) <= set(content):
        yield from _apart("val" if "val" in file.stem.lower() else "test", *(content[name] for name in QUERIES))
    elif not isinstance(content, list):
        raise ValueError(f"{named(file)} holds {shown(content)}: expected is a list of records {RECORD}")
    elif content and all(_is_pair(record) for record in content):
        yield from _own_identities([as_record(record) for record in content])
    else:
        yield from content


def one_photo_each(record: Any) -> list[Any]:
    """The record, or, where its path is a list of photos of the same text, a record for each photo.

    In train every photo is paired with every caption. In val and test the captions are queries, which must not be
    counted twice: they go to the first photo, and the others are in the gallery only.
    """
    field = next(
        (name for name in PATH_FIELDS if isinstance(record, dict) and isinstance(record.get(name), list)), None
    )
    if field is None:
        return [record]
    kept = [record | {field: name} for name in record[field]]
    if record.get("split") in ("val", "test"):
        kept[1:] = [each | {"captions": []} for each in kept[1:]]
    return kept


def _apart(split: str, image_pids: list, photos: list, caption_pids: list, captions: list) -> Iterator[Any]:
    """Yields the records of a gallery and of queries that are listed apart, as in TBAPR's files for val and test.

    The table has a photo in each row, so the captions of a person are dealt out to the person's photos. Scores depend
    on identities alone, so they are the same for every such assignment.
    """
    given: dict[Any, list[list[str]]] = {pid: [] for pid in image_pids}
    records = []
    for pid, photo in zip(image_pids, photos, strict=True):
        given[pid].append([])
        name = photo if isinstance(photo, str) else "/".join(photo)
        records.append({"file_path": name, "captions": given[pid][-1], "id": pid, "split": split})
    count: Counter = Counter()
    for pid, caption in zip(caption_pids, captions, strict=True):
        if pid not in given:
            records.append(ValueError(f"caption {shown(caption)} is of person {pid!r}, who has no photo: add one"))
            continue
        given[pid][count[pid] % len(given[pid])].append(caption)
        count[pid] += 1
    yield from records


def _is_pair(record: Any) -> bool:
    """True for a record of a pretraining set such as MALS: a photo and a caption, and no field of the official ones."""
    return isinstance(record, Mapping) and {"image", "caption"} <= set(record) and "captions" not in record


def _own_identities(records: list[Any]) -> Iterator[Any]:
    """Yields the records of a pretraining set with a split: at most VAL_PHOTOS identities are val, none is test.

    A set in which a record names its split, or is malformed, is left as it is. Every n-th identity is val, so that the
    table depends on nothing but the file.
    """
    records = [
        each if isinstance(each, ValueError) else each | {"captions": _listed(each["captions"])} for each in records
    ]
    if any(isinstance(record, ValueError) or "split" in record for record in records):
        yield from records
        return
    number = {identity: place for place, identity in enumerate(dict.fromkeys(str(each["id"]) for each in records))}
    every = max(10, -(-len(number) // VAL_PHOTOS))
    for record in records:
        held = number[str(record["id"])] % every == every - 1
        yield record | {"split": "val" if held else "train"}


def _listed(captions: Any) -> Any:
    """A caption alone as a list."""
    return [captions] if isinstance(captions, str) else captions


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
