"""tables.py: own CSV and Parquet files, sound and damaged, give the table that JSON gives, or one error."""

import csv
import json

import pandas as pd
import pyarrow.parquet
import pytest
from test_annotations import own, people, table_of

from irra_core.annotations import load_annotations


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


def test_a_parquet_file_whose_index_is_not_in_it_is_refused_by_name(tmp_path):
    own(tmp_path, people(3))
    about = json.dumps({"index_columns": ["nope"], "columns": [], "column_indexes": []})
    table = pyarrow.Table.from_pandas(table_of(people(3)), preserve_index=False)
    pyarrow.parquet.write_table(table.replace_schema_metadata({"pandas": about}), tmp_path / "own.parquet")
    with pytest.raises(ValueError, match=r"/own\.parquet is no readable Parquet file .*'nope'"):
        load_annotations(tmp_path / "own.parquet")
