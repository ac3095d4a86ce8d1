"""A data set on disk → one pandas table, one row per caption: `pid, image_id, path, caption, split`."""

import difflib
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from pandas import DataFrame

from irra_core.recipes import RENDERED
from irra_core.settings import short, unknown

SPLITS = ("train", "val", "test")
PATH_FIELDS = ("file_path", "img_path")  # CUHK-PEDES and ICFG-PEDES use the first, RSTPReid the second
RECORD = '{"split": "train", "captions": ["…"], "file_path" or "img_path": "…", "id": 1}'
BAD_CHARACTERS = re.compile("[\0\ud800-\udfff]")  # no file name and no UTF-8 text holds one
SHOWN = 20  # bad records that one error lists
SAMPLE = 8  # images whose files are looked for here; check_annotations and the image array look for all


class Source(NamedTuple):
    """The folder of a data set below the data root, its annotation file, and the paper whose authors give it out."""

    folder: str
    file: str
    paper: str | None  # None: make_synthetic renders it


DATA_SETS: dict[str, Source] = {
    "cuhk": Source(
        "CUHK-PEDES", "reid_raw.json", 'Li et al., "Person Search with Natural Language Description", CVPR 2017'
    ),
    "icfg": Source(
        "ICFG-PEDES",
        "ICFG-PEDES.json",
        'Ding et al., "Semantically Self-Aligned Network for Text-to-Image Part-aware Person Re-identification", '
        "arXiv 2107.12666",
    ),
    "rstp": Source(
        "RSTPReid",
        "data_captions.json",
        'Zhu et al., "DSSL: Deep Surroundings-person Separation Learning for Text-based Person Retrieval", ACM MM 2021',
    ),
} | {name: Source(name, "annotations.json", None) for name in RENDERED}


class _Row(NamedTuple):
    """One caption of an annotation file."""

    record: int  # the number of its record, from 1
    name: str  # of the image, as the file writes it
    caption: str | None  # None: the photo is in the gallery only
    id: str
    split: str | None


def load_annotations(
    dataset: str | Path = "synthetic", root: str | Path | None = None, identities: int | None = None, seed: int = 0
) -> DataFrame:
    """The table of a data set: a name in DATA_SETS, or the path of your own file or folder (see docs/data_sets.md).

    One row per caption, in the file's order: `pid` (the file's integer ids; other ids are numbered by first
    appearance), `image_id` (from 0, one per image file), `path` (absolute), `caption` (missing where a val or test
    photo is in the gallery only), `split`. Image paths in your own file are relative to `imgs/` beside it, to its
    folder, or to `root` if given: the first that holds some of the images. If it has no splits, its identities are
    split 5:1:2 by `seed`. `identities` keeps about that many identities, the first by pid, in the proportion of the
    splits. Only a few image files are looked for here; check_annotations looks for all.

    Raises FileNotFoundError for missing data and ValueError for a malformed file. Each message gives file, record
    (counted from 1), field, value and remedy; of several bad records the first SHOWN, and the number of the others.
    """
    from irra_core.datasets.places import find

    file, folders = find(str(dataset), root)
    rows, faults = _read(file)
    if str(dataset) in DATA_SETS or any(row.split for row in rows):
        for row in (each for each in rows if each.split is None):
            faults[row.record] = "field 'split' is missing: write it in every record (own data: or in none)"
    paths = _locate(file, rows, faults, folders, str(dataset), root)
    pids = _number([row.id for row in rows])
    splits = [row.split for row in rows]
    if splits[0] is None:
        from irra_core.datasets.splits import split_identities

        splits = split_identities(file, [row.name for row in rows], pids, seed)
    table = DataFrame(
        {
            "pid": pids,
            "image_id": pd.factorize(np.array(paths, dtype=object))[0].astype(np.int64),
            "path": paths,
            "caption": [row.caption for row in rows],
            "split": splits,
        }
    )
    return table if identities is None else _fewer(table, identities)


def _read(file: Path) -> tuple[list[_Row], dict[int, str]]:
    """The rows of an annotation file, and the first fault of each bad record: number → what is wrong with it."""
    from irra_core.datasets.records import one_photo_each, read_records

    rows, faults = [], {}
    for number, record in enumerate(read_records(file), start=1):
        try:
            for part in one_photo_each(record):
                rows += _rows(number, part)
        except ValueError as error:
            faults[number] = str(error)
    return rows, faults


def _rows(number: int, record: Any) -> list[_Row]:
    """One checked row per caption of a record. Raises ValueError without file and number."""
    if isinstance(record, ValueError):  # what the reader of a table says about a malformed row
        raise record
    if not isinstance(record, dict):
        raise ValueError(f"is {shown(record)}: expected is {RECORD}")
    present = [field for field in PATH_FIELDS if field in record]
    if len(present) == 2 and record["file_path"] != record["img_path"]:
        raise ValueError("file_path and img_path differ: keep the one that names the image")
    name = _field(record, (*present, "file_path")[0], str, "the path of an image")
    captions = _field(record, "captions", list, "a list of sentences")
    if not captions and record.get("split") not in ("val", "test"):
        raise ValueError("captions is empty: write at least one sentence, or drop the record (val, test: gallery only)")
    split = None if record.get("split", "") == "" else _field(record, "split", str, "train, val or test")
    pid = str(_field(record, "id", (int, str), "an integer or a text")).strip()
    for caption in captions:
        _check_text("caption", caption)
    _check_text("path", name)
    if not pid:
        raise ValueError("id is empty: write an integer or a text")
    if split not in (None, *SPLITS):
        raise unknown("split", split, SPLITS)
    return [_Row(number, name, caption, pid, split) for caption in captions or [None]]


def _field(record: Mapping[str, Any], field: str, types: type | tuple[type, ...], expected: str) -> Any:
    """The field's value. Raises ValueError if it is missing or of another type."""
    if field not in record:
        near = difflib.get_close_matches(field, map(str, record), n=1)
        hint = f"is it {near[0]!r}? " if near else ""
        also = " (or img_path)" if field == "file_path" else ""
        has = f"the record has {short(', '.join(map(str, record)))}"
        raise ValueError(f"field {field!r}{also} is missing: {hint}expected is {RECORD}; {has}")
    value = record[field]
    if not isinstance(value, types) or isinstance(value, bool):
        raise ValueError(f"{field} is {shown(value)}: expected is {expected}")
    return value


def _check_text(field: str, value: Any) -> None:
    """Raise ValueError for what is not a text, or cannot be encoded."""
    if not isinstance(value, str):
        raise ValueError(f"{field} is {shown(value)}: expected is a text")
    if BAD_CHARACTERS.search(value):
        what = "a NUL character" if "\0" in value else "half a surrogate pair"
        raise ValueError(f"{field} {shown(value)} holds {what}: write it again without")


def _locate(
    file: Path, rows: list[_Row], faults: dict[int, str], folders: list[Path], dataset: str, root: str | Path | None
) -> list[str]:
    """The absolute path of each row's image, in the first folder that holds some of the images.

    Raises one ValueError for all faults, those of the paths included; then FileNotFoundError if no image is there.
    """
    from irra_core.datasets.members import exists
    from irra_core.datasets.places import missing

    names = list(dict.fromkeys(row.name for row in rows))
    sample = names[:: max(1, len(names) // SAMPLE)][:SAMPLE]
    bases = [os.path.abspath(folder) for folder in folders]
    found = [base for base in bases if any(exists(_inside(base, name) or "") for name in sample)]
    base = (found or bases)[0]
    paths = {name: _inside(base, name) for name in names}
    remedy = f"names no file inside {base}: write it relative to that folder, and keep the images in it"
    outside = {row.record: f"path {shown(row.name)} {remedy}" for row in rows if paths[row.name] is None}
    _refuse(file, rows, outside | faults)
    if not found:
        what = f"none of the first images is there, as {paths[sample[0]]} (record {rows[0].record})"
        if dataset in DATA_SETS:
            raise missing(dataset, root, what)
        looked = f"Looked in {', '.join(bases)}: put the images there, or give their folder as data_root"
        raise FileNotFoundError(f"{named(file)}: {what}. {looked}")
    return [paths[row.name] for row in rows]


def _inside(base: str, name: str) -> str | None:
    """The absolute path of an image inside the folder `base`; None if it leads out of it or names a Windows drive."""
    name = name.replace("\\", "/")
    path = os.path.normpath(os.path.join(base, name))
    return None if re.match("[A-Za-z]:/", name) or not path.startswith(base.rstrip(os.sep) + os.sep) else path


def _refuse(file: Path, rows: list[_Row], faults: Mapping[int, str]) -> None:
    """Raise one ValueError for all bad records of an annotation file, if there are any, or for a file without rows."""
    if faults:
        lines = [f"record {number}: {faults[number]}" for number in sorted(faults)]
        more = f"\n  … and {len(lines) - SHOWN:,} more records" if len(lines) > SHOWN else ""
        raise ValueError(f"{named(file)}, " + "\n  ".join(lines[:SHOWN]) + more)
    if not rows:
        raise ValueError(f"{named(file)} has no records: expected is at least one {RECORD}")


def _number(ids: list[str]) -> np.ndarray:
    """The pid of each row: the file's integers, or, if an id is not an integer, all numbered by first appearance."""
    if all(re.fullmatch("-?[0-9]{1,18}", text) for text in dict.fromkeys(ids)):  # 18 digits fit into 64 bits
        return np.array(ids, dtype=object).astype(np.int64)
    return pd.factorize(np.array(ids, dtype=object))[0].astype(np.int64)


def _fewer(table: DataFrame, identities: int) -> DataFrame:
    """About that many identities, the first by pid, each split in its proportion but at least two."""
    pids = table.groupby("split")["pid"]
    known, place = pids.transform("nunique"), pids.rank("dense")  # the split's identities, and this one's place, from 1
    share = (identities * known / pids.nunique().sum()).round().clip(lower=2)
    fewer = table[place <= share].reset_index(drop=True)
    return fewer.assign(image_id=pd.factorize(fewer["image_id"])[0].astype(np.int64))


def hold_out(annotations: DataFrame, share: float = 0.1, seed: int = 0) -> DataFrame:
    """The table with a seeded share of the train identities, at least 2, as val; unchanged if it has a val split.

    Raises ValueError if fewer than two identities would be left to train on.
    """
    if (annotations["split"] == "val").any():
        return annotations
    known = np.sort(annotations.loc[annotations["split"] == "train", "pid"].unique())
    count = max(2, round(share * len(known)))
    if len(known) < count + 2:
        raise ValueError(
            f"the table has no val split, and {len(known)} train identities cannot give {count} to it and keep 2: "
            "annotate more, write a val split, or hold out a smaller share"
        )
    chosen = np.random.default_rng(seed).permutation(known)[:count]
    held = (annotations["split"] == "train") & annotations["pid"].isin(chosen)
    return annotations.assign(split=annotations["split"].mask(held, "val"))


def photo_table(annotations: DataFrame) -> DataFrame:
    """One row per photo (of its first caption), by image_id: the order of the decoded image array."""
    return annotations.drop_duplicates("image_id").sort_values("image_id")


def table_digest(annotations: DataFrame) -> str:
    """SHA-256 (hex) over each row's pid, image path below the common folder, caption and split: equal on any disk."""
    folder = common_folder(annotations["path"].unique().tolist())
    names = annotations["path"].str.slice(len(folder)).str.replace(os.sep, "/").str.lstrip("/")
    columns = (annotations["pid"], names, annotations["caption"], annotations["split"])
    return hashlib.sha256(json.dumps([column.tolist() for column in columns]).encode()).hexdigest()


def common_folder(paths: list[str]) -> str:
    """The deepest folder that holds all the files; empty if there are none, or they are on several drives."""
    drives = {os.path.splitdrive(path)[0] for path in paths}
    return os.path.commonpath([os.path.dirname(path) for path in paths]) if len(drives) == 1 else ""


def named(file: Path) -> str:
    """The file with its folder, as messages name it."""
    return f"{file.parent.name}/{file.name}"


def shown(value: object) -> str:
    """A value and its type, as an error message shows them."""
    return f"{short(value)} ({type(value).__name__})"
