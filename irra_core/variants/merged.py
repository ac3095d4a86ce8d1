"""Words and image tokens in one sequence → word states: merged attention, an encoder that the paper compares with."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from irra_core.interaction import heads
from irra_core.transformer import LayerNorm, ResidualAttentionBlock


class MergedEncoder(nn.Module):
    """Transformer blocks over the words and the image tokens joined in one sequence, words first."""

    def __init__(self, width: int, depth: int):
        super().__init__()
        self.blocks = nn.ModuleList(ResidualAttentionBlock(width, heads(width)) for _ in range(depth))
        self.ln_post = LayerNorm(width)

    def forward(
        self,
        words: Float[Tensor, "batch length dim"],
        patches: Float[Tensor, "batch tokens dim"],
        real: Bool[Tensor, "batch length"] | None = None,
        at: Int[Tensor, "batch wanted"] | None = None,
        record: list[Tensor] | None = None,
    ) -> Float[Tensor, "batch states dim"]:
        length, states = words.shape[1], torch.cat([words, patches], dim=1)
        mask = None if real is None else F.pad(real, (0, patches.shape[1]), value=True)[:, None, None]
        weights: list[Tensor] | None = None if record is None else []
        for block in self.blocks[:-1]:
            states = block(states, mask, record=weights)
        if at is None:
            at = torch.arange(length, device=words.device).expand(len(patches), -1)
        states = self.blocks[-1](states, mask, at, weights)
        if record is not None:
            record += [layer[:, :, :length, length:] for layer in weights]
        return self.ln_post(states)
