"""Training steps on a GPU that computes nothing: no operand on the wrong device, no wait of the host, no slow copy."""

import pytest
import torch
from fake_cuda import fake_cuda, unusable
from test_objective import CASES, setting

from irra_core.objective import Objective, half_weights
from irra_core.training import build_optimiser, optimise

if reason := unusable():
    pytest.skip(reason, allow_module_level=True)

pytestmark = pytest.mark.usefixtures("narrow")
VARIANTS = [(case, precision, {}) for case in CASES for precision in ("fp32", "bf16", "fp16")]
VARIANTS += [("every loss", precision, {"micro_batch": 3}) for precision in ("fp32", "bf16", "fp16")]
VARIANTS += [("every loss", "bf16", {"adapter_rank": 4, "frozen": "image"})]


def stepper(case: str, precision: str, **changes):
    """A model on `cuda` and a function that takes one training step of it."""
    recipe, model, batches = setting(case, False, "cuda", **changes)
    model = half_weights(model) if precision == "fp16" else model
    objective, optimiser = Objective(model, recipe, precision), build_optimiser(model, recipe)
    return model, lambda step: optimise(objective, optimiser, batches.at(step))


@pytest.mark.parametrize(("case", "precision", "changes"), VARIANTS, ids=str)
def test_a_step_on_a_gpu_mixes_no_devices_and_never_waits(case, precision, changes):
    with fake_cuda() as gpu:
        model, step = stepper(case, precision, **changes)
        step(0)  # what is made once, such as constants on the device
        gpu.clear()
        numbers = step(2)  # a short batch
        assert numbers.is_cuda
        assert (gpu.waits, gpu.slow) == ([], [])
        gradients = [(weight, weight.grad) for weight in model.parameters() if weight.grad is not None]
        assert gradients
        for weight, gradient in gradients:
            assert (gradient.device, gradient.dtype, gradient.shape) == (weight.device, weight.dtype, weight.shape)


FAULTS = {
    "a tensor left on the CPU": lambda losses: losses + torch.ones(3),
    "a boolean index": lambda losses: losses[losses > 0],
    "a number read": lambda losses: losses * losses[0].item(),
    "a copy from memory that is not pinned": lambda losses: losses + torch.ones(3).to("cuda"),
    "a strided copy": lambda losses: losses + torch.ones(3, 2)[:, 0].pin_memory().to("cuda", non_blocking=True),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_refused_or_recorded(fault):
    with fake_cuda() as gpu:
        assert caught(FAULTS[fault], gpu)


def test_a_copy_from_pinned_memory_is_no_fault():
    with fake_cuda() as gpu:
        assert not caught(lambda losses: losses + torch.ones(3).pin_memory().to("cuda", non_blocking=True), gpu)


def caught(fault, gpu) -> bool:
    """True if the fault raises an error, or if the GPU records a wait or a slow copy."""
    losses = torch.zeros(3, device="cuda")
    try:
        fault(losses)
    except RuntimeError:
        return True
    return bool(gpu.waits or gpu.slow)


def test_work_on_the_cpu_is_real_and_not_recorded():
    with fake_cuda() as gpu:
        product = torch.full((2, 3), 2.0) @ torch.full((3, 2), 4.0)
    assert product.tolist() == [[24.0, 24.0], [24.0, 24.0]]
    assert not gpu.operations


def test_nothing_of_it_is_left_behind():
    with fake_cuda():
        torch.zeros(1, device="cuda")
    assert not torch.cuda.is_available()
    assert torch.accelerator.current_accelerator() is None or not torch.accelerator.is_available()
    with torch.random.fork_rng():
        assert torch.rand(2, 2).sum() > 0
