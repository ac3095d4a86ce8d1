"""docs/methods.md: its commands name parameters and values that exist, its figures are those of published.csv."""

import re
from pathlib import Path

import nbformat
import pandas as pd
import pytest

import irra_core as irra
from irra_core.recipes import recipe

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "methods.md").read_text()
NUMBERS = {"cuhk": 1, "icfg": 2, "rstp": 3}  # data set → its column


def rows(heading: str) -> list[list[str]]:
    """The cells of the table below a heading of the page ("" for the first)."""
    part = TEXT.split(f"## {heading}\n")[1] if heading else TEXT.split("\n## ")[0]
    lines = [line.strip("|").split(" | ") for line in part.split("\n## ")[0].splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line] for line in lines[1:]]


COMMANDS = {
    method: re.search(r"`(papermill .*)`", command)[1].split() for method, _, command, _ in rows("") if command != "–"
}


@pytest.mark.parametrize("method", COMMANDS)
def test_a_command_makes_a_recipe(method):
    words = COMMANDS[method]
    assert words[:3] == ["papermill", "train.ipynb", "OUT"]
    assert set(words[3::3]) == {"-p"}
    given = dict(zip(words[4::3], words[5::3], strict=True))
    cells = nbformat.read(ROOT / "notebooks" / "train.ipynb", 4).cells
    declared = next(cell.source for cell in cells if "parameters" in cell.metadata.get("tags", []))
    assert set(given) <= set(re.findall(r"^(\w+): ", declared, re.M))
    values = {name: float(value) if "." in value and value[0].isdigit() else value for name, value in given.items()}
    values = {name: int(value) if str(value).isdigit() else value for name, value in values.items()}
    recipe(**values)


def test_every_method_names_its_paper():
    for method, paper, *_ in rows(""):
        assert re.search(r"\*.{20,}\*, [A-Z]+ 20\d\d$", paper) or method == "CLIP fine-tuned", method


def test_the_figures_are_the_published_ones():
    table = irra.published().query("table == 'methods'")
    found = rows("Published figures")
    assert [row[0] for row in found] == list(dict.fromkeys(table.method))
    for row in found:
        for dataset, column in NUMBERS.items():
            (line,) = table[(table.method == row[0]) & (table.dataset == dataset)].itertuples()
            assert row[column] == f"{line.R1:.2f} / {'–' if pd.isna(line.mAP) else f'{line.mAP:.2f}'}"
            said = [line.backbone, line.pretrained, line.selected_on, line.second_hand]
            assert row[4:] == ["–" if pd.isna(each) else each for each in said]


def test_every_published_method_has_a_row_and_the_readme_leads_to_the_page():
    assert set(irra.published().query("table == 'methods'").method) <= {row[0] for row in rows("")}
    assert "docs/methods.md" in (ROOT / "README.md").read_text()
