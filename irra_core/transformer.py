"""CLIP written out: residual attention block, image encoder, text encoder; pixels or token ids → token features.

Parameters have open_clip's names and, from the same seed, its initial values, so that weights load both ways. Source:
Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

# Up to this many keys, bf16 attention on a CPU is computed in separate steps: torch's fused kernel takes three to six
# times as long. The scores are then rounded too: the gradient's error grows from 1.7 to 2.0 % of its norm.
EXPLICIT = 512


class CLIP(nn.Module):
    """The image encoder `visual` and the parts of the text encoder, with random weights.

    `config` is an open_clip configuration (hub/configurations.py names the options that are followed), `image_size` is
    height and width in pixels. `logit_scale`, CLIP's learned temperature, is a buffer: IRRA's temperature is fixed.
    """

    def __init__(self, config: Mapping[str, Any], image_size: tuple[int, int]):
        super().__init__()
        text, dim, quick_gelu = config["text_cfg"], config["embed_dim"], config.get("quick_gelu", False)
        width = text.get("width", 512)
        self.context_length, self.vocab_size = text.get("context_length", 77), text.get("vocab_size", 49408)
        self.visual = ImageEncoder(config["vision_cfg"], image_size, dim, quick_gelu)
        token_embedding = nn.Embedding(self.vocab_size, width)  # drawn before the blocks, listed after them
        self.transformer = Transformer(text, width, text.get("heads", 8), quick_gelu)
        self.token_embedding = token_embedding
        self.positional_embedding = nn.Parameter(torch.empty(self.context_length, width))
        self.ln_final = LayerNorm(width, **text.get("norm_kwargs") or {})
        self.text_projection = nn.Parameter(torch.empty(width, dim))
        self.register_buffer("logit_scale", torch.tensor(math.log(1 / 0.07)))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        initialise(self.transformer, width, len(self.transformer.resblocks))
        nn.init.normal_(self.text_projection, std=width**-0.5)

    def begin_text(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length width"]:
        """The states of captions before the text encoder's last block."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        states = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        states = states.to(self.text_projection.dtype)
        for block in self.transformer.resblocks[:-1]:
            states = block(states, places <= places[:, None])
        return states

    def finish_text(
        self, states: Float[Tensor, "batch length width"], at: Int[Tensor, "batch wanted"] | None = None
    ) -> Float[Tensor, "batch words dim"]:
        """The projected text tokens, those of padding included; with `at`, only those at the given positions."""
        places = torch.arange(states.shape[1], device=states.device)
        earlier = places <= places[:, None] if at is None else (places <= at[..., None])[:, None]
        states = self.transformer.resblocks[-1](states, earlier, at)
        return F.linear(self.ln_final(states), self.text_projection.T)


class ImageEncoder(nn.Module):
    """CLIP's vision transformer: images → the projected class token, then one projected token per patch, row by row."""

    def __init__(self, config: Mapping[str, Any], image_size: tuple[int, int], dim: int, quick_gelu: bool):
        super().__init__()
        width, patch = config.get("width", 768), config.get("patch_size", 16)
        spread, options = width**-0.5, config.get("norm_kwargs") or {}
        self.image_size, self.patch_size, self.output_dim = tuple(image_size), (patch, patch), dim
        self.grid_size = (image_size[0] // patch, image_size[1] // patch)
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(spread * torch.randn(width))
        self.positional_embedding = nn.Parameter(spread * torch.randn(math.prod(self.grid_size) + 1, width))
        self.ln_pre = LayerNorm(width, **options)
        self.transformer = Transformer(config, width, width // config.get("head_width", 64), quick_gelu)
        self.ln_post = LayerNorm(width, **options)
        self.proj = nn.Parameter(spread * torch.randn(width, dim))

    def forward(self, images: Float[Tensor, "b 3 h w"], at: Int[Tensor, "b k"] | None = None) -> Float[Tensor, "b n d"]:
        """All tokens; with `at`, only those at the given positions."""
        patches = self.conv1(images.to(self.conv1.weight.dtype)).flatten(2).transpose(1, 2)
        start = self.class_embedding.to(patches.dtype).expand(len(images), 1, -1)
        states = self.ln_pre(torch.cat([start, patches], dim=1) + self.positional_embedding.to(patches.dtype))
        for block in self.transformer.resblocks[:-1]:
            states = block(states)
        states = self.transformer.resblocks[-1](states, at=at)
        return F.linear(self.ln_post(states), self.proj.T)


class Transformer(nn.Module):
    """The blocks of an encoder."""

    def __init__(self, config: Mapping[str, Any], width: int, heads: int, quick_gelu: bool):
        super().__init__()
        blocks = (ResidualAttentionBlock(width, heads, quick_gelu, config) for _ in range(config.get("layers", 12)))
        self.resblocks = nn.ModuleList(blocks)


class ResidualAttentionBlock(nn.Module):
    """Self-attention, then feed-forward, each after a LayerNorm and added to what entered."""

    def __init__(self, width: int, heads: int, quick_gelu: bool = True, config: Mapping[str, Any] | None = None):
        super().__init__()
        config = config or {}
        hidden, initial = int(width * config.get("mlp_ratio", 4.0)), config.get("ls_init_value")
        options = config.get("norm_kwargs") or {}
        self.ln_1 = LayerNorm(width, **options)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)  # holds the weights; `attend` computes
        self.ls_1 = nn.Identity() if initial is None else LayerScale(width, initial)
        self.ln_2 = LayerNorm(width, **options)
        gelu = (QuickGELU if quick_gelu else nn.GELU)(**config.get("act_kwargs") or {})
        self.mlp = nn.Sequential(OrderedDict(c_fc=nn.Linear(width, hidden), gelu=gelu, c_proj=nn.Linear(hidden, width)))
        self.ls_2 = nn.Identity() if initial is None else LayerScale(width, initial)

    def forward(
        self,
        tokens: Float[Tensor, "batch length dim"],
        mask: Bool[Tensor, "*#queries length"] | None = None,
        at: Int[Tensor, "batch wanted"] | None = None,
        record: list[Tensor] | None = None,
    ) -> Float[Tensor, "batch states dim"]:
        """All tokens after the block; with `at`, only those at the given positions, which `mask` is then about."""
        context = self.ln_1(tokens)
        if at is None:
            found = attend(self.attn, context, None, mask, record)
        else:
            tokens, found = pick(tokens, at), attend(self.attn, pick(context, at), context, mask, record)
        states = tokens + self.ls_1(found)
        return states + self.ls_2(self.mlp(self.ln_2(states)))


class LayerNorm(nn.LayerNorm):
    """LayerNorm in its own weights' precision, the result in that of its input: fp16 models keep it in fp32."""

    def forward(self, tokens: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        return super().forward(tokens.to(self.weight.dtype)).to(tokens.dtype)


class LayerScale(nn.Module):
    """Each channel times a learned factor."""

    def __init__(self, width: int, initial: float):
        super().__init__()
        self.gamma = nn.Parameter(initial * torch.ones(width))

    def forward(self, states: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        return states * self.gamma


class QuickGELU(nn.Module):
    """x σ(1.702 x), the activation of OpenAI's weights."""

    def forward(self, states: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return F.silu(1.702 * states) / 1.702  # keeps one tensor for the gradient; the product with sigmoid, two


def initialise(module: nn.Module, width: int, depth: int) -> None:
    """Draw attention and feed-forward weights: std d^-½ and (2d)^-½ of the inner maps, d^-½(2n)^-½ of the outer."""
    outer = width**-0.5 * (2 * depth) ** -0.5
    for part in module.modules():
        if isinstance(part, nn.MultiheadAttention):
            nn.init.normal_(part.in_proj_weight, std=width**-0.5)
            nn.init.normal_(part.out_proj.weight, std=outer)
        elif hasattr(part, "c_fc"):
            nn.init.normal_(part.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(part.c_proj.weight, std=outer)


def attend(
    layer: nn.MultiheadAttention,
    query: Float[Tensor, "batch queries dim"],
    context: Float[Tensor, "batch keys dim"] | None = None,
    mask: Bool[Tensor, "*#queries keys"] | None = None,
    record: list[Tensor] | None = None,
) -> Float[Tensor, "batch queries dim"]:
    """Multi-head attention of the query to the context (to itself without one), to those keys where `mask` is True.

    `mask` broadcasts to [batch, heads, queries, keys]; the attention weights, of that shape, are appended to `record`.
    """
    weight, bias, width = layer.in_proj_weight, layer.in_proj_bias, layer.embed_dim
    if context is None:
        parts = F.linear(query, weight, bias).chunk(3, -1)
    else:
        own, other = F.linear(query, weight[:width], bias[:width]), F.linear(context, weight[width:], bias[width:])
        parts = (own, *other.chunk(2, -1))
    q, k, v = (part.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2) for part in parts)
    if record is None and not (q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] <= EXPLICIT):
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    else:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        shares = (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1)
        if record is not None:
            record.append(shares)
        found = shares @ v
    return F.linear(found.transpose(1, 2).flatten(2), layer.out_proj.weight, layer.out_proj.bias)


def pick(tokens: Float[Tensor, "batch n dim"], at: Int[Tensor, "batch k"]) -> Float[Tensor, "batch k dim"]:
    """The tokens at the given positions of each row."""
    return tokens.gather(1, at[..., None].expand(-1, -1, tokens.shape[-1]))
