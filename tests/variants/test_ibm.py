"""The IBM loss against its equation in plain loops, and its gradient."""

from math import exp, log

import pytest
import torch
import torch.nn.functional as F

from irra_core.variants.ibm import ibm_loss


def slow_ibm(image, text, pids):
    loss = 0.0
    for i, one in enumerate(image):
        for j, other in enumerate(text):
            s = F.cosine_similarity(one, other, dim=0).item()
            if i == j:
                loss += log(1 + exp(-10 * (s - 0.6)))
            elif pids[i] == pids[j]:
                loss += log(1 + exp(-5 * (s - 0.4))) + log(1 + exp(5 * (s - 0.6)))
            else:
                loss += log(1 + exp(40 * (s - 0.4)))
    return loss / len(pids)


def features():
    return torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()


@pytest.mark.parametrize("pids", [[0, 1, 2, 3, 4], [0, 0, 1, 2, 3], [3, 1, 3, 1, 3], [2] * 5])
def test_ibm_loss_is_the_sum_of_the_equation_and_has_its_gradient(pids):
    both, pids = features(), torch.tensor(pids)
    assert ibm_loss(*both, pids).item() == pytest.approx(slow_ibm(*both, pids.tolist()), rel=1e-9)
    assert torch.autograd.gradcheck(lambda both: ibm_loss(*both, pids), both)


def test_pairs_in_their_ranges_cost_less_than_pairs_out_of_them():
    def cost(own, weak, stranger):
        """Pairs 0 and 1 are one person, 2 is another; texts are unit vectors, so images are rows of cosines."""
        cosines = torch.full((3, 3), stranger, dtype=torch.float64)
        cosines[0, 1] = cosines[1, 0] = weak
        cosines.fill_diagonal_(own)
        rest = torch.diag((1 - cosines.square().sum(1)).sqrt())
        return ibm_loss(torch.cat([cosines, rest], 1), torch.eye(3, 6, dtype=torch.float64), torch.tensor([0, 0, 1]))

    best = cost(0.8, 0.5, 0.1)
    assert best < cost(0.5, 0.5, 0.1)
    assert best < cost(0.8, 0.3, 0.1)
    assert best < cost(0.8, 0.58, 0.1)
    assert best < cost(0.8, 0.5, 0.3)
