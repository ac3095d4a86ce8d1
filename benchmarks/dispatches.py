"""Operations, casts and bytes that one training step dispatches, counted on the fake GPU of tests/fake_cuda.py.

    python benchmarks/dispatches.py [--histogram] [field=value …]

Fields are the recipe's, as in `precision=fp32`; the default is the paper's step: ViT-B/16, 384×128, 64 pairs, bf16.
The tables in docs/performance.md are made with it.
"""

import argparse
import json
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from pandas import DataFrame
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from fake_cuda import fake_cuda, unusable

import irra_core as irra
from irra_core.batches import Batches
from irra_core.objective import Objective
from irra_core.scale.precision import half_weights
from irra_core.text import tokenize
from irra_core.training import build_optimiser, optimise

COLOURS = ("red", "green", "blue", "white", "black")


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """`F.scaled_dot_product_attention` by the kernel that torch takes on a GPU in half precision, cuDNN left out.

    torch itself would take separate products, since the fake GPU has no kernels to choose from.
    """
    if attn_mask is None and q.dtype in (torch.bfloat16, torch.float16):
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]
    bias, keys = None, k.shape[2]
    if attn_mask is not None:
        bias = attn_mask
        if attn_mask.dtype == torch.bool:
            zero, low = (torch.scalar_tensor(value, dtype=q.dtype, device=q.device) for value in (0.0, -torch.inf))
            bias = torch.where(attn_mask, zero, low)
        if keys % 16:  # the kernel reads aligned rows
            bias = F.pad(bias, (0, 16 - keys % 16))[..., :keys]
        bias = bias.expand(*q.shape[:3], keys)
    grad = torch.is_grad_enabled() and any(part.requires_grad for part in (q, k, v))
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, grad, is_causal=is_causal)[0]


def counted(**changes) -> tuple[dict[str, float], dict[str, int]]:
    """What the second step of a recipe dispatches, and how often each operation that is not a view."""
    recipe = irra.recipe("cuhk", pretrained="none", **({"precision": "bf16"} | changes))
    count = 2 * recipe.batch_size
    captions = [f"a person in a {COLOURS[n % 5]} coat{' who carries a bag' * (n % 3)}" for n in range(count)]
    rows = [(n // 2, n, f"{n}.png", caption, "train") for n, caption in enumerate(captions)]
    table = DataFrame(rows, columns=["pid", "image_id", "path", "caption", "split"])
    pixels = np.zeros((count, 3, recipe.image_height, recipe.image_width), np.uint8)
    model = irra.build_model(recipe, num_ids=count // 2)
    with fake_cuda() as gpu, patch.object(F, "scaled_dot_product_attention", fused_attention):
        model = (half_weights(model) if recipe.precision == "fp16" else model).to("cuda")
        batches = Batches(table, pixels, tokenize(captions), recipe, "cuda")
        objective, optimiser = Objective(model, recipe, recipe.precision), build_optimiser(model, recipe)
        optimise(objective, optimiser, batches.at(0))  # what is made once, such as constants on the device
        gpu.clear()
        optimise(objective, optimiser, batches.at(1))
        others = sum(gpu.operations.values())
        found = {
            "operations": others + gpu.views,
            "not views": others,
            "casts": gpu.casts,
            "cast elements, millions": round(gpu.cast_elements / 1e6, 1),
        }
        return found, dict(gpu.operations.most_common())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--histogram", action="store_true", help="also each operation and how often it is dispatched")
    parser.add_argument("fields", nargs="*", help="fields of the recipe, as in precision=fp32")
    given = parser.parse_args()
    if reason := unusable():
        raise SystemExit(reason)
    values = dict(field.split("=", 1) for field in given.fields)
    fields = {name: int(value) if value.isdigit() else value for name, value in values.items()}
    found, histogram = counted(**fields)
    print(json.dumps(found | ({"each": histogram} if given.histogram else {}), indent=2))


if __name__ == "__main__":
    main()
