"""Tokens and their attention → the global feature joined with one of selected patches or words (token selection).

Source: RDE (Qin et al., CVPR 2024), "Token Selection Embedding"; numbers as in the authors' code. The patches to which
the class token attends most, and the words to which the end token attends most, go through selection_head. With
`layers` the attention of two blocks counts, and the number of tokens falls during training (see multi_layer).

Not as there: a caption without words selects its end token (there, the result is NaN). Selection has no gradient.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from irra_core.augmentation import full_precision
from irra_core.transformer import CLIP, pick
from irra_core.variants.multi_layer import ratio_at, rollout
from irra_core.variants.selection_head import SelectionHead

RATIO = 0.3  # authors' code: share of the patches, and of the words of the longest caption, that are selected
HEAD_LR = 1e-3  # authors' code: the learning rate of these weights, whatever that of the encoders


class TokenSelection(nn.Module):
    """Two heads, for selected patches and words; each gives the joined feature of its side, [batch, 3 dim].

    A joined feature is the global one, then the selected one at the global one's length: the cosine of two joined
    features is the mean of the two cosines, so that search stays one inner product. See `parts`.
    """

    def __init__(self, dim: int, kind: str = "last"):
        super().__init__()
        self.kind, self.image, self.text = kind, SelectionHead(dim), SelectionHead(dim)

    def of_images(
        self, clip: CLIP, images: Float[Tensor, "b 3 h w"], elapsed: float = 1.0
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b joined"]]:
        """All projected tokens of images, and their joined features; `elapsed`: the share of training that is done."""
        record = self._record(clip.visual)
        tokens = clip.visual(images, record=record)
        return tokens, self.of_image(tokens, self._seen(record)[:, 0], self._ratio(elapsed))

    def of_texts(self, clip: CLIP, tokens: Int[Tensor, "b length"], elapsed: float = 1.0) -> Float[Tensor, "b joined"]:
        """The joined features of captions."""
        record, end = self._record(clip), tokens.argmax(1, keepdim=True)
        states = clip.finish_text(clip.begin_text(tokens, record), record=record)
        seen = self._seen(record).gather(1, end[..., None].expand(-1, -1, tokens.shape[1]))[:, 0]
        return self.of_text(states, seen, end, clip.context_length, self._ratio(elapsed))

    def _record(self, encoder: nn.Module) -> dict[int, list[Tensor]]:
        """The blocks whose attention is needed: the last, and for `layers` a middle one."""
        depth = len(encoder.transformer.resblocks)
        return {number: [] for number in ([depth - 1] if self.kind == "last" else [depth // 3, depth - 1])}

    def _seen(self, record: dict[int, list[Tensor]]) -> Float[Tensor, "b n n"]:
        """How much each token counts for each other one."""
        blocks = [attention.detach() for (attention,) in record.values()]
        return full_precision(blocks[0]).mean(1) if self.kind == "last" else rollout(blocks[0], blocks[-1])

    def _ratio(self, elapsed: float) -> float:
        """The share of the tokens that is selected."""
        return RATIO if self.kind == "last" else ratio_at(elapsed)

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
        scores = attention.detach().masked_fill((places == 0) | (places >= end), -2.0).masked_fill(places == end, -1.0)
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
