"""The folder of a run that stopped at a loss that is not finite → that step, computed again."""

from dataclasses import replace
from pathlib import Path

import torch

from irra_core import runs
from irra_core.backbone import read_weights
from irra_core.batches import Batch
from irra_core.checkpoints import load_checkpoint
from irra_core.objective import Objective, gradient_norm, step_precision
from irra_core.scale.precision import half_weights
from irra_core.settings import default_device
from irra_core.training import named_parts


def replay(folder: str | Path) -> dict[str, float]:
    """Loss parts and gradient norm, computed again, of the step at which a run stopped because one was not finite.

    `train` saved the weights before that step in failed.safetensors and its batch in failed-batch.safetensors.
    """
    model, recipe = load_checkpoint(Path(folder) / runs.FAILED, finite=False)
    tensors, about = read_weights(Path(folder) / runs.FAILED_BATCH)
    device = default_device()
    batch = Batch(**{name: tensor.to(device) for name, tensor in tensors.items() if name != "image_ids"})
    batch = replace(batch, elapsed=float(about["elapsed"]))
    precision = step_precision(recipe.precision, device)
    model = (half_weights(model) if precision == "fp16" else model).train()
    parts = Objective(model, recipe, precision)(batch)
    return named_parts(torch.cat([parts, gradient_norm(model)[None]]), recipe)
