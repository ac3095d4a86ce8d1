"""Rendered pedestrians with captions: a data set that needs no download."""

from irra_core.settings import lazily

_HOMES = {
    "people": (
        "RENDERING MARKER VIEWS TWINS FEWEST ALONE LAYOUTS MIX HAIR CLOTH DENIM CALM SHOE HAIR_MIX PATTERNS PATTERNED "
        "COLOURFUL TWIN_KEYS make_synthetic attributes stated_attributes near_twins is_rendered twin_pids "
        "synthetic_ceiling"
    ),
    "pretraining": "pretraining pretrain ship",
}
__getattr__, __dir__, __all__ = lazily(__name__, _HOMES)
