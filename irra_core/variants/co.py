"""Words and image tokens in two streams → word states: co-attention, an encoder that the paper compares with."""

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from irra_core.interaction import heads
from irra_core.transformer import LayerNorm, ResidualAttentionBlock, attend, pick


class CoEncoder(nn.Module):
    """Two streams, words and image: in every layer each attends to itself and then to the other."""

    def __init__(self, width: int, depth: int):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"text": _Stream(width), "image": _Stream(width)}) for _ in range(depth)
        )
        self.ln_post = LayerNorm(width)

    def forward(
        self,
        words: Float[Tensor, "batch length dim"],
        patches: Float[Tensor, "batch tokens dim"],
        real: Bool[Tensor, "batch length"] | None = None,
        at: Int[Tensor, "batch wanted"] | None = None,
        record: list[Tensor] | None = None,
    ) -> Float[Tensor, "batch states dim"]:
        mask = None if real is None else real[:, None, None]
        for streams in self.blocks:
            text, image = streams["text"], streams["image"]
            words, patches = text.look_inward(words, mask), image.look_inward(patches)
            seen_words, seen_patches = text.ln_2(words), image.ln_2(patches)
            words = text.look_across(words, seen_words, seen_patches, record=record)
            patches = image.look_across(patches, seen_patches, seen_words, mask)
        return self.ln_post(words if at is None else pick(words, at))


class _Stream(nn.Module):
    """One side of a co-attention layer: self-attention, cross-attention and feed-forward, each after a LayerNorm."""

    def __init__(self, width: int):
        super().__init__()
        block = ResidualAttentionBlock(width, heads(width))
        self.ln_1, self.attn, self.ln_3, self.mlp = block.ln_1, block.attn, block.ln_2, block.mlp
        self.ln_2, self.cross = LayerNorm(width), nn.MultiheadAttention(width, heads(width), batch_first=True)

    def look_inward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        return tokens + attend(self.attn, self.ln_1(tokens), mask=mask)

    def look_across(self, tokens: Tensor, seen: Tensor, other: Tensor, mask: Tensor | None = None, **named) -> Tensor:
        tokens = tokens + attend(self.cross, seen, other, mask, **named)
        return tokens + self.mlp(self.ln_3(tokens))
