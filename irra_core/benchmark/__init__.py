"""What is timed, and how."""

from irra_core.settings import lazily

_HOMES = {
    "timing": (
        "FORMAT PARTS measure profile_step merged speed_table ratios save_benchmark load_benchmark to_markdown "
        "machine_line"
    ),
}
__getattr__, __dir__, __all__ = lazily(__name__, _HOMES)
