"""A recipe's `precision` and a device → the arithmetic of training steps and scores: bf16, fp16 or fp32."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize

from irra_core.objective import autocast
from irra_core.scale.cpu import accelerated
from irra_core.transformer import QuickGELU

GROUP = 2**24  # parameters that are cast together: DistributedDataParallel sends a group's gradients while others are
# computed; fewer, larger groups need fewer launches
SLOPE = 1.702  # of QuickGELU
ALIGNED = 64  # elements: each weight's copy begins at a multiple, as matrix products want it


@contextmanager
def step_arithmetic(model: nn.Module, precision: str) -> Iterator[None]:
    """The arithmetic of a training step. In bf16 the weights are cast once, and activations stay in bf16.

    Adapters compute their matrices where they are used: there torch's autocast casts.
    """
    device = next(model.parameters()).device
    if precision != "bf16" or is_adapted(model):
        with autocast(device, precision):
            yield
    else:
        with weights_in(model, torch.bfloat16), accelerated(device), fused_attention(device):
            yield


def half_weights(model: nn.Module) -> nn.Module:
    """The released code's fp16: matrices of convolutions, attention, linear layers and projections are half.

    LayerNorms and embeddings stay fp32. In place.
    """
    for name, parameter in model.named_parameters():
        if not any(word in name for word in ("ln_", ".ln.", "embedding", "log_scale")):
            parameter.data = parameter.data.half()
    return model


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

    Embeddings, classifier, token selection and a learned temperature stay as they are, and on a CPU LayerNorms, whose
    gradients its kernels add up in the precision of the activations. QuickGELU's two factors are in the copies.
    """
    found, fed = list(_castable(model)), _feed_forwards(model)
    factors = {id(weight): factor for part in fed for weight, factor in _factors(part)}
    try:
        for part in fed:
            part.gelu.forward = F.silu
        for group in _groups(found):
            weights = [weight for _, _, weight in group]
            copies = _Copies.apply(dtype, [factors.get(id(weight), 1.0) for weight in weights], *weights)
            for (owner, name, _), copy in zip(group, copies, strict=True):
                owner[name] = copy
        yield
    finally:
        for part in fed:
            part.gelu.__dict__.pop("forward", None)
        for owner, name, weight in found:
            owner[name] = weight


def _castable(model: nn.Module) -> Iterator[tuple[dict, str, nn.Parameter]]:
    """Where each weight is that `weights_in` copies: its module's parameters, its name, the weight."""
    cuda = next(model.parameters()).is_cuda
    for path, module in model.named_modules():
        if (
            "embedding" in path
            or path == "classifier"
            or path.startswith("selection")
            or (isinstance(module, nn.LayerNorm) and not cuda)
        ):
            continue
        for name, weight in module._parameters.items():
            if weight is not None and weight.dtype == torch.float32 and "embedding" not in name and name != "log_scale":
                yield module._parameters, name, weight


def _groups(found: list[tuple[dict, str, nn.Parameter]]) -> list[list[tuple[dict, str, nn.Parameter]]]:
    """The weights that are copied together; frozen ones by themselves, since they would else be differentiated."""
    groups, size = [[place for place in found if not place[2].requires_grad], []], 0
    for place in found:
        if place[2].requires_grad:
            if size >= GROUP and torch.distributed.is_initialized():
                groups.append([])
                size = 0
            groups[-1].append(place)
            size += place[2].numel()
    return [group for group in groups if group]


def _feed_forwards(model: nn.Module) -> list[nn.Module]:
    """The feed-forward layers with QuickGELU: x σ(1.702 x) between two linear maps."""
    return [part for part in model.modules() if hasattr(part, "c_fc") and isinstance(part.gelu, QuickGELU)]


def _factors(layer: nn.Module) -> Iterator[tuple[nn.Parameter, float]]:
    """What each weight of such a layer is multiplied by so that x σ(x) takes QuickGELU's place: two products less."""
    yield from ((weight, SLOPE) for weight in layer.c_fc.parameters())
    yield layer.c_proj.weight, 1 / SLOPE


class _Copies(torch.autograd.Function):
    """Weights times factors in another precision; backward, the copies' gradients in the weights' own."""

    @staticmethod
    def forward(
        ctx, dtype: torch.dtype, factors: list[float], *weights: Float[Tensor, "..."]
    ) -> tuple[Float[Tensor, "..."], ...]:
        ctx.set_materialize_grads(False)
        ctx.dtype, ctx.factors = weights[0].dtype, factors
        scaled = [n for n, factor in enumerate(factors) if factor != 1]
        products = torch._foreach_mul([weights[n] for n in scaled], [factors[n] for n in scaled]) if scaled else ()
        given = dict(enumerate(weights)) | dict(zip(scaled, products, strict=True))
        return tuple(_copied(list(given.values()), dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Float[Tensor, "..."] | None) -> tuple[Float[Tensor, "..."] | None, ...]:
        there = [n for n, gradient in enumerate(gradients) if gradient is not None]
        copies = dict(zip(there, _copied([gradients[n] for n in there], ctx.dtype), strict=True))
        if scaled := [n for n in there if ctx.factors[n] != 1]:
            torch._foreach_mul_([copies[n] for n in scaled], [ctx.factors[n] for n in scaled])
        return None, None, *(copies.get(n) for n in range(len(gradients)))


def _copied(tensors, dtype: torch.dtype) -> list[Tensor]:
    """The tensors in another precision: one allocation and one operation for all of them."""
    if not tensors:
        return []
    sizes = [size for tensor in tensors for size in (tensor.numel(), -tensor.numel() % ALIGNED)]
    parts = torch.empty(sum(sizes), dtype=dtype, device=tensors[0].device).split(sizes)[::2]
    copies = [part if tensor.dim() == 1 else part.view(tensor.shape) for part, tensor in zip(parts, tensors)]
    torch._foreach_copy_(copies, list(tensors))
    return copies
