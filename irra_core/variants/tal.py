"""The losses of RDE: triplet alignment of the global features (tal) and of the features of selected tokens (tse)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from irra_core.losses import cosines, in_full_precision


@in_full_precision
def tal_loss(
    image: Float[Tensor, "batch dim"],
    text: Float[Tensor, "batch dim"],
    pids: Int[Tensor, " batch"],
    margin: float = 0.1,
    tau: float = 0.015,
) -> Float[Tensor, ""]:
    """Triplet alignment: a triplet loss against the soft maximum of all negatives, summed over the batch, in cosines.

    With s = cosine, P_i the texts of the person pids[i], N_i all others, and α = softmax of s_ij / tau over j in P_i,
    detached from the gradient:
        loss = Σ_i [margin − Σ_{j∈P_i} α_ij s_ij + tau · log Σ_{j∈N_i} exp(s_ij / tau)]₊ + the same for sᵀ
    A batch of one person has no negatives and loss 0. The sum, margin and tau are those of the authors' code; with the
    sum, the gradient is about as large as that of sdm_loss. Source: RDE (Qin et al., CVPR 2024), "Triplet Alignment
    Loss".
    """
    scores = cosines(image, text)
    same = pids[:, None] == pids
    return _triplets(scores, same, margin, tau) + _triplets(scores.T, same, margin, tau)


def _triplets(scores: Float[Tensor, "n n"], same: Tensor, margin: float, tau: float) -> Float[Tensor, ""]:
    """Sum over the rows of one direction of tal_loss."""
    alpha = (scores / tau).masked_fill(~same, -torch.inf).softmax(1).detach()
    negative = tau * (scores / tau).masked_fill(same, -torch.inf).logsumexp(1)
    return (margin - (alpha * scores).sum(1) + negative).clamp(min=0).sum()


def tse_loss(
    selected_image: Float[Tensor, "batch dim"],
    selected_text: Float[Tensor, "batch dim"],
    pids: Int[Tensor, " batch"],
) -> Float[Tensor, ""]:
    """Triplet alignment of the features of selected tokens (see token_selection); RDE's own losses are tal+tse."""
    return tal_loss(selected_image, selected_text, pids)
