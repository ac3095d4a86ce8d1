"""A data set on disk → one pandas table, one row a caption: `pid, image_id, path, caption, split`."""

import csv
import difflib
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from pandas import DataFrame

from irra_core.recipes import own_file
from irra_core.settings import data_root, project_root, unknown

SPLITS = ("train", "val", "test")
PATH_FIELDS = ("file_path", "img_path")  # CUHK-PEDES and ICFG-PEDES write the first, RSTPReid the second
RECORD = '{"split": "train", "captions": ["…"], "file_path" or "img_path": "…", "id": 1}'
COLUMNS = ("path", "caption", "id", "split")  # of a CSV or Parquet file; the last is optional
SHOWN = 20  # bad records that one error names
SAMPLE = 8  # images looked for at load; check_annotations and the image array look for all


class Source(NamedTuple):
    """Where a data set lies under the data root, and whom to ask for it."""

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
    "synthetic": Source("synthetic", "annotations.json", None),
    "synthetic-night": Source("synthetic-night", "annotations.json", None),
    "synthetic-campus": Source("synthetic-campus", "annotations.json", None),
    "synthetic-general": Source("synthetic-general", "annotations.json", None),
}

# Images, captions and identities of each split, as the data sets' papers and the released code count them.
PUBLISHED_COUNTS: dict[str, dict[str, dict[str, int]]] = {
    "cuhk": {
        "train": {"images": 34054, "captions": 68126, "identities": 11003},
        "val": {"images": 3078, "captions": 6158, "identities": 1000},
        "test": {"images": 3074, "captions": 6156, "identities": 1000},
    },
    "icfg": {
        "train": {"images": 34674, "captions": 34674, "identities": 3102},
        "test": {"images": 19848, "captions": 19848, "identities": 1000},
    },
    "rstp": {
        "train": {"images": 18505, "captions": 37010, "identities": 3701},
        "val": {"images": 1000, "captions": 2000, "identities": 200},
        "test": {"images": 1000, "captions": 2000, "identities": 200},
    },
}


class _Rows(NamedTuple):
    """The columns of an annotation file, one entry a caption, not yet checked against each other.

    `faults` is record → the first thing that is wrong with it: all bad records are told at once.
    """

    records: list[int]  # the record of each row, counted from 1
    ids: list[Any]
    names: list[str]  # of the images, as the file writes them
    captions: list[str]
    splits: list[str | None]
    faults: dict[int, str]


def load_annotations(
    dataset: str | Path = "synthetic",
    root: str | Path | None = None,
    identities: int | None = None,
    seed: int = 0,
) -> DataFrame:
    """The table of a data set (a name in DATA_SETS, or the path of an own .json, .csv or .parquet file).

    One row a caption, in the file's order: `pid` (the file's own integer ids; other ids are numbered by first
    appearance), `image_id` (0.. one a file), `path` (absolute), `caption`, `split`. An own file's image paths are
    relative to `imgs/` beside it, to its own folder, or to `root` where one is given: the first that holds some of
    the images. Without any split, its identities are split 5:1:2 by `seed`. `identities` keeps about so many, the
    first ones by pid, in the proportion of the splits. Only a few images are looked for here; check_annotations
    looks for all.

    Raises FileNotFoundError where the data are missing and ValueError for a malformed file; each names file, record
    (counted from 1), field, value and remedy; of several bad records the first SHOWN, and how many more there are.
    """
    file, folders = _find(str(dataset), root)
    rows = _read(file)
    _check_text(rows)
    paths = _locate(file, rows, folders, str(dataset), root)
    pids = _number(rows)
    splits = _splits(file, rows, pids, None if str(dataset) in DATA_SETS else seed)
    _refuse(file, rows)
    table = DataFrame(
        {
            "pid": pids,
            "image_id": pd.factorize(np.array(paths, dtype=object))[0].astype(np.int64),
            "path": paths,
            "caption": rows.captions,
            "split": splits,
        }
    )
    return table if identities is None else _fewer(table, identities)


def _find(dataset: str, root: str | Path | None) -> tuple[Path, list[Path]]:
    """The annotation file, and the folders that its image paths may be relative to, the first choice first."""
    if dataset in DATA_SETS:
        source = DATA_SETS[dataset]
        folder = data_root(root) / source.folder
        for path in (folder, folder / source.file, folder / "imgs"):
            if not path.exists():
                raise _missing(dataset, root, f"{path} is not there")
        return folder / source.file, [folder / "imgs"]
    file = own_file(dataset)
    if file is None and Path(dataset).suffix.lower() in (".json", ".csv", ".parquet"):
        raise FileNotFoundError(
            f"annotation file {dataset!r} is not there: looked in {Path.cwd()} and {project_root()}. "
            "Give its path; `-p dataset synthetic` needs no file"
        )
    if file is None:
        raise ValueError(f"{unknown('data set', dataset, DATA_SETS)}, or the path of a .json, .csv or .parquet file")
    given = [] if root is None else [data_root(root)]
    return file, [folder for folder in (file.parent / "imgs", file.parent, *given) if folder.is_dir()]


def _missing(dataset: str, root: str | Path | None, what: str) -> FileNotFoundError:
    """The one message for a data set that is not there: what was looked for, what is expected, whom to ask."""
    source, folder = DATA_SETS[dataset], data_root(root)
    tree = f"    {folder}/\n        {source.folder}/\n            {source.file}\n            imgs/"
    if source.paper is None:
        domain = dataset.removeprefix("synthetic").lstrip("-")
        call = f'make_synthetic("{folder}"' + (f', domain="{domain}")' if domain else ")")
        remedy = f"Nobody needs to be asked for it: irra_core.{call} renders it there."
    else:
        remedy = (
            f"The data set is given out by its authors: ask those of {source.paper}. Where it lies elsewhere, give "
            "the folder above it as data_root or in IRRA_DATA. `-p dataset synthetic` needs no data."
        )
    return FileNotFoundError(
        f"data set {dataset!r}: {what}. Looked for the folder {source.folder} with the annotation file {source.file} "
        f"in {folder}. Expected is\n{tree}\n{remedy}"
    )


def _read(file: Path) -> _Rows:
    """The rows of an annotation file: JSON in the official schema (RECORD), or CSV or Parquet with COLUMNS.

    Other fields and columns are left alone.
    """
    readers = {".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    rows = _Rows([], [], [], [], [], {})
    for number, record in enumerate(readers[file.suffix.lower()](file), start=1):
        try:
            name, captions, split, pid = _record(record, file.suffix.lower())
        except ValueError as error:
            rows.faults[number] = str(error)
            continue
        rows.records.extend([number] * len(captions))
        rows.ids.extend([pid] * len(captions))
        rows.names.extend([name] * len(captions))
        rows.captions.extend(captions)
        rows.splits.extend([split] * len(captions))
    if not rows.records:
        _refuse(file, rows)
        raise ValueError(f"{_short(file)} has no records: expected is at least one {RECORD}")
    return rows


def _record(record: Any, suffix: str) -> tuple[str, list[str], str | None, int | str]:
    """A record's image name, captions, split and id, each of its type. Raises ValueError, without file and number."""
    if not isinstance(record, dict):
        raise ValueError(f"is {_shown(record)}: expected is {RECORD}")
    if suffix == ".csv" and (None in record or None in record.values()):  # csv's mark of too many, and too few, cells
        wrong = "more" if None in record else "fewer"
        raise ValueError(f"has {wrong} cells than the first line: write a sentence with commas in double quotes")
    if suffix == ".json":
        name = _image_name(record)
        captions = _field(record, "captions", list, "a list of sentences")
    else:
        name = _field(record, "path", str, "the path of an image")
        captions = [_field(record, "caption", str, "a sentence")]
    if not captions:
        raise ValueError("captions is empty: write at least one sentence, or drop the record")
    for caption in captions:
        if not isinstance(caption, str):
            raise ValueError(f"caption is {_shown(caption)}: expected is a text")
    split = None
    if record.get("split", "") != "":
        split = _field(record, "split", str, "train, val or test")
    return name, captions, split, _field(record, "id", (int, str), "an integer or a text")


def _read_json(file: Path) -> list:
    """The records of a JSON file."""
    text = _read_text(file)
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{_short(file)} is not JSON: {error} (of {len(text):,} characters): copy it again, or correct it there"
        ) from None
    if not isinstance(records, list):
        raise ValueError(f"{_short(file)} holds {_shown(records)}: expected is a list of records {RECORD}")
    return records


def _read_csv(file: Path) -> list[dict]:
    """The records of a CSV file. pandas would shift or drop the cells of a row that has too many."""
    reader = csv.DictReader(io.StringIO(_read_text(file), newline=""), strict=True)
    limit = csv.field_size_limit(2**31 - 1)  # the usual one, 131,072 letters a cell, is smaller than some captions
    try:
        _check_columns(file, reader.fieldnames or [])
        return list(reader)
    except csv.Error as error:
        raise ValueError(
            f"{_short(file)}, after line {reader.line_num}: {error}: write a sentence in double quotes, and double "
            "the quotes inside"
        ) from None
    finally:
        csv.field_size_limit(limit)


def _read_parquet(file: Path) -> list[dict]:
    """The records of a Parquet file; a missing split is an empty one."""
    try:
        table = pd.read_parquet(file)
    except (ValueError, OSError, KeyError) as error:  # pyarrow's own errors are among them; KeyError: an absent index
        raise ValueError(f"{_short(file)} is no readable Parquet file ({error}): copy or write it again") from None
    _check_columns(file, table.columns)
    if "split" in table.columns:
        table["split"] = table["split"].astype(object).where(table["split"].notna(), "")
    return table[[name for name in COLUMNS if name in table.columns]].to_dict("records")


def _read_text(file: Path) -> str:
    """The file's text without a byte-order mark. Raises ValueError for what is empty or not UTF-8."""
    content = file.read_bytes()
    if not content.strip():
        raise ValueError(f"{_short(file)} is empty ({len(content)} bytes): copy it again")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{_short(file)} is not UTF-8 text: byte {error.start:,} is 0x{content[error.start]:02x}: save it as UTF-8"
        ) from None


def _check_columns(file: Path, columns: Iterable[str]) -> None:
    """Refuse a table without one of the columns that it needs, or with two of a name that is read."""
    columns = list(columns)
    for column in COLUMNS:
        if columns.count(column) > 1:
            raise ValueError(
                f"{_short(file)}: column {column!r} is there {columns.count(column)} times: keep the one that counts"
            )
    for column in COLUMNS[:3]:
        if column not in columns:
            raise ValueError(
                f"{_short(file)}: column {column!r} is missing: it has {_shown(columns)}; expected are "
                "path, caption, id and, if you like, split (in a CSV file separated by commas)"
            )


def _image_name(record: dict) -> str:
    """The image's path as the record writes it, under either official name of the field."""
    present = [field for field in PATH_FIELDS if field in record]
    if len(present) == 2 and record["file_path"] != record["img_path"]:
        raise ValueError("file_path and img_path differ: keep the one that names the image")
    return _field(record, present[0] if present else "file_path", str, "the path of an image")


def _field(record: dict, field: str, types: type | tuple[type, ...], expected: str) -> Any:
    """The field's value, or an error that names field, value and what is expected."""
    if field not in record:
        near = difflib.get_close_matches(field, map(str, record), n=1)
        hint = f"is it {near[0]!r}? " if near else ""
        also = " (or img_path)" if field == "file_path" else ""
        raise ValueError(f"field {field!r}{also} is missing: {hint}expected is {RECORD}")
    value = record[field]
    if not isinstance(value, types) or isinstance(value, bool):
        raise ValueError(f"{field} is {_shown(value)}: expected is {expected}")
    return value


def _check_text(rows: _Rows) -> None:
    """Find captions and image paths that are no text: with NUL or with half a surrogate pair."""
    for field, values in (("caption", rows.captions), ("path", rows.names)):
        if not re.search("[\0\ud800-\udfff]", "".join(values)):
            continue
        for number, value in zip(rows.records, values, strict=True):
            if "\0" in value or re.search("[\ud800-\udfff]", value):
                what = "a NUL character" if "\0" in value else "half a surrogate pair"
                rows.faults.setdefault(number, f"{field} {_shown(value)} holds {what}: write it again without")


def _locate(file: Path, rows: _Rows, folders: list[Path], dataset: str, root: str | Path | None) -> list[str | None]:
    """The absolute path of each row's image, under the first of the folders that holds some of the images."""
    names = list(dict.fromkeys(rows.names))
    sample = names[:: max(1, len(names) // SAMPLE)][:SAMPLE]
    bases = [os.path.abspath(folder) for folder in folders]
    found = [base for base in bases if any(os.path.isfile(_inside(base, name) or "") for name in sample)]
    base = found[0] if found else bases[0]
    placed = {name: _inside(base, name) for name in names}
    for number, name in zip(rows.records, rows.names, strict=True):
        if placed[name] is None:
            what = f"path {_shown(name)} names no file inside {base}: write it relative to that folder, and keep the "
            rows.faults.setdefault(number, what + "images in it")
    if found:
        return [placed[name] for name in rows.names]
    _refuse(file, rows)
    what = f"none of the first images is there, as {placed[sample[0]]} (record {rows.records[0]})"
    if dataset in DATA_SETS:
        raise _missing(dataset, root, what)
    raise FileNotFoundError(
        f"{_short(file)}: {what}. Looked in {', '.join(bases)}: put the images there, or give their folder as data_root"
    )


def _inside(base: str, name: str) -> str | None:
    """The absolute path of an image inside the folder `base`; None where it leads out, or is a Windows drive's."""
    name = name.replace("\\", "/")
    path = os.path.normpath(os.path.join(base, name))
    return None if re.match("[A-Za-z]:/", name) or not path.startswith(base.rstrip(os.sep) + os.sep) else path


def _number(rows: _Rows) -> np.ndarray:
    """The pid of each row: the file's own integers, or, where an id is none, all numbered by first appearance."""
    texts = [str(value).strip() for value in rows.ids]
    for number, text in zip(rows.records, texts, strict=True):
        if not text:
            rows.faults.setdefault(number, "id is empty: write an integer or a text")
    if all(re.fullmatch("-?[0-9]{1,18}", text) for text in dict.fromkeys(texts)):  # 18 digits fit into 64 bits
        return np.array([int(text) for text in texts], dtype=np.int64)
    return pd.factorize(np.array(texts, dtype=object))[0].astype(np.int64)


def _splits(file: Path, rows: _Rows, pids: np.ndarray, seed: int | None) -> list[str | None]:
    """The split of each row: the file's own, or, where own data have none at all, 5:1:2 of the identities by seed."""
    if seed is not None and all(split is None for split in rows.splits):
        _refuse(file, rows)
        return _split_identities(file, pids, seed)
    for number, split in zip(rows.records, rows.splits, strict=True):
        if split is None:
            rows.faults.setdefault(number, "field 'split' is missing: write it in every record (own data: or in none)")
        elif split not in SPLITS:
            rows.faults.setdefault(number, str(unknown("split", split, SPLITS)))
    return rows.splits


def _split_identities(file: Path, pids: np.ndarray, seed: int) -> list[str]:
    """Each row's split: of the identities, shuffled, an eighth to val, a quarter to test, the rest to train."""
    known = np.unique(pids)
    val, test = max(2, round(len(known) / 8)), max(2, round(len(known) / 4))
    if len(known) < val + test + 2:
        raise ValueError(
            f"{_short(file)} has no splits, and its {len(known)} identities are too few to make them (two each): "
            "write the field split, or annotate at least 6 identities"
        )
    shuffled = np.random.default_rng(seed).permutation(known).tolist()
    split = dict.fromkeys(shuffled, "train")
    split |= dict.fromkeys(shuffled[:val], "val") | dict.fromkeys(shuffled[val : val + test], "test")
    return [split[pid] for pid in pids.tolist()]


def _fewer(table: DataFrame, identities: int) -> DataFrame:
    """About so many identities, each split in its proportion but at least two, the first ones by pid."""
    total = table.groupby("split")["pid"].nunique().sum()
    kept = []
    for split, rows in table.groupby("split")["pid"]:
        known = np.sort(rows.unique())
        count = max(2, round(identities * len(known) / total))
        kept.append(table.index[(table["split"] == split) & table["pid"].isin(known[:count])])
    fewer = table.loc[np.sort(np.concatenate(kept))].reset_index(drop=True)
    return fewer.assign(image_id=pd.factorize(fewer["image_id"])[0].astype(np.int64))


def hold_out(annotations: DataFrame, share: float = 0.1, seed: int = 0) -> DataFrame:
    """The table with a seeded share of the train identities, at least 2, as val; itself where it has a val split.

    Raises ValueError where fewer than two identities would be left to train on.
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


def count_splits(annotations: DataFrame) -> DataFrame:
    """Images, captions and identities of each split that the table has, in the order train, val, test."""
    groups = annotations.groupby("split")
    counts = DataFrame(
        {
            "images": groups["image_id"].nunique(),
            "captions": groups.size(),
            "identities": groups["pid"].nunique(),
        }
    )
    return counts.reindex([split for split in SPLITS if split in counts.index])


def photo_table(annotations: DataFrame) -> DataFrame:
    """One row a photo (of its first caption), by image_id: the order of the decoded image array."""
    return annotations.drop_duplicates("image_id").sort_values("image_id")


def table_digest(annotations: DataFrame) -> str:
    """SHA-256 (hex) over each row's pid, image path below the common folder, caption and split: equal on any disk."""
    folder = common_folder(annotations["path"].unique().tolist())
    names = annotations["path"].str.slice(len(folder)).str.replace(os.sep, "/").str.lstrip("/")
    columns = (annotations["pid"], names, annotations["caption"], annotations["split"])
    return hashlib.sha256(json.dumps([column.tolist() for column in columns]).encode()).hexdigest()


def common_folder(paths: list[str]) -> str:
    """The deepest folder that holds all the files."""
    return os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else ""


def _refuse(file: Path, rows: _Rows) -> None:
    """Raise the one error for all bad records of an annotation file, if there are any."""
    if not rows.faults:
        return
    faults = [f"record {number}: {rows.faults[number]}" for number in sorted(rows.faults)]
    shown = "\n  ".join(faults[:SHOWN])
    more = f"\n  … and {len(faults) - SHOWN:,} more records" if len(faults) > SHOWN else ""
    raise ValueError(f"{_short(file)}, {shown}{more}")


def _short(file: Path) -> str:
    """The file as people call it: with its folder."""
    return f"{file.parent.name}/{file.name}"


def _shown(value: object) -> str:
    """The value as an error shows it: a long one cut."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '…'} ({type(value).__name__})"
