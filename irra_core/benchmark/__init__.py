"""What is timed, and how."""

import importlib

_HOMES = {
    "timing": "FORMAT PARTS measure profile_step merged speed_table ratios save_benchmark load_benchmark to_markdown machine_line",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
