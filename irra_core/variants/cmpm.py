"""The losses of CMPM/C: cross-modal projection matching, and cross-modal projection classification.

Source: Zhang & Lu, "Deep Cross-Modal Projection Learning for Image-Text Matching", ECCV 2018.
"""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from irra_core.losses import EPSILON, divergence, in_full_precision, same_person
from irra_core.settings import unknown


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
