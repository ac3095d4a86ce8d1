"""checks.py: every finding about a table and its image files, and the published sizes."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_annotations import QUIRKS, draw, own, people, records, write

from irra_core.analysis.checks import PUBLISHED_COUNTS, check_annotations, count_splits
from irra_core.annotations import load_annotations


def findings(table: pd.DataFrame, **options) -> dict[str, tuple[str, str, int]]:
    """What check_annotations finds: finding → severity, where, count."""
    rows = check_annotations(table, **options)
    assert list(rows.columns) == ["severity", "finding", "where", "count"]
    order = [("error", "warning", "note").index(severity) for severity in rows["severity"]]
    assert order == sorted(order)
    return {row.finding: (row.severity, row.where, row.count) for row in rows.itertuples(index=False)}


def test_a_sound_table_has_no_findings(tmp_path):
    write(tmp_path, "cuhk", records("cuhk"))
    assert findings(load_annotations("cuhk", tmp_path)) == {}


def test_all_findings_are_listed_at_once(tmp_path):
    content = records("cuhk")
    content[0]["captions"] = ["", "same words", "Same words "]
    content[2]["captions"] = ["same words"]
    content[4]["id"] = 1  # so that person 3 has one image, and person 1 a third
    content[6]["split"] = "test"  # and is trained on
    content.append(content[9] | {"id": 99})
    file = write(tmp_path, "cuhk", content)
    folder = file.parent / "imgs"
    paths = {number: folder / content[number]["file_path"] for number in range(len(content))}
    paths[10].unlink()
    paths[11].write_bytes(b"")
    paths[12].write_bytes(paths[12].read_bytes()[:45])
    paths[13].write_text("no image")
    paths[14].write_bytes(paths[15].read_bytes())
    paths[8].write_bytes(paths[7].read_bytes())
    draw(tmp_path / "outside.png", 999)
    paths[3].unlink()
    paths[3].symlink_to(tmp_path / "outside.png")
    found = findings(load_annotations("cuhk", tmp_path))
    severities = {finding: severity for finding, (severity, _, _) in found.items()}
    assert severities == {
        "the same identity in two splits": "error",
        "the same image under two identities": "error",
        "an image file is missing": "error",
        "an image file cannot be read: copy it again, or drop its record": "error",
        "one photo under two identities": "error",
        "one photo under two names": "warning",
        "an empty caption": "warning",
        "a caption twice for the same image": "warning",
        "a link that leads out of the image folder": "warning",
        "an identity with one image": "note",
        "one caption for several identities: no model can tell them apart": "note",
    }
    assert found["the same identity in two splits"][1:] == ("pid 4", 1)
    assert found["an image file is missing"][1:] == (str(paths[10]), 1)
    where, count = found["an image file cannot be read: copy it again, or drop its record"][1:]
    assert count == 3
    assert all(
        text in where
        for text in ("0 bytes", f"{paths[12]}: ", "(45 bytes)", f"{paths[13]}: its content is no image (8 bytes)")
    )
    assert found["one photo under two names"][1:] == (f"{paths[14]} = {paths[15]}", 1)
    assert found["a link that leads out of the image folder"][1:] == (str(paths[3]), 1)
    assert found["an empty caption"][1:] == (str(paths[0]), 1)
    assert found["an identity with one image"][1:] == ("pid 3, pid 99", 2)


def test_without_reading_only_missing_and_empty_files_are_found(tmp_path):
    content = records("rstp")
    file = write(tmp_path, "rstp", content)
    paths = [file.parent / "imgs" / record["img_path"] for record in content]
    paths[0].unlink()
    paths[1].write_bytes(b"")
    paths[2].write_text("no image")
    found = findings(load_annotations("rstp", tmp_path), read_images=False)
    assert {finding: count for finding, (_, _, count) in found.items()} == {
        "an image file is missing": 1,
        "an image file cannot be read: copy it again, or drop its record": 1,
    }


def test_a_decompression_bomb_is_a_finding_and_no_warning(tmp_path, recwarn):
    content = people(4, split="test")
    dataset = own(tmp_path, content)
    Image.new("1", (12_000, 12_000)).save(tmp_path / "b.png")
    found = findings(load_annotations(dataset))
    severity, where, count = found["an image file cannot be read: copy it again, or drop its record"]
    assert (severity, count) == ("error", 1)
    assert "decompression bomb" in where
    assert not recwarn.list


def test_only_the_formats_that_training_reads_are_opened(tmp_path):
    dataset = own(tmp_path, people(4, split="test"))
    Image.new("RGB", (4, 12)).save(tmp_path / "b.png", format="EPS")  # Pillow would hand it to Ghostscript
    found = findings(load_annotations(dataset))
    assert "no image" in found["an image file cannot be read: copy it again, or drop its record"][1]


def test_missing_splits_are_found(tmp_path):
    found = findings(load_annotations(own(tmp_path, people(1, split="test"))))
    assert found["a split with one identity"] == ("error", "test", 1)
    assert found["a split without rows"] == ("warning", "train", 1)
    assert found["no val split: train identities are held out"][0] == "note"


def paper_sized(dataset: str) -> pd.DataFrame:
    """A table with exactly the published numbers, its one file imaginary."""
    parts, first, seen = [], 0, 0
    for split, counts in PUBLISHED_COUNTS[dataset].items():
        numbers = np.arange(counts["captions"]) % counts["images"]
        part = {"pid": first + numbers % counts["identities"], "image_id": seen + numbers, "split": split}
        parts.append(pd.DataFrame(part))
        first, seen = first + counts["identities"], seen + counts["images"]
    table = pd.concat(parts, ignore_index=True)
    return table.assign(path="/nowhere/imgs/a.png", caption="caption " + table.index.astype(str))


@pytest.mark.parametrize("dataset", QUIRKS)
def test_sizes_are_compared_with_the_published_ones(dataset):
    table = paper_sized(dataset)
    found = findings(table, dataset=dataset, read_images=False)
    assert f"sizes are those published of {dataset}" in found
    assert f"sizes differ from those published of {dataset}" not in found
    found = findings(table.iloc[1:], dataset=dataset, read_images=False)
    severity, where, count = found[f"sizes differ from those published of {dataset}"]
    captions = PUBLISHED_COUNTS[dataset]["train"]["captions"]
    assert severity == "warning"
    assert f"train captions: {captions - 1:,}, published {captions:,}" in where
    assert count == (2 if dataset == "icfg" else 1)  # with one caption an image, its image is gone too
    assert f"sizes are those published of {dataset}" not in found


def test_published_counts_are_those_of_the_papers():
    assert set(PUBLISHED_COUNTS) == {*QUIRKS, "UFine6926", "UFine3C"}
    ufine = PUBLISHED_COUNTS["UFine6926"].values()
    totals = [sum(counts[what] for counts in ufine) for what in ("images", "captions", "identities")]
    assert totals == [26_206, 52_412, 6_926]
    assert sum(counts["images"] for counts in PUBLISHED_COUNTS["cuhk"].values()) == 40_206
    assert sum(counts["identities"] for counts in PUBLISHED_COUNTS["cuhk"].values()) == 13_003
    assert sum(counts["images"] for counts in PUBLISHED_COUNTS["icfg"].values()) == 54_522
    assert sum(counts["identities"] for counts in PUBLISHED_COUNTS["icfg"].values()) == 4_102
    assert sum(counts["images"] for counts in PUBLISHED_COUNTS["rstp"].values()) == 20_505
    assert sum(counts["identities"] for counts in PUBLISHED_COUNTS["rstp"].values()) == 4_101


def test_splits_are_counted_as_sets_are(tmp_path):
    write(tmp_path, "cuhk", records("cuhk"))
    table = load_annotations("cuhk", tmp_path)
    counts = count_splits(table)
    assert list(counts.index) == ["train", "val", "test"]
    for split, row in counts.iterrows():
        rows = [record for record in records("cuhk") if record["split"] == split]
        assert row["captions"] == sum(len(record["captions"]) for record in rows)
        assert row["images"] == len({record["file_path"] for record in rows})
        assert row["identities"] == len({record["id"] for record in rows})


def test_the_sizes_of_a_set_without_a_name_are_found_by_its_file(tmp_path):
    table = paper_sized("UFine3C")
    found = findings(table, dataset=str(tmp_path / "ufine3c.json"), read_images=False)
    assert any(finding.startswith("sizes are those published of") for finding in found)
    found = findings(table.iloc[1:], dataset=str(tmp_path / "UFine3C.json"), read_images=False)
    assert any("test captions: 37,938, published 37,939" in where for _, where, _ in found.values())
