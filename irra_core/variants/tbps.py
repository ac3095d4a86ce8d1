"""The losses of TBPS-CLIP: normalised ITC with soft labels, and reversed InfoNCE.

Source: TBPS-CLIP (Cao et al., "An Empirical Study of CLIP for Text-based Person Search", AAAI 2024); numbers as in the
authors' code. Both take the learned temperature (recipe field `learned_temperature`), which starts at the recipe's.
"""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from irra_core.losses import cosines, divergence, in_full_precision, same_person

SOFT = 0.5  # authors' code: the largest share of the model's own scores in the target
EPSILON = 1e-2  # authors' code; sdm_loss has 1e-8
LARGEST_SCALE = 100.0  # CLIP: 1 / temperature never exceeds it


def temperature_of(log_scale: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """The learned temperature, at least 0.01; its gradient is that without this bound, so that it can rise again."""
    scale = log_scale.exp()
    return 1 / (scale + (scale.clamp(max=LARGEST_SCALE) - scale).detach())


@in_full_precision
def nitc_loss(
    image: Float[Tensor, "batch dim"],
    text: Float[Tensor, "batch dim"],
    pids: Int[Tensor, " batch"],
    temperature: float | Float[Tensor, ""] = 0.01,
    epoch: float = 1.0,
) -> Float[Tensor, ""]:
    """Normalised ITC: InfoNCE with all pairs of a person as targets, softened by the model's own scores, in nats.

    With s = cosine / temperature, q the normalised same-identity matrix and p = softmax of s without gradient:
        loss = −½ mean_i Σ_j [t_ij log softmax_j s_ij + t'_ij log softmax_j s_ji],   t = α p + (1 − α) q,   t' of sᵀ
    α rises from 0 to 0.5 during the first epoch; `epoch` counts the epochs before this step. The authors take p from a
    second forward pass, which differs from the first by dropout alone; this model has no dropout.
    """
    scores = cosines(image, text) / temperature
    alpha, same = SOFT * min(1.0, epoch), same_person(pids, scores)
    target = (1 - alpha) * same / same.sum(1, keepdim=True)
    losses = (F.cross_entropy(way, alpha * way.detach().softmax(1) + target) for way in (scores, scores.T))
    return sum(losses) / 2


@in_full_precision
def ritc_loss(
    image: Float[Tensor, "batch dim"],
    text: Float[Tensor, "batch dim"],
    pids: Int[Tensor, " batch"],
    temperature: float | Float[Tensor, ""] = 0.01,
) -> Float[Tensor, ""]:
    """Reversed InfoNCE: half the divergence of the scores from the targets, in both directions, in nats.

    With p = softmax_j s_ij and q the normalised same-identity matrix:
        loss = ½ mean_i Σ_j p_ij (log p_ij − log(q_ij + 0.01)) + the same for sᵀ
    This is sdm_loss in another name: half of it, with ε 0.01 for 1e-8. A larger ε bounds the price of probability on a
    stranger: log p + 4.6 nats instead of log p + 18.4.
    """
    scores = cosines(image, text) / temperature
    same = same_person(pids, scores)
    target = (same / same.sum(1, keepdim=True) + EPSILON).log()
    return (divergence(scores, target) + divergence(scores.T, target)) / 2
