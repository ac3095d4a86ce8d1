"""Transfer: a cell is the plain mean, its interval agrees with another way, leaks leave, what was not run is said."""

import shutil

import numpy as np
import pandas as pd
import pytest
from pandas import DataFrame

import irra_core as irra
from irra_core.analysis import leaks
from irra_core.annotations import load_annotations
from irra_core.metrics import bootstrap_interval
from irra_core.studies import transfer
from irra_core.synthetic.people import make_synthetic
from irra_core.training import trained_run

NAMES = ("one", "two", "three")
SCORES = ("R1", "R5", "R10", "AP", "INP")


def asked(train, test, values, seed=0, leaks="kept", first=0) -> DataFrame:
    """One run's queries, two a person, every score the same value."""
    places = np.arange(len(values)) + first
    scores = {name: np.asarray(values, dtype=float) for name in SCORES}
    fixed = {"train": train, "test": test, "seed": seed, "leaks": leaks}
    return DataFrame({"query": places, "pid": places // 2, "image_id": places, **scores}).assign(**fixed)


@pytest.fixture
def queries() -> DataFrame:
    """`one` tested on both, `two` on itself; two seeds each; `three` was not run."""
    draw = np.random.default_rng(0)
    parts = []
    for train, test, level in (("one", "one", 60), ("one", "two", 20), ("two", "two", 70)):
        for seed in (0, 1):
            values = 100.0 * (draw.random(80) * 100 < level)
            parts += [asked(train, test, values, seed, kept) for kept in ("kept", "left out")]
    return pd.concat(parts).sample(frac=1, random_state=0)  # the order of the rows means nothing


def cell(table, train, test, leaks="kept"):
    return table[(table.train == train) & (table.test == test) & (table.leaks == leaks)].iloc[0]


def test_a_cell_is_the_mean_over_queries_and_seeds(queries):
    found = cell(transfer.transfer_matrix(queries, NAMES), "one", "two")
    chosen = queries[(queries.train == "one") & (queries.test == "two") & (queries.leaks == "kept")]
    assert float(found.R1) == pytest.approx(sum(chosen.R1) / len(chosen))
    assert (found.seeds, found["queries"]) == (2, 80)
    assert found.R1_low < found.R1 < found.R1_high


def test_with_one_seed_the_interval_is_that_of_resampled_identities(queries):
    chosen = queries[queries.seed == 0]
    found = cell(transfer.transfer_matrix(chosen, NAMES), "one", "one")
    rows = chosen[(chosen.train == "one") & (chosen.test == "one") & (chosen.leaks == "kept")]
    low, high = bootstrap_interval(rows.R1.to_numpy(), rows.pid.to_numpy())
    assert (found.R1_low, found.R1_high) == pytest.approx((low, high), abs=1.0)


def test_every_pair_is_in_the_matrix_and_one_that_was_not_run_has_no_score(queries):
    table = transfer.transfer_matrix(queries, NAMES)
    assert len(table) == 2 * len(NAMES) ** 2
    for train, test in (("three", "one"), ("two", "one"), ("three", "three")):
        assert cell(table, train, test).seeds == 0
        assert np.isnan(cell(table, train, test)[["R1", "R1_low", "mAP_high"]].to_numpy(dtype=float)).all()


def test_the_loss_is_the_difference_on_the_same_queries_and_its_verdict_follows_the_interval(queries):
    table = transfer.transfer_losses(queries, NAMES)
    (row,) = table.itertuples()
    means = queries[queries.leaks == "kept"].groupby(["train", "test"]).R1.mean()
    assert float(row.R1) == pytest.approx(means["one", "two"] - means["two", "two"])
    assert row.R1_high < 0
    assert row.verdict.startswith(f"On two, training on one instead costs {-row.R1:.1f} [")
    same = asked("one", "two", [100, 0] * 10), asked("two", "two", [0, 100] * 10)
    (row,) = transfer.transfer_losses(pd.concat(same), NAMES).itertuples()
    assert "undecided" in row.verdict


def test_queries_that_only_one_side_was_asked_are_not_compared():
    left_out = asked("one", "two", [100.0] * 6, leaks="left out", first=4)
    own = asked("two", "two", [0.0] * 4 + [50.0] * 6, leaks="left out")
    (row,) = transfer.transfer_losses(pd.concat([left_out, own]), NAMES, "left out").itertuples()
    assert row.R1 == 50


def test_seeds_with_different_queries_are_refused():
    table = pd.concat([asked("one", "one", [0.0, 100.0]), asked("one", "one", [0.0, 100.0], seed=1, first=2)])
    with pytest.raises(ValueError, match="seeds 0, 1 were asked different queries"):
        transfer.transfer_matrix(table, NAMES)


def test_the_real_data_sets_are_taken_as_soon_as_one_is_there(tmp_path):
    assert transfer.transfer_domains(tmp_path) == ("synthetic-study", "synthetic-study-night", "synthetic-study-campus")
    make_synthetic(tmp_path, layout="rstp", people=12)
    assert transfer.transfer_domains(tmp_path) == transfer.REAL
    assert [transfer.present(name, tmp_path) for name in transfer.REAL] == [False, False, True]


def test_the_published_matrix_has_every_pair_of_the_real_data_sets_once():
    table = transfer.published_matrix()
    pairs = [(train, test) for train in transfer.REAL for test in transfer.REAL]
    assert sorted(zip(table.train, table.test)) == sorted(pairs)
    assert table.set_index(["train", "test"]).R1["cuhk", "icfg"] == 42.41
    assert table.set_index(["train", "test"]).mAP["rstp", "cuhk"] == 30.29


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> dict[str, DataFrame]:
    """Two rendered sets of 16 people; one photo of train of `one` lies in test of `two` too."""
    root = tmp_path_factory.mktemp("two")
    make_synthetic(root / "one", people=16)
    make_synthetic(root / "two", people=16, domain="night", layout="rstp")
    one, two = load_annotations("synthetic", root / "one"), load_annotations("rstp", root / "two")
    shutil.copyfile(one[one.split == "train"].path.iloc[0], two[two.split == "test"].path.iloc[0])
    return {"one": one, "two": two}


def test_a_leaked_photo_is_found_and_leaves_the_queries_and_the_gallery_of_the_one_pair_where_it_leaked(tables):
    hashed = transfer.hashed_photos(tables)
    leaked = transfer.leaked_photos(hashed)
    (pair,) = leaked.itertuples()
    assert (pair.train, pair.test, pair.distance) == ("one", "two", 0)
    distances = transfer.nearest_photos(hashed)
    assert distances.distance.min() == 0
    assert (distances.distance <= leaks.SAME).sum() == 1
    recipe = irra.recipe(pretrained="none", losses="itc", batch_size=8, max_steps=2)
    run = trained_run(recipe, tables["one"])
    trained = DataFrame({"train": ["one"], "seed": [0], "path": [run]})
    queries = transfer.transfer_queries(trained, tables, leaked)
    counts = queries.groupby(["test", "leaks"])["query"].nunique()
    assert counts["two", "kept"] - counts["two", "left out"] == 2
    assert counts["one", "kept"] == counts["one", "left out"]
    left = queries[(queries.test == "two") & (queries.leaks == "left out")]
    assert pair.test_image_id not in set(left.image_id)
    model, _ = irra.load_checkpoint(run / "weights.safetensors")
    expected = irra.evaluate(model, tables["two"][tables["two"].image_id != pair.test_image_id]).text_to_image
    assert left.AP.tolist() == pytest.approx(expected.AP.tolist())
    stored = list(run.glob("queries-*.csv.gz"))
    assert sorted(file.name.split("-")[1] for file in stored) == ["one", "two"]
    (run / "weights.safetensors").rename(run / "aside")
    again = transfer.transfer_queries(trained, tables, leaked)  # as of a run that is committed: without weights
    pairs = ["test", "leaks", "query"]
    both = queries.merge(again, on=pairs, suffixes=("", "_again"))
    assert len(again) == len(both) == len(queries) - len(left)  # leaks need the model
    assert (both.AP - both.AP_again).abs().max() < 6e-5
    assert (both.R1_again == both.R1).all()
    (run / "aside").rename(run / "weights.safetensors")
    matrix = transfer.transfer_matrix(queries, tables, trained)
    assert cell(matrix, "one", "two", "left out")["queries"] == len(expected)
    assert cell(matrix, transfer.BEFORE, "one").seeds == 0


def test_the_clip_before_fine_tuning_is_asked_the_same_captions_and_paired_with_every_seed(tables, tmp_path):
    recipe = irra.recipe(losses="itc", batch_size=8, max_steps=2)
    rows = []
    for seed in (0, 1):
        run = trained_run(recipe.replace(seed=seed), tables["one"])
        rows.append(("one", seed, str(run)))
    trained = DataFrame(rows, columns=["train", "seed", "path"])
    queries = transfer.transfer_queries(trained, {"one": tables["one"]})
    before = queries[(queries.train == transfer.BEFORE) & (queries.leaks == "kept")]
    model = irra.build_model(recipe, 1)
    expected = irra.evaluate(model, tables["one"]).text_to_image
    for seed in (0, 1):
        assert before[before.seed == seed].AP.tolist() == pytest.approx(expected.AP.tolist(), abs=6e-5)
    row = cell(transfer.transfer_matrix(queries, ["one"], trained), transfer.BEFORE, "one")
    assert (row.seeds, float(row.R1)) == (1, pytest.approx(expected.R1.mean()))
