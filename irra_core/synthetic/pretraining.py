"""The domain `general` → the small CLIP's weights after InfoNCE, trained once and cached."""

import hashlib
import shutil
from pathlib import Path

from irra_core import runs
from irra_core.annotations import load_annotations
from irra_core.checkpoints import replaced
from irra_core.recipes import Recipe, recipe
from irra_core.settings import cache_root
from irra_core.synthetic.people import RENDERING, make_synthetic
from irra_core.training import train


def pretraining() -> Recipe:
    """The recipe of the small CLIP's `general` weights: InfoNCE on the rendered domain `general`, last epoch."""
    chosen = {"identities": 1000, "losses": "itc", "epochs": 14, "lr": 8e-4, "warmup_epochs": 1, "select_on": "last"}
    return recipe("synthetic-general", pretrained="none", **chosen)


def general_weights(recipe: Recipe) -> Path:
    """The cache file of the small CLIP pretrained by that recipe; its name changes with the renderer's version."""
    key = hashlib.sha256(f"{recipe.key()} {RENDERING}".encode()).hexdigest()[:16]
    return cache_root() / "general" / f"{key}.safetensors"


def pretrained_general(progress=None) -> Path:
    """The small CLIP's weights after InfoNCE on the domain `general`; rendered and trained once, then cached."""
    recipe = pretraining()
    weights = general_weights(recipe)
    if weights.exists():
        return weights
    with runs.locked(weights.parent, wait=True, progress=progress):  # another process may be training them
        if not weights.exists():
            folder = weights.with_suffix("")
            make_synthetic(folder, people=recipe.identities, domain="general", progress=progress)
            annotations = load_annotations("synthetic-general", folder).assign(split="train")
            for _ in train(recipe, annotations, folder / "run", progress):
                pass
            with replaced(weights) as aside:
                shutil.copyfile(folder / "run" / runs.WEIGHTS, aside)
    return weights
