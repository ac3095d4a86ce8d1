"""Tables and figures about a trained model and its data."""

from irra_core.settings import lazily

_HOMES = {
    "confusions": (
        "KINDS means by_attribute pair_kinds pair_similarities separation answers contradictions length_groups "
        "reliability calibration_error calibrated_temperature"
    ),
    "description": "describe",
    "logs": "LOGS check_log logged",
    "words": "sample_masked masked_words",
}
__getattr__, __dir__, __all__ = lazily(__name__, _HOMES)
