"""The paper's tables as data: complete, sourced, and spelled so that a recipe can name each row."""

from importlib.resources import files

import pandas as pd
import pytest

from irra_core.recipes import RECIPES, recipe

PUBLISHED = pd.read_csv(files("irra_core") / "released" / "published.csv")
METRICS = ["R1", "R5", "R10", "mAP", "mINP"]


def row(**wanted):
    """The one row with these values."""
    found = PUBLISHED[(PUBLISHED[list(wanted)] == pd.Series(wanted)).all(axis=1)]
    assert len(found) == 1, f"{len(found)} rows have {wanted}"
    return found.iloc[0]


def test_every_row_has_a_source_a_table_and_an_r1_in_per_cent():
    assert PUBLISHED[["source", "table", "dataset", "train_dataset", "method", "second_hand"]].notna().all(axis=None)
    assert PUBLISHED.loc[PUBLISHED["table"] != "methods", "losses"].notna().all()
    assert set(PUBLISHED["source"]) == {"paper", "released README", "later papers"}
    assert set(PUBLISHED["table"]) == {"results", "ablation", "interaction", "transfer", "methods"}
    assert PUBLISHED["R1"].between(0, 100).all()
    known = PUBLISHED[METRICS].dropna()
    assert (known["R1"] < known["R5"]).all()
    assert (known["R5"] < known["R10"]).all()
    assert (known["mINP"] < known["mAP"]).all()


def test_no_row_is_there_twice():
    key = ["source", "table", "dataset", "train_dataset", "losses", "interaction"]
    assert not PUBLISHED[PUBLISHED["table"] != "methods"].duplicated(key).any()
    assert not PUBLISHED.duplicated([*key, "method"]).any()


def test_each_row_names_data_sets_and_losses_that_a_recipe_accepts():
    for _, item in PUBLISHED[PUBLISHED["losses"].notna()].iterrows():
        given = {} if pd.isna(item["interaction"]) else {"interaction": item["interaction"]}
        assert recipe(item["dataset"], losses=item["losses"], **given).losses == item["losses"]
        assert item["train_dataset"] in RECIPES
        assert ("mlm" in item["losses"]) == bool(given)


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("cuhk", [73.38, 89.93, 93.71, 66.13, 50.24]),
        ("icfg", [63.46, 80.24, 85.82, 38.05, 7.92]),
        ("rstp", [60.20, 81.30, 88.20, 47.17, 25.28]),
    ],
)
def test_paper_and_released_readme_agree_to_two_hundredths_on_every_result(dataset, expected):
    for losses in ("sdm+id+mlm", "itc"):
        pair = [
            row(source=source, table="results", dataset=dataset, losses=losses)[METRICS].astype(float)
            for source in ("released README", "paper")
        ]
        assert (pair[0] - pair[1]).abs().max() < 0.02
        if losses == "sdm+id+mlm":
            assert pair[0].tolist() == expected


def test_the_ablations_best_and_baseline_are_those_of_the_results():
    for dataset in ("cuhk", "icfg", "rstp"):
        for losses in ("itc", "sdm+id+mlm"):
            result = row(source="paper", table="results", dataset=dataset, losses=losses)
            assert row(table="ablation", dataset=dataset, losses=losses)["R1"] == result["R1"]


def test_a_quoted_or_derived_figure_says_so():
    assert "may be CMPM/C" in row(losses="cmpm")["note"]
    derived = PUBLISHED[(PUBLISHED["table"] == "ablation") & PUBLISHED["losses"].isin(["sdm", "itc+mlm"])]
    assert derived.loc[derived["dataset"] != "cuhk", "note"].str.contains("gain").all()


def test_the_interaction_encoders_carry_parameters_and_time():
    costs = PUBLISHED[PUBLISHED["table"] == "interaction"].set_index("interaction")
    assert costs["params_m"].to_dict() == {"co": 33.62, "merged": 12.61, "cross": 13.66}
    assert costs["forward_ms"].to_dict() == {"co": 24.30, "merged": 19.20, "cross": 6.42}


def test_transfer_covers_the_six_ordered_pairs_of_data_sets():
    pairs = PUBLISHED.loc[PUBLISHED["table"] == "transfer", ["train_dataset", "dataset", "R1", "mAP"]]
    assert len(pairs) == 6
    assert (pairs["train_dataset"] != pairs["dataset"]).all()
    assert pairs.notna().all(axis=None)
    assert row(table="transfer", train_dataset="cuhk", dataset="icfg")["mAP"] == 21.77


METHODS = {  # R@1 and, where it is known, mAP on cuhk, icfg, rstp
    "IRRA": [(73.38, 66.13), (63.46, 38.06), (60.20, 47.17)],
    "TBPS-CLIP": [73.54, 65.05, 61.95],
    "CFAM": [75.60, 65.38, 62.45],
    "RDE": [(75.94, 67.56), (67.68, 40.06), (65.35, 50.88)],
    "ITSELF": [(76.95, 69.38), (69.23, 43.80), (67.30, 53.05)],
    "IRRA + NAM": [76.82, 67.05, 68.50],
    "GA-DMS": [77.60, 69.51, 71.25],
    "RDE + HAM": [(77.99, 69.72), 69.95, 71.50],
    "CoRL + NAM": [78.15, 69.50, 69.10],
}


def test_the_later_methods_have_their_figures_on_all_three_data_sets():
    rows = PUBLISHED[PUBLISHED["table"] == "methods"]
    assert list(dict.fromkeys(rows["method"])) == list(METHODS)
    for method, figures in METHODS.items():
        found = rows[rows["method"] == method]
        assert found["dataset"].tolist() == found["train_dataset"].tolist() == ["cuhk", "icfg", "rstp"]
        shown = [r1 if pd.isna(m_ap) else (r1, m_ap) for r1, m_ap in zip(found["R1"], found["mAP"])]
        assert shown == figures


def test_each_figure_of_a_method_says_how_it_was_made_and_whether_it_is_second_hand():
    rows = PUBLISHED[PUBLISHED["table"] == "methods"]
    assert rows[["backbone", "pretrained"]].notna().all(axis=None)
    assert set(rows.loc[rows["selected_on"].notna(), "selected_on"]) == {"test"}
    assert set(rows.loc[rows["method"].isin(["IRRA", "RDE"]), "selected_on"]) == {"test"}
    assert ((PUBLISHED["source"] == "later papers") == (PUBLISHED["second_hand"] == "yes")).all()
