"""Timing of training, evaluation, ranking, decoding and start-up, beside a clone of the released code."""

from irra_core.settings import lazily

_HOMES = {
    "timing": (
        "FORMAT PARTS measure profile_step merged speed_table ratios save_benchmark load_benchmark to_markdown "
        "machine_line"
    ),
    "costs": "inference_ms step_seconds interaction_costs",
}
__getattr__, __dir__, __all__ = lazily(__name__, _HOMES)
