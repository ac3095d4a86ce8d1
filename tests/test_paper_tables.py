"""docs/paper_tables.md: its figures are the published ones, none is missing, and its commands name what exists."""

import math
import re
import shlex
from pathlib import Path

import nbformat
import pytest

import irra_core as irra
from irra_core.analysis.checks import PUBLISHED_COUNTS
from irra_core.studies.grid import STUDIES

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "paper_tables.md").read_text()
COLUMNS = {
    "R@1": "R1", "R@5": "R5", "R@10": "R10", "mAP": "mAP", "mINP": "mINP",
    "parameters (M)": "params_m", "forward (ms)": "forward_ms",
}  # fmt: skip
NAMED = {"data set": "dataset", "method": "method", "trained on": "train_dataset", "tested on": "dataset"}


def lines(table: str) -> list[dict[str, str]]:
    """The rows of one of the page's tables."""
    found = TEXT.split(f"<!-- {table} -->\n")[1].split(f"<!-- /{table} -->")[0].strip().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in found]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


@pytest.mark.parametrize("table", ["results", "ablation", "interaction", "transfer"])
def test_every_published_figure_is_on_the_page_with_its_source_and_no_other_is(table):
    shown = set()
    for line in lines(table):
        for source in line["source"].split(";")[0].split(", "):
            named = tuple((NAMED[name], line[name]) for name in NAMED if name in line)
            figures = tuple((COLUMNS[name], float(line[name])) for name in COLUMNS if name in line)
            shown.add((source, *named, *figures))
    published = irra.published()
    expected = set()
    for row in published[published.table == table].to_dict("records"):
        header = lines(table)[0]
        named = tuple((NAMED[name], row[NAMED[name]]) for name in NAMED if name in header)
        figures = tuple((COLUMNS[name], float(row[COLUMNS[name]])) for name in COLUMNS if name in header)
        expected.add((row["source"], *named, *figures))
        hidden = [name for name in COLUMNS.values() if name not in dict(figures) and not math.isnan(row[name])]
        assert not hidden
    assert shown == expected


def commands() -> list[list[str]]:
    """Every papermill command of the page, as the shell splits it."""
    found = re.findall(r"papermill [^\n`]+", TEXT)
    return [shlex.split(command) for command in found]


def test_each_table_has_its_command():
    assert len(commands()) >= 12


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_a_command_names_a_notebook_its_parameters_and_known_values(command):
    cells = nbformat.read(ROOT / "notebooks" / command[1], 4).cells
    declared = next(cell.source for cell in cells if "parameters" in cell.metadata.get("tags", []))
    names = re.findall(r"^(\w+): ", declared, re.M)
    assert list(command[3::3]) == ["-p"] * len(command[3::3])
    given = dict(zip(command[4::3], command[5::3]))
    assert set(given) <= set(names)
    assert given.get("study", "rq1") in STUDIES
    for dataset in given.get("datasets", given.get("dataset", "cuhk")).split("+"):
        irra.recipe(dataset, losses=given.get("losses"))


def test_the_readme_leads_to_the_page():
    assert "docs/paper_tables.md" in (ROOT / "README.md").read_text()


def test_the_steps_of_a_run_follow_from_the_data_sets_sizes():
    counts = PUBLISHED_COUNTS
    for dataset in ("cuhk", "rstp", "icfg"):
        recipe = irra.recipe(dataset)
        steps = recipe.epochs * -(-counts[dataset]["train"]["captions"] // recipe.batch_size)
        assert f"{steps:,}" in TEXT
