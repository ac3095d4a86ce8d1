"""Text tokens and image tokens → one state a word that has seen the image: three interaction encoders."""

import torch
from jaxtyping import Bool, Float, Int
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from torch import Tensor, nn
from torch.nn import functional as F

from irra_core.packing import Packing
from irra_core.scale.linear import linear
from irra_core.settings import unknown

# Keys up to which a CPU in bf16 computes attention step by step: torch's fused one takes three to six times as long.
# The scores are then rounded too: the gradient's error grows from 1.7 to 2.0 % of its norm (small CLIP, 16 batches).
EXPLICIT = 512


def build_interaction(kind: str, width: int, depth: int) -> nn.Module:
    """A `cross`, `co` or `merged` interaction encoder with seeded-by-the-caller weights.

    Called as encoder(words [B, L, D], patches [B, N, D], real [B, L] | None, at [B, K] | None, record | None, packing
    | None) it gives the words' states [B, L, D]. Keys where `real` is False are not attended to; `at` names the only
    positions that are wanted and makes the result [B, K, D]; to the list `record` each image-facing layer appends its
    attention [B, heads, L, N]. With a packing the words come packed [T, D]; the states of padding then mean nothing.
    Parameters at width 512 and depth 4: 13.66 M, 33.63 M and 12.61 M.
    """
    kinds = {"cross": CrossEncoder, "co": CoEncoder, "merged": MergedEncoder}
    if kind not in kinds:
        raise unknown("interaction", kind, kinds)
    encoder = kinds[kind](width, depth)
    _initialise(encoder, width, depth)
    return encoder


class CrossEncoder(nn.Module):
    """The paper's: each word attends to the image once, then the words go through transformer blocks."""

    def __init__(self, width: int, depth: int):
        super().__init__()
        self.ln_text, self.ln_image, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, max(width // 64, 1), batch_first=True)
        self.blocks = nn.ModuleList(_block(width) for _ in range(depth))

    def forward(
        self,
        words: Float[Tensor, "batch length dim"] | Float[Tensor, "real dim"],
        patches: Float[Tensor, "batch tokens dim"],
        real: Bool[Tensor, "batch length"] | None = None,
        at: Int[Tensor, "batch wanted"] | None = None,
        record: list[Tensor] | None = None,
        packing: Packing | None = None,
    ) -> Float[Tensor, "batch states dim"]:
        words, seen = norm(self.ln_text, words), norm(self.ln_image, patches)
        states = attend(self.attention, words, seen, record=record, packing=packing)
        mask = None if real is None else real[:, None, None]
        for block in self.blocks[:-1]:
            states = run_block(block, states, mask, packing=packing)
        states = norm(self.ln_post, run_block(self.blocks[-1], states, mask, at=at, packing=packing))
        return states if at is not None else _padded(states, packing)


class MergedEncoder(nn.Module):
    """Transformer blocks over the words and the image tokens joined in one sequence, words first."""

    def __init__(self, width: int, depth: int):
        super().__init__()
        self.blocks = nn.ModuleList(_block(width) for _ in range(depth))
        self.ln_post = nn.LayerNorm(width)

    def forward(
        self,
        words: Float[Tensor, "batch length dim"] | Float[Tensor, "real dim"],
        patches: Float[Tensor, "batch tokens dim"],
        real: Bool[Tensor, "batch length"] | None = None,
        at: Int[Tensor, "batch wanted"] | None = None,
        record: list[Tensor] | None = None,
        packing: Packing | None = None,
    ) -> Float[Tensor, "batch states dim"]:
        length = words.shape[1] if packing is None else packing.length
        if packing is None:
            states = torch.cat([words, patches], dim=1)
        else:
            states, packing = torch.cat([words, patches.flatten(0, 1)]), packing.beside(patches.shape[1])
        mask = None if real is None else F.pad(real, (0, patches.shape[1]), value=True)[:, None, None]
        weights: list[Tensor] | None = None if record is None else []
        for block in self.blocks[:-1]:
            states = run_block(block, states, mask, record=weights, packing=packing)
        if at is None:
            at = torch.arange(length, device=words.device).expand(len(patches), -1)
        states = run_block(self.blocks[-1], states, mask, at=at, record=weights, packing=packing)
        if record is not None:
            record += [layer[:, :, :length, length:] for layer in weights]
        return norm(self.ln_post, states)


class CoEncoder(nn.Module):
    """Two streams, words and image, which attend to themselves and then to each other in every layer."""

    def __init__(self, width: int, depth: int):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"text": _Stream(width), "image": _Stream(width)}) for _ in range(depth)
        )
        self.ln_post = nn.LayerNorm(width)

    def forward(
        self,
        words: Float[Tensor, "batch length dim"] | Float[Tensor, "real dim"],
        patches: Float[Tensor, "batch tokens dim"],
        real: Bool[Tensor, "batch length"] | None = None,
        at: Int[Tensor, "batch wanted"] | None = None,
        record: list[Tensor] | None = None,
        packing: Packing | None = None,
    ) -> Float[Tensor, "batch states dim"]:
        mask = None if real is None else real[:, None, None]
        for streams in self.blocks:
            text, image = streams["text"], streams["image"]
            words, patches = text.look_inward(words, mask, packing), image.look_inward(patches)
            seen_words, seen_patches = norm(text.ln_2, words), norm(image.ln_2, patches)
            words = text.look_across(words, seen_words, seen_patches, record=record, packing=packing)
            patches = image.look_across(patches, seen_patches, seen_words, mask, context_packing=packing)
        return norm(self.ln_post, _padded(words, packing) if at is None else pick(words, at, packing))


class _Stream(nn.Module):
    """One side of a co-attention layer: self-attention, cross-attention and feed-forward, each after a LayerNorm."""

    def __init__(self, width: int):
        super().__init__()
        block = _block(width)
        self.ln_1, self.attn, self.ln_3, self.mlp = block.ln_1, block.attn, block.ln_2, block.mlp
        self.ln_2, self.cross = nn.LayerNorm(width), nn.MultiheadAttention(width, max(width // 64, 1), batch_first=True)

    def look_inward(self, tokens: Tensor, mask: Tensor | None = None, packing: Packing | None = None) -> Tensor:
        return tokens + attend(self.attn, norm(self.ln_1, tokens), mask=mask, packing=packing)

    def look_across(self, tokens: Tensor, seen: Tensor, other: Tensor, mask: Tensor | None = None, **named) -> Tensor:
        tokens = tokens + attend(self.cross, seen, other, mask, **named)
        return tokens + feed_forward(self.mlp, norm(self.ln_3, tokens))


def _block(width: int) -> ResidualAttentionBlock:
    """A pre-norm transformer block of CLIP's kind: heads of width 64, QuickGELU."""
    return ResidualAttentionBlock(width, max(width // 64, 1), act_layer=QuickGELU)


def _initialise(encoder: nn.Module, width: int, depth: int) -> None:
    """Released: attention in d^-½, every projection back d^-½(2n)^-½, feed-forward in (2d)^-½; biases as torch has."""
    back = width**-0.5 * (2 * depth) ** -0.5
    for module in encoder.modules():
        if isinstance(module, nn.MultiheadAttention):
            nn.init.normal_(module.in_proj_weight, std=width**-0.5)
            nn.init.normal_(module.out_proj.weight, std=back)
        elif hasattr(module, "c_fc"):
            nn.init.normal_(module.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(module.c_proj.weight, std=back)


def run_block(
    block: ResidualAttentionBlock,
    tokens: Float[Tensor, "batch length dim"] | Float[Tensor, "real dim"],
    mask: Bool[Tensor, "batch 1 queries length"] | None = None,
    causal: bool = False,
    at: Int[Tensor, "batch wanted"] | None = None,
    record: list[Tensor] | None = None,
    packing: Packing | None = None,
) -> Float[Tensor, "batch states dim"] | Float[Tensor, "real dim"]:
    """The tokens after a block of open_clip's; with `at`, only the tokens at those positions (all are attended to).

    Tokens that come packed leave packed, but those at positions.
    """
    context = norm(block.ln_1, tokens)
    if at is None:
        found = attend(block.attn, context, mask=mask, causal=causal, record=record, packing=packing)
        states = tokens + block.ls_1(found)
    else:
        if causal:
            length = tokens.shape[1] if packing is None else packing.length
            mask = (torch.arange(length, device=tokens.device) <= at[..., None])[:, None]
        chosen = pick(context, at, packing)
        chosen = attend(block.attn, chosen, context, mask, record=record, context_packing=packing)
        states = pick(tokens, at, packing) + block.ls_1(chosen)
    return states + block.ls_2(feed_forward(block.mlp, norm(block.ln_2, states)))


def attend(
    layer: nn.MultiheadAttention,
    query: Float[Tensor, "batch queries dim"] | Float[Tensor, "real dim"],
    context: Float[Tensor, "batch keys dim"] | Float[Tensor, "real_keys dim"] | None = None,
    mask: Bool[Tensor, "batch 1 #queries keys"] | None = None,
    causal: bool = False,
    record: list[Tensor] | None = None,
    packing: Packing | None = None,
    context_packing: Packing | None = None,
) -> Float[Tensor, "batch queries dim"] | Float[Tensor, "real dim"]:
    """Multi-head attention of the query to the context (to itself without one), True in `mask` = attended to.

    With `packing` the query comes and leaves packed, with `context_packing` the context comes packed.
    """
    weight, bias, width = layer.in_proj_weight, layer.in_proj_bias, layer.embed_dim
    if context is None:
        parts = _padded(linear(query, weight, bias), packing).chunk(3, -1)
    else:
        own = _padded(linear(query, weight[:width], bias[:width]), packing)
        other = _padded(linear(context, weight[width:], bias[width:]), context_packing)
        parts = (own, *other.chunk(2, -1))
    q, k, v = (part.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2) for part in parts)
    if record is None and not (q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] <= EXPLICIT):
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    else:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        if causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        shares = (scores if mask is None else scores.masked_fill(~mask, float("-inf"))).softmax(-1)
        if record is not None:
            record.append(shares)
        found = shares @ v
    found = found.transpose(1, 2).flatten(2)
    return linear(packing.pack(found) if packing else found, layer.out_proj.weight, layer.out_proj.bias)


def _padded(tokens: Tensor, packing: Packing | None) -> Tensor:
    """The tokens padded again, where they came packed."""
    return tokens if packing is None else packing.pad(tokens)


def feed_forward(mlp: nn.Sequential, tokens: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
    """The two linear layers of a block with its activation between them.

    QuickGELU(x) = x σ(1.702 x) is silu(1.702 x) / 1.702: with both factors moved into the weights, one pass over the
    largest tensor of the block instead of three, and one copy of it kept for the gradient.
    """
    if not isinstance(mlp.gelu, QuickGELU):
        return mlp(tokens)
    inner = F.silu(linear(tokens, mlp.c_fc.weight * 1.702, mlp.c_fc.bias * 1.702))
    return linear(inner, mlp.c_proj.weight / 1.702, mlp.c_proj.bias)


def norm(layer: nn.LayerNorm, tokens: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
    """LayerNorm in its own weights' precision, the result in that of the tokens (fp16 models keep it in fp32)."""
    weight = layer.weight
    return F.layer_norm(tokens.to(weight.dtype), layer.normalized_shape, weight, layer.bias, layer.eps).to(tokens.dtype)


def pick(
    tokens: Float[Tensor, "batch length dim"] | Float[Tensor, "real dim"],
    at: Int[Tensor, "batch wanted"],
    packing: Packing | None = None,
) -> Float[Tensor, "batch wanted dim"]:
    """The tokens at the given positions of each row."""
    if packing is not None:
        return packing.pick(tokens, at)
    return tokens.gather(1, at[..., None].expand(-1, -1, tokens.shape[-1]))
