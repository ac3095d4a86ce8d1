"""TBPS-CLIP's losses against their equations in plain loops, their gradients, and what they share with others."""

from math import exp, log

import pytest
import torch
import torch.nn.functional as F

from irra_core.losses import itc_loss
from irra_core.variants.tbps import nitc_loss, ritc_loss

CROWDS = [[0, 1, 2, 3, 4], [0, 0, 1, 2, 3], [3, 1, 3, 1, 3], [2] * 5]


def features():
    return torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()


def softmax(scores):
    return [exp(score) / sum(exp(other) for other in scores) for score in scores]


def directions(image, text, pids, temperature):
    """Softmax and same-identity row of every query, in both directions."""
    for a, b in (image, text), (text, image):
        for row, pid in zip(a, pids, strict=True):
            same = [float(pid == other) for other in pids]
            scores = [F.cosine_similarity(row, other, dim=0).item() / temperature for other in b]
            yield softmax(scores), [value / sum(same) for value in same]


def slow_nitc(image, text, pids, temperature, alpha, targets=None):
    loss = 0.0
    for place, (p, q) in enumerate(directions(image, text, pids, temperature)):
        own = p if targets is None else targets[place]
        loss -= sum((alpha * s + (1 - alpha) * y) * log(x) for x, s, y in zip(p, own, q, strict=True))
    return loss / (2 * len(pids))


def slow_ritc(image, text, pids, temperature):
    found = directions(image, text, pids, temperature)
    return sum(x * (log(x) - log(y + 0.01)) for p, q in found for x, y in zip(p, q, strict=True)) / (2 * len(pids))


@pytest.mark.parametrize("pids", CROWDS)
@pytest.mark.parametrize("temperature", [0.05, 0.5])
@pytest.mark.parametrize(("epoch", "alpha"), [(0.0, 0.0), (0.5, 0.25), (1.0, 0.5), (3.0, 0.5)])
def test_nitc_loss_is_the_equation(pids, temperature, epoch, alpha):
    both = features()
    loss = nitc_loss(*both, torch.tensor(pids), temperature, epoch)
    assert loss.item() == pytest.approx(slow_nitc(*both, pids, temperature, alpha), rel=1e-9)


def test_nitc_loss_has_the_gradient_of_fixed_targets():
    both, pids = features(), [3, 1, 3, 1, 3]
    nitc_loss(*both, torch.tensor(pids), 0.5, 1.0).backward()
    targets = [p for p, _ in directions(*both, pids, 0.5)]
    for index in ((0, 0, 0), (0, 3, 2), (1, 1, 5)):
        ends = []
        for step in (1e-6, -1e-6):
            moved = both.detach().clone()
            moved[index] += step
            ends.append(slow_nitc(*moved, pids, 0.5, 0.5, targets))
        assert both.grad[index].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5)


def test_nitc_loss_is_infonce_among_strangers_before_the_labels_are_soft():
    both, strangers = features(), torch.arange(5)
    assert nitc_loss(*both, strangers, 0.1, 0.0).item() == pytest.approx(itc_loss(*both, 0.1).item(), rel=1e-12)


@pytest.mark.parametrize("pids", CROWDS)
@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_ritc_loss_is_the_equation_and_has_its_gradient(pids, temperature):
    both, labels = features(), torch.tensor(pids)
    assert ritc_loss(*both, labels, temperature).item() == pytest.approx(slow_ritc(*both, pids, temperature), rel=1e-9)
    assert torch.autograd.gradcheck(lambda both: ritc_loss(*both, labels, 0.5), both)


@pytest.mark.parametrize("loss", [nitc_loss, ritc_loss])
def test_a_learned_temperature_gets_a_gradient(loss):
    both, pids = features().detach(), torch.tensor([0, 0, 1, 2, 3])
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    loss(*both, pids, temperature).backward()
    if loss is ritc_loss:
        ends = [slow_ritc(*both, pids.tolist(), 0.3 + step) for step in (1e-6, -1e-6)]
    else:
        targets = [p for p, _ in directions(*both, pids.tolist(), 0.3)]
        ends = [slow_nitc(*both, pids.tolist(), 0.3 + step, 0.5, targets) for step in (1e-6, -1e-6)]
    assert temperature.grad.item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5)
