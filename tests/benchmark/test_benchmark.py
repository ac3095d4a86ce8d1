"""A result names its machine, keeps the rows of other works, and its table says what was not measured."""

import json

import pytest
import torch

from irra_core.benchmark import timing as benchmark
from irra_core.benchmark import workloads
from irra_core.benchmark.workloads import WORKS


@pytest.fixture
def result(monkeypatch):
    """Two quick works, shrunken."""
    monkeypatch.setenv("IRRA_SMOKE", "1")
    return benchmark.measure("rank+gpu", "cpu", repeats=2)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"work": "step+rnak"}, "work 'rnak' is unknown: did you mean 'rank'"),
        ({"device": "toaster"}, "device 'toaster' is unknown"),
        ({"device": "mps"}, "device 'mps' is not available here"),
        ({"repeats": 0}, "repeats is 0"),
    ],
)
def test_a_mistake_is_named_before_anything_is_measured(given, words):
    with pytest.raises(ValueError, match=words):
        benchmark.measure(**given)


def test_a_folder_that_is_no_clone_stops_the_benchmark(tmp_path):
    with pytest.raises(FileNotFoundError, match="no clone of the released code"):
        benchmark.measure("rank", official=tmp_path)


def test_a_result_holds_machine_limits_and_a_row_a_number(result):
    assert result["machine"]["threads"] >= 1
    assert result["limits"].keys() == {*workloads.precisions(torch.device("cpu")), "memory"}
    assert all(value > 1e7 for value in result["limits"].values())
    assert [row["work"] for row in result["rows"]] == ["rank"] + ["gpu"] * 5
    assert len(result["rows"][0]["ours"]["all"]) == 2
    assert result["shrunken"] is True


def test_the_table_says_what_was_not_measured(result):
    table = benchmark.speed_table(result)
    assert set(table.released) == {"not measured"}
    assert table.ours[0].endswith(")")
    assert set(table.ours[1:]) == {"not measured"}
    assert list(table.met) == [""] * 6
    assert table.target[0] == "≥ 2×"


def test_the_table_shows_ratio_verdict_and_share(result):
    row = result["rows"][0]
    row |= {"ours": {"min": 1.0, "median": 2.0, "max": 3.0}, "other": {"min": 7.0, "median": 8.0, "max": 9.0}}
    row |= {"ratio": 4.0, "met": True, "share_of_limit": 0.251}
    shown = benchmark.speed_table(result).iloc[0]
    assert list(shown[1:]) == ["2 s (1)", "8 s (7)", "4×", "≥ 2×", "yes", "25 % of memory"]
    row |= {"unit": "photos/s", "other_name": "Pillow alone", "met": False}
    shown = benchmark.speed_table(result).iloc[0]
    assert list(shown[1:4]) == ["2 photos/s (3)", "Pillow alone: 8 photos/s (9)", "4×"]
    assert shown.met == "no"
    ratios = benchmark.ratios(result)
    assert ratios[["ratio", "target"]].to_numpy().tolist() == [[4.0, 2.0]]


def test_a_saved_result_is_read_back_and_its_markdown_names_the_machine(result, tmp_path):
    benchmark.save_benchmark(result, tmp_path / "new")
    assert benchmark.load_benchmark(tmp_path / "new") == json.loads(json.dumps(result))
    assert benchmark.load_benchmark(tmp_path) is None
    text = (tmp_path / "new" / "benchmark.md").read_text()
    assert text.count("\n| ") == 7  # the rule and six rows, below the head
    assert result["machine"]["processor"] in text


def test_a_later_result_keeps_the_works_that_it_did_not_measure_on_the_same_machine_alone(result):
    earlier = json.loads(json.dumps(result))
    later = result | {"rows": [result["rows"][0] | {"unit": "new"}]}
    both = benchmark.merged(later, earlier)
    assert [row["unit"] for row in both["rows"]] == ["new"] + [row["unit"] for row in earlier["rows"][1:]]
    other = earlier | {"machine": earlier["machine"] | {"threads": 77}}
    assert benchmark.merged(later, other) == later
    assert benchmark.merged(later, None) == later


def test_every_work_of_the_default_is_known_and_the_long_one_is_not_in_it():
    assert set(benchmark.ON_REQUEST) < set(WORKS)


def test_the_parts_of_a_step_are_timed_and_add_up(monkeypatch):
    monkeypatch.setenv("IRRA_SMOKE", "1")
    table = benchmark.profile_step("cpu", repeats=1)
    assert tuple(table.precision.unique()) == workloads.precisions(torch.device("cpu"))
    table = table[table.precision == "fp32"]
    assert tuple(table.part) == benchmark.PARTS
    assert (table.seconds > 0).all()
    assert table.share.sum() == pytest.approx(100)
    assert table.set_index("part").seconds["backward"] > table.set_index("part").seconds["identities"]
