"""Linear maps by the faster of torch's two libraries, and memory that is kept: what speeds up a model on a CPU.

The model knows of neither: `accelerated` is entered around its forward pass. Results differ by rounding (measured on an
AMD EPYC with AVX-512).
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

# torch multiplies float32 by MKL, which takes AVX2 on AMD's processors where oneDNN takes AVX-512: 110 against 235
# GFLOP/s per core for ViT-B/16's layers. This is oneDNN's own entry. Intel's processors are as fast by either; those
# without AVX-512 are slower by oneDNN, of transposed matrices by a third (measured on an AMD EPYC with AVX2).
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
KEPT = 2**30  # bytes; smaller allocations come from memory that is kept, larger ones from the system, each time new
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def accelerated(device: torch.device) -> AbstractContextManager:
    """Within, F.linear in float32 on a CPU with AVX-512, and its gradients, are computed by oneDNN.

    On a CPU the process keeps the memory that it frees from then on. Has no effect on other devices, nor on linear maps
    under autocast: enter it inside autocast.
    """
    if device.type != "cpu":
        return nullcontext()
    keep_freed_memory()
    return nullcontext() if torch.is_autocast_enabled("cpu") or not _usable() else _FasterLinear()


class _FasterLinear(TorchFunctionMode):
    """Takes calls of F.linear, those of nn.Linear included, to oneDNN where it can compute them."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear and not kwargs and _suits(*args):
            return _Linear.apply(*args, *[None] * (3 - len(args)))
        return function(*args, **(kwargs or {}))


def _suits(tokens: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """True of single precision numbers in the main memory, outside autocast."""
    float32 = tokens.dtype == weight.dtype == torch.float32
    return float32 and tokens.device.type == "cpu" and tokens.numel() > 0 and not torch.is_autocast_enabled("cpu")


@functools.cache
def _usable() -> bool:
    """True where oneDNN's entry is the faster one and computes what it should."""
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
    """The linear map with its gradients, each one product."""

    @staticmethod
    def forward(ctx, tokens, weight, bias):
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
    """Let this process use memory again that a step has freed, where the system's allocator is glibc's; True if so.

    By default large pieces go back to the system at once and come back as new pages, which have to be cleared: a sixth
    of the little model's training step. The process then holds its peak until it ends.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, KEPT) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
