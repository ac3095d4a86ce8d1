"""A model, photos and a sentence → each word's contribution to the score, its map, and predictions of masked words."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from pandas import DataFrame
from torch import Tensor
from torch.nn import functional as F

from irra_core.augmentation import moved, normalise
from irra_core.images import image_array, open_photo
from irra_core.interaction import CrossEncoder
from irra_core.model import IRRA
from irra_core.synthetic.captions import things_named
from irra_core.synthetic.people import attributes
from irra_core.text import END_ID, MASK_ID, START_ID, detokenize_words, length_of, tokenize, trim
from irra_core.transformer import attend

CHUNK = 128  # captions per forward pass
WINDOWS = (12, 4)  # rows and columns of the squares that drop-one-patch covers, each about a pedestrian's hand or shoe


@dataclass(frozen=True)
class Explanation:
    """The scores of some photos for a sentence, explained word by word."""

    words: list[str]
    scores: Float[np.ndarray, " photos"]  # cosine similarity of the whole sentence
    contributions: Float[np.ndarray, "photos words"]  # decrease of the score when the word is dropped
    maps: Float[np.ndarray, "looked_at words rows cols"]  # weight of each patch for each word
    method: str  # "attention", or "drop-one-patch" for a model without interaction encoder


@torch.inference_mode()
def explain(
    model: IRRA, images: Float[Tensor, "photos 3 height width"], text: str, looked_at: Sequence[int] | None = None
) -> Explanation:
    """Each word's contribution to each photo's score (drop-one-word) and its map over the photo.

    The maps are the interaction encoder's word-to-patch attention. For a model without one they are drop-one-patch: the
    decrease of the word's contribution when a square of the photo is covered with the photo's mean colour; an increase
    counts as 0. This takes 48 passes per photo, so `looked_at` selects the rows of images that get a map (None: all).
    """
    device = next(model.parameters()).device
    (tokens,) = trim(tokenize([text], length=length_of(model)))
    words = detokenize_words(tokens[0])
    images, asked = moved(images, device), moved(torch.cat([tokens, _without_each(tokens[0], words)]), device)
    texts = F.normalize(model.encode_text(asked), dim=1)
    scores = F.normalize(model.encode_image(images), dim=1) @ texts.T
    contributions = scores[:, :1] - scores[:, 1:]
    chosen = moved(torch.tensor(range(len(images)) if looked_at is None else looked_at, dtype=torch.long), device)
    images = images.index_select(0, chosen)
    if model.interaction is None:
        maps, method = _drop_each_patch(model, images, texts, contributions.index_select(0, chosen)), "drop-one-patch"
    else:
        seen = model.attention(images, asked[:1].expand(len(images), -1)).cpu()
        maps = torch.stack([seen[:, positions].mean(1) for _, positions in words], 1) if words else seen[:, :0]
        method = "attention"
    arrays = [part.float().cpu().numpy() for part in (scores[:, 0], contributions, maps)]
    return Explanation([word for word, _ in words], *arrays, method)


def _without_each(tokens: Int[Tensor, " length"], words: list[tuple[str, list[int]]]) -> Int[Tensor, "words length"]:
    """One copy of the sentence per word, without that word's tokens, padded to the sentence's length."""
    shorter = tokens.new_zeros(len(words), len(tokens))
    for row, (_, positions) in enumerate(words):
        others = [token for position, token in enumerate(tokens.tolist()) if position not in positions]
        shorter[row, : len(others)] = tokens.new_tensor(others)
    return shorter


def _drop_each_patch(
    model: IRRA,
    images: Float[Tensor, "photos 3 height width"],
    texts: Float[Tensor, "texts dim"],
    contributions: Float[Tensor, "photos words"],
) -> Float[Tensor, "photos words rows cols"]:
    """Decrease of each word's contribution when each square of each photo is covered; texts[0]: the whole sentence."""
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
    """The n most probable words for each [MASK] of a sentence, for each photo.

    Columns photo (row of images), mask (0 for the first one), rank, word, probability (among all words). Empty for a
    sentence without mask. Raises ValueError for a model without MLM.
    """
    device = next(model.parameters()).device
    (tokens,) = trim(tokenize([text], length=length_of(model)))
    positions = (tokens[0] == MASK_ID).nonzero().flatten() if "[MASK]" in text else torch.empty(0)
    rows = []
    if len(positions):
        asked = moved(tokens, device).expand(len(images), -1)
        logits = model.word_logits(moved(images, device), asked).index_select(1, moved(positions, device))
        no_words = moved(torch.tensor([MASK_ID, START_ID, END_ID]), device)
        shares = logits.float().index_fill(2, no_words, -torch.inf).softmax(2)
        chances, likeliest = (part.cpu().numpy() for part in shares.topk(n, dim=2))
        for (photo, mask, rank), token in np.ndenumerate(likeliest):
            word = "".join(piece for piece, _ in detokenize_words(torch.tensor([token])))
            rows.append((photo, mask, rank + 1, word, float(chances[photo, mask, rank])))
    return DataFrame(rows, columns=["photo", "mask", "rank", "word", "probability"])


@torch.inference_mode()
def rollout(
    model: IRRA, images: Float[Tensor, "batch 3 height width"], tokens: Int[Tensor, "batch length"]
) -> Float[Tensor, "batch length rows cols"]:
    """Attention rollout: each word's attention to the patches, propagated through the text blocks.

    After each block, a word's map is half its own previous map and half the attention-weighted mean of all words'
    previous maps (attention averaged over heads). As in `IRRA.attention`, the class token's share is omitted. Raises
    ValueError for another encoder than `cross`, the only one with text blocks after its attention to the image.
    Source: Abnar & Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020.
    """
    encoder, length = model.interaction, tokens.shape[1]
    if not isinstance(encoder, CrossEncoder):
        raise ValueError(f"rollout needs text blocks after the image: {type(encoder).__name__} has none, cross has")
    images, tokens = (moved(part, next(model.parameters()).device) for part in (images, tokens))
    tokens, real = _attended(model, tokens)
    mask, shares = None if real is None else real[:, None, None], []
    words, patches = encoder.ln_text(model.text_tokens(tokens)), encoder.ln_image(model.image_tokens(images))
    states = attend(encoder.attention, words, patches, record=shares)
    for block in encoder.blocks:
        states = block(states, mask, record=shares)
    first, *later = (layer.mean(1) for layer in shares)
    for layer in later:
        first = (first + layer @ first) / 2
    return first[:, :length, 1:].unflatten(-1, model.grid)


def box_cover(box: Sequence[int], size: tuple[int, int], grid: tuple[int, int]) -> Float[np.ndarray, "rows cols"]:
    """The share of each patch that lies in a box [x0, y0, x1, y1] of an image of that size (width, height), pixels."""
    shares = []
    for low, high, length, cells in ((box[1], box[3], size[1], grid[0]), (box[0], box[2], size[0], grid[1])):
        edges = np.linspace(0, length, cells + 1)
        inside = np.minimum(edges[1:], high) - np.maximum(edges[:-1], low)
        shares.append(inside.clip(min=0) / (length / cells))
    return np.outer(*shares)


def attention_mass(model: IRRA, annotations: DataFrame) -> DataFrame:
    """The share of each word's attention that lies in the box of the garment or other thing that the word names.

    One row per colour or noun in captions of rendered people whose photo shows the thing: pid, image_id, thing, kind,
    word; attention (the share in the box of the word's attention over the patches, mean over layers and heads), rollout
    (the same for `rollout`; NaN for encoders without it) and area (the box's share of the photo, which is also the
    share of evenly spread attention). Raises ValueError for images that were not rendered or a model without MLM.
    """
    boxes = attributes(annotations).set_index("image_id")["boxes"]
    rows = []
    for chunk, images, tokens in _read(model, annotations):
        with torch.inference_mode():
            maps = {"attention": model.attention(images, moved(tokens, images.device))}
            if isinstance(model.interaction, CrossEncoder):
                maps["rollout"] = rollout(model, images, tokens)
        maps = {name: each.float().cpu().numpy() for name, each in maps.items()}
        for row, caption in enumerate(chunk.itertuples()):
            size = open_photo(caption.path).size
            for thing, kind, word, positions in named_words(tokens[row]):
                if thing in boxes[caption.image_id]:
                    cover = box_cover(boxes[caption.image_id][thing], size, model.grid)
                    looks = {name: each[row, positions].mean(0) for name, each in maps.items()}
                    mass = {name: float((look * cover).sum() / look.sum()) for name, look in looks.items()}
                    rows.append((caption.pid, caption.image_id, thing, kind, word, mass["attention"],
                                 mass.get("rollout", np.nan), float(cover.mean())))  # fmt: skip
    columns = ["pid", "image_id", "thing", "kind", "word", "attention", "rollout", "area"]
    return DataFrame(rows, columns=columns)


def _read(model: IRRA, annotations: DataFrame) -> Iterator[tuple[DataFrame, Tensor, Tensor]]:
    """Yields chunks of captions, each caption with its photo on the model's device, and its tokens on the CPU."""
    device = next(model.parameters()).device
    photos = annotations.drop_duplicates("image_id")
    row_of = dict(zip(photos["image_id"], range(len(photos)), strict=True))
    pixels = image_array(list(photos["path"]), *model.image_size).pixels
    for start in range(0, len(annotations), CHUNK):
        chunk = annotations.iloc[start : start + CHUNK]
        shown = torch.from_numpy(pixels[[row_of[image] for image in chunk["image_id"]]])
        (tokens,) = trim(tokenize(list(chunk["caption"]), length=length_of(model)))
        yield chunk, normalise(moved(shown, device)), tokens


def named_words(tokens: Int[Tensor, " length"]) -> Iterator[tuple[str, str, str, list[int]]]:
    """Yields the things named in a tokenised caption: thing, kind, word, and the positions of its tokens."""
    words = detokenize_words(tokens)
    for thing, kind, indices in things_named([word for word, _ in words]):
        positions = [position for index in indices for position in words[index][1]]
        yield thing, kind, " ".join(words[index][0] for index in indices), positions


@torch.inference_mode()
def word_evidence(model: IRRA, annotations: DataFrame, others: int = 8, seed: int = 0) -> DataFrame:
    """How much the photo helps to predict each masked word: the caption's own photo against photos of other people.

    One row per colour or noun of one token in captions of the rendered people's grammar: pid, image_id, thing, kind,
    word; with_image, the probability of the masked word given the caption's photo; without_image, its mean probability
    over `others` photos of other people, drawn with the seed; bits, the logarithm to base 2 of the ratio; right_with
    and right_without, whether the word is the most probable of all. Raises ValueError for a model without MLM.
    """
    device, draw = next(model.parameters()).device, np.random.default_rng(seed)
    photos = annotations.drop_duplicates("image_id").reset_index(drop=True)
    pixels = image_array(list(photos["path"]), *model.image_size).pixels
    rows = []
    for caption in annotations.itertuples():
        own = np.flatnonzero(photos["image_id"] == caption.image_id)
        strangers = draw.choice(np.flatnonzero(photos["pid"] != caption.pid), others)
        images = normalise(moved(torch.from_numpy(pixels[[*own, *strangers]]), device))
        (tokens,) = trim(tokenize([caption.caption], length=length_of(model)))
        named = [item for item in named_words(tokens[0]) if len(item[3]) == 1]
        chances = _chances(model, images, tokens[0], [positions[0] for *_, positions in named])
        for (thing, kind, word, (position,)), chance in zip(named, chances, strict=True):
            seen, unseen = chance[0], chance[1:].mean(0)
            true = int(tokens[0, position])
            rows.append({"pid": caption.pid, "image_id": caption.image_id, "thing": thing, "kind": kind, "word": word,
                         "with_image": float(seen[true]), "without_image": float(unseen[true]),
                         "bits": float((seen[true] / unseen[true]).log2()),
                         "right_with": int(seen.argmax()) == true, "right_without": int(unseen.argmax()) == true,
                         })  # fmt: skip
    return DataFrame(rows)


def _chances(
    model: IRRA, images: Float[Tensor, "photos 3 height width"], tokens: Int[Tensor, " length"], positions: list[int]
) -> Float[Tensor, "positions photos vocabulary"]:
    """The probability, on the CPU, of every word at each position, with only that position masked, for each photo."""
    at = torch.tensor(positions, dtype=torch.long)
    masked = tokens.repeat(len(positions), 1).scatter(1, at[:, None], MASK_ID)
    masked, real = _attended(model, moved(masked, images.device))
    at = moved(at, images.device)
    words, patches = model.text_tokens(masked), model.image_tokens(images)
    photos = torch.arange(len(images), device=at.device).repeat(len(positions))
    rows = torch.arange(len(positions), device=at.device).repeat_interleave(len(images))
    real = None if real is None else real[rows]
    states = model.interaction(words[rows], patches[photos], real, at[rows, None])
    return model.mlm_head(states[:, 0]).float().softmax(1).cpu().unflatten(0, (len(positions), len(images)))


def _attended(model: IRRA, tokens: Int[Tensor, "n length"]) -> tuple[Tensor, Tensor | None]:
    """The tokens as input of the text blocks, and a mask of those attended to (None: all, including padding)."""
    if model.padding_attention:
        return F.pad(tokens, (0, model.clip.context_length - tokens.shape[1])), None
    return tokens, torch.arange(tokens.shape[1], device=tokens.device) <= tokens.argmax(1, keepdim=True)
