"""CLIP written out: residual attention block, image encoder, text encoder; pixels or token ids → token features.

Parameters have open_clip's names and, from the same seed, its initial values, so that weights load both ways. Source:
Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

# Up to this many keys, bf16 attention on a CPU is computed in separate steps: torch's fused kernel takes three to six
# times as long. The scores are then rounded too: the gradient's error grows from 1.7 to 2.0 % of its norm.
EXPLICIT = 512
Record = Mapping[int, list[Tensor]]  # number of a block → the list that its attention is appended to
NONE: Record = MappingProxyType({})


class CLIP(nn.Module):
    """The image encoder `visual` and the parts of the text encoder, with random weights.

    `config` is an open_clip configuration (hub/configurations.py names the options that are followed), `image_size` is
    height and width in pixels. `logit_scale`, CLIP's learned temperature, is a buffer: IRRA's temperature is fixed.
    """

    def __init__(self, config: Mapping[str, Any], image_size: tuple[int, int]):
        super().__init__()
        self.origin: dict[str, str] = {}  # on which split its pretrained weights were selected, if known (hub/field.py)
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

    def begin_text(
        self, tokens: Int[Tensor, "batch length"], record: Record = NONE
    ) -> Float[Tensor, "batch length width"]:
        """The states of captions before the text encoder's last block."""
        states = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        states = states.to(self.text_projection.dtype)
        for number, block in enumerate(self.transformer.resblocks[:-1]):
            states = block(states, record=record.get(number), causal=True)
        return states

    def finish_text(
        self,
        states: Float[Tensor, "batch length width"],
        at: Int[Tensor, "batch wanted"] | None = None,
        record: Record = NONE,
    ) -> Float[Tensor, "batch words dim"]:
        """The projected text tokens, those of padding included; with `at`, only those at the given positions."""
        earlier = None
        if at is not None:
            earlier = (torch.arange(states.shape[1], device=states.device) <= at[..., None])[:, None]
        last = len(self.transformer.resblocks) - 1
        states = self.transformer.resblocks[last](states, earlier, at, record.get(last), causal=at is None)
        return projected(self.ln_final(states), self.text_projection)


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

    def forward(
        self, images: Float[Tensor, "b 3 h w"], at: Int[Tensor, "b k"] | None = None, record: Record = NONE
    ) -> Float[Tensor, "b n d"]:
        """All tokens; with `at`, only those at the given positions."""
        if tuple(images.shape[-2:]) != self.image_size:
            given, accepted = ("×".join(map(str, size)) for size in (images.shape[-2:], self.image_size))
            raise ValueError(f"images are {given} pixels: this model takes {accepted}")
        patches = self._patches(images.to(self.conv1.weight.dtype))
        start = self.class_embedding.to(patches.dtype).expand(len(images), 1, -1)
        states = self.ln_pre(torch.cat([start, patches], dim=1) + self.positional_embedding.to(patches.dtype))
        last = len(self.transformer.resblocks) - 1
        for number, block in enumerate(self.transformer.resblocks):
            states = block(states, at=at if number == last else None, record=record.get(number))
        return projected(self.ln_post(states), self.proj)

    def _patches(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n width"]:
        """The projected patches. A convolution in fp32 would round to TF32 on a GPU; a linear map does not."""
        (patch, _), (stride, _), (rows, cols) = self.conv1.kernel_size, self.conv1.stride, self.grid_size
        if stride == patch:
            cut = images[..., : rows * patch, : cols * patch].unflatten(3, (cols, patch)).unflatten(2, (rows, patch))
            pixels = cut.permute(0, 2, 4, 1, 3, 5)
        else:
            pixels = F.unfold(images, patch, stride=stride).transpose(1, 2)
        weight = self.conv1.weight.flatten(1)
        return F.linear(pixels.reshape(-1, weight.shape[1]), weight).view(len(images), rows * cols, len(weight))


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
        mask: Shaped[Tensor, "*#queries length"] | None = None,
        at: Int[Tensor, "batch wanted"] | None = None,
        record: list[Tensor] | None = None,
        causal: bool = False,
    ) -> Float[Tensor, "batch states dim"]:
        """All tokens after the block; with `at`, only those at the given positions, which `mask` is then about."""
        context = self.ln_1(tokens)
        if at is None:
            found = attend(self.attn, context, None, mask, record, causal)
        else:
            tokens, found = pick(tokens, at), attend(self.attn, pick(context, at), context, mask, record)
        states = tokens + self.ls_1(found)
        return states + self.ls_2(self.mlp(self.ln_2(states).flatten(0, 1)).view(states.shape))


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
    mask: Shaped[Tensor, "*#queries keys"] | None = None,
    record: list[Tensor] | None = None,
    causal: bool = False,
) -> Float[Tensor, "batch queries dim"]:
    """Multi-head attention of the query to the context (to itself without one), to those keys where `mask` is True.

    With `causal`, each query attends to the keys up to its own position instead. `mask` broadcasts to [batch, heads,
    queries, keys] and may also be `added`; the attention weights, of that shape, are appended to `record`.
    """
    weight, bias, sizes = layer.in_proj_weight, layer.in_proj_bias, (layer.embed_dim, 2 * layer.embed_dim)
    if context is None:
        parts = _parts(layer, query, weight, bias)
    else:
        (of_query, of_context), biases = weight.split(sizes), bias.split(sizes)
        parts = _parts(layer, query, of_query, biases[0]) + _parts(layer, context, of_context, biases[1])
    q, k, v = (part.transpose(1, 2) for part in parts)
    if record is None and not (q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] <= EXPLICIT):
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    else:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril() if causal else mask
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        mask = added(mask, scores.dtype) if mask is not None and mask.dtype == torch.bool else mask
        shares = (scores if mask is None else scores + mask).softmax(-1)
        if record is not None:
            record.append(shares)
        found = shares @ v
    found = found.transpose(1, 2).reshape(-1, layer.embed_dim)
    return F.linear(found, layer.out_proj.weight, layer.out_proj.bias).view(query.shape)


def _parts(
    layer: nn.MultiheadAttention, states: Float[Tensor, "batch n dim"], weight: Tensor, bias: Tensor
) -> tuple[Float[Tensor, "batch n heads width"], ...]:
    """The linear maps of the states that are stacked in a weight, split into heads."""
    mapped = F.linear(states.flatten(0, 1), weight, bias)  # of rows: fewer operations than of a batch of rows
    stacked = len(weight) // layer.embed_dim
    return mapped.view(*states.shape[:2], stacked, layer.num_heads, layer.head_dim).unbind(2)


def added(mask: Bool[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """The mask as attention adds it to scores, 0 where True, else minus infinity: once for several blocks."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


def projected(
    states: Float[Tensor, "batch n width"], matrix: Float[Tensor, "width dim"]
) -> Float[Tensor, "batch n dim"]:
    """The states times the matrix."""
    return F.linear(states.flatten(0, 1), matrix.T).view(*states.shape[:2], matrix.shape[1])


def pick(tokens: Float[Tensor, "batch n dim"], at: Int[Tensor, "batch k"]) -> Float[Tensor, "batch k dim"]:
    """The tokens at the given positions of each row."""
    return tokens.gather(1, at[..., None].expand(-1, -1, tokens.shape[-1]))
