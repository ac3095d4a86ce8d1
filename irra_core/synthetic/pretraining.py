"""The pictures of `general` → the small CLIP's weights after InfoNCE, as the package holds them (`make pretrain`)."""

import json
import sys
from pathlib import Path
from typing import Any

from irra_core import runs
from irra_core.annotations import load_annotations
from irra_core.backbone import GENERAL
from irra_core.checkpoints import FORMAT, load_checkpoint, save_tensors, weights_of
from irra_core.recipes import Recipe, recipe
from irra_core.settings import cache_root, smoke
from irra_core.synthetic import people, web
from irra_core.training import train


def pretraining(annotations: str | Path) -> Recipe:
    """The recipe of the shipped weights: InfoNCE on `general`; its held-out pictures choose the epoch."""
    return recipe(
        str(annotations),
        backbone="small",
        pretrained="none",
        losses="itc",
        temperature=0.03,  # texts that fit another picture too are many: 0.02 stays longer on the first plateau
        epochs=20,
        lr=1e-3,
        warmup_epochs=1,
        crop_padding=2,
        erase_probability=0.0,
        select_on="val",
    )


def pretrain(folder: str | Path | None = None, progress: Any = None) -> Path:
    """The file of the small CLIP's weights after pretraining, made in a folder; a killed call is resumed.

    The folder then holds the pictures in `general/`, the run with its history in `run/`, and `general.safetensors`.
    """
    version = f"{people.RENDERING}.{web.RENDERING}{'-smoke' if smoke() else ''}"
    folder = Path(folder or cache_root() / f"pretraining-{version}")
    pictures = web.make_web(folder / "general", *((48, 12) if smoke() else ()), progress=progress)
    for _ in train(pretraining(pictures), load_annotations(pictures), folder / "run", progress):
        pass
    ship(folder / "run" / runs.WEIGHTS, folder / GENERAL.name)
    return folder / GENERAL.name


def ship(weights: str | Path, file: str | Path) -> None:
    """Write a pretraining's weights in half precision, with its recipe, whose data set is named general."""
    model, chosen = load_checkpoint(weights)
    said = json.dumps(json.loads(chosen.to_json()) | {"dataset": "general"})
    tensors = {name: tensor.half() for name, tensor in weights_of(model).items()}
    save_tensors(tensors, file, {"format": FORMAT, "recipe": said, "num_ids": "0"})


if __name__ == "__main__":
    from tqdm.auto import tqdm

    sys.stdout.write(f"{pretrain(*sys.argv[1:2], progress=tqdm)}\n")
