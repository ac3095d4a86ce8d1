"""The faster linear map is torch's own, value and gradients, whatever the shapes, and a model needs not know of it."""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

import irra_core as irra
from irra_core.objective import computes_bf16
from irra_core.scale import cpu
from irra_core.scale.cpu import accelerated, keep_freed_memory

CPU = torch.device("cpu")
SHAPES = {"rows": (7, 5), "a batch": (3, 4, 5), "one vector": (5,), "no rows": (0, 5), "four axes": (2, 1, 3, 5)}


def drawn(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(len(shape)))


def linear(*given):
    """torch's linear map as a model calls it while the faster one is asked for."""
    with accelerated(CPU):
        return F.linear(*given)


@pytest.fixture
def processor(monkeypatch):
    """Takes oneDNN's entry or torch's own, as on a processor with these instructions."""

    def with_instructions(name):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: name)
        cpu._usable.cache_clear()

    yield with_instructions
    monkeypatch.undo()
    cpu._usable.cache_clear()


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


def test_no_product_gets_columns_of_wider_rows(monkeypatch, processor):
    """For such a matrix oneDNN has only a loop, 1,000 times as slow."""
    processor("AVX512")
    given = []
    monkeypatch.setattr(cpu, "_ONEDNN", lambda left, right, *rest: given.append((left, right)) or left @ right.T)
    wide, weight = drawn(7, 15, dtype=torch.float32).requires_grad_(), drawn(6, 5, dtype=torch.float32).requires_grad_()
    (linear(wide[:, :5], weight) * drawn(7, 6, dtype=torch.float32)).sum().backward()
    assert len(given) == 4  # the check of _usable, the value and two gradients
    assert all(each.is_contiguous() or each.T.is_contiguous() for each in sum(given, ()))


def test_the_other_library_is_taken_in_float32_alone_and_with_avx512(monkeypatch, processor):
    processor("AVX2")
    assert not cpu._usable()
    processor("AVX512")
    if not cpu._usable():
        pytest.skip("no oneDNN in this torch")
    calls = []
    product = cpu._product
    monkeypatch.setattr(cpu, "_product", lambda *given: calls.append(given) or product(*given))
    tokens, weight = drawn(4, 5, dtype=torch.float32), drawn(6, 5, dtype=torch.float32)
    linear(tokens, weight)
    assert len(calls) == 1
    linear(tokens.double(), weight.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(tokens, weight).dtype == torch.bfloat16
    with accelerated(CPU), torch.autocast("cpu", torch.bfloat16):
        assert F.linear(tokens, weight).dtype == torch.bfloat16
    with accelerated(torch.device("cuda")):
        F.linear(tokens, weight)
    F.linear(tokens, weight)
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


def test_a_model_gives_the_same_features_and_gradients_and_every_linear_map_is_the_faster_one(monkeypatch, processor):
    processor("AVX512")
    if not cpu._usable():
        pytest.skip("no oneDNN in this torch")
    recipe, calls, product = irra.recipe(pretrained="none", interaction_depth=4), [], cpu._product
    model = irra.build_model(recipe, 3)
    monkeypatch.setattr(cpu, "_product", lambda *given: calls.append(given) or product(*given))
    images, tokens = drawn(2, 3, 96, 32, dtype=torch.float32), torch.tensor([[49406, 320, 49407], [49406, 518, 49407]])
    labels, found = torch.tensor([[0, 320, 0], [0, 518, 0]]), []
    before = list(model.state_dict())
    for faster in (False, True):
        model.zero_grad()
        with accelerated(CPU if faster else torch.device("cuda")):
            features = model(images, tokens, tokens, labels)
        in_encoders, in_the_rest = 3 * 4 + 2 * 4 + 4 + 5 + 3, 3 + 3 * 4 + 5 + 2 + 2  # blocks and projections; all else
        assert len(calls) == (in_encoders + in_the_rest) * faster
        made = [value for value in vars(features).values() if value is not None and value.is_floating_point()]
        sum(value.sin().sum() for value in made).backward()
        found.append([*(value.detach() for value in made), *(parameter.grad for parameter in model.parameters())])
    assert len(calls) > 2 * (in_encoders + in_the_rest)  # the gradients too
    for plain, faster in zip(*found, strict=True):
        assert (faster - plain).norm() <= 1e-4 * plain.norm() + 1e-6
    assert list(model.state_dict()) == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator is Linux's")
def test_a_process_that_keeps_its_memory_asks_for_new_pages_once():
    source = (
        "import resource, torch; from irra_core.scale.cpu import keep_freed_memory\n"
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


def test_building_a_model_leaves_the_processs_memory_settings_alone():
    keep_freed_memory.cache_clear()
    irra.build_model(irra.recipe(pretrained="none"), 3)
    assert keep_freed_memory.cache_info().currsize == 0


@pytest.mark.skipif(not computes_bf16(CPU), reason="only processors with bf16 compile an operation per shape")
def test_a_process_keeps_few_of_the_operations_that_torch_compiles_for_each_length_of_a_batch():
    source = (
        "import irra_core, torch\n"
        "from irra_core.scale.machine import peak_memory as peak\n"
        "weight, before = torch.randn(512, 128), 0\n"
        "with torch.autocast('cpu', torch.bfloat16):\n"
        "    for rows in range(1000, 4200, 8):\n"
        "        torch.nn.functional.linear(torch.randn(rows, 128), weight)\n"
        "        before = before or peak()\n"
        "print(peak() - before)"
    )
    names, grown = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"), []
    for given in ({}, dict.fromkeys(names, "1024")):  # the environment comes first
        environment = {name: value for name, value in os.environ.items() if name not in names} | given
        command = [sys.executable, "-c", source]
        grown.append(int(subprocess.run(command, capture_output=True, text=True, env=environment).stdout))
    assert grown[0] < 0.7 * grown[1]
