"""Verdicts: p-values of plain loops, Holm's steps by their definition, a table from committed runs alone."""

import csv
import dataclasses
import gzip
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_committed import made_run

from irra_core.studies import committed, grid, sizes, transfer, verdicts
from irra_core.studies.comparison import compare

PEOPLE, EACH = 405, 4
REPORTS = Path(__file__).resolve().parents[2] / "reports" / "example" / "studies"


def slow_bootstrap(values, people, draws, seed):
    """Means over drawn seeds and drawn people with all their queries, one draw at a time."""
    random, values, people = np.random.default_rng(seed), np.asarray(values), np.asarray(people)
    known = np.unique(people)
    sums = np.array([[row[people == each].sum() for each in known] for row in values])
    counts = np.array([(people == each).sum() for each in known])
    means = []
    for _ in range(draws):
        who, which = random.integers(len(known), size=len(known)), random.integers(len(values), size=len(values))
        means.append(sums[which][:, who].sum() / (len(which) * counts[who].sum()))
    return np.array(means)


@pytest.mark.parametrize("shift", [0.0, 4.0, -9.0])
def test_interval_and_p_are_those_of_a_bootstrap_in_plain_loops(shift):
    random = np.random.default_rng(3)
    people = np.repeat(np.arange(60), random.integers(1, 6, size=60))
    values = random.normal(size=(3, len(people))) * 30 + random.normal(size=60)[people] * 15 + shift
    gain, low, high, p = verdicts.paired_bootstrap(values, people)
    means = slow_bootstrap(values, people, 4000, seed=8)
    assert gain == pytest.approx(sum(map(sum, values.tolist())) / values.size)
    assert [low, high] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.1 * (high - low))
    assert p == pytest.approx(min(1.0, 2 * min((means <= 0).mean(), (means >= 0).mean())), abs=0.03)
    assert (p < 0.05) == (low > 0 or high < 0)


def test_no_gain_at_all_has_p_one_and_the_least_p_is_not_zero():
    people = np.arange(30)
    assert verdicts.paired_bootstrap(np.zeros((2, 30)), people)[3] == 1.0
    assert verdicts.paired_bootstrap(np.full((2, 30), 100.0), people)[3] == pytest.approx(2 / 10_001)


def test_holm_steps_down_as_its_definition_says():
    assert verdicts.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    random = np.random.default_rng(0)
    for _ in range(50):
        p = (random.random(5) ** 3).tolist()
        slow = [min(1.0, max((5 - sum(q < r for q in p)) * r for r in p if r <= each)) for each in p]
        assert verdicts.holm(p) == pytest.approx(slow)


@pytest.mark.parametrize(
    ("gain", "p", "said"),
    [(2.0, 0.01, "supported"), (-2.0, 0.01, "contradicted"), (2.0, 0.05, "undecided"), (-0.1, 0.9, "undecided")],
)
def test_a_verdict_follows_from_direction_and_adjusted_p(gain, p, said):
    assert verdicts.decided(gain, p) == said


def ranks_of(level: float, seed: int) -> np.ndarray:
    """Ranks of which about this share are 1."""
    random = np.random.default_rng(seed)
    return np.where(random.random(PEOPLE * EACH) < level, 1, random.integers(2, 40, size=PEOPLE * EACH))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Committed runs, with two seeds, of what the hypotheses of rq1, rq2 and rq5 compare; nothing of rq3 and rq4."""
    base = tmp_path_factory.mktemp("small")
    levels = {"sdm+id+mlm": 0.5, "sdm+id": 0.5, "sdm": 0.3, "itc": 0.6}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sizes.SIZES, "small", sizes.SIZES["small"] | {"seeds": 2})
        plans = {name: grid.plan(name, **sizes.sized("small")) for name in ("rq1", "rq2")}
        for name, planned in plans.items():
            for row in planned[planned.variant.isin(levels)].itertuples():
                folder = base / f"{name}-{row.variant}-{row.seed}"
                ranks = ranks_of(levels[row.variant], 10 * row.seed + len(row.variant))
                committed.export_run(made_run(folder, row.recipe, ranks), base / "runs")
        names = sizes.domains("small")
        for place, row in enumerate(grid.plan_transfer(names, seeds=2, epochs=1, max_steps=150).itertuples()):
            kept = made_run(base / f"transfer-{row.variant}-{row.seed}", row.recipe, ranks_of(0.5, 50 + place))
            for test in names:
                for before in (True, False) if test == row.variant else (False,):
                    level = 0.5 if before or test == row.variant else 0.52
                    other = made_run(base / "aside" / f"{place}{test}{before}", row.recipe,
                                     ranks_of(level, 90 + 7 * place + names.index(test)))  # fmt: skip
                    queries = pd.read_csv(other / "queries.csv")
                    committed.write_ranks(transfer.results_file(kept, test, before), queries)
            committed.export_run(kept, base / "runs")
        yield base / "runs"


def test_the_table_says_what_is_decided_what_is_not_and_what_was_not_run(small):
    table = verdicts.verdict_table("small", root=small).set_index("question")
    assert table.verdict.to_dict() == {
        "rq1": "undecided", "rq2": "contradicted", "rq3": "not run", "rq4": "not run", "rq5": table.verdict["rq5"]
    }  # fmt: skip
    assert (table.seeds["rq1"], table.people["rq1"], table["queries"]["rq1"]) == (2, PEOPLE, PEOPLE * EACH)
    assert table.people["rq5"] == 3 * PEOPLE
    p = [1.0 if np.isnan(each) else each for each in table.p]
    assert table.p_holm["rq2"] == pytest.approx(verdicts.holm(p)[1])
    assert (table.half_width / (table.high - table.low)).dropna().tolist() == pytest.approx([0.5] * 3)
    assert table.hours["rq2"] == pytest.approx(4 * 6 / 3600)
    assert table.command["rq2"] == "papermill notebooks/ablation.ipynb out.ipynb -p study rq2 -p size small"
    shown = verdicts.to_markdown(table.reset_index()).splitlines()
    assert len(shown) == 7
    assert len({line.count("|") for line in shown}) == 1
    assert "| contradicted |" in shown[3]
    assert f"{table.half_width['rq2']:.2f}, 1.20" in shown[3]
    assert "| not run |" in shown[4]


def test_nothing_is_decided_before_all_seeds_have_run(small, monkeypatch):
    monkeypatch.setitem(sizes.SIZES, "small", sizes.SIZES["small"] | {"seeds": 3})
    table = verdicts.verdict_table("small", root=small).set_index("question")
    assert table.verdict["rq2"] == "2 of 3 seeds"  # contradicted by the two alone
    assert table.verdict["rq3"] == "not run"


@pytest.fixture
def narrow_plan(monkeypatch) -> dict[str, verdicts.Hypothesis]:
    """rq1 and rq2, whose runs are there, with one seed, up to one more where the interval is wider than planned."""
    monkeypatch.setitem(sizes.SIZES, "small", sizes.SIZES["small"] | {"seeds": 1})
    monkeypatch.setitem(sizes.MORE_SEEDS, "small", (0, 1))
    return {
        "rq1": dataclasses.replace(verdicts.PRIMARY["rq1"], planned=0.001),
        "rq2": dataclasses.replace(verdicts.PRIMARY["rq2"], planned=50.0),
    }


def test_a_comparison_wider_than_planned_gets_more_seeds_and_another_does_not(small, narrow_plan):
    table = verdicts.verdict_table("small", narrow_plan, root=small).set_index("question")
    assert (table.seeds["rq1"], table.seeds["rq2"]) == (2, 1)
    runs = verdicts.more_runs("small", narrow_plan, root=small)
    assert set(zip(runs.study, runs.variant, runs.seed)) == {("rq1", "sdm+id", 1), ("rq1", "sdm+id+mlm", 1)}
    assert [*runs.columns] == ["study", "variant", "seed", "recipe"]


def test_without_these_seeds_nothing_is_decided_even_if_it_would_be(small, narrow_plan, monkeypatch):
    monkeypatch.setitem(sizes.MORE_SEEDS, "small", (0, 4))
    wide = {"rq2": dataclasses.replace(narrow_plan["rq2"], planned=0.001)}
    table = verdicts.verdict_table("small", wide, root=small).set_index("question")
    assert table.p_holm["rq2"] < 0.05
    assert table.verdict["rq2"] == "2 of 5 seeds"


def test_both_sides_always_have_more_seeds_than_the_other_variants(small, narrow_plan, monkeypatch):
    monkeypatch.setitem(sizes.MORE_SEEDS, "small", (1, 0))
    wide = {"rq2": dataclasses.replace(narrow_plan["rq2"], planned=0.001)}
    assert verdicts.verdict_table("small", wide, root=small).verdict[0] == "contradicted"  # with both seeds
    runs = verdicts.more_runs("small", wide, root=small)
    assert set(zip(runs.variant, runs.seed)) == {("sdm", 1), ("itc", 1)}
    planned = grid.plan("rq2", **sizes.sized("small"))
    found = verdicts.with_more_seeds(planned, "rq2", "small", root=small)
    assert [*found.recipe] == [*planned.recipe, *runs.recipe]
    domains = grid.plan_domains("small")
    assert len(verdicts.with_more_seeds(domains, "transfer", "small", root=small)) == 2 * len(domains) == 6
    for study, other in {"rq2": grid.plan("rq2", **sizes.sized("small", epochs=2)), "noise": planned}.items():
        assert verdicts.with_more_seeds(other, study, "small", root=small) is other


def test_transfer_gains_are_the_mean_over_all_data_sets_but_the_own_one(small):
    """Recomputed from the files by name, without the library's reader."""
    row = verdicts.verdict_table("small", root=small).set_index("question").loc["rq5"]
    names, hits = sizes.domains("small"), {}
    for folder in small.iterdir():
        recipe = json.loads((folder / "run.json").read_text())["recipe"]
        for file in folder.glob("queries-*.csv.gz"):
            test = file.name.removeprefix("queries-").rsplit("-", 1)[0]
            lines = csv.DictReader(gzip.decompress(file.read_bytes()).decode().splitlines())
            first = [line["rank"] == "1" for line in lines]
            hits[recipe["dataset"], recipe["seed"], test] = 100 * np.mean(first)
    cells = []
    for seed in (0, 1):
        for test in names:
            others = [hits[name, seed, test] for name in names if name != test]
            cells.append(np.mean(others) - hits[test, 0, f"before-{test}"])
    assert row.gain == pytest.approx(np.mean(cells))


# every interval once more, by a script that shares no code with the library: gzip, csv, json and numpy


def recomputed(runs: Path, variants: dict[str, list[dict]], reference: str, hard: bool = False, seed: int = 1):
    """Variant → gain in R@1 over the reference and its 95 % interval, from the committed files alone."""
    hits, people = {}, None
    for folder in runs.iterdir():
        recipe = json.loads((folder / "run.json").read_text())["recipe"]
        names = [name for name, recipes in variants.items() if recipe in recipes]
        if not names:
            continue
        with gzip.open(folder / "ranks.csv.gz", "rt") as file:
            rows = [row for row in csv.DictReader(file) if not hard or row["hard"] == "1"]
        for name in names:
            hits.setdefault(name, {})[recipe["seed"]] = [100.0 * (row["rank"] == "1") for row in rows]
        mine = [row["pid"] for row in rows]
        assert people in (None, mine)
        people = mine
    known, person = np.unique(people, return_inverse=True)
    random, found = np.random.default_rng(seed), {}
    counts = np.bincount(person)
    for name, by_seed in hits.items():
        seeds = sorted(set(by_seed) & set(hits[reference]))
        gains = np.array([np.subtract(by_seed[each], hits[reference][each]) for each in seeds])
        sums, means = np.array([np.bincount(person, row) for row in gains]), []
        for _ in range(3000):
            drawn = random.integers(len(known), size=len(known))
            which = random.integers(len(seeds), size=len(seeds))
            means.append(sums[np.ix_(which, drawn)].sum() / (len(which) * counts[drawn].sum()))
        found[name] = (gains.mean(), *np.quantile(means, [0.025, 0.975]))
    return found


def agrees(table: pd.DataFrame, found: dict) -> int:
    """The number of rows whose gain is the recomputed one and whose interval is, up to the draws."""
    compared = table.dropna(subset="R1_gain")
    for row in compared.itertuples():
        gain, low, high = found[row.variant]
        assert row.R1_gain == pytest.approx(gain, abs=1e-6)
        tolerance = 0.08 * max(high - low, row.R1_gain_high - row.R1_gain_low) + 1e-9
        assert (row.R1_gain_low, row.R1_gain_high) == pytest.approx((low, high), abs=tolerance)
    return len(compared)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("study", ["rq1", "rq2"])
def test_every_interval_of_a_study_is_recomputed_from_the_committed_ranks(small, study, hard, monkeypatch):
    monkeypatch.setattr(committed, "committed_root", lambda: small)
    planned = grid.plan(study, **sizes.sized("small"))
    there = planned[[committed.find(recipe) is not None for recipe in planned.recipe]]
    reference = grid.STUDIES[study].reference
    table = compare(grid.run_all(there), reference, hard=hard)
    recipes = {name: [json.loads(r.to_json()) for r in rows.recipe] for name, rows in planned.groupby("variant")}
    assert agrees(table, recomputed(small, recipes, reference, hard)) == (4 if study == "rq1" else 2)


def test_the_answers_show_the_verdicts_of_the_committed_runs():
    text = (REPORTS.parents[2] / "docs" / "answers.md").read_text(encoding="utf-8")
    shown = text.partition("<!-- verdicts -->\n")[2].partition("<!-- /verdicts -->")[0]
    assert shown == verdicts.to_markdown(verdicts.verdict_table())


@pytest.mark.parametrize("study", [*grid.STUDIES])
def test_the_intervals_of_the_example_studies_are_those_of_their_committed_ranks(study):
    file = REPORTS / study / "table.csv"
    planned = verdicts.with_more_seeds(grid.plan(study, **sizes.sized("full")), study)
    here = [recipe for recipe in planned.recipe if recipe.precision != "fp16"]  # which needs a GPU
    if not file.is_file() or any(committed.find(recipe) is None for recipe in here):
        pytest.skip("not all runs of this study are committed")
    recipes = {name: [json.loads(r.to_json()) for r in rows.recipe] for name, rows in planned.groupby("variant")}
    reference = grid.STUDIES[study].reference
    table = pd.read_csv(file)
    assert agrees(table, recomputed(REPORTS / "runs", recipes, reference)) == table.R1_gain.notna().sum() > 0
