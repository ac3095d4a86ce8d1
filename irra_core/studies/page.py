"""An executed notebook → Markdown for a code host, its figures as PNG files, its tables as Markdown tables."""

import re
import sys
from collections.abc import Mapping
from pathlib import Path

import nbformat
from bs4 import BeautifulSoup
from nbconvert.exporters import MarkdownExporter
from traitlets.config import Config

from irra_core import runs


def write_markdown(notebook: str | Path, folder: str | Path) -> Path:
    """The file `<notebook>.md` in a folder, written from an executed notebook, with its figures beside it.

    Tables become Markdown tables; style sheets, scripts, progress bars and messages on stderr are left out. Raises
    ValueError for a notebook that was not executed.
    """
    notebook, folder = Path(notebook), Path(folder)
    content = nbformat.read(notebook, 4)
    code = [cell for cell in content.cells if cell.cell_type == "code"]
    if not any(cell.outputs for cell in code):
        raise ValueError(f"{notebook} has no outputs: execute it first, for example by papermill")
    for cell in code:
        cell.outputs = [_plain(output) for output in cell.outputs if _is_shown(output)]
    options = Config()
    options.ExtractOutputPreprocessor.output_filename_template = (
        f"{notebook.stem}-{{cell_index}}-{{index}}{{extension}}"
    )
    text, resources = MarkdownExporter(config=options).from_notebook_node(content)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in (resources["outputs"] or {}).items():
        with runs.replaced(folder / name) as aside:
            aside.write_bytes(data)
    text = "\n".join(line.rstrip() for line in text.splitlines())
    runs.write_text(folder / f"{notebook.stem}.md", re.sub(r"\n{3,}", "\n\n", text).strip() + "\n")
    return folder / f"{notebook.stem}.md"


def _is_shown(output: nbformat.NotebookNode) -> bool:
    """False for messages on stderr and for progress bars."""
    widget = "application/vnd.jupyter.widget-view+json" in output.get("data", {})
    return not widget and output.get("name") != "stderr"


def _plain(output: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The output with tables in Markdown, of pictures the PNG alone, and no other HTML."""
    data = output.get("data")
    if data is None:
        return output
    if "image/png" in data:
        output.data = {"image/png": data["image/png"]}
    elif "text/html" in data:
        content = BeautifulSoup(data["text/html"], "html.parser")
        shown = "\n\n".join(_table(table) for table in content.find_all("table"))
        output.data = {"text/markdown": shown} if shown else {"text/plain": _text(content, data)}
    return output


def _text(content: BeautifulSoup, data: Mapping[str, str]) -> str:
    """What HTML without a table says as plain text: the object's own text, else the HTML's, one line per block."""
    if not (plain := data.get("text/plain", "")).startswith("<IPython."):
        return plain
    for block in content.find_all(["p", "div", "li", "br"]):
        block.append("\n")
    for above in content.find_all("rt"):  # the word to predict above a mask
        above.string = f" ({above.get_text()})"
    lines = (" ".join(line.split()) for line in content.get_text().splitlines())
    return "\n".join(line for line in lines if line)


def _table(table) -> str:
    """An HTML table as a Markdown table: the rows of its head are joined into one."""
    rows = table.find_all("tr")
    named = table.select("thead tr") or [row for row in rows[:1] if not row.find("td")]
    head, body = _grid(named), _grid([row for row in rows if not any(row is each for each in named)])
    width = max(map(len, head + body))
    head, body = ([row + [""] * (width - len(row)) for row in rows] for rows in (head, body))
    joined = [" ".join(dict.fromkeys(part for part in column if part)) for column in zip(*head)] or [""] * width
    return "\n".join("| " + " | ".join(line) + " |" for line in [joined, ["---"] * width, *body])


def _grid(rows) -> list[list[str]]:
    """The texts of a table's rows; a cell that spans columns or rows is repeated."""
    grid, below = [], {}  # below: column → text and number of rows that it still spans
    for row in rows:
        line: list[str] = []
        for cell in [*row.find_all(["th", "td"]), None]:
            while len(line) in below:
                text, left = below.pop(place := len(line))
                below |= {place: (text, left - 1)} if left > 1 else {}
                line.append(text)
            if cell is None:
                break
            text = " ".join(cell.get_text().split()).replace("|", "\\|")
            for _ in range(int(cell.get("colspan", 1))):
                if (span := int(cell.get("rowspan", 1))) > 1:
                    below[len(line)] = text, span - 1
                line.append(text)
        grid.append(line)
    return grid


if __name__ == "__main__":
    sys.stdout.write(f"{write_markdown(*sys.argv[1:3])}\n")
