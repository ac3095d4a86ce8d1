"""Studies: their grids, running them through papermill, and what they keep."""

import json
import os
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook
from pandas import DataFrame

import irra_core as irra
from irra_core import runs
from irra_core.batches import Batches
from irra_core.recipes import PRESETS
from irra_core.studies import grid as studies
from irra_core.studies.comparison import compare, verdict
from irra_core.studies.grid import STUDIES, Study, estimate, plan, run_all
from irra_core.studies.sizes import sized

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
    assert [name for name in STUDIES if full in made[name]] == ["rq1", "rq3", "rq4", "released", "plugins", "noise"]
    assert len(set().union(*made.values())) < sum(map(len, made.values()))


@pytest.mark.parametrize("sampler", [{}, {"sampler": "identity", "per_identity": 4}])
def test_the_steps_that_are_estimated_are_those_of_the_batches(annotations, sampler):
    few = annotations[annotations.image_id > 0]  # one train person has a caption less
    made = irra.recipe(batch_size=8, select_on="last", epochs=3, **sampler)
    train = few[few.split == "train"].reset_index(drop=True)
    pixels = np.zeros((36, 3, 96, 32), np.uint8)
    batches = Batches(train, pixels, irra.tokenize(train.caption), made)
    assert studies._steps(made, few) == 3 * batches.steps_per_epoch


def test_each_departure_of_the_released_code_is_one_switch_on_the_papers_recipe():
    table = plan("released", "cuhk", seeds=1).set_index("variant").recipe
    paper, seen = table["paper"], {}
    for made in table:
        changed = {
            name: getattr(made, name) for name in PRESETS["released"] if getattr(made, name) != getattr(paper, name)
        }
        if len(changed) == 1:
            seen |= changed
    half = table["adam_eps 0.001, precision fp16"]  # which is compared with adam_eps alone: it is refused without
    assert half == table["adam_eps 0.001"].replace(precision="fp16")
    seen |= {"precision": half.precision}
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


def test_a_size_says_data_seeds_and_epochs_and_what_is_given_wins():
    assert sized("small", epochs=None, lr=0.1) == {
        "dataset": "synthetic", "seeds": 1, "epochs": 1, "max_steps": 150, "lr": 0.1
    }  # fmt: skip
    assert sized("full", dataset="rstp", seeds=5) == {"dataset": "rstp", "seeds": 5}
    with pytest.raises(ValueError, match=r"size 'smal' is unknown: did you mean 'small'"):
        sized("smal")


@pytest.mark.parametrize("size", ["full", "small"])
def test_the_plan_of_everything_has_each_studys_runs_and_shares_what_is_the_same(size):
    everything, given = studies.plan_all(size), sized(size)
    for name in STUDIES:
        rows = everything[everything.study == name]
        assert set(rows.recipe) == set(plan(name, **given).recipe)
        assert len(rows) == len(STUDIES[name].variants) * given["seeds"]
    domains = everything[everything.study == "transfer"]
    assert len(set(domains.variant)) == 3
    assert {made.dataset for made in domains.recipe} == set(domains.variant)
    assert {made.losses for made in domains.recipe} == {"sdm+id+mlm"}
    shared = set(domains.recipe) & set(plan("rq1", **given).recipe)  # the runs on the studies' own data set
    assert len(shared) == given["seeds"]
    assert len(set(everything.recipe)) < 0.8 * len(everything)
    assert everything.seed.is_monotonic_increasing


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
    assert list(found.columns) == ["variant", "seed", "recipe", "path", "status", "seconds", "error", "committed"]
    assert list(found.status) == ["finished", "finished", "failed"]
    assert found.path[0] == found.path[1] == str(runs.run_folder(grid.recipe[0], load_digest(found.path[0])).path)
    assert "absent.safetensors" in found.error[2]
    assert list(found.committed) == [""] * 3
    assert {"train.ipynb", "metrics.json"} <= {path.name for path in Path(found.path[0]).iterdir()}
    assert (Path(found.path[2]) / "failed.ipynb").exists()
    bar = next(bar for bar in Bar.made if bar.unit == "step")
    assert (bar.n, bar.total) == (3, 3)  # the failed run's steps are no longer waited for
    assert bar.text == "1 of 2 runs finished, 1 failed"

    monkeypatch.setattr(studies.subprocess, "Popen", lambda *_, **__: pytest.fail("a finished run was started"))
    began = time.process_time()
    again = run_all(grid[:2], export=True)
    assert list(again.status) == ["finished", "finished"]
    assert list(again.committed) == ["agrees", "agrees"]
    assert time.process_time() - began < 3
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
    found = run_all(grid[:1].assign(recipe=[grid.recipe[0].replace(precision="fp16", adam_eps=1e-3)]))
    assert (found.status[0], found.error[0]) == ("not run", "fp16 needs a GPU")


def test_data_that_are_not_there_fail_their_runs_and_say_so(grid):
    found = run_all(grid[:1].assign(recipe=[irra.recipe("rstp", backbone="small", pretrained="none")]))
    assert found.status[0] == "failed"
    assert "RSTPReid" in found.error[0]


def test_the_shared_weights_are_downloaded_before_the_first_run_starts(grid, monkeypatch):
    calls = []
    monkeypatch.setattr(studies, "download", lambda backbone, tag: calls.append(tag))

    def started(*_, **__):
        calls.append("run")
        raise KeyboardInterrupt

    monkeypatch.setattr(studies, "_start", started)
    with pytest.raises(KeyboardInterrupt):
        run_all(grid[:1].assign(recipe=[irra.recipe(backbone="ViT-B-32-quickgelu", losses="itc")]), workers=2)
    assert calls == ["openai", "run"]


def test_a_study_is_kept_as_tables_and_figures(tmp_path):
    from matplotlib.figure import Figure

    assert (
        studies.study_folder("rq1", "synthetic") == Path(os.environ["IRRA_REPORTS"]) / "synthetic" / "studies" / "rq1"
    )
    written = studies.save_study(tmp_path / "rq1", {"table": DataFrame({"a": [1]})}, {"figure": Figure()})
    assert written == ["table.csv", "figure.svg", "figure.png"]
    assert all((tmp_path / "rq1" / name).stat().st_size for name in written)


def test_a_study_of_ones_own_needs_no_name():
    own = Study("Does depth help?", "one", {"one": {}, "two": {"interaction_depth": 2}})
    assert [made.interaction_depth for made in plan(own, seeds=1).recipe] == [1, 2]
