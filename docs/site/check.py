"""Check the built site: its pages load nothing from elsewhere, and every link between them arrives.

python docs/site/check.py FOLDER
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {  # element → attributes whose target a browser loads by itself
    **dict.fromkeys(("script", "img", "iframe", "embed", "source", "audio", "video", "track", "input"), ("src",)),
    "link": ("href",),
    "object": ("data",),
    "image": ("href", "xlink:href"),
    "use": ("href", "xlink:href"),
}
SETS = ("srcset", "poster", "background")  # attributes that are loaded on any element
NOT_LOADED = {"canonical", "next", "prev", "up", "search", "index", "author", "license", "alternate"}  # of <link rel>
ELSEWHERE = re.compile(r"(https?:)?//", re.I)
IN_STYLE = re.compile(r"""(?:url\(\s*['"]?|@import\s+['"])((?:https?:)?//[^'")\s]+)""", re.I)
IN_SCRIPT = re.compile(  # what a script could load: imports, workers, fetched files and elements that it makes
    r"""(?:\bimport\s*\(?\s*|\bfrom\s*|\bfetch\(\s*|importScripts\(\s*|new\s+\w*Worker\(\s*|\.src\s*=\s*)"""
    r"""['"`](?:https?:)?//[^'"`]*""",
    re.I,
)


class Page(HTMLParser):
    """What a page loads, where it links, and the names that links can end in."""

    def __init__(self, path: Path):
        super().__init__()
        self.loads, self.links, self.names, self._code = [], [], set(), None
        self.styles, self.scripts = "", ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        given = {name: value or "" for name, value in attrs}
        self.names.update(given[name] for name in ("id", "name") if name in given)
        self.styles += given.get("style", "") + "\n"
        self._code = tag if tag in ("style", "script") else None
        if tag in ("a", "area") and "href" in given:
            self.links.append(given["href"])
        if tag == "link" and NOT_LOADED & set(given.get("rel", "").lower().split()):
            return
        for name in (*LOADED.get(tag, ()), *SETS):
            if name in given:
                self.loads += [part.split()[0] for part in given[name].split(", ") if part.strip()]

    def handle_endtag(self, tag):
        self._code = None

    def handle_data(self, data):
        if self._code == "style":
            self.styles += data
        elif self._code == "script":
            self.scripts += data


def loaded_from_elsewhere(folder: Path) -> list[str]:
    """Every address outside the site that a page, a style sheet or a script of it would load."""
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".html" or path.suffix == ".svg":
            page = Page(path)
            found += [f"{name} loads {target}" for target in page.loads if ELSEWHERE.match(target)]
            styles, scripts = page.styles, page.scripts
        elif path.suffix in (".css", ".js"):
            text = path.read_text(encoding="utf-8")
            styles, scripts = (text, "") if path.suffix == ".css" else ("", text)
        else:
            continue
        found += [f"{name} loads {target}" for target in IN_STYLE.findall(styles)]
        found += [f"{name} loads by script: {target}" for target in IN_SCRIPT.findall(scripts)]
    return found


def broken_links(folder: Path) -> list[str]:
    """Every link of a page to a file or a place in a page that the site does not have."""
    made = (path for path in folder.rglob("*.html") if "_static" not in path.relative_to(folder).parts)
    pages = {path.resolve(): Page(path) for path in made}
    found = []
    for path, page in sorted(pages.items()):
        name = path.relative_to(folder.resolve()).as_posix()
        for target in [*page.links, *page.loads]:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            file = file / "index.html" if file.is_dir() else file
            if not file.is_file():
                found.append(f"{name} links {target}: no such file")
            elif parts.fragment and file in pages and unquote(parts.fragment) not in pages[file].names:
                found.append(f"{name} links {target}: no such place in that page")
    return found


def main(folder: Path) -> None:
    """Print the findings and exit with 1, or print the size of the site."""
    findings = loaded_from_elsewhere(folder) + broken_links(folder)
    if findings:
        sys.exit("\n".join([*findings, f"{len(findings)} findings"]))
    files = [path for path in folder.rglob("*") if path.is_file()]
    pages = sum(path.suffix == ".html" and "_static" not in path.parts for path in files)
    size = sum(path.stat().st_size for path in files) / 1e6
    print(f"{pages} pages, {size:.1f} MB; nothing is loaded from elsewhere, no link is broken: {folder / 'index.html'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
