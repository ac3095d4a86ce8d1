"""The query explorer: a widget that searches a gallery."""

import importlib

_HOMES = {
    "widget": "THUMBNAIL LONGEST DEEP CHOICES Card QueryExplorer",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
