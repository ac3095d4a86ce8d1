"""The linear map is torch's own, value and gradients, whatever the shapes; autocast, float64 and no rows included."""

import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from irra_core.scale import linear as module
from irra_core.scale.linear import Linear, keep_freed_memory, linear

SHAPES = {"rows": (7, 5), "a batch": (3, 4, 5), "one vector": (5,), "no rows": (0, 5), "four axes": (2, 1, 3, 5)}


def drawn(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(len(shape)))


@pytest.fixture
def processor(monkeypatch):
    """Takes oneDNN's entry or torch's own, as on a processor with these instructions."""

    def with_instructions(name):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: name)
        module._usable.cache_clear()

    yield with_instructions
    monkeypatch.undo()
    module._usable.cache_clear()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("instructions", ["AVX512", "AVX2"])
def test_values_and_gradients_are_those_of_the_product_in_double_precision(shape, bias, instructions, processor):
    processor(instructions)
    given = [drawn(*shape), drawn(6, 5), drawn(6) if bias else None]
    found = []
    for dtype in (torch.float64, torch.float32):
        tensors = [None if each is None else each.detach().to(dtype).requires_grad_() for each in given]
        value = linear(*tensors) if dtype == torch.float32 else tensors[0] @ tensors[1].T + (tensors[2] if bias else 0)
        (value * drawn(*value.shape).to(dtype)).sum().backward()
        found.append([value.detach(), *(each.grad for each in tensors if each is not None)])
    for expected, value in zip(*found, strict=True):
        assert value.dtype == torch.float32
        assert torch.allclose(value.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_other_library_is_taken_in_float32_alone_and_with_avx512(monkeypatch, processor):
    processor("AVX2")
    assert not module._usable()
    processor("AVX512")
    if not module._usable():
        pytest.skip("no oneDNN in this torch")
    calls = []
    monkeypatch.setattr(module, "_product", lambda *given: calls.append(given) or F.linear(*given))
    tokens, weight = drawn(4, 5, dtype=torch.float32), drawn(6, 5, dtype=torch.float32)
    linear(tokens, weight)
    assert len(calls) == 1
    linear(tokens.double(), weight.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(tokens, weight).dtype == torch.bfloat16
    assert len(calls) == 1


@pytest.mark.parametrize("instructions", ["AVX512", "AVX2"])
def test_transposed_and_sliced_weights_are_read_where_they_lie(instructions, processor):
    processor(instructions)
    weight, tokens = drawn(10, 6, dtype=torch.float32), drawn(4, 10, dtype=torch.float32)
    assert torch.allclose(linear(tokens, weight.T), tokens @ weight, atol=1e-5)
    assert torch.allclose(linear(tokens[:, :6], weight[4:]), tokens[:, :6] @ weight[4:].T, atol=1e-5)


def test_what_does_not_learn_gets_no_gradient():
    tokens, weight = drawn(4, 5, dtype=torch.float32), drawn(6, 5, dtype=torch.float32).requires_grad_()
    linear(tokens, weight).sum().backward()
    assert tokens.grad is None
    assert torch.allclose(weight.grad, tokens.sum(0).expand(6, -1), atol=1e-5)


def test_the_layer_has_the_weights_of_torchs_own():
    ours, theirs = Linear(5, 6), torch.nn.Linear(5, 6)
    ours.load_state_dict(theirs.state_dict())
    tokens = drawn(4, 5, dtype=torch.float32)
    assert torch.allclose(ours(tokens), theirs(tokens), atol=1e-6)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator is Linux's")
def test_a_process_that_keeps_its_memory_asks_for_new_pages_once():
    source = (
        "import resource, torch; from irra_core.scale.linear import keep_freed_memory\n"
        "if {keep}: keep_freed_memory()\n"
        "def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(12): torch.ones(2**24)\n"  # 64 MiB
        "before = faults()\n"
        "for _ in range(5): torch.ones(2**24)\n"
        "print(faults() - before)"
    )
    counts = []
    for keep in (True, False):
        command = [sys.executable, "-c", source.format(keep=keep)]
        counts.append(int(subprocess.run(command, capture_output=True, text=True).stdout))
    if keep_freed_memory():
        assert counts[0] < counts[1] / 5
