"""Studies: their grids, running them through papermill, and the comparison against slow loops."""

import json
import math
import os
import statistics
import time
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook
from pandas import DataFrame
from safetensors.torch import save_file

import irra_core as irra
from irra_core import runs, studies
from irra_core.metrics import bootstrap_interval
from irra_core.recipes import PRESETS
from irra_core.studies import STUDIES, Study, compare, estimate, plan, run_all, seed_identity_interval, verdict

# the grid


@pytest.mark.parametrize("dataset", ["synthetic", "rstp"])
@pytest.mark.parametrize("name", STUDIES)
def test_the_parameters_that_a_run_is_given_make_its_recipe_again(name, dataset):
    table = plan(name, dataset, seeds=2)
    assert list(table.columns) == ["variant", "seed", "recipe"]
    assert len(table) == 2 * len(STUDIES[name].variants)
    assert STUDIES[name].reference in set(table.variant)
    for made in table.recipe:
        assert irra.recipe(dataset, **made.differences()) == made
        assert made.preset == ("study" if dataset == "synthetic" else "paper")


def test_variants_of_one_study_are_different_runs_and_studies_share_theirs():
    made = {name: set(plan(name, seeds=1).recipe) for name in STUDIES}
    assert all(len(made[name]) == len(STUDIES[name].variants) for name in STUDIES)
    full = irra.recipe(preset="study")
    assert [name for name in STUDIES if full in made[name]] == ["rq1", "rq3", "rq4", "released"]
    assert len(set().union(*made.values())) < sum(map(len, made.values()))


def test_each_departure_of_the_released_code_is_one_switch_on_the_papers_recipe():
    table = plan("released", "cuhk", seeds=1).set_index("variant").recipe
    paper, seen = table["paper"], {}
    for made in table:
        changed = {
            name: getattr(made, name) for name in PRESETS["released"] if getattr(made, name) != getattr(paper, name)
        }
        if len(changed) == 1:
            seen |= changed
    assert seen == PRESETS["released"]
    assert {name: getattr(table["all"], name) for name in seen if name != "cmpm_target"} == {
        name: value for name, value in seen.items() if name != "cmpm_target"
    }
    assert table["all but fp16"] == table["all"].replace(precision=paper.precision)


def test_a_preset_and_numbers_can_be_given_but_not_what_the_study_varies():
    assert {made.epochs for made in plan("rq2", preset="paper", epochs=7, data_root=None).recipe} == {7}
    with pytest.raises(ValueError, match=r"losses 'itc' cannot be given: the study varies it"):
        plan("rq1", losses="itc")
    with pytest.raises(ValueError, match=r"study 'rq' is unknown: did you mean 'rq"):
        plan("rq")


def test_smoke_leaves_the_reference_one_variant_and_one_seed(monkeypatch):
    monkeypatch.setenv("IRRA_SMOKE", "1")
    for name, study in STUDIES.items():
        table = plan(name, seeds=3)
        assert (len(table), set(table.seed), study.reference in set(table.variant)) == (2, {0}, True)


# running it

MADE = """import irra_core as irra
given = dict(preset=preset, pretrained=pretrained, losses=losses, batch_size=batch_size, seed=seed)
recipe = irra.recipe(dataset, **given)
"""
TRAIN = "irra.training.trained_run(recipe, irra.open_annotations(recipe))"
ECHO = """import json, os
from pathlib import Path
folder = Path(os.environ["ECHO"]) / str(seed)
folder.mkdir(parents=True)
told = [recipe.losses, os.environ["OMP_NUM_THREADS"], os.environ.get("CUDA_VISIBLE_DEVICES"), os.getpid()]
(folder / "told.json").write_text(json.dumps(told))"""
DECLARED = """dataset: str = "synthetic"
preset: str = None
pretrained: str = None
losses: str = None
batch_size: int = None
seed: int = None"""


def notebook(path: Path, *cells: str) -> Path:
    """A notebook that takes a few parameters and runs the cells."""
    first = new_code_cell(DECLARED, metadata={"tags": ["parameters"]})
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    nbformat.write(new_notebook(cells=[first, *map(new_code_cell, (MADE, *cells))], metadata=kernel), path)
    return path


@pytest.fixture
def grid(monkeypatch) -> DataFrame:
    """One run, the same once more, and one whose weights do not exist."""
    monkeypatch.setenv("IRRA_SMOKE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    made = irra.recipe(pretrained="none", preset="study", losses="itc", batch_size=8)
    absent = made.replace(pretrained="absent.safetensors", seed=1)
    return DataFrame({"variant": ["itc", "again", "absent"], "seed": [0, 0, 1], "recipe": [made, made, absent]})


class Bar:
    """A tqdm-like bar that remembers."""

    made: list = []  # noqa: RUF012

    def __init__(self, iterable=None, **given):
        self.iterable, self.total, self.n = iterable, given.get("total"), given.get("initial", 0)
        self.unit, self.text = given.get("unit"), ""
        Bar.made.append(self)

    def __iter__(self):
        return iter(self.iterable)

    def update(self, count=1):
        self.n += count

    def set_postfix_str(self, text, refresh=True):
        self.text = text

    def set_postfix(self, *_, **__): ...
    def refresh(self): ...
    def close(self): ...


@pytest.mark.notebook
def test_a_grid_runs_once_each_survives_a_failure_and_is_not_repeated(grid, tmp_path, monkeypatch):
    assert estimate(grid).startswith("2 different runs, 0 of them finished; the other 2 take about ")
    Bar.made.clear()
    found = run_all(grid, progress=Bar, notebook=notebook(tmp_path / "train.ipynb", TRAIN))
    assert list(found.columns) == ["variant", "seed", "recipe", "path", "status", "seconds", "error"]
    assert list(found.status) == ["finished", "finished", "failed"]
    assert found.path[0] == found.path[1] == str(runs.run_folder(grid.recipe[0], load_digest(found.path[0])).path)
    assert "absent.safetensors" in found.error[2]
    assert {"train.ipynb", "metrics.json"} <= {path.name for path in Path(found.path[0]).iterdir()}
    assert (Path(found.path[2]) / "failed.ipynb").exists()
    bar = next(bar for bar in Bar.made if bar.unit == "step")
    assert (bar.n, bar.total) == (3, 3)  # the failed run's steps are no longer waited for
    assert bar.text == "1 of 2 runs finished, 1 failed"

    monkeypatch.setattr(studies.subprocess, "Popen", lambda *_, **__: pytest.fail("a finished run was started"))
    began = time.perf_counter()
    again = run_all(grid[:2])
    assert list(again.status) == ["finished", "finished"]
    assert time.perf_counter() - began < 3
    assert again.seconds[0] == pytest.approx(found.seconds[0], rel=0.5)
    assert estimate(grid[:2]) == "1 run, 1 of them finished; nothing is left to run."
    table = compare(again, "itc")
    model, _ = irra.load_checkpoint(Path(found.path[0]) / runs.WEIGHTS)
    trained = sum(p.numel() for name, p in model.named_parameters() if not name.endswith("logit_scale"))
    assert list(table.parameters) == [trained] * 2
    assert verdict(table.iloc[1]) == "the same: again and itc give every query the same result"


def load_digest(path: str) -> str:
    return json.loads((Path(path) / "recipe.json").read_text())["data"]


@pytest.mark.notebook
def test_runs_at_the_same_time_share_threads_and_gpus_and_get_their_own_recipe(grid, tmp_path, monkeypatch):
    monkeypatch.setenv("ECHO", str(tmp_path / "told"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,6")
    monkeypatch.setattr(studies, "_gpus", lambda: 2)
    made = [grid.recipe[0].replace(seed=seed, losses=losses) for seed, losses in ((5, "sdm"), (6, "itc+id"))]
    table = DataFrame({"variant": ["a", "b"], "seed": [5, 6], "recipe": made})
    found = run_all(table, workers=2, notebook=notebook(tmp_path / "echo.ipynb", ECHO))
    told = [json.loads((tmp_path / "told" / str(seed) / "told.json").read_text()) for seed in (5, 6)]
    assert [row[:3] for row in told] == [["sdm", "1", "3"], ["itc+id", "1", "6"]]
    assert list(found.status) == ["failed", "failed"]  # they ended well, but left no run
    assert "left no finished run" in found.error[0]


@pytest.mark.notebook
def test_an_interrupt_ends_the_running_notebooks_with_their_kernels(grid, tmp_path, monkeypatch):
    monkeypatch.setenv("ECHO", str(tmp_path / "told"))
    told = tmp_path / "told" / "8" / "told.json"
    wait, limit = time.sleep, time.perf_counter() + 60

    def interrupted(seconds):
        if told.exists() or time.perf_counter() > limit:
            raise KeyboardInterrupt
        wait(seconds)

    monkeypatch.setattr(studies.time, "sleep", interrupted)
    endless = notebook(tmp_path / "endless.ipynb", ECHO, "import time; time.sleep(600)")
    with pytest.raises(KeyboardInterrupt):
        run_all(grid[:1].assign(recipe=[grid.recipe[0].replace(seed=8)]), notebook=endless)
    kernel = json.loads(told.read_text())[-1]
    for _ in range(100):
        if not alive(kernel):
            break
        wait(0.1)
    assert not alive(kernel)
    assert run_all(grid[:0]).empty


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


def test_half_precision_is_not_run_without_a_gpu(grid, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = run_all(grid[:1].assign(recipe=[grid.recipe[0].replace(precision="fp16")]))
    assert (found.status[0], found.error[0]) == ("not run", "fp16 needs a GPU")


def test_data_that_are_not_there_fail_their_runs_and_say_so(grid):
    found = run_all(grid[:1].assign(recipe=[irra.recipe("rstp", backbone="small", pretrained="none")]))
    assert found.status[0] == "failed"
    assert "RSTPReid" in found.error[0]


def test_the_shared_weights_are_made_before_the_first_run_starts(grid, monkeypatch):
    calls = []
    monkeypatch.setattr(studies, "pretrained_general", lambda progress: calls.append("weights"))

    def started(*_, **__):
        calls.append("run")
        raise KeyboardInterrupt

    monkeypatch.setattr(studies, "_start", started)
    with pytest.raises(KeyboardInterrupt):
        run_all(grid[:1].assign(recipe=[grid.recipe[0].replace(pretrained="general")]), workers=2)
    assert calls == ["weights", "run"]


# comparing it


def slow_interval(values, pids, draws, seed=0):
    """The percentile interval one draw, one seed, one person, one query at a time."""
    people = sorted(set(pids))
    generator = np.random.default_rng(seed)
    drawn_people = generator.integers(len(people), size=(draws, len(people)), dtype=np.int32)
    drawn_seeds = generator.integers(len(values), size=(draws, len(values)), dtype=np.int32)
    means = []
    for draw in range(draws):
        picked = [
            values[row][query]
            for row in drawn_seeds[draw]
            for place in drawn_people[draw]
            for query in range(len(pids))
            if pids[query] == people[place]
        ]
        means.append(sum(picked) / len(picked))
    return np.quantile(means, 0.025), np.quantile(means, 0.975)


def test_the_interval_over_seeds_and_identities_is_that_of_plain_loops():
    noise = np.random.default_rng(1)
    pids = np.array([7, 7, 7, 2, 2, 9, 4, 4, 4, 4])
    values = noise.normal(size=(3, 10)) + np.array([[0.0], [1.0], [-2.0]])
    assert seed_identity_interval(values, pids, draws=200) == pytest.approx(slow_interval(values, pids, 200))


def test_one_seed_leaves_the_interval_over_identities():
    values, pids = np.random.default_rng(2).normal(size=(1, 40)), np.repeat(np.arange(10), 4)
    assert seed_identity_interval(values, pids) == pytest.approx(bootstrap_interval(values[0], pids))


def test_seeds_that_disagree_widen_the_interval():
    values, pids = np.random.default_rng(2).normal(size=(3, 400)), np.repeat(np.arange(100), 4)
    apart = values + np.array([[-1.0], [0.0], [1.0]])
    ends = [seed_identity_interval(each, pids) for each in (values, apart)]
    assert ends[1][1] - ends[1][0] > 2 * (ends[0][1] - ends[0][0])


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
    low, high = slow_interval(difference, [PIDS[i] for i in kept], 2000)
    assert (table.R1_gain_low["itc"], table.R1_gain_high["itc"]) == pytest.approx((low, high))
    assert table.mAP_gain["itc"] == pytest.approx(np.mean(difference) / 2)
    assert table.R1_gain["late"] == pytest.approx(means["late"][0] - means["sdm"][1])  # the seed that both have
    assert (table.parameters["sdm"], table.step_seconds["sdm"]) == (17, 0.75)


def test_what_did_not_run_stays_in_the_table_and_says_why(finished):
    table = compare(finished, "sdm")
    assert list(table.variant) == ["sdm", "itc", "late", "never"]
    assert list(table.seeds) == [2, 2, 1, 0]
    assert table.status[2:].tolist() == ["1 of 2 finished: ValueError: no", "not run: fp16 needs a GPU"]
    shown = studies.readable(table)
    assert shown.loc["never", "R1 (%)"] == "not run"
    assert shown.loc["sdm", "R1 against sdm"] == "reference"
    assert shown.loc["itc", "R1 (%)"] == "33.3 ± 0.0"
    assert verdict(table.iloc[3]) == "never: not run: fp16 needs a GPU"


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
    found = studies.selection_inflation(finished[finished.seed == 1], "sdm", "itc")
    assert found.to_dict("list") == {
        "seed": [1], "evaluations": [3], "val_step": [15], "test_step": [10],
        "picked_on_val": [44.0], "picked_on_test": [47.0], "inflation": [3.0],
    }  # fmt: skip


def test_hard_queries_are_those_of_twins_or_those_that_read_most_like_another_persons(tmp_path):
    made = irra.recipe()
    irra.make_synthetic(tmp_path, people=16)
    table = irra.load_annotations("synthetic", tmp_path)
    twins = irra.synthetic.near_twins(table)
    assert studies.hard_queries(table, made).tolist() == [bool(twins[pid]) for pid in table[table.split == "test"].pid]

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
    assert studies._likeness(list(test.caption), test.pid.to_numpy(), chunk=7) == pytest.approx(likeness, abs=1e-5)
    found = studies.hard_queries(table, irra.recipe("rstp", backbone="small"), share=0.25)
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


# costs and files


def test_the_interaction_encoders_have_the_papers_parameters_at_its_width():
    table = studies.interaction_costs(irra.recipe(), width=512, batch_size=1, words=8, repeats=1).set_index(
        "interaction"
    )
    for name, millions in {"cross": 13.66, "co": 33.62, "merged": 12.61}.items():
        assert table.parameters[name] / 1e6 == pytest.approx(millions, rel=1e-3)
    assert table.times["cross"] == 1.0
    assert (table.forward_ms > 0).all()


def test_a_study_is_kept_as_tables_and_figures(tmp_path):
    from matplotlib.figure import Figure

    assert (
        studies.study_folder("rq1", "synthetic") == Path(os.environ["IRRA_REPORTS"]) / "synthetic" / "studies" / "rq1"
    )
    written = studies.save_study(tmp_path / "rq1", {"table": DataFrame({"a": [1]})}, {"figure": Figure()})
    assert written == ["table.csv", "figure.svg", "figure.png"]
    assert all((tmp_path / "rq1" / name).stat().st_size for name in written)


def test_a_study_of_ones_own_needs_no_name():
    own = Study("Does depth help?", "four", {"four": {}, "one": {"interaction_depth": 1}})
    assert [made.interaction_depth for made in plan(own, seeds=1).recipe] == [4, 1]
