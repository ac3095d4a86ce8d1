"""Tokens and their attention → the global feature joined with one of selected patches or words (token selection).

Source: RDE (Qin et al., CVPR 2024), "Token Selection Embedding"; numbers as in the authors' code. The patches to which
the class token attends most, and the words to which the end token attends most, go through selection_head. With
`layers` the attention of two blocks counts, and the number of tokens falls during training (see multi_layer).

Not as there: a caption without words selects its end token (there, the result is NaN). Selection has no gradient.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from irra_core.transformer import CLIP, pick
from irra_core.variants.joined import joined
from irra_core.variants.multi_layer import ratio_at, recorded, seen
from irra_core.variants.selection_head import SelectionHead, selected

RATIO = 0.3  # authors' code: share of the patches, and of the words of the longest caption, that are selected
HEAD_LR = 1e-3  # authors' code: the learning rate of these weights, whatever that of the encoders


class TokenSelection(nn.Module):
    """Two heads, for selected patches and words; each gives the joined feature of its side, [batch, 3 dim].

    A joined feature is the global one, then the selected one at the global one's length (see joined).
    """

    def __init__(self, dim: int, kind: str = "last"):
        super().__init__()
        self.kind, self.image, self.text = kind, SelectionHead(dim), SelectionHead(dim)

    def of_images(
        self, clip: CLIP, images: Float[Tensor, "b 3 h w"], elapsed: float = 1.0
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b joined"]]:
        """All projected tokens of images, and their joined features; `elapsed`: the share of training that is done."""
        tokens, attention = self.image_attention(clip, images)
        return tokens, self.of_image(tokens, attention, self.ratio(elapsed))

    def image_attention(
        self, clip: CLIP, images: Float[Tensor, "b 3 h w"]
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b n"]]:
        """All projected tokens of images, and how much each counts for the class token, itself first."""
        record = recorded(self.kind, clip.visual)
        return clip.visual(images, record=record), seen(self.kind, record)[:, 0]

    def of_texts(self, clip: CLIP, tokens: Int[Tensor, "b length"], elapsed: float = 1.0) -> Float[Tensor, "b joined"]:
        """The joined features of captions."""
        record, end = recorded(self.kind, clip), tokens.argmax(1, keepdim=True)
        states = clip.finish_text(clip.begin_text(tokens, record), record=record)
        attention = seen(self.kind, record).gather(1, end[..., None].expand(-1, -1, tokens.shape[1]))[:, 0]
        return self.of_text(states, attention, end, clip.context_length, self.ratio(elapsed))

    def ratio(self, elapsed: float) -> float:
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
