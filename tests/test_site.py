"""The website's sources: every page, notebook and public name has its place; docstrings survive; checks find faults.

The built site is checked by `make docs`, which has an environment of its own.
"""

import ast
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import mistune
import pytest

import irra_core as irra

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs" / "site"))

import api  # noqa: E402
import check  # noqa: E402
import sources  # noqa: E402


def test_every_page_of_the_docs_is_in_one_section_and_every_listed_page_exists():
    pages = [page for _, page in sources.listed_pages()]
    assert len(pages) == len(set(pages))
    assert {f"docs/{path.stem}" for path in (ROOT / "docs").glob("*.md")} <= set(pages)
    assert [page for page in pages if not (ROOT / f"{page}.md").is_file()] == []


def test_every_notebook_has_a_page_and_every_executed_page_is_shown():
    shown = sources.notebook_pages()
    assert {page.notebook for page in shown.values()} - {None} == {
        path.stem for path in (ROOT / "notebooks").glob("*.ipynb")
    }
    executed = {path.stem for path in (ROOT / "reports" / "example").glob("*.md")} - {"README"}
    assert executed >= {"train", "losses", "data"}
    assert {f"reports/example/{name}" for name in executed} <= {path for path, page in shown.items() if page.executed}
    assert all(page.text.startswith("# ") for page in shown.values())


def test_links_between_the_pages_of_the_repository_arrive_and_each_page_is_in_the_navigation(tmp_path):
    sources.write_pages(tmp_path)  # stops at a link to nothing
    written = {path.relative_to(tmp_path).with_suffix("").as_posix() for path in tmp_path.rglob("*.md")}
    trees = "".join(path.read_text() for path in tmp_path.rglob("*.md") if "{toctree}" in path.read_text())
    in_tree = set(re.findall(r"^(?:.* <)?/([^<>\s]+?)>?$", trees, re.M))
    assert written - {"index"} == {name for name in in_tree if not name.startswith("api/")}


@pytest.mark.parametrize("target", ["docs/none.md", "reports/none.png", "../outside.md"])
def test_a_link_to_nothing_stops_the_site_and_is_named(target, tmp_path):
    with pytest.raises(SystemExit, match=f"README.md links {re.escape(target)}"):
        sources.linked(f"see [this `page`]({target})", "README", {}, tmp_path)


def test_links_to_notebooks_readme_and_folders_go_to_their_pages(tmp_path):
    places = {"README.md": "index.md", "notebooks/train.ipynb": "reports/example/train.md"}
    text = "[a](../README.md#cite) [b](../notebooks/train.ipynb) [c](../tests/) [d](https://x.org) `[e](f)`"
    expected = "[a](../index.md#cite) [b](../reports/example/train.md) c [d](https://x.org)"
    assert sources.linked(text.removesuffix(" `[e](f)`"), "docs/page", places, tmp_path) == expected
    sources.linked("![](../docs/ranking.jpg)", "docs/page", places, tmp_path)
    assert (tmp_path / "docs" / "ranking.jpg").is_file()


def test_the_api_reference_lists_every_public_name_once():
    listed = [name for _, _, names in api.SECTIONS.values() for name in names.split()]
    assert len(listed) == len(set(listed))
    assert set(listed) <= set(irra.__all__)
    for name in set(irra.__all__) - set(listed):  # each of them has a page of its own
        assert isinstance(getattr(irra, name), ModuleType), f"{name} is in no section of docs/site/api.py"


class Shown(HTMLParser):
    """The text of a page, without its tags."""

    def __init__(self, html: str):
        super().__init__()
        self.text = ""
        self.feed(html)

    def handle_data(self, data):
        self.text += data


def docstrings() -> list[str]:
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "irra_core").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, kinds)]
    return [text for node in nodes if (text := ast.get_docstring(node))]


def test_no_character_of_a_docstring_is_lost_or_changes_its_meaning_in_markdown():
    found = docstrings()
    assert len(found) > 500
    for text in found:
        html = mistune.html(api.markdown(text))
        listed = re.sub(r"(?m)^- ", "", text)  # the hyphens of lists become bullets
        assert re.sub(r"[\s`]", "", Shown(html).text) == re.sub(r"[\s`]", "", listed), text
        assert not re.search("<(em|strong|a|h[1-6]|ol|blockquote)>", html), text


def test_an_equation_of_a_docstring_is_code():
    shown = api.markdown("With s_ij and *c*:\n    loss = mean_i p_ij\nSource: `a_b`.")
    assert shown == "With s\\_ij and \\*c\\*:\n\n```text\nloss = mean_i p_ij\n```\n\nSource: `a_b`."


FAULTS = [
    ("a.html", '<script src="https://cdn.org/x.js"></script>', "a.html loads https://cdn.org/x.js"),
    ("a.html", '<link rel="stylesheet" href="//cdn.org/x.css">', "a.html loads //cdn.org/x.css"),
    ("a.html", '<img srcset="b.png 1x, https://cdn.org/b.png 2x" src="b.png">', "a.html loads https://cdn.org/b.png"),
    ("a.html", "<style>@import 'https://fonts.org/f.css';</style>", "a.html loads https://fonts.org/f.css"),
    ("a.html", '<p style="background: url(http://x.org/y)">', "a.html loads http://x.org/y"),
    ("a.html", "<script>import('https://cdn.org/m.mjs')</script>", "a.html loads by script: import('https://cdn.org/m"),
    ("s/a.css", '@font-face {src: url("https://fonts.org/f.woff2")}', "s/a.css loads https://fonts.org/f.woff2"),
    ("s/a.js", 'fetch("https://search.org/q")', 's/a.js loads by script: fetch("https://search.org/q'),
    ("a.svg", '<svg><image href="http://x.org/y.png"/></svg>', "a.svg loads http://x.org/y.png"),
    ("a.html", '<a href="none.html">', "a.html links none.html: no such file"),
    ("a.html", '<a href="b.html#none">', "a.html links b.html#none: no such place in that page"),
    ("a.html", '<img src="none.png">', "a.html links none.png: no such file"),
]


@pytest.mark.parametrize(("name", "text", "said"), FAULTS)
def test_each_fault_of_a_built_site_is_found(name, text, said, tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "b.html").write_text('<h1 id="here">b</h1><a href="https://x.org">x</a><a href="#here">y</a>')
    (tmp_path / "b.png").write_bytes(b"")
    assert check.loaded_from_elsewhere(tmp_path) + check.broken_links(tmp_path) == []
    (tmp_path / name).write_text(text)
    (found,) = check.loaded_from_elsewhere(tmp_path) + check.broken_links(tmp_path)
    assert found.startswith(said)
