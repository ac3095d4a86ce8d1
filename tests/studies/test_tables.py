"""Tables of many runs, and of one beside the published results."""

import json

import pytest

import irra_core as irra
from irra_core import runs
from irra_core.studies.tables import beside_published, collect, gains

METRICS = {
    "selected": {"on": "val", "step": 3},
    "text_to_image": dict.fromkeys(("R1", "R5", "R10", "mAP", "mINP"), (50.0, 45.0, 55.0)),
    "untrained": dict.fromkeys(("R1", "R5", "R10", "mAP", "mINP"), (1.0, 0.0, 2.0)),
    "gain_over_untrained": dict.fromkeys(("R1", "R5", "R10", "mAP", "mINP"), (49.0, 44.0, 54.0)),
}


def test_many_runs_make_one_table_and_an_unfinished_one_is_not_in_it(tmp_path):
    for seed in (0, 1, 2):
        recipe = irra.recipe("cuhk", seed=seed)
        folder = runs.run_folder(recipe, "data", tmp_path).path
        runs.begin(folder, recipe, "data")
        if seed < 2:
            runs.write_text(folder / "metrics.json", json.dumps(METRICS))
    table = collect(tmp_path)
    assert table.seed.tolist() == [0, 1]
    assert table.run.tolist() == ["default", "seed=1"]
    assert table[["R1", "R1_low", "R1_high"]].to_numpy().tolist() == [[50.0, 45.0, 55.0]] * 2


def test_runs_behind_a_linked_folder_are_found_and_none_is_counted_twice(tmp_path):
    reports, elsewhere = tmp_path / "reports", tmp_path / "large disk"
    for root, seed in ((reports, 0), (elsewhere, 1)):
        recipe = irra.recipe("cuhk", seed=seed)
        folder = runs.run_folder(recipe, "data", root).path
        runs.begin(folder, recipe, "data")
        runs.write_text(folder / "metrics.json", json.dumps(METRICS))
    (reports / "a link").symlink_to(elsewhere)
    (reports / "another").symlink_to(elsewhere / "cuhk")
    (elsewhere / "round").symlink_to(reports)
    runs.mark_latest(reports / "cuhk" / "default")
    (reports / "broken").symlink_to(tmp_path / "gone")
    assert collect(reports).path.tolist() == [
        str(reports / "a link" / "cuhk" / "seed=1"),
        str(reports / "cuhk" / "default"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("metrics.json", '{"selected": ', r"metrics\.json cannot be read .*copy default again, or remove it"),
        ("recipe.json", "[]", r"recipe\.json cannot be read"),
        ("history.csv", "", r"history\.csv cannot be read"),
        ("recipe.json", None, "no run is here"),
    ],
)
def test_a_broken_folder_is_passed_over_out_loud_and_the_other_runs_are_there(tmp_path, name, content, reason):
    for seed in (0, 1):
        recipe = irra.recipe("cuhk", seed=seed)
        folder = runs.run_folder(recipe, "data", tmp_path).path
        runs.begin(folder, recipe, "data")
        runs.write_text(folder / "metrics.json", json.dumps(METRICS))
    broken = tmp_path / "cuhk" / "default"
    (broken / name).unlink(missing_ok=True)
    if content is not None:
        (broken / name).write_text(content)
    with pytest.warns(UserWarning, match=f"a run is left out: .*{reason}"):
        table = collect(tmp_path)
    assert table.run.tolist() == ["seed=1"]
    assert list(table.attrs["broken"]) == [str(broken)]


def test_the_published_rows_stand_beside_the_measured_ones():
    table = beside_published(METRICS, irra.recipe("cuhk"))
    assert table.loc["this run", "R1 (%)"] == "50.0 [45.0, 55.0]"
    assert (table.filter(like="published: IRRA", axis=0)["R1 (%)"] == "73.4 (this run -23.4)").all()
    assert not beside_published(METRICS, irra.recipe()).index.str.startswith("published").any()
    assert gains(METRICS).loc["over random weights", "mAP (%)"] == "49.0 [44.0, 54.0]"
