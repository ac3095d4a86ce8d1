"""A recipe's `precision` and a device → the arithmetic of training steps and scores: bf16, fp16 or fp32."""

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize

from irra_core.transformer import QuickGELU

GROUP = 2**24  # parameters that are cast together: DistributedDataParallel sends a group's gradients while others are
# computed; fewer, larger groups need fewer launches
SLOPE = 1.702  # of QuickGELU
ALIGNED = 64  # elements: each weight's copy begins at a multiple, as matrix products want it


def fused_attention(device: torch.device) -> AbstractContextManager:
    """Context manager in which a GPU's attention is computed by every kernel of torch except cuDNN's.

    cuDNN builds a plan for each shape, about 0.4 s for each of hundreds of caption lengths, and has returned NaN for
    some masks.
    """
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(kernels) if device.type == "cuda" else nullcontext()


def is_adapted(model: nn.Module) -> bool:
    """True for a model with adapters."""
    return any(parametrize.is_parametrized(module) for module in model.modules())


@contextmanager
def weights_in(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Within, the model computes with copies of its weights in that precision, made once; their gradients reach it.

    Embeddings and the classifier stay as they are, and on a CPU LayerNorms, whose gradients its kernels add up in the
    precision of the activations.
    """
    cuda = next(model.parameters()).is_cuda
    found = [
        (module._parameters, name, weight)
        for path, module in model.named_modules()
        if "embedding" not in path and path != "classifier" and (cuda or not isinstance(module, nn.LayerNorm))
        for name, weight in module._parameters.items()
        if weight is not None and weight.dtype == torch.float32 and "embedding" not in name
    ]
    groups: list[list] = [[place for place in found if not place[2].requires_grad]]  # would else be differentiated
    size = 0
    for place in found:
        if place[2].requires_grad:
            if not groups[1:] or (size >= GROUP and torch.distributed.is_initialized()):
                groups.append([])
                size = 0
            groups[-1].append(place)
            size += place[2].numel()
    feeding = [part for part in model.modules() if isinstance(getattr(part, "gelu", None), QuickGELU)]
    try:
        for part in feeding:
            if hasattr(part, "c_fc"):
                part.forward = functools.partial(_feed_forward, part)
        for group in groups:
            copies = _Copies.apply(dtype, *(weight for _, _, weight in group)) if group else ()
            for (owner, name, _), copy in zip(group, copies, strict=True):
                owner[name] = copy
        yield
    finally:
        for part in feeding:
            part.__dict__.pop("forward", None)
        for owner, name, weight in found:
            owner[name] = weight


class _Copies(torch.autograd.Function):
    """Weights → their copies in another precision; backward, the copies' gradients in the weights' own."""

    @staticmethod
    def forward(ctx, dtype: torch.dtype, *weights: Float[Tensor, "..."]) -> tuple[Float[Tensor, "..."], ...]:
        ctx.set_materialize_grads(False)
        ctx.dtype = weights[0].dtype
        return tuple(_copied(weights, dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Float[Tensor, "..."] | None) -> tuple[Float[Tensor, "..."] | None, ...]:
        copies = iter(_copied([gradient for gradient in gradients if gradient is not None], ctx.dtype))
        return None, *(None if gradient is None else next(copies) for gradient in gradients)


def _copied(tensors, dtype: torch.dtype) -> list[Tensor]:
    """The tensors in another precision: one allocation and one operation for all of them."""
    if not tensors:
        return []
    sizes = [size for tensor in tensors for size in (tensor.numel(), -tensor.numel() % ALIGNED)]
    parts = torch.empty(sum(sizes), dtype=dtype, device=tensors[0].device).split(sizes)[::2]
    copies = [part if tensor.dim() == 1 else part.view(tensor.shape) for part, tensor in zip(parts, tensors)]
    torch._foreach_copy_(copies, list(tensors))
    return copies


def _feed_forward(layer: nn.Sequential, states: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
    """What a block's feed-forward layer with QuickGELU gives."""
    return _FeedForward.apply(states, layer.c_fc.weight, layer.c_fc.bias, layer.c_proj.weight, layer.c_proj.bias)


class _FeedForward(torch.autograd.Function):
    """QuickGELU between two linear maps. The maps' products take its factors along, in the gradient they cancel."""

    @staticmethod
    def forward(ctx, states, inner, inner_bias, outer, outer_bias):
        rows = states.flatten(0, -2)
        scaled = torch.addmm(inner_bias, rows, inner.t(), beta=SLOPE, alpha=SLOPE)
        hidden = F.silu(scaled)
        ctx.save_for_backward(rows, inner, scaled, hidden, outer)
        return torch.addmm(outer_bias, hidden, outer.t(), alpha=1 / SLOPE).view(states.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        rows, inner, scaled, hidden, outer = ctx.saved_tensors
        found = gradient.flatten(0, -2)
        within = torch.ops.aten.silu_backward(found @ outer, scaled)
        of_outer = torch.addmm(outer, found.t(), hidden, beta=0, alpha=1 / SLOPE)
        of_states = (within @ inner).view(gradient.shape)
        return of_states, within.t() @ rows, within.sum(0), of_outer, found.sum(0)
