"""Comparing runs: the table of plain loops, intervals over seeds and identities, verdicts, costs."""

import json
import math
import statistics
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from pandas import DataFrame
from safetensors.torch import save_file
from test_metrics import slow_interval_of_runs

import irra_core as irra
from irra_core import runs
from irra_core.studies import comparison
from irra_core.studies.comparison import compare, verdict


def fake_run(folder: Path, hits, pids, hard, steps=10, training=5.0) -> str:
    """A folder with what `compare` reads: R@1 hits given, the other scores made of them."""
    folder.mkdir()
    values = 100.0 * np.asarray(hits)
    table = DataFrame({"pid": pids, "image_id": 0, "hard": hard, "R1": values})
    table.assign(R5=values, R10=100.0, AP=values / 2, INP=values / 4, rank=1).to_csv(folder / "queries.csv")
    save_file({"a": torch.zeros(3, 4), "b": torch.zeros(5)}, folder / runs.WEIGHTS)
    (folder / "machine.json").write_text(json.dumps({"seconds": {"training": training, "evaluation": 1.0}}))
    (folder / "recipe.json").write_text(json.dumps({"data": "", "recipe": json.loads(irra.recipe().to_json())}))
    DataFrame({"step": [steps]}).to_csv(folder / "history.csv")
    return str(folder)


PIDS = [1, 1, 2, 3, 3, 3]
HARD = [True, True, False, True, True, True]
HITS = {
    "sdm": [[1, 0, 1, 0, 1, 1], [1, 1, 1, 0, 0, 1]],
    "itc": [[0, 0, 1, 0, 1, 0], [1, 0, 0, 0, 0, 1]],
    "late": [[1, 1, 1, 1, 1, 1]],
}


@pytest.fixture
def finished(tmp_path) -> DataFrame:
    """Two variants with two seeds, one with its second seed alone, one that never ran."""
    rows = []
    for variant, hits in HITS.items():
        for seed, values in enumerate(hits, start=2 - len(hits)):
            path = fake_run(tmp_path / f"{variant}{seed}", values, PIDS, HARD, training=5.0 * (seed + 1))
            rows.append((variant, seed, path, "finished", ""))
    rows += [("late", 0, None, "failed", "ValueError: no"), ("never", 0, None, "not run", "fp16 needs a GPU")]
    return DataFrame(rows, columns=["variant", "seed", "path", "status", "error"])


@pytest.mark.parametrize("hard", [False, True, np.array(HARD)], ids=["all", "hard", "marked"])
def test_the_table_is_that_of_plain_loops(finished, hard):
    table = compare(finished, "sdm", hard=hard).set_index("variant")
    kept = [place for place in range(6) if HARD[place] or hard is False]
    means = {n: [100 * sum(row[i] for i in kept) / len(kept) for row in rows] for n, rows in HITS.items()}
    for name in ("sdm", "itc"):
        assert table.R1[name] == pytest.approx(statistics.mean(means[name]))
        assert table.R1_sd[name] == pytest.approx(statistics.stdev(means[name]))
        assert table.mAP[name] == pytest.approx(statistics.mean(means[name]) / 2)
    assert np.isnan(table.R1_sd["late"])
    difference = [[100.0 * (HITS["itc"][s][i] - HITS["sdm"][s][i]) for i in kept] for s in range(2)]
    assert table.R1_gain["itc"] == pytest.approx(np.mean(difference))
    low, high = slow_interval_of_runs(difference, [PIDS[i] for i in kept], 2000)
    assert (table.R1_gain_low["itc"], table.R1_gain_high["itc"]) == pytest.approx((low, high))
    assert table.mAP_gain["itc"] == pytest.approx(np.mean(difference) / 2)
    assert table.R1_gain["late"] == pytest.approx(means["late"][0] - means["sdm"][1])  # the seed that both have
    assert table.parameters["sdm"] == 17
    assert "step_seconds" not in table  # measured alone, never taken from runs that shared a machine


NOISE = {  # method, share of wrong captions → hits of seeds 0 and 1
    "irra, 0 % wrong": [[1, 1, 1, 0, 1, 1], [1, 1, 1, 1, 0, 1]],
    "irra, 20 % wrong": [[1, 0, 1, 0, 1, 1], [1, 1, 0, 0, 0, 1]],
    "irra, 50 % wrong": [[0, 0, 1, 0, 0, 1], [1, 0, 0, 0, 0, 0]],
    "rde, 0 % wrong": [[1, 1, 0, 0, 1, 1], [1, 1, 1, 0, 0, 1]],
    "rde, 20 % wrong": [[1, 1, 0, 0, 1, 1], [1, 1, 1, 0, 0, 0]],
    "rde, 50 % wrong": [[1, 0, 0, 0, 1, 1], [0, 1, 1, 0, 0, 0]],
}


def noise_runs(folder: Path, absent=()) -> DataFrame:
    """The finished runs of NOISE, but for the given variants and seeds."""
    rows = []
    for number, (variant, hits) in enumerate(NOISE.items()):
        for seed, values in enumerate(hits):
            gone = (variant, seed) in absent
            path = None if gone else fake_run(folder / f"{number}-{seed}", values, PIDS, HARD)
            rows.append((variant, seed, path, "not run" if gone else "finished", ""))
    return DataFrame(rows, columns=["variant", "seed", "path", "status", "error"])


def slow_difference(share, seeds):
    """Per seed and query, in per cent: what rde changes with wrong captions less what irra changes."""
    rows = []
    for seed in seeds:
        row = []
        for query in range(len(PIDS)):
            ours = NOISE[f"rde, {share} % wrong"][seed][query] - NOISE["rde, 0 % wrong"][seed][query]
            theirs = NOISE[f"irra, {share} % wrong"][seed][query] - NOISE["irra, 0 % wrong"][seed][query]
            row.append(100.0 * (ours - theirs))
        rows.append(row)
    return rows


def test_the_difference_of_drops_and_its_interval_are_those_of_plain_loops(tmp_path):
    table = comparison.compare_drops(noise_runs(tmp_path), "rde", "irra").set_index("condition")
    assert table.index.tolist() == ["20 % wrong", "50 % wrong"]
    assert table.seeds.tolist() == [2, 2]
    for share in (20, 50):
        difference, row = slow_difference(share, (0, 1)), table.loc[f"{share} % wrong"]
        mean = sum(map(sum, difference)) / (2 * len(PIDS))
        low, high = slow_interval_of_runs(difference, PIDS, 2000)
        assert (row.R1_gain, row.R1_gain_low, row.R1_gain_high) == pytest.approx((mean, low, high))
        assert (row.mAP_gain, row.mAP_gain_low, row.mAP_gain_high) == pytest.approx((mean / 2, low / 2, high / 2))
    shown = comparison.readable_drops(table.reset_index(), "rde", "irra")
    mean = sum(map(sum, slow_difference(50, (0, 1)))) / (2 * len(PIDS))
    assert shown.loc["50 % wrong", "R1, rde less irra"].startswith(f"{mean:+.1f} [")


def test_the_difference_of_drops_is_over_the_seeds_that_all_four_runs_have(tmp_path):
    absent = [("irra, 0 % wrong", 1), ("rde, 20 % wrong", 0)]
    finished = noise_runs(tmp_path, absent)
    table = comparison.compare_drops(finished, "rde", "irra").set_index("condition")
    assert table.seeds.tolist() == [0, 1]
    assert np.isnan(table.R1_gain["20 % wrong"])
    assert table.R1_gain["50 % wrong"] == pytest.approx(np.mean(slow_difference(50, (0,))))
    assert comparison.readable_drops(table.reset_index(), "rde", "irra").iloc[0].tolist() == ["", "", 0]
    assert comparison.compare_drops(finished[finished.variant.str.startswith("irra")], "rde", "irra").empty
    own = compare(finished[finished.variant.str.startswith("rde")], "rde, 0 % wrong")
    assert own.seeds.tolist() == [2, 1, 2]


@pytest.mark.parametrize("study", ["noise", "plugins"])
def test_the_notebooks_cell_shows_the_drops_of_a_study_of_which_some_runs_finished(study, tmp_path):
    """The shrunken study of `make notebooks` has no run of RDE."""
    finished = noise_runs(tmp_path, [("irra, 50 % wrong", 0), ("irra, 50 % wrong", 1), ("rde, 20 % wrong", 0)])
    finished = finished if study == "noise" else finished.assign(variant="rde")
    cells = nbformat.read(Path(__file__).parents[2] / "notebooks" / "ablation.ipynb", 4).cells
    (source,) = (cell.source for cell in cells if "compare_drops" in cell.source)
    shown: list[DataFrame] = []
    names = {"planned": finished, "finished": finished, "comparison": comparison, "display": lambda *a: shown.extend(a)}
    exec(source, names)
    rows = [["rde, 0 % wrong", "rde, 20 % wrong", "rde, 50 % wrong"], ["20 % wrong", "50 % wrong"]]
    assert [table.index.tolist() for table in shown] == (rows if study == "noise" else [])
    assert list(names["drops"]) == (["rde", "drops"] if study == "noise" else [])


def test_what_did_not_run_stays_in_the_table_and_says_why(finished):
    table = compare(finished, "sdm")
    assert list(table.variant) == ["sdm", "itc", "late", "never"]
    assert list(table.seeds) == [2, 2, 1, 0]
    assert table.status[2:].tolist() == ["1 of 2 finished: ValueError: no", "not run: fp16 needs a GPU"]
    shown = comparison.readable(table)
    assert shown.loc["never", "R1 (%)"] == "not run"
    assert shown.loc["sdm", "R1 against sdm"] == "reference"
    assert shown.loc["itc", "R1 (%)"] == "33.3 ± 0.0"
    assert verdict(table.iloc[3]) == "never: not run: fp16 needs a GPU"


def test_the_width_of_the_intervals_says_what_stays_undecided(finished):
    table = compare(finished, "sdm")
    half = [(row.R1_gain_high - row.R1_gain_low) / 2 for row in table[table.variant.isin(["itc", "late"])].itertuples()]
    said = comparison.power(table)
    assert said.startswith(f"Intervals of gains in R@1: ±{min(half):.1f} to ±{max(half):.1f} points; ")
    assert said.endswith("One seed each: how much other seeds differ is not known.")  # as few as any variant has
    assert "One seed" not in comparison.power(table[table.variant != "late"])
    assert comparison.power(table[table.variant == "sdm"]) == "Nothing was compared, so nothing is decided."


def test_without_known_twins_the_hard_table_says_that_there_are_none(finished):
    for path in finished.path.dropna():
        pd.read_csv(Path(path) / "queries.csv").assign(hard=False).to_csv(Path(path) / "queries.csv")
    table = compare(finished, "sdm", hard=True)
    assert table.R1.isna().all()
    assert table.status[0] == "not available: no query is marked as hard"


def test_the_inflation_is_what_the_test_scores_of_both_picks_differ_by(finished):
    folder = {name: Path(finished[finished.variant == name].path.iloc[1]) for name in ("sdm", "itc")}
    DataFrame({"step": [5, 10, 15], "test_R1": [40.0, 47.0, 44.0]}).to_csv(folder["itc"] / "history.csv")
    for name, step in (("sdm", 15), ("itc", 10)):
        (folder[name] / "metrics.json").write_text(json.dumps({"selected": {"on": "", "step": step}}))
    found = comparison.selection_inflation(finished[finished.seed == 1], "sdm", "itc")
    assert found.to_dict("list") == {
        "seed": [1], "evaluations": [3], "val_step": [15], "test_step": [10],
        "picked_on_val": [44.0], "picked_on_test": [47.0], "inflation": [3.0],
    }  # fmt: skip


def test_hard_queries_are_those_of_twins_or_those_that_read_most_like_another_persons(tmp_path):
    made = irra.recipe()
    irra.make_synthetic(tmp_path, people=16)
    table = irra.load_annotations("synthetic", tmp_path)
    twins = irra.synthetic.near_twins(table)
    assert comparison.hard_queries(table, made).tolist() == [
        bool(twins[pid]) for pid in table[table.split == "test"].pid
    ]

    test = table[table.split == "test"]
    plain = str.maketrans(dict.fromkeys(",.-'", " "))
    words = [set(caption.lower().translate(plain).split()) for caption in test.caption]
    weight = {w: math.log(len(words) / sum(w in other for other in words)) for w in set().union(*words)}
    length = [math.sqrt(sum(weight[w] ** 2 for w in own)) for own in words]
    likeness = [
        max(
            sum(weight[w] ** 2 for w in words[i] & words[j]) / (length[i] * length[j])
            for j in range(len(words))
            if test.pid.iloc[i] != test.pid.iloc[j]
        )
        for i in range(len(words))
    ]
    assert comparison._likeness(list(test.caption), test.pid.to_numpy(), chunk=7) == pytest.approx(likeness, abs=1e-5)
    found = comparison.hard_queries(table, irra.recipe("rstp", backbone="small"), share=0.25)
    assert likeness[int(np.argmax(likeness))] == max(value for value, hard in zip(likeness, found) if hard)
    assert min(np.array(likeness)[found]) >= max(np.array(likeness)[~found])
    assert len(found) / 4 <= found.sum() <= len(found) / 2


def test_runs_on_other_queries_and_unknown_references_are_refused(finished):
    with pytest.raises(ValueError, match=r"reference 'smd' is unknown: did you mean 'sdm'"):
        compare(finished, "smd")
    path = Path(finished.path[2])
    pd.read_csv(path / "queries.csv").assign(pid=9).to_csv(path / "queries.csv")
    with pytest.raises(ValueError, match="itc and sdm have different queries"):
        compare(finished, "sdm")


@pytest.mark.parametrize(
    ("gain", "seeds", "words"),
    [
        ((2.1, 0.6, 3.7), 3, "sdm beats itc by 2.1 [0.6, 3.7]"),
        ((-2.1, -3.7, -0.6), 3, "itc beats sdm by 2.1 [0.6, 3.7]"),
        ((0.4, -1.2, 2.0), 3, "undecided: sdm against itc +0.4 [-1.2, 2.0]"),
        ((2.1, 0.6, 3.7), 1, "sdm beats itc by 2.1 [0.6, 3.7] (one seed: other seeds may differ more)"),
        ((float("nan"),) * 3, 1, "sdm: no run of itc with the same seed to compare with"),
    ],
)
def test_the_verdict_names_a_winner_only_outside_the_interval(gain, seeds, words):
    row = {"variant": "sdm", "reference": "itc", "status": "finished", "seeds": seeds}
    assert verdict(row | dict(zip(("R1_gain", "R1_gain_low", "R1_gain_high"), gain))) == words
