"""A model's transformer blocks → compiled ones, which need fewer launches on a GPU: the recipe's `compile`."""

import torch
from torch import nn

from irra_core.transformer import ResidualAttentionBlock

VARIANTS = 64  # of a block's code: two widths, masks, wanted positions, precisions, with and without gradients. Beyond
# torch's limit of 8 a block would silently run uncompiled


def compile_blocks(model: nn.Module, backend: str = "inductor") -> None:
    """Compile each residual attention block where it stands, for any batch size and caption length.

    Weights and their names do not change. The first steps take minutes, and on a CPU a C++ compiler is needed.
    """
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    for part in model.modules():
        if isinstance(part, ResidualAttentionBlock):
            part.compile(dynamic=True, backend=backend)
