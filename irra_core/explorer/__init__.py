"""The query explorer: a widget that searches a gallery."""

from irra_core.settings import lazily

_HOMES = {
    "widget": "THUMBNAIL LONGEST DEEP CHOICES Card QueryExplorer",
}
__getattr__, __dir__, __all__ = lazily(__name__, _HOMES)
