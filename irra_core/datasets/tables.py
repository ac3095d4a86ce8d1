"""A CSV or Parquet file of your own, one row per caption → records in the schema of the official data sets."""

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from irra_core.annotations import named, shown

COLUMNS = ("path", "caption", "id", "split")  # the last is optional; other columns are ignored
SURE_ROWS = 100_000  # of a Parquet file, which may hold any number in a few bytes; more need a byte each


def read_table(file: Path) -> Iterator[dict[str, Any] | ValueError]:
    """Yields the record of each row, or a ValueError with the reason if the row is malformed.

    Raises ValueError if the file is damaged or lacks a column.
    """
    is_csv = file.suffix.lower() == ".csv"
    for row in _read_csv(file) if is_csv else _read_parquet(file):
        if is_csv and (None in row or None in row.values()):  # DictReader's marks for too many and too few cells
            wrong = "more" if None in row else "fewer"
            yield ValueError(f"has {wrong} cells than the first line: write a sentence with commas in double quotes")
        elif not isinstance(row["path"], str):
            yield ValueError(f"path is {shown(row['path'])}: expected is the path of an image")
        else:
            split = row.get("split", "")
            yield {"file_path": row["path"], "captions": [row["caption"]], "id": row["id"], "split": split}


def _read_csv(file: Path) -> list[dict[str | None, Any]]:
    """The rows of a CSV file, every cell as text. pandas would shift or drop cells of a row that has too many."""
    reader = csv.DictReader(io.StringIO(read_text(file), newline=""), strict=True)
    limit = csv.field_size_limit(2**31 - 1)  # the default, 131,072 characters per cell, is too small for some captions
    try:
        _check_columns(file, reader.fieldnames or [])
        return list(reader)
    except csv.Error as error:
        remedy = "write a sentence in double quotes, and double the quotes inside"
        raise ValueError(f"{named(file)}, after line {reader.line_num}: {error}: {remedy}") from None
    finally:
        csv.field_size_limit(limit)


def _read_parquet(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, a few thousand in memory at a time; a null split becomes an empty text."""
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(file, page_checksum_verification=True) as opened:
            columns, count = opened.schema_arrow.names, opened.metadata.num_rows
            table = None
            if count <= max(SURE_ROWS, file.stat().st_size):
                table = opened.read([name for name in COLUMNS if name in columns])
                table.validate(full=True)  # else a text that is not UTF-8 is noticed later, without the file's name
    except (ArrowException, ValueError, OSError, KeyError) as error:
        raise ValueError(f"{named(file)} is no readable Parquet file ({error}): copy or write it again") from None
    _check_columns(file, columns)
    if table is None:
        raise ValueError(
            f"{named(file)} has {count:,} rows in {file.stat().st_size:,} bytes: so few bytes hold no sentences of so "
            "many photos. Write it again, or, if it is right, as a CSV file"
        )
    return _parquet_rows(table)


def _parquet_rows(table) -> Iterator[dict[str, Any]]:
    """Yields the rows of an Arrow table."""
    for batch in table.to_batches(max_chunksize=4096):
        for row in batch.to_pylist():
            yield row | {"split": "" if pd.isna(row.get("split")) else row["split"]}


def _check_columns(file: Path, columns: Sequence[str]) -> None:
    """Raise ValueError for a table that lacks a required column, or has one of COLUMNS twice."""
    for column in COLUMNS:
        if (times := columns.count(column)) > 1:
            raise ValueError(f"{named(file)}: column {column!r} is there {times} times: keep one of them")
        if times == 0 and column != "split":
            raise ValueError(
                f"{named(file)}: column {column!r} is missing: it has {shown(columns)}; expected are path, caption, id "
                "and, optionally, split (in a CSV file separated by commas)"
            )


def read_text(file: Path) -> str:
    """The text of a UTF-8 file, without a byte-order mark."""
    content = file.read_bytes()
    if not content.strip():
        raise ValueError(f"{named(file)} is empty ({len(content)} bytes): copy it again")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = f"byte {error.start:,} is 0x{content[error.start]:02x}"
        raise ValueError(f"{named(file)} is not UTF-8 text: {byte}: save it as UTF-8") from None
