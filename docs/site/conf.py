"""Sphinx's settings for the site that `make docs` builds from the pages of `sources.py`."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

project = "irra-core"
author = "the irra-core developers"
release = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
copyright = "the irra-core developers, MIT licence"
extensions = ["myst_parser"]
myst_heading_anchors = 4
myst_enable_extensions = []
suppress_warnings = ["myst.header"]  # a notebook may begin a part with a heading of a lower level
highlight_language = "text"  # indented blocks are commands and outputs
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True
add_module_names = False
toc_object_entries_show_parents = "hide"
html_theme = "pydata_sphinx_theme"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_title = "irra-core"
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_theme_options = {
    "logo": {"text": "irra-core"},
    "navbar_persistent": ["search-field"],
    "navbar_end": ["theme-switcher"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "secondary_sidebar_items": ["page-toc"],
    "show_nav_level": 1,
    "navigation_with_keys": False,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
html_sidebars = {"index": []}
