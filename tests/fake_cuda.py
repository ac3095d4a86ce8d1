"""A GPU that computes nothing: holds the CUDA path to account on machines without a GPU.

Within `fake_cuda()` torch reports one CUDA device. A tensor on `cuda` has shape, dtype, device and strides, but no
values; a tensor on the CPU is real. CUDA's autocast rules apply, and so do autograd and torch's own optimisers.

What a test can prove with it:
- no operation mixes a CPU tensor with a GPU tensor (torch raises, as it does on a GPU);
- dtypes, devices, shapes and strides of results and gradients;
- that the host does not wait for the GPU: `waits` lists every operation for which it would (`item`, `nonzero`,
  `equal`, `tolist`, a copy to the CPU that is not into pinned memory);
- that nothing is copied to the CPU twice: `reads` lists every such copy;
- that copies to the GPU can overlap with its work: `slow` lists every copy from memory that is not pinned or not dense,
  or that is not asynchronous;
- how many operations, casts and bytes a step dispatches (`operations`, `views`, `casts`, `cast_elements`).

What it cannot prove: values, the kernels themselves, speed, memory use, NCCL. What a wait would bring to the host is
made up: numbers are 0, `equal` is True, `nonzero` finds nothing, and copied rows have length 1.

It relies on private parts of torch (written for 2.15). `unusable()` says why this torch or machine cannot run it; the
tests then skip as one, with that reason. Do not use it in a process that has a GPU.
"""

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator
from unittest.mock import MagicMock, Mock, patch

import torch
from torch._subclasses import fake_tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA, META = torch.device("cuda", 0), torch.device("meta")
aten = torch.ops.aten


class _Fakes(fake_tensor.FakeTensorMode):
    """torch's fake tensors, which refuse operands on two devices, without the start of a real CUDA context.

    During the backward pass C++ is told that GPU tensors are on `meta` (see `FakeCuda`), so the tensors that it makes
    there are bare meta tensors: they become fake CUDA tensors when they come back.
    """

    avoid_device_init = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return super().__torch_dispatch__(func, types, *tree_map(self._on_gpu, (args, kwargs or {})))

    def _on_gpu(self, value):
        if isinstance(value, torch.Tensor) and not isinstance(value, fake_tensor.FakeTensor) and value.is_meta:
            return self.fake_tensor_converter.from_meta_and_device(self, value, CUDA)
        return CUDA if isinstance(value, torch.device) and value == META else value


class FakeCuda(TorchDispatchMode):
    """Sends what touches the GPU to fake tensors, the rest to torch, and records waits, slow copies and operations."""

    def __init__(self):
        super().__init__()
        self.fakes = _Fakes(allow_non_fake_inputs=True)
        self.pinned: set[int] = set()  # addresses of pinned memory
        self.waits: list[str] = []
        self.slow: list[tuple[tuple[int, ...], tuple[int, ...]]] = []  # shape and strides of each
        self.reads: list[tuple[int, ...]] = []  # shapes of all copies to the CPU
        self.operations: Counter[str] = Counter()  # on the GPU, by name, views left out
        self.views = self.casts = self.cast_elements = 0
        self._in_backward, self._run_backward = False, torch.autograd._engine_run_backward

    def clear(self) -> None:
        """Forget what was recorded so far."""
        self.waits.clear()
        self.slow.clear()
        self.reads.clear()
        self.operations.clear()
        self.views = self.casts = self.cast_elements = 0

    def run_backward(self, *args, **kwargs):
        """Autograd's engine, during which C++ must not hear of CUDA: it would look for its streams."""
        with patch.object(self, "_in_backward", True):
            return self._run_backward(*args, **kwargs)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        op, kwargs, first = func.overloadpacket, kwargs or {}, args[0] if args else None
        if func is torch.ops.prim.device.default:  # C++ asks for the device: autocast must hear cuda
            return META if self._in_backward else first.fake_device
        if torch.is_inference_mode_enabled() and func._can_decompose():  # composite operations arrive whole there
            with self:
                return func.decompose(*args, **kwargs)
        if op is aten._pin_memory:
            return self._pin(first)
        to = getattr(kwargs.get("device"), "type", None)
        if to != "cuda" and not any(isinstance(leaf, fake_tensor.FakeTensor) for leaf in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        if op in (aten._local_scalar_dense, aten.equal, aten.nonzero) or (op is aten._to_copy and to == "cpu"):
            self.waits.append(str(func))
            if op is aten._to_copy:
                self.reads.append(tuple(first.shape))
            return _made_up(op, first, kwargs.get("dtype"))
        if op is aten.copy_ and not isinstance(first, fake_tensor.FakeTensor):
            return self._read(func, *args)
        self._record(func, first, to, kwargs)
        with self.fakes:
            return func(*args, **kwargs)

    def _pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy with the same strides, as torch makes it, whose memory counts as pinned."""
        pinned = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(tensor)
        self.pinned.add(pinned.untyped_storage().data_ptr())
        return pinned

    def _read(self, func, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        """A copy from the GPU into a tensor on the CPU: the host does not wait if it is asynchronous and pinned."""
        self.reads.append(tuple(source.shape))
        if not (non_blocking and target.untyped_storage().data_ptr() in self.pinned):
            self.waits.append(str(func))
        return target.copy_(_made_up(aten._to_copy, source, target.dtype))

    def _record(self, func, first, to: str | None, kwargs) -> None:
        if func.is_view:
            self.views += 1
            return
        self.operations[str(func)] += 1
        if func.overloadpacket is not aten._to_copy:
            return
        if isinstance(first, fake_tensor.FakeTensor):
            self.casts += 1
            self.cast_elements += first.numel()
        elif to == "cuda":
            pinned = first.untyped_storage().data_ptr() in self.pinned
            if not (kwargs.get("non_blocking") and first.is_contiguous() and pinned):
                self.slow.append((tuple(first.shape), first.stride()))


def _made_up(op, tensor: torch.Tensor, dtype: torch.dtype | None):
    """What the host reads where it waits for a GPU that computed nothing."""
    if op is aten._to_copy:  # rows of length 1, so that features can be ranked
        return torch.full(tensor.shape, max(1, *tensor.shape[-1:], 1) ** -0.5).to(dtype or tensor.dtype)
    if op is aten.nonzero:
        return tensor.new_empty((0, tensor.dim()), dtype=torch.long)
    return True if op is aten.equal else torch.zeros((), dtype=tensor.dtype).item()


def _numbers(tensor: torch.Tensor) -> list:
    """`tensor.tolist()`, for which a GPU's numbers are copied to the host at once; torch reads fakes one by one."""
    return (tensor.cpu() if tensor.numel() else torch.empty(tensor.shape)).tolist()


class _Nobody(backend_registration._DummyBackendModule):
    """The module of torch's free device name, under which autograd's engine runs: a registration is for ever.

    Outside `fake_cuda` it has no device, so that nothing else in this process meets it.
    """

    within = False

    def is_available(self) -> bool:
        return self.within

    def device_count(self) -> int:
        return int(self.within)


class _NobodysHook(backend_registration._DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        return _Nobody.within


def _answer(answer, *_, **__):
    """What a question to the device is answered with; torch asks far too often for a `Mock`, which counts."""
    return answer


@contextlib.contextmanager
def fake_cuda(bf16: bool = True, free: int = 2**36) -> Iterator[FakeCuda]:
    """Within, one CUDA device with or without bf16 instructions and with `free` bytes of memory."""
    torch._C._ensureCUDADeviceGuardSet()
    if torch._C._get_privateuse1_backend_name() != "nobody":  # so that the engine does not look for CUDA's streams
        backend_registration._setup_privateuseone_for_python_backend("nobody", _Nobody(), _NobodysHook())
    answers = {
        "_lazy_init": None,
        "is_available": True,
        "is_bf16_supported": bf16,
        "mem_get_info": (free, free),
        "device_count": 1,
        "current_device": 0,
        "get_device_name": "fake",
        "synchronize": None,
        "max_memory_allocated": 0,
    }
    calls = {name: functools.partial(_answer, answer) for name, answer in answers.items()}
    calls |= {"reset_peak_memory_stats": Mock(), "current_stream": Mock(return_value=MagicMock())}
    gpu = FakeCuda()
    with (
        patch.object(_Nobody, "within", True),
        patch.multiple(torch.cuda, **calls),
        patch("torch.autograd._engine_run_backward", gpu.run_backward),
        patch.object(fake_tensor.FakeTensor, "tolist", _numbers),
        patch("torch.backends.cudnn.version", return_value=0),
        patch.object(fake_tensor, "init_gpu_context"),
        torch.autograd.set_multithreading_enabled(False),
        gpu,
    ):
        yield gpu


@functools.cache
def unusable() -> str | None:
    """Why this process cannot use `fake_cuda`, found by running a small step; None where it can."""
    if torch.cuda.is_available():
        return "this machine has a GPU: the fake one is not needed"
    try:
        _try()
    except Exception as error:  # private parts of torch may fail in any way
        return (
            f"torch {torch.__version__} has changed what tests/fake_cuda.py relies on: {type(error).__name__}: {error}"
        )
    return None


def _try() -> None:
    """One step of a linear map under autocast, read on the host. Raises AssertionError where it is not as on a GPU."""
    with fake_cuda() as gpu:
        layer = torch.nn.Linear(3, 2).to("cuda")
        given = torch.ones(4, 3).pin_memory().to("cuda", non_blocking=True)
        gpu.clear()
        with torch.autocast("cuda", torch.bfloat16):
            found = layer(given)
        found.float().sum().backward()
        assert (found.is_cuda, found.dtype) == (True, torch.bfloat16)
        assert layer.weight.grad.is_cuda
        assert layer.weight.grad.shape == (2, 3)
        assert not gpu.waits
        assert not gpu.slow
        assert gpu.casts >= 3  # input, weight and bias
        assert found.sum().item() == 0
        assert len(gpu.waits) == 1
        torch.optim.Adam(layer.parameters(), fused=True).step()
        with torch.inference_mode():
            kept = torch.empty(4, 2).pin_memory()
            kept.copy_(layer(given), non_blocking=True)
            assert len(gpu.waits) == 1
            assert len(layer(given).tolist()) == 4
        assert (len(gpu.waits), gpu.reads) == (2, [(4, 2), (4, 2)])
