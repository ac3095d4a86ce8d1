"""The IBM loss of CoRL: three groups of pairs, each pulled or pushed to its own range of cosines."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from irra_core.losses import cosines, in_full_precision

HIGH, LOW = 0.6, 0.4  # own pairs go above HIGH, strangers below LOW, other pairs of a person in between


@in_full_precision
def ibm_loss(
    image: Float[Tensor, "batch dim"], text: Float[Tensor, "batch dim"], pids: Int[Tensor, " batch"]
) -> Float[Tensor, ""]:
    """Own pairs above a cosine of 0.6, strangers below 0.4, a person's other pairs between; the mean over the batch.

    With s = cosine, own pairs i = j, weak pairs i ≠ j of one person, and strangers, B pairs in the batch:
        loss = 1/B · { Σ_own log(1 + e^(−10 (s − 0.6)))
                     + Σ_weak [log(1 + e^(−5 (s − 0.4))) + log(1 + e^(5 (s − 0.6)))]
                     + Σ_strangers log(1 + e^(40 (s − 0.4))) }
    The sums run over the whole matrix, so both directions are in them. Without weak pairs, and but for a factor 2, this
    is the alignment loss of ViTAA (Wang et al., ECCV 2020), whose bounds and factors it keeps.
    Source: "identity-bounded matching" of CoRL (Yan et al., "Cross-modal Collaborative Representation Learning for
    Text-to-Image Person Retrieval", IJCAI 2025), equation 9 and its numbers; its weight beside other losses is 1, as
    there. The paper's batches have one text per photo; here two captions of one photo can meet, as weak pairs.
    """
    scores = cosines(image, text)
    same = pids[:, None] == pids
    own = torch.eye(len(pids), dtype=torch.bool, device=pids.device)
    near = F.softplus(-10 * (scores - HIGH))
    between = F.softplus(-5 * (scores - LOW)) + F.softplus(5 * (scores - HIGH))
    far = F.softplus(40 * (scores - LOW))
    return torch.where(own, near, torch.where(same, between, far)).sum() / len(scores)
