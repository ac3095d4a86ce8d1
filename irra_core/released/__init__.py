"""The authors' released code: its published numbers, its checkpoints, and a clone of it run beside ours."""

import importlib

_HOMES = {
    "clone": "MODULES PACKAGES WORKERS TEST_BATCH Code STAND_INS load_code in_single_precision as_released build build_optimiser batch_of losses step rank evaluate train_loader",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
