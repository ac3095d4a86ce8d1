"""The repository → the folder of Markdown pages that Sphinx reads: README, docs, API, notebooks, in one navigation.

    python docs/site/sources.py FOLDER

Pages keep their places, so that links between them are the same on a code host and on the site. Notebooks are shown as
executed if `reports/example` has their page, else without outputs; nothing is executed.
"""

import json
import posixpath
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = "reports/example"
SECTIONS = {  # section → title, its pages in order; pages of docs/ that no section names come last in `reference`
    "guide": ("Guide", "results answers study_design paper_tables released_code"),
    "how_to": ("How to", "own_photos hub data_sets explorer small_cards clusters logging methods"),
    "notebooks": ("Notebooks", ""),
    "api": ("API", ""),
    "reference": (
        "Reference",
        "/reports/README determinism performance scaling pretrained_general model_card data_card /CONTRIBUTING",
    ),
}
NOTEBOOKS = {  # in README's order; a study has a page of its own in `reports/example/studies`
    name: [] for name in ("irra_by_hand", "data", "train", "evaluate")
}
NOTEBOOKS |= {
    "ablation": ["rq1", "rq2", "rq3", "rq4", "plugins", "noise"],
    "released_vs_paper": ["released"],
    "transfer": ["rq5"],
}
NOTEBOOKS |= {name: [] for name in ("losses", "attention", "similarity", "benchmark", "explorer")}
LINK = re.compile(r"(?<!\\)(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")


def write_pages(folder: Path) -> None:
    """Write every page of the site but the API's, and the files that pages link, into an empty folder."""
    pages = {"index": (ROOT / "README.md").read_text(encoding="utf-8")}
    pages |= {page: (ROOT / f"{page}.md").read_text(encoding="utf-8") for _, page in listed_pages()}
    shown = notebook_pages()
    pages |= {path: page.text for path, page in shown.items()}
    places = {f"{page}.md": f"{page}.md" for page in pages}  # file of the repository → page of the site
    places |= {f"notebooks/{page.notebook}.ipynb": f"{path}.md" for path, page in reversed(shown.items())}
    places |= {"README.md": "index.md", EXAMPLE: "notebooks/index.md", f"{EXAMPLE}/README.md": "notebooks/index.md"}
    for page, text in pages.items():
        home = "README" if page == "index" else page
        _write(folder / f"{page}.md", linked(text, home, places, folder))
    for section, (title, _) in SECTIONS.items():
        if section not in ("api", "notebooks"):
            listed = [page for name, page in listed_pages() if name == section]
            _write(folder / section / "index.md", f"# {title}\n\n{_toctree([(None, page) for page in listed])}")
    _write(folder / "notebooks" / "index.md", _notebook_index(shown))
    _write(folder / "index.md", (folder / "index.md").read_text(encoding="utf-8") + _navigation())


def listed_pages() -> list[tuple[str, str]]:
    """Each page of the sections but notebooks and API: its section and its path without .md."""
    listed = [
        (section, page[1:] if page[0] == "/" else f"docs/{page}")
        for section, (_, pages) in SECTIONS.items()
        for page in pages.split()
    ]
    known = {page for _, page in listed}
    rest = sorted(f"docs/{path.stem}" for path in (ROOT / "docs").glob("*.md"))
    return listed + [("reference", page) for page in rest if page not in known]


def _navigation() -> str:
    tree = [(title, f"{section}/index") for section, (title, _) in SECTIONS.items()]
    return "\n\n" + _toctree(tree, ":hidden:\n")


def _toctree(entries: list[tuple[str | None, str]], options: str = ":maxdepth: 1\n") -> str:
    lines = (f"{title} </{page}>" if title else f"/{page}" for title, page in entries)
    return f"```{{toctree}}\n{options}\n" + "\n".join(lines) + "\n```\n"


class NotebookPage(NamedTuple):
    """The page of a notebook, or of a table that one wrote."""

    text: str
    notebook: str | None = None  # None for a table
    executed: bool = False


def notebook_pages() -> dict[str, NotebookPage]:
    """Path without .md → page: executed notebooks and tables of `reports/example`, then the rest without outputs."""
    shown = {}
    for path in sorted((ROOT / EXAMPLE).rglob("*.md")):
        text, name = path.read_text(encoding="utf-8"), notebook_of(path.stem)
        page = path.relative_to(ROOT).with_suffix("").as_posix()
        if name and text.startswith("# "):
            note = f"*Executed; widgets are live in JupyterLab only. [`{name}.ipynb`](/notebooks/{name}.ipynb).*"
            shown[page] = NotebookPage(_under_title(text, note), name, True)
        elif path.name != "README.md":
            figures = "".join(f"\n![{each.stem}]({each.name})\n" for each in sorted(path.parent.glob("*.svg")))
            shown[page] = NotebookPage(f"# {path.parent.name.capitalize().replace('-', ', ')}\n\n{text}{figures}")
    executed = {page.notebook for page in shown.values()}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        if path.stem not in executed:
            note = f"*Without outputs. The notebook: [`{path.name}`](/notebooks/{path.name}).*"
            shown[f"notebooks/{path.stem}"] = NotebookPage(_under_title(_unexecuted(path), note), path.stem)
    return shown


def notebook_of(stem: str) -> str | None:
    """The notebook that a page shows: it has the notebook's name, or that of a study made with it."""
    return next((name for name, studies in NOTEBOOKS.items() if stem == name or stem in studies), None)


def _under_title(text: str, note: str) -> str:
    title, _, rest = text.partition("\n")
    return f"{title}\n\n{note}\n{rest}"


def _unexecuted(path: Path) -> str:
    """The cells of a notebook as Markdown."""
    shown = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"]).rstrip()
        shown.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    return "\n\n".join(shown) + "\n"


def _notebook_index(shown: dict[str, NotebookPage]) -> str:
    """The list of notebooks in README's order: executed ones, then those without outputs, then tables."""
    order = list(NOTEBOOKS)
    heads = {"Executed": [], "Without outputs": [], "Tables": []}
    for path, page in sorted(shown.items(), key=lambda item: order.index(item[1].notebook or order[-1])):
        study = posixpath.basename(posixpath.dirname(path)) if "/studies/" in path else ""
        title = page.text.partition("\n")[0].removeprefix("# ")
        kind = "Executed" if page.executed else "Without outputs" if page.notebook else "Tables"
        heads[kind].append((f"{study}: {title}" if study else None, path))
    parts = ["# Notebooks", "Each notebook asks one question. Its parameters, prose, code and figures are one page."]
    parts += [f"## {head}\n\n{_toctree(found)}" for head, found in heads.items() if found]
    return "\n\n".join(parts)


def linked(text: str, home: str, places: dict[str, str], folder: Path) -> str:
    """The text with its links as the site needs them, from the page `home` of the repository.

    A target in `places` is replaced by its page, another file is copied to the same place, and another folder, which a
    site cannot show, becomes the link's text. Raises SystemExit for a target that does not exist.
    """

    def replaced(found: re.Match) -> str:
        mark, label, target = found.groups()
        if re.match(r"[a-z]+:|#", target):
            return found.group()
        given, _, anchor = target.partition("#")
        place = posixpath.normpath(posixpath.join(posixpath.dirname(home), given) if given[0] != "/" else given[1:])
        if not (ROOT / place).exists():
            raise SystemExit(f"{home}.md links {target}, which does not exist: {place}")
        if (ROOT / place).is_dir() and place not in places:
            return label
        to = place if given[0] == "/" else places.get(place, place)
        if (ROOT / to).is_file() and to not in places.values():
            (folder / to).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / to, folder / to)
        to = posixpath.relpath(to, posixpath.dirname(home) or ".")
        return f"{mark}[{label}]({to}{'#' + anchor if anchor else ''})"

    parts = re.split(r"(^```[\s\S]*?^```|^(?: {4}.*\n)+)", text, flags=re.M)  # every other one is code
    return "".join(part if number % 2 else LINK.sub(replaced, part) for number, part in enumerate(parts))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    from api import write_api

    target = Path(sys.argv[1])
    shutil.rmtree(target, ignore_errors=True)
    write_pages(target)
    write_api(target / "api")
