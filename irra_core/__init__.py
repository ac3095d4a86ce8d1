"""irra-core: find a person's photo by a sentence. The public names, in the order of a user's day.

Names load on first use, so that `import irra_core` costs nothing and a mistyped parameter stops a notebook before
torch is imported.
"""

from irra_core.settings import lazily

_HOMES = {  # module below irra_core: the names that it gives
    "settings": "settings",
    "recipes": "recipe Recipe RECIPES PRESETS recipes",
    "notebook": "notebook_parameters notebook",
    "scale.progress": "progress",
    "annotations": "load_annotations annotations",
    "analysis.checks": "check_annotations",
    "synthetic": "make_synthetic synthetic_ceiling synthetic",
    "text": "tokenize text",
    "images": "open_annotations images",
    "scale.distributed": "distributed",
    "augmentation": "load_images augmentation",
    "batches": "batches",
    "model": "IRRA Features model",
    "backbone": "build_model",
    "losses": "sdm_loss itc_loss id_loss mlm_loss losses",
    "variants.cmpm": "cmpm_loss cmpc_loss",
    "variants.tal": "tal_loss",
    "variants.losses": "LOSSES",
    "metrics": "retrieval_metrics metrics",
    "checkpoints": "save_checkpoint load_checkpoint checkpoints",
    "hub.sources": "load_model",
    "hub.publish": "push_to_hub",
    "released.checkpoint": "load_official save_official",
    "released.published": "published",
    "evaluation": "evaluate Evaluation evaluation",
    "runs": "runs",
    "training": "train training",
    "analysis.logs": "logged",
    "retrieval": "Gallery",
    "explorer": "QueryExplorer",
    "search.kept": "kept_gallery",
    "benchmark": "benchmark",
    "studies": "studies",
    "studies.comparison": "comparison",
    "analysis": "analysis",
    "analysis.leaks": "leaks",
    "studies.transfer": "transfer",
    "analysis.plots": "plots",
    "studies.report": "report",
}
__getattr__, __dir__, __all__ = lazily(__name__, _HOMES)
__version__ = "0.1.0"
