"""Token ids of captions → the same captions with some words masked, replaced or deleted.

Word augmentation, source: RDE (Qin et al., CVPR 2024), as in the authors' code: each token of a word is changed with
probability p = 0.2; of the changed ones 60 % become the mask, 20 % a random word, 20 % are deleted.
Word deletion, source: TBPS-CLIP (Cao et al., AAAI 2024), after EDA (Wei & Zou, EMNLP 2019): each word is deleted with
probability p = 0.05. There a word is what spaces separate; here it is a token, so a long word may lose a part.

In both a caption with words keeps one of them (RDE's code may delete all).
"""

import torch
from jaxtyping import Int
from torch import Generator, Tensor

from irra_core.text import MASK_ID, PADDING_ID, VOCABULARY

MASKED, REPLACED = 0.6, 0.2  # authors' code of RDE: of the changed words; the rest is deleted


def augment_words(
    tokens: Int[Tensor, "n length"],
    generator: Generator,
    changed: float,
    deleted: float = 0.0,
    mask_id: int = MASK_ID,
    vocabulary: int = VOCABULARY,
) -> Int[Tensor, "n length"]:
    """The captions with a share `changed` of their words augmented, then a share `deleted` of the words deleted.

    Words are the ids from 1 to mask_id - 1 before the end token, as in mask_tokens, and random words are drawn from
    the same range. What follows a deleted word moves up; padding fills the end. Drawn on the generator's device.
    """
    chance, kind, fate = torch.rand((3, *tokens.shape), generator=generator, device=generator.device).to(tokens.device)
    words = torch.randint(1, mask_id, tokens.shape, generator=generator, device=generator.device).to(tokens.device)
    before_end = (tokens == vocabulary - 1).cumsum(1) == 0
    is_word = (tokens > PADDING_ID) & (tokens < mask_id) & before_end
    picked = is_word & (chance < changed)
    gone = (picked & (kind >= MASKED + REPLACED)) | (is_word & (fate < deleted))
    last = fate.masked_fill(~is_word, -1.0)
    gone &= last < last.amax(1, keepdim=True)  # one word of each caption is never deleted
    replaced = torch.where(kind < MASKED, mask_id, words)
    tokens = torch.where(picked & (kind < MASKED + REPLACED), replaced, tokens)
    order = gone.int().argsort(dim=1, stable=True)  # what stays, in order, then what is deleted
    return tokens.masked_fill(gone, PADDING_ID).gather(1, order)
