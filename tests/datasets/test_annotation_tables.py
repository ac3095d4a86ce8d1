"""tables.py: own CSV and Parquet files, sound and damaged, give the table that JSON gives, or one error."""

import csv
import json

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
from test_annotations import own, people, table_of

from irra_core.annotations import load_annotations
from irra_core.datasets.tables import read_table


def test_csv_and_parquet_give_the_table_that_json_gives(tmp_path):
    content = [r | {"captions": ['a "red" coat, blue\njeans', "ünïcode, NA"]} for r in people(12)]
    expected = load_annotations(own(tmp_path, content))
    table = table_of(content)
    table.to_csv(tmp_path / "own.csv", index=False)
    table.reset_index(drop=True).to_parquet(tmp_path / "own.parquet")
    for name in ("own.csv", "own.parquet"):
        pd.testing.assert_frame_equal(load_annotations(tmp_path / name), expected)
    table.assign(split=["train", "test"] * 12, more=1).to_csv(tmp_path / "split.csv", index=False)
    assert load_annotations(tmp_path / "split.csv")["split"].tolist() == ["train", "test"] * 12


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_split_column_without_an_entry_splits_nothing(suffix, tmp_path):
    own(tmp_path, people(12))
    table = table_of(people(12)).assign(split=None)
    getattr(table, f"to_{suffix}")(tmp_path / f"x.{suffix}", index=False)
    assert set(load_annotations(tmp_path / f"x.{suffix}")["split"]) == {"train", "val", "test"}


def test_bad_rows_of_a_csv_are_refused_at_once(tmp_path):
    text = "path,caption,id,split\na.png,a man, tall,1,test\nb.png,a man,1,test\nc.png,a man\nd.png,x,,test\n"
    with pytest.raises(ValueError, match=r"record 1: has more (?s:.*)record 3: has fewer (?s:.*)record 4: id is empty"):
        load_annotations(own(tmp_path, text, "own.csv"))


BAD_TABLES = {
    "no column caption": ("path,id\na.png,1\n", "column 'caption' is missing: it has .*'path', 'id'"),
    "a column twice": ("path,caption,id,split,split\na.png,x,1,test,train\n", "column 'split' is there 2 times"),
    "semicolons": ("path;caption;id\na.png;a man;1\n", "column 'path' is missing.*separated by commas"),
    "a comma too many": ("path,caption,id\na.png,a man, tall,1\n", "record 1: has more cells"),
    "a cell too few": ("path,caption,id\na.png,a man,1\nb.png,a man\n", "record 2: has fewer cells"),
    "a quote without end": ('path,caption,id\na.png,"a man,1\n', "after line 1: unexpected end"),
    "an empty id": ("path,caption,id\na.png,a man,\n", "record 1: id is empty"),
    "an empty path": ("path,caption,id,split\na.png,x,1,test\n,a man,1,test\n", "record 2: path ''"),
    "no rows": ("path,caption,id\n", "has no records"),
    "a split left out": ("path,caption,id,split\na.png,x,1,test\nb.png,x,1,\n", "record 2: field 'split' is missing"),
    "a misspelt split": ("path,caption,id,split\na.png,x,1,Test\n", "record 1: split 'Test' is unknown"),
    "nothing": ("", "is empty"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_a_damaged_csv_file_is_refused_by_name(case, tmp_path):
    content, message = BAD_TABLES[case]
    with pytest.raises(ValueError, match=rf"(?s)/own\.csv.*{message}"):
        load_annotations(own(tmp_path, content, "own.csv"))


def test_a_csv_caption_of_two_hundred_thousand_letters_is_read_and_the_limit_of_others_stays(tmp_path):
    limit = csv.field_size_limit()
    text = "path,caption,id,split\n" + "".join(f"{x}.png,{'word ' * 40_000},{x},test\n" for x in "abc")
    assert load_annotations(own(tmp_path, text, "own.csv"))["caption"].str.len().tolist() == [200_000] * 3
    assert csv.field_size_limit() == limit


def test_a_damaged_parquet_file_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"/own\.parquet is no readable Parquet file"):
        load_annotations(own(tmp_path, b"PAR1 not really", "own.parquet"))
    table_of(people(3)).assign(id=[1.0, None, 2.0]).to_parquet(tmp_path / "own.parquet", index=False)
    with pytest.raises(ValueError, match=r"record 1: id is 1\.0 \(float\)"):
        load_annotations(tmp_path / "own.parquet")
    table_of(people(3)).assign(caption=["x", None, "y"]).to_parquet(tmp_path / "own.parquet", index=False)
    with pytest.raises(ValueError, match=r"record 2: caption is (None|nan)"):
        load_annotations(tmp_path / "own.parquet")


def test_what_pandas_noted_about_a_parquet_file_changes_nothing(tmp_path):
    own(tmp_path, people(6))
    about = json.dumps({"index_columns": ["nope"], "columns": [], "column_indexes": []})
    table = pyarrow.Table.from_pandas(table_of(people(6)), preserve_index=False)
    pyarrow.parquet.write_table(table, tmp_path / "plain.parquet")
    pyarrow.parquet.write_table(table.replace_schema_metadata({"pandas": about}), tmp_path / "noted.parquet")
    table_of(people(6)).set_index("path").to_parquet(tmp_path / "indexed.parquet")
    plain, *others = (load_annotations(tmp_path / f"{name}.parquet") for name in ("plain", "noted", "indexed"))
    assert len(plain) == 6
    for other in others:
        pd.testing.assert_frame_equal(other, plain)


def test_a_parquet_file_of_a_million_rows_in_few_bytes_is_refused_without_reading_them(tmp_path):
    own(tmp_path, people(12))
    count = 1_000_000
    columns = {"path": ["a.png"] * count, "caption": ["a man"] * count, "id": np.zeros(count, int)}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet")
    assert (tmp_path / "x.parquet").stat().st_size < 50_000
    before = pyarrow.total_allocated_bytes()
    pool = pyarrow.default_memory_pool()
    with pytest.raises(ValueError, match=r"x\.parquet has 1,000,000 rows in .* bytes: .* as a CSV file"):
        load_annotations(tmp_path / "x.parquet")
    assert pool.bytes_allocated() == before
    columns = {name: values[:100_000] for name, values in columns.items()}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet")
    assert sum(1 for _ in read_table(tmp_path / "x.parquet")) == 100_000


def test_a_text_in_a_parquet_file_that_is_not_utf_8_names_the_file(tmp_path):
    own(tmp_path, people(12))
    table = table_of(people(12)).reset_index(drop=True)
    table.assign(caption="a man in MARK").to_parquet(tmp_path / "x.parquet", compression=None)
    content = (tmp_path / "x.parquet").read_bytes()
    assert b"MARK" in content
    (tmp_path / "x.parquet").write_bytes(content.replace(b"MARK", b"\xff\xfe\xfd\xfc"))
    with pytest.raises(ValueError, match=r"x\.parquet is no readable Parquet file .*UTF8.*: copy or write it again"):
        load_annotations(tmp_path / "x.parquet")


def test_an_error_of_arrow_that_is_no_value_error_names_the_file(tmp_path, monkeypatch):
    own(tmp_path, people(12))
    table_of(people(12)).reset_index(drop=True).to_parquet(tmp_path / "x.parquet")

    def refuse(*_, **__):
        raise pyarrow.ArrowNotImplementedError("Unsupported encoding")

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "read", refuse)
    with pytest.raises(ValueError, match=r"x\.parquet is no readable Parquet file \(Unsupported encoding\)"):
        load_annotations(tmp_path / "x.parquet")
