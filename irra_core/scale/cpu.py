"""A model on a CPU → faster passes: linear maps by the faster of torch's two libraries, and reuse of freed memory.

The model is unchanged: its forward pass runs inside the context manager `accelerated`. Results differ by rounding
(measured on an AMD EPYC with AVX-512).
"""

import ctypes
import functools
import sys
from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# torch multiplies float32 matrices by MKL. On AMD processors MKL uses AVX2 where oneDNN uses AVX-512: 110 against 235
# GFLOP/s per core for ViT-B/16's layers. This operator calls oneDNN directly. Intel processors are equally fast with
# both; processors without AVX-512 are slower with oneDNN, by a third for transposed matrices (measured on an AMD EPYC
# with AVX2).
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
KEPT = 2**30  # bytes: smaller allocations reuse freed memory, larger ones get new memory from the system each time
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def accelerated(device: torch.device) -> AbstractContextManager:
    """Context manager in which oneDNN computes F.linear and its gradients in float32 on a CPU with AVX-512.

    On any CPU the process also keeps the memory that it frees, from then on. No effect on other devices, nor on linear
    maps under autocast: enter it inside autocast.
    """
    if device.type != "cpu":
        return nullcontext()
    keep_freed_memory()
    return nullcontext() if torch.is_autocast_enabled("cpu") or not _usable() else _FasterLinear()


class _FasterLinear(TorchFunctionMode):
    """Redirects calls of F.linear, including those of nn.Linear, to oneDNN where it can compute them."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear and not kwargs and _suits(*args):
            return _Linear.apply(*args, *[None] * (3 - len(args)))
        return function(*args, **(kwargs or {}))


def _suits(tokens: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """True for tensors in single precision on the CPU that are not empty, outside autocast."""
    float32 = tokens.dtype == weight.dtype == torch.float32
    return float32 and tokens.device.type == "cpu" and tokens.numel() > 0 and not torch.is_autocast_enabled("cpu")


@functools.cache
def _usable() -> bool:
    """True if oneDNN is the faster library on this CPU and its operator returns the right result."""
    if _ONEDNN is None or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        return torch.allclose(_product(torch.ones(2, 3), torch.ones(4, 3)), torch.full((2, 4), 3.0))
    except (RuntimeError, NotImplementedError):
        return False


def _product(left: Float[Tensor, "*batch dim"], right: Float[Tensor, "out dim"], bias: Tensor | None = None) -> Tensor:
    """left · rightᵀ + bias by oneDNN; either may be a transposed view."""
    return _ONEDNN(left, right, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    """A linear map and its gradients, each computed as one product by oneDNN."""

    @staticmethod
    def forward(ctx, tokens, weight, bias):
        tokens = tokens.contiguous()  # for columns of wider rows oneDNN only has a loop, 1,000 times as slow
        ctx.save_for_backward(tokens, weight)
        return _product(tokens, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        tokens, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        wanted = ctx.needs_input_grad
        of_tokens = _product(gradient, weight.t()) if wanted[0] else None
        of_weight = _product(rows.t(), tokens.reshape(-1, tokens.shape[-1]).t()) if wanted[1] else None
        return of_tokens, of_weight, rows.sum(0) if wanted[2] else None


@functools.cache
def keep_freed_memory() -> bool:
    """Let this process reuse the memory that a step frees, if the system's allocator is glibc's; True if it is.

    By default large blocks return to the system at once, and the next allocation gets new pages, which must be cleared:
    a sixth of the small model's training step. With this setting the process holds its peak memory until it ends.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, KEPT) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
