"""Rendered pedestrians with captions: the data set that everybody has."""

import importlib

_HOMES = {
    "people": "RENDERING MARKER VIEWS TWINS FEWEST ALONE LAYOUTS MIX HAIR CLOTH DENIM CALM SHOE HAIR_MIX PATTERNS PATTERNED COLOURFUL TWIN_KEYS make_synthetic attributes stated_attributes near_twins is_rendered twin_pids synthetic_ceiling",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
