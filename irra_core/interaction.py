"""Text tokens and image tokens → one state per word that has seen the image: the paper's interaction encoder."""

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from irra_core.settings import unknown
from irra_core.transformer import LayerNorm, ResidualAttentionBlock, added, attend, initialise

KINDS = ("cross", "co", "merged")


def build_interaction(kind: str, width: int, depth: int) -> nn.Module:
    """A `cross`, `co` or `merged` interaction encoder, its weights drawn from torch's random state.

    Called as encoder(words [B, L, D], patches [B, N, D], real [B, L] | None, at [B, K] | None, record | None) it gives
    the words' states [B, L, D]. Keys where `real` is False are not attended to; `at` names the only positions that are
    wanted and makes the result [B, K, D]; each image-facing layer appends its attention [B, heads, L, N] to the list
    `record`. Parameters at width 512 and depth 4: 13.66 M, 33.63 M and 12.61 M.
    """
    if kind == "co":
        from irra_core.variants.co import CoEncoder as Encoder
    elif kind == "merged":
        from irra_core.variants.merged import MergedEncoder as Encoder
    elif kind == "cross":
        Encoder = CrossEncoder
    else:
        raise unknown("interaction", kind, KINDS)
    encoder = Encoder(width, depth)
    initialise(encoder, width, depth)
    return encoder


class CrossEncoder(nn.Module):
    """The paper's encoder: each word attends to the image once, then the words go through transformer blocks."""

    def __init__(self, width: int, depth: int):
        super().__init__()
        self.ln_text, self.ln_image, self.ln_post = LayerNorm(width), LayerNorm(width), LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads(width), batch_first=True)
        self.blocks = nn.ModuleList(ResidualAttentionBlock(width, heads(width)) for _ in range(depth))

    def forward(
        self,
        words: Float[Tensor, "batch length dim"],
        patches: Float[Tensor, "batch tokens dim"],
        real: Bool[Tensor, "batch length"] | None = None,
        at: Int[Tensor, "batch wanted"] | None = None,
        record: list[Tensor] | None = None,
    ) -> Float[Tensor, "batch states dim"]:
        mask = None if real is None else added(real[:, None, None], words.dtype)
        states = attend(self.attention, self.ln_text(words), self.ln_image(patches), record=record)
        for block in self.blocks[:-1]:
            states = block(states, mask)
        return self.ln_post(self.blocks[-1](states, mask, at))


def heads(width: int) -> int:
    """Attention heads of an interaction encoder: one per 64 channels, as released."""
    return max(width // 64, 1)
