"""The authors' released code: its published results, its checkpoint format, and functions that run a local clone."""

from irra_core.settings import lazily

_HOMES = {
    "checkpoint": "load_official save_official released_name RELEASED_NAMES",
    "clone": (
        "MODULES PACKAGES WORKERS TEST_BATCH Code STAND_INS load_code in_single_precision as_released build "
        "build_optimiser batch_of losses step rank evaluate train_loader"
    ),
}
__getattr__, __dir__, __all__ = lazily(__name__, _HOMES)
