"""A model, photos and a sentence → what each word adds to the score, where it looks, and what stands behind a mask."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from pandas import DataFrame
from torch import Tensor
from torch.nn import functional as F

from irra_core.model import IRRA
from irra_core.text import END_ID, MASK_ID, START_ID, detokenize_words, tokenize, trim

WINDOWS = (12, 4)  # rows and columns of the squares that drop-one-patch covers: a hand or a shoe of a pedestrian


@dataclass(frozen=True)
class Explanation:
    """Why some photos have the score they have with a sentence, word by word."""

    words: list[str]
    scores: Float[np.ndarray, " photos"]  # cosine similarity of the whole sentence
    contributions: Float[np.ndarray, "photos words"]  # what the score loses when the word is dropped
    maps: Float[np.ndarray, "looked_at words rows cols"]  # where each word looks
    method: str  # "attention", or "drop-one-patch" for a model without interaction encoder


@torch.inference_mode()
def explain(
    model: IRRA, images: Float[Tensor, "photos 3 height width"], text: str, looked_at: Sequence[int] | None = None
) -> Explanation:
    """Each word's contribution to each photo's score (drop-one-word) and its map over the photo.

    The maps are the interaction encoder's word-to-patch attention. A model without one gets drop-one-patch: what the
    word's contribution loses when a square of the photo is covered with its mean colour; negative values, where the
    contribution grows, are set to 0. That takes 48 passes a photo: `looked_at` are the rows of images whose maps are
    wanted, all of them if None.
    """
    device = next(model.parameters()).device
    images = images.to(device)
    (tokens,) = trim(tokenize([text]).to(device))
    words = detokenize_words(tokens[0])
    texts = F.normalize(model.encode_text(torch.cat([tokens, _without_each(tokens[0], words)])), dim=1)
    scores = F.normalize(model.encode_image(images), dim=1) @ texts.T
    contributions = scores[:, :1] - scores[:, 1:]
    chosen = list(range(len(images)) if looked_at is None else looked_at)
    if model.interaction is None:
        maps, method = _drop_each_patch(model, images[chosen], texts, contributions[chosen]), "drop-one-patch"
    else:
        seen = model.attention(images[chosen], tokens.expand(len(chosen), -1))
        maps = torch.stack([seen[:, positions].mean(1) for _, positions in words], 1) if words else seen[:, :0]
        method = "attention"
    found = [part.float().cpu().numpy() for part in (scores[:, 0], contributions, maps)]
    return Explanation([word for word, _ in words], *found, method)


def _without_each(tokens: Int[Tensor, " length"], words: list[tuple[str, list[int]]]) -> Int[Tensor, "words length"]:
    """The sentence once a word, each time without that word's tokens, padded to the sentence's length."""
    shorter = tokens.new_zeros(len(words), len(tokens))
    for row, (_, positions) in enumerate(words):
        kept = [token for place, token in enumerate(tokens.tolist()) if place not in positions]
        shorter[row, : len(kept)] = tokens.new_tensor(kept)
    return shorter


def _drop_each_patch(
    model: IRRA,
    images: Float[Tensor, "photos 3 height width"],
    texts: Float[Tensor, "texts dim"],
    contributions: Float[Tensor, "photos words"],
) -> Float[Tensor, "photos words rows cols"]:
    """What each word's contribution loses when each square of each photo is covered; texts[0] is the whole sentence."""
    rows, cols = WINDOWS
    height, width = images.shape[-2:]
    square = torch.eye(rows * cols, device=images.device).view(-1, 1, rows, cols)
    cover = F.interpolate(square, (height, width), mode="nearest")
    maps = []
    for image, whole in zip(images, contributions, strict=True):
        covered = torch.lerp(image.expand(len(cover), -1, -1, -1), image.mean((1, 2), keepdim=True), cover)
        scores = F.normalize(model.encode_image(covered), dim=1) @ texts.T
        lost = whole - (scores[:, :1] - scores[:, 1:])
        maps.append(lost.clamp(min=0).T.unflatten(1, WINDOWS))
    return torch.stack(maps) if maps else contributions[..., None, None].expand(-1, -1, *WINDOWS)


@torch.inference_mode()
def fill_masks(model: IRRA, images: Float[Tensor, "photos 3 height width"], text: str, n: int = 5) -> DataFrame:
    """The n likeliest words behind each [MASK] of a sentence, photo by photo.

    Columns photo (row of images), mask (0 for the first one), rank, word, probability (of all words). Empty for a
    sentence without mask. Raises ValueError for a model without MLM.
    """
    device = next(model.parameters()).device
    (tokens,) = trim(tokenize([text]).to(device))
    places = (tokens[0] == MASK_ID).nonzero().flatten() if "[MASK]" in text else tokens.new_zeros(0)
    rows = []
    if len(places):
        logits = model.word_logits(images.to(device), tokens.expand(len(images), -1))[:, places].float()
        logits[..., [MASK_ID, START_ID, END_ID]] = -torch.inf  # these are no words
        likeliest = logits.softmax(-1).topk(n, dim=-1)
        for (photo, mask, rank), token in np.ndenumerate(likeliest.indices.cpu().numpy()):
            word = "".join(piece for piece, _ in detokenize_words(torch.tensor([token])))
            rows.append((photo, mask, rank + 1, word, float(likeliest.values[photo, mask, rank])))
    return DataFrame(rows, columns=["photo", "mask", "rank", "word", "probability"])
