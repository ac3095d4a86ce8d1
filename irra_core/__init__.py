"""irra-core: find a person's photo by a sentence. The public names, in the order of a user's day.

Names load on first use, so that `import irra_core` costs nothing and a mistyped parameter stops a notebook before
torch is imported.
"""

import importlib

_HOMES = {
    "recipes": "recipe Recipe RECIPES PRESETS notebook_parameters",
    "annotations": "load_annotations check_annotations",
    "synthetic": "make_synthetic synthetic_ceiling",
    "text": "tokenize",
    "images": "open_annotations load_images",
    "model": "build_model IRRA Features",
    "losses": "sdm_loss itc_loss cmpm_loss cmpc_loss tal_loss id_loss mlm_loss LOSSES",
    "metrics": "retrieval_metrics",
    "checkpoints": "save_checkpoint load_checkpoint load_official save_official",
    "runs": "published",
    "evaluation": "evaluate Evaluation",
    "training": "train",
    "retrieval": "Gallery",
    "explorer": "QueryExplorer",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}
_MODULES = {
    "recipes": "recipes",
    "annotations": "annotations",
    "synthetic": "synthetic",
    "text": "text",
    "images": "images",
    "distributed": "scale.distributed",
    "batches": "batches",
    "model": "model",
    "losses": "losses",
    "metrics": "metrics",
    "checkpoints": "checkpoints",
    "evaluation": "evaluation",
    "runs": "runs",
    "training": "training",
    "benchmark": "benchmark",
    "studies": "studies",
    "comparison": "studies.comparison",
    "leaks": "analysis.leaks",
    "transfer": "studies.transfer",
    "plots": "analysis.plots",
    "report": "studies.report",
}

__all__ = [*_HOME, *_MODULES]
__version__ = "0.1.0"


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f"irra_core.{_MODULES[name]}")
    if name not in _HOME:
        raise AttributeError(f"module 'irra_core' has no attribute {name!r}")
    return getattr(importlib.import_module(f"irra_core.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
