"""Committed runs: what they keep, when they count, what a repeated run is compared in."""

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from pandas import DataFrame
from safetensors.torch import save_file

import irra_core as irra
from irra_core import runs
from irra_core.recipes import RECIPES, RENDERED
from irra_core.studies import committed, grid
from irra_core.studies.comparison import compare, readable
from irra_core.synthetic import people

PEOPLE = 5  # tested, with four queries each


def made_run(folder: Path, recipe: irra.Recipe, ranks, data: str = "da7a", threads: int = 1) -> Path:
    """A finished run's folder with these ranks of the first correct photo."""
    folder.mkdir(parents=True)
    ranks = np.asarray(ranks)
    table = DataFrame({"pid": np.arange(len(ranks)) // 4 + 7, "image_id": np.arange(len(ranks)) // 2 + 28})
    table = table.assign(hard=table.pid % 2 == 0, **{f"R{k}": 100.0 * (ranks <= k) for k in (1, 5, 10)})
    table = table.assign(AP=100 / ranks, INP=100 / (2 + ranks), rank=ranks)
    table.to_csv(folder / "queries.csv", index=False)
    save_file({"a": torch.zeros(3, 4), "logit_scale": torch.zeros(())}, folder / runs.WEIGHTS)
    means = {"R1": [float(table.R1.mean()), 0.0, 100.0], "mAP": [float(table.AP.mean()), 0.0, 100.0]}
    metrics = {"selected": {"on": "val", "step": 9}, "identities": table.pid.nunique(), "text_to_image": means}
    machine = {"processor": "A", "instructions": "AVX2", "precision": "fp32", "threads": threads, "device": "cpu"}
    machine |= {"packages": {"torch": "2.15.0"}, "seconds": {"training": 5.0, "evaluation": 1.0}}
    for name, kept in (("metrics", metrics), ("machine", machine)):
        (folder / f"{name}.json").write_text(json.dumps(kept))
    recorded = {"format": runs.FORMAT, "data": data, "recipe": json.loads(recipe.to_json())}
    (folder / "recipe.json").write_text(json.dumps(recorded))
    DataFrame({"step": [4, 9], "loss": [1.0, 0.5]}).to_csv(folder / "history.csv", index=False)
    return folder


RANKS = [1, 2, 3, 1, 11, 6, 1, 1, 5, 10, 9, 1, 3, 1, 1, 1, 2, 2, 4, 7]


@pytest.fixture
def recipe(monkeypatch) -> irra.Recipe:
    monkeypatch.setattr(people, "STUDY_TEST", PEOPLE)
    return irra.recipe("synthetic-study", preset="study", losses="sdm")


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(committed, "committed_root", lambda: tmp_path / "committed")
    return tmp_path / "committed"


def test_a_committed_run_gives_what_the_run_folder_gives_but_the_weights(tmp_path, root, recipe):
    path = made_run(tmp_path / "run", recipe, RANKS)
    folder = committed.export_run(path)
    assert folder == root / committed.run_key(recipe) == committed.find(recipe)
    assert sorted(file.name for file in folder.iterdir()) == ["history.csv", "ranks.csv.gz", "run.json"]
    here, there = committed.load(path), committed.load(folder)
    assert (here["recipe"], here["metrics"], here["machine"]) == (recipe, there["metrics"], there["machine"])
    assert there["parameters"] == here["parameters"] == 12
    pd.testing.assert_frame_equal(here["history"], there["history"])
    pd.testing.assert_frame_equal(
        there["queries"][here["queries"].columns], here["queries"], atol=6e-5, rtol=0, check_dtype=False
    )
    assert committed.run_seconds(folder) == 6.0
    assert not runs.finished(folder)
    assert list(irra.studies.collect(tmp_path).path) == [str(path)]


def test_the_same_run_gives_the_same_bytes_and_eight_thousand_queries_are_small(tmp_path, recipe):
    draws = np.random.default_rng(0).geometric(0.4, size=8000)
    queries = pd.read_csv(made_run(tmp_path / "run", recipe, draws) / "queries.csv")
    for name in "ab":
        committed.write_ranks(tmp_path / f"{name}.csv.gz", queries)
    assert (tmp_path / "a.csv.gz").read_bytes() == (tmp_path / "b.csv.gz").read_bytes()
    assert (tmp_path / "a.csv.gz").stat().st_size < 60_000
    plain = gzip.decompress((tmp_path / "a.csv.gz").read_bytes()).decode().splitlines()
    assert plain[0] == "pid,image_id,hard,rank,AP,INP"
    numbers = [float(value) for value in plain[1].split(",")]
    assert numbers == pytest.approx([7, 28, 0, draws[0], 100 / draws[0], 100 / (2 + draws[0])], abs=6e-5)


def test_the_key_is_that_of_recipe_renderer_and_clip_not_of_photos_or_folder(tmp_path, root, recipe, monkeypatch):
    keys = {committed.run_key(recipe)}
    assert committed.run_key(recipe, "other pixels, as another processor rounds them") in keys
    keys |= {committed.run_key(recipe.replace(**change)) for change in ({"seed": 1}, {"lr": 3e-4}, {"losses": "itc"})}
    keys |= {committed.run_key(irra.recipe(name, preset="study", losses="sdm")) for name in RENDERED}
    monkeypatch.setattr(committed, "RENDERING", people.RENDERING + 1)
    keys.add(committed.run_key(recipe))
    monkeypatch.setattr(committed, "GENERAL", Path(__file__))
    keys.add(committed.run_key(recipe))
    assert len(keys) == 1 + 3 + len(RENDERED) - 1 + 2
    real = irra.recipe("cuhk")
    assert committed.run_key(real, "one") != committed.run_key(real, "two")
    with pytest.raises(ValueError, match=r"cuhk is not rendered.*give `data`"):
        committed.run_key(real)
    assert set(RENDERED) | {"cuhk", "icfg", "rstp"} == set(RECIPES)


def test_half_written_and_other_formats_do_not_count(tmp_path, root, recipe, monkeypatch):
    path = made_run(tmp_path / "run", recipe, RANKS)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(committed, "write_ranks", killed)
        with pytest.raises(KeyboardInterrupt):
            committed.export_run(path)
    assert committed.find(recipe) is None
    assert list(root.iterdir()) == []
    folder = committed.export_run(path)
    (folder / committed.RANKS).rename(folder / "aside")
    assert committed.find(recipe) is None
    (folder / "aside").rename(folder / committed.RANKS)
    text = (folder / committed.RUN).read_text()
    (folder / committed.RUN).write_text(text.replace('"format": 1', '"format": 0', 1))
    assert committed.find(recipe) is None
    (path / runs.WEIGHTS).unlink()
    with pytest.raises(ValueError, match="holds no finished run"):
        committed.export_run(path)


def test_a_run_on_people_of_ones_own_is_not_exported_under_the_name_of_the_rendered_ones(tmp_path, root, recipe):
    path = made_run(tmp_path / "run", recipe, RANKS[:8])
    with pytest.raises(ValueError, match="was tested on 2 people, synthetic-study has 5"):
        committed.export_run(path)


def test_a_repeated_run_agrees_or_says_in_what_it_differs_and_on_which_machines(tmp_path, root, recipe):
    folder = committed.export_run(made_run(tmp_path / "one", recipe, RANKS))
    again = made_run(tmp_path / "two", recipe, RANKS, data="other bytes")
    assert committed.disagreement(again, folder) == ""
    changed = [2, *RANKS[1:-1], 8]
    other = made_run(tmp_path / "three", recipe, changed, data="other bytes", threads=2)
    said = committed.disagreement(other, folder)
    ones = [sum(rank == 1 for rank in ranks) * 5.0 for ranks in (changed, RANKS)]
    assert said.startswith(f"2 of 20 ranks differ: R@1 {ones[0]:.2f} instead of {ones[1]:.2f}, mAP ")
    assert "here A, AVX2, fp32, 2 threads, torch 2.15.0; committed A, AVX2, fp32, 1 thread" in said
    assert "photos with other bytes" in said
    assert committed.export_run(other) == folder  # what is committed stays
    assert committed.disagreement(tmp_path / "one", folder) == ""
    committed.export_run(other, replace=True)
    assert committed.disagreement(other, folder) == ""
    assert committed.machines([folder, tmp_path / "one"]) == {
        "A, AVX2, fp32, 2 threads, torch 2.15.0": 1, "A, AVX2, fp32, 1 thread, torch 2.15.0": 1
    }  # fmt: skip
    shorter = made_run(tmp_path / "four", recipe, RANKS[:8])
    assert committed.disagreement(shorter, folder).startswith("other queries (here ")


def test_a_plan_takes_committed_runs_without_rendering_or_training_and_says_so(tmp_path, root, recipe, monkeypatch):
    own = grid.Study("?", "sdm", {"sdm": {"losses": "sdm"}, "itc": {"losses": "itc"}})
    planned = grid.plan(own, "synthetic-study", seeds=2)
    for place, row in enumerate(planned.itertuples()):
        made_run(tmp_path / f"run{place}", row.recipe, np.roll(RANKS, place))
        committed.export_run(tmp_path / f"run{place}")
    for name in ("open_annotations", "_start"):
        monkeypatch.setattr(grid, name, lambda *_, **__: pytest.fail("a committed run needs neither data nor training"))
    found = grid.run_all(planned)
    assert list(found.status) == ["committed"] * 4
    assert list(found.seconds) == [6.0] * 4
    assert grid.estimate(planned) == "4 different runs, 0 of them finished, 4 committed; nothing is left to run."
    table = compare(found, "sdm")
    direct = compare(found.assign(path=[str(tmp_path / f"run{i}") for i in range(4)], status="finished"), "sdm")
    assert list(table.status) == ["committed"] * 2
    assert list(readable(table).seeds) == ["2 (committed)"] * 2
    pd.testing.assert_frame_equal(table.drop(columns="status"), direct.drop(columns="status"), atol=1e-3)
    hard = compare(found, "sdm", hard=True)
    kept = [[rank == 1 for rank in np.roll(RANKS, place)[4:8]] + [rank == 1 for rank in np.roll(RANKS, place)[12:16]]
            for place in range(2)]  # fmt: skip
    assert hard.R1[0] == pytest.approx(100 * np.mean(kept))
    with pytest.raises(pytest.fail.Exception, match="neither data nor training"):
        grid.run_all(planned, use_committed=False)
    shutil.rmtree(root / committed.run_key(planned.recipe[0]))
    with pytest.raises(pytest.fail.Exception, match="neither data nor training"):
        grid.run_all(planned)
