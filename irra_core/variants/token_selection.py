"""Tokens and their attention → the global feature joined with one of selected patches or words (token selection).

Source: RDE (Qin et al., CVPR 2024), "Token Selection Embedding"; numbers as in the authors' code. The patches to which
the class token attends most, and the words to which the end token attends most, go through selection_head.

Not as there: a caption without words selects its end token (there, the result is NaN). Selection has no gradient.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from irra_core.augmentation import full_precision
from irra_core.transformer import pick
from irra_core.variants.selection_head import SelectionHead

RATIO = 0.3  # authors' code: share of the patches, and of the words of the longest caption, that are selected
HEAD_LR = 1e-3  # authors' code: the learning rate of these weights, whatever that of the encoders


class TokenSelection(nn.Module):
    """Two heads, for selected patches and words; each gives the joined feature of its side, [batch, 3 dim].

    A joined feature is the global one, then the selected one at the global one's length: the cosine of two joined
    features is the mean of the two cosines, so that search stays one inner product. See `parts`.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.image, self.text = SelectionHead(dim), SelectionHead(dim)

    def of_image(
        self, tokens: Float[Tensor, "b n d"], attention: Float[Tensor, "b n"], ratio: float = RATIO
    ) -> Float[Tensor, "b joined"]:
        """The joined feature of image tokens, the class token first; `attention` is that of the class token."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        scores = attention.detach().masked_fill(places == 0, -1.0)
        return joined(tokens[:, 0], self.image(*selected(tokens, scores, int(ratio * (tokens.shape[1] - 1)))))

    def of_text(
        self,
        tokens: Float[Tensor, "b n d"],
        attention: Float[Tensor, "b n"],
        end: Int[Tensor, "b 1"],
        longest: int,
        ratio: float = RATIO,
    ) -> Float[Tensor, "b joined"]:
        """The joined feature of text tokens; `attention` is that of the end token, which is at `end`.

        As many words are selected as of a caption of `longest` tokens, at most all words of the caption.
        """
        places = torch.arange(tokens.shape[1], device=tokens.device)
        scores = attention.detach().masked_fill((places == 0) | (places >= end), -2.0).scatter(1, end, -1.0)
        return joined(pick(tokens, end)[:, 0], self.text(*selected(tokens, scores, int(ratio * (longest - 2)))))


def selected(
    tokens: Float[Tensor, "b n d"], scores: Float[Tensor, "b n"], count: int
) -> tuple[Float[Tensor, "b k d"], Bool[Tensor, "b k"]]:
    """The `count` tokens with the highest scores, l2-normalised; True for scores from 0, and for the highest."""
    best, at = scores.topk(max(1, min(count, tokens.shape[1])), dim=1)
    first = torch.arange(best.shape[1], device=best.device) == 0
    return F.normalize(full_precision(pick(tokens, at)), dim=2), (best >= 0) | first


def joined(whole: Float[Tensor, "b d"], local: Float[Tensor, "b e"]) -> Float[Tensor, "b joined"]:
    """Both features side by side, the second scaled to the length of the first; that length gets no gradient."""
    whole = full_precision(whole)
    return torch.cat([whole, F.normalize(local, dim=1) * whole.detach().norm(dim=1, keepdim=True)], 1)


def parts(features: Float[Tensor, "b joined"]) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b e"]]:
    """The global and the selected part of joined features."""
    dim = features.shape[1] // 3
    return features[:, :dim], features[:, dim:]
