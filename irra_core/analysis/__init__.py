"""Tables and figures about a trained model and its data."""

import importlib

_HOMES = {
    "confusions": "KINDS means by_attribute pair_kinds pair_similarities separation answers contradictions length_groups reliability calibration_error calibrated_temperature",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
