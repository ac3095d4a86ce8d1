"""An executed notebook as Markdown: tables as tables, figures as files, nothing else of HTML."""

import base64

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from irra_core.studies.page import write_markdown

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def executed(*outputs) -> nbformat.NotebookNode:
    return new_notebook(cells=[new_markdown_cell("# A question"), new_code_cell("compute()", outputs=list(outputs))])


def shown(**data) -> nbformat.NotebookNode:
    kinds = {
        "html": "text/html",
        "plain": "text/plain",
        "png": "image/png",
        "widget": "application/vnd.jupyter.widget-view+json",
    }
    return new_output("display_data", {kinds[name]: value for name, value in data.items()})


def test_tables_become_tables_and_figures_files_and_bars_and_styles_go(tmp_path):
    rows = pd.MultiIndex.from_tuples([("one", 1), ("two", 2)], names=["name", ""])
    table = pd.DataFrame({"R@1 (%)": [1.5, 2.0], "a|b": ["x", "y < z"]}, index=rows)
    notebook = executed(
        shown(html="<style scoped>.dataframe {color: red}</style>" + table.to_html(), plain="as text"),
        shown(html=table.reset_index().style.format(precision=1).hide(axis="index").to_html(), plain="styler"),
        shown(png=base64.b64encode(PNG).decode(), plain="<Figure>"),
        shown(widget={"model_id": "1"}, plain="bar"),
        new_output("stream", name="stderr", text="a bar of tqdm"),
        new_output("stream", name="stdout", text="one beats two\n"),
        shown(html="<div>only layout</div>", plain="the text"),
    )
    nbformat.write(notebook, tmp_path / "rq1.ipynb")
    file = write_markdown(tmp_path / "rq1.ipynb", tmp_path / "out")
    text = file.read_text()
    assert file == tmp_path / "out" / "rq1.md"
    assert text.startswith("# A question\n")
    lines = text.splitlines()
    assert "| name |  | R@1 (%) | a\\|b |" in lines
    assert "| one | 1 | 1.5 | x |" in lines
    assert "| two | 2 | 2.0 | y < z |" in lines
    assert text.count("| two | 2 | 2.0 | y < z |") == 2  # the second is the styled one
    (picture,) = (path for path in (tmp_path / "out").iterdir() if path.suffix == ".png")
    assert picture.read_bytes() == PNG
    assert f"]({picture.name})" in text
    assert "one beats two" in text
    assert "the text" in text
    for word in ("<style", "color: red", "a bar", "<div", "<table", "model_id", "as text"):
        assert word not in text
    assert not any(line != line.rstrip() for line in lines)


def test_the_heads_of_a_table_with_two_rows_of_names_are_joined(tmp_path):
    columns = pd.MultiIndex.from_tuples([("all", "R1"), ("all", "mAP"), ("hard", "R1")])
    table = pd.DataFrame([[1, 2, 3]], columns=columns, index=["sdm"])
    nbformat.write(executed(shown(html=table.to_html(), plain="")), tmp_path / "a.ipynb")
    lines = write_markdown(tmp_path / "a.ipynb", tmp_path).read_text().splitlines()
    assert "|  | all R1 | all mAP | hard R1 |" in lines
    assert "| sdm | 1 | 2 | 3 |" in lines


def test_a_first_row_of_names_is_the_head_of_a_table_that_marks_none(tmp_path):
    html = "<table><tr><th>field</th><th>value</th></tr><tr><td>epochs</td><td>4</td></tr></table>"
    nbformat.write(executed(shown(html=html, plain="")), tmp_path / "a.ipynb")
    lines = write_markdown(tmp_path / "a.ipynb", tmp_path).read_text().splitlines()
    place = lines.index("| field | value |")
    assert lines[place : place + 3] == ["| field | value |", "| --- | --- |", "| epochs | 4 |"]


def test_html_without_a_table_or_a_text_of_its_own_is_shown_as_its_text(tmp_path):
    html = "<p>a man in <s>red</s> &lt; <ruby>[MASK]<rt>blue</rt></ruby></p>\n<p>a  <b>woman</b></p>"
    nbformat.write(executed(shown(html=html, plain="<IPython.core.display.HTML object>")), tmp_path / "a.ipynb")
    text = write_markdown(tmp_path / "a.ipynb", tmp_path).read_text()
    assert "    a man in red < [MASK] (blue)\n    a woman\n" in text
    assert "IPython" not in text


def test_a_cell_over_several_rows_is_repeated_in_each(tmp_path):
    index = pd.MultiIndex.from_product([["small", "large"], ["cross", "co", "merged"]])
    table = pd.DataFrame({"ms": range(6), "times": range(6, 12)}, index=index)
    nbformat.write(executed(shown(html=table.to_html(), plain="")), tmp_path / "a.ipynb")
    lines = write_markdown(tmp_path / "a.ipynb", tmp_path).read_text().splitlines()
    for place, (size, name) in enumerate(index):
        assert f"| {size} | {name} | {place} | {place + 6} |" in lines


def test_a_notebook_that_was_not_executed_is_refused(tmp_path):
    nbformat.write(executed(), tmp_path / "a.ipynb")
    with pytest.raises(ValueError, match=r"a\.ipynb has no outputs: execute it first"):
        write_markdown(tmp_path / "a.ipynb", tmp_path)
