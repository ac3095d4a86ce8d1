"""A global feature and one of selected tokens ↔ joined features, whose cosine is the mean of both cosines.

So a gallery keeps both, and search stays one inner product. Source of the mean: RDE (Qin et al., CVPR 2024).
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from irra_core.augmentation import full_precision


def joined(whole: Float[Tensor, "b d"], local: Float[Tensor, "b e"]) -> Float[Tensor, "b joined"]:
    """Both features side by side, the second scaled to the length of the first; that length gets no gradient."""
    whole = full_precision(whole)
    return torch.cat([whole, F.normalize(local, dim=1) * whole.detach().norm(dim=1, keepdim=True)], 1)


def parts_of(features: Any, selects: bool) -> dict[str, Float[Tensor, "b _"]]:
    """The features that losses take of a batch's, by the names of their arguments: image and text, and the selected."""
    if not selects:
        return {"image": features.image, "text": features.text}
    (image, selected_image), (text, selected_text) = parts(features.image), parts(features.text)
    return {"image": image, "text": text, "selected_image": selected_image, "selected_text": selected_text}


def parts(features: Float[Tensor, "b joined"]) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b e"]]:
    """The global and the selected part of joined features."""
    dim = features.shape[1] // 3
    return features[:, :dim], features[:, dim:]
