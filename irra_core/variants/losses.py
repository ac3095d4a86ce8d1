"""Losses of other papers, and the registry of all losses: name → function.

A loss named in a recipe is looked up in LOSSES; recipes.LOSS_NAMES lists the same names without importing torch.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from irra_core.losses import (
    EPSILON,
    cosines,
    divergence,
    id_loss,
    in_full_precision,
    itc_loss,
    mlm_loss,
    same_person,
    sdm_loss,
)
from irra_core.settings import unknown
from irra_core.variants.ibm import ibm_loss
from irra_core.variants.tbps import nitc_loss, ritc_loss


@in_full_precision
def cmpm_loss(
    image: Float[Tensor, "batch dim"],
    text: Float[Tensor, "batch dim"],
    pids: Int[Tensor, " batch"],
    target: str = "l2",
) -> Float[Tensor, ""]:
    """Cross-modal projection matching: the divergence image-to-text plus text-to-image, in nats.

    Like sdm_loss, but on scalar projections s_ij = image_i · text_j / ‖text_j‖ (for the reverse: text_i · image_j /
    ‖image_j‖), without a temperature. `target` "sum" divides the same-identity row by its sum, so that q is a
    distribution (the paper); "l2" by its L2 norm (the released code; then the loss can be negative).
    Source: Zhang & Lu, ECCV 2018, equations 3 to 7.
    """
    if target not in ("sum", "l2"):
        raise unknown("cmpm target", target, ("sum", "l2"))
    image_to_text = image @ F.normalize(text, dim=1).T
    text_to_image = text @ F.normalize(image, dim=1).T
    same = same_person(pids, image_to_text)
    size = same.sum(1, keepdim=True) if target == "sum" else same.norm(dim=1, keepdim=True)
    log_target = (same / size + EPSILON).log()
    return divergence(image_to_text, log_target) + divergence(text_to_image, log_target)


@in_full_precision
def cmpc_loss(
    image: Float[Tensor, "batch dim"],
    text: Float[Tensor, "batch dim"],
    pids: Int[Tensor, " batch"],
    weight: Float[Tensor, "identities dim"],
) -> Float[Tensor, ""]:
    """Cross-modal projection classification: cross-entropy of both projected features, summed, in nats.

    The image feature is projected onto its own text's direction t̄ and classified: logits_k = (image · t̄) (w̄_k · t̄),
    with w̄_k = weight[k] / ‖weight[k]‖ (norm-softmax); the text feature likewise. pids are rows of `weight`.
    CMPM/C is `cmpm + cmpc`. Source: Zhang & Lu, ECCV 2018, "Cross-Modal Projection Classification".
    """
    weight = F.normalize(weight, dim=1)
    image_way, text_way = F.normalize(image, dim=1), F.normalize(text, dim=1)
    image_on_text = (image * text_way).sum(1, keepdim=True) * text_way
    text_on_image = (text * image_way).sum(1, keepdim=True) * image_way
    pids = pids.long()
    return F.cross_entropy(image_on_text @ weight.T, pids) + F.cross_entropy(text_on_image @ weight.T, pids)


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


LOSSES: dict[str, Callable[..., Tensor]] = {
    "sdm": sdm_loss,
    "itc": itc_loss,
    "cmpm": cmpm_loss,
    "cmpc": cmpc_loss,
    "tal": tal_loss,
    "ibm": ibm_loss,
    "nitc": nitc_loss,
    "ritc": ritc_loss,
    "tse": tse_loss,
    "id": id_loss,
    "mlm": mlm_loss,
}
