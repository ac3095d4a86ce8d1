"""Grids of runs, their comparison, transfer between data sets and the page of results."""

import importlib

_HOMES = {
    "grid": "ROUGH_STEP_SECONDS ROUGH_RUN_SECONDS LOOK_EVERY Study STUDIES plan estimate run_all study_folder save_study",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
