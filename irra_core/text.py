"""Captions → token ids; token ids → masked ids and labels."""

import gzip
import html
import importlib.util
import warnings
from collections.abc import Iterable
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import regex
import torch
from jaxtyping import Int
from tokenizers.models import BPE
from torch import Generator, Tensor

CONTEXT = 77  # tokens per caption, start and end included, unless the recipe has another text_length
VOCABULARY = 49408
MASK_ID = 49405  # as in the released code; in CLIP's vocabulary it is the word "jekyll"
MASK_WORD = (43893, 865)  # "jeky" and "ll", which CLIP's last merge joins to that word
START_ID, END_ID, PADDING_ID = 49406, 49407, 0
START, END = "<start_of_text>", "<end_of_text>"  # how the vocabulary spells START_ID and END_ID
WORDS = regex.compile(  # as in CLIP: letters, one digit, or anything else up to a space
    rf"{START}|{END}|'s|'t|'re|'ve|'m|'ll|'d|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+", regex.IGNORECASE
)
GPU_LENGTHS = 8  # to whose multiples lengths are rounded: few shapes, of aligned rows
LONGEST = 40  # characters of one word that are encoded, per token of the caption: a token has at most 32 bytes
LONGEST_TEXT = 5000  # characters of a text that are cleaned, of many spaces one: the time to repair it is quadratic
HUGE_REFERENCE = regex.compile("&#[0-9]{4301,};?")  # Python refuses to read such a number; no character has it
# The vocabulary spells each byte as a printable character: itself where it is one, else the next free one from 256 on.
_UNPRINTABLE = [byte for byte in range(256) if byte == 32 or not chr(byte).isprintable()]
_LETTERS = {byte: chr(256 + number) for number, byte in enumerate(_UNPRINTABLE)}
_BYTES = {ord(letter): byte for byte, letter in _LETTERS.items()}


def whole_characters(text: str) -> str:
    """The text with a "?" for each half of a character, which a browser may send and no encoding can hold."""
    return text.encode("utf-8", "replace").decode()


def length_of(model: object) -> int:
    """How many tokens of a caption a model reads: CONTEXT, unless its CLIP has another context_length."""
    return getattr(getattr(model, "clip", None), "context_length", CONTEXT)


def tokenize(captions: Iterable[str], mask: str = "[MASK]", length: int = CONTEXT) -> Int[Tensor, "n {length}"]:
    """CLIP's token ids of each caption: start, words, end, padding 0; a caption that is too long keeps its end token.

    A warning says how many captions are too long.

    Every literal `mask` becomes MASK_ID. CLIP's vocabulary gives that id to one word, "jekyll" (the released
    tokeniser stops at it with a KeyError). A caption with a mask spells it in its two pieces, so that there MASK_ID
    is always a mask; in every other caption the word keeps CLIP's id. Raises TypeError for an entry that is no text.
    """
    if isinstance(captions, str):
        raise TypeError(f"captions is one text, {captions[:40]!r}: give a list of texts")
    captions = list(captions)
    tokens, cut = np.full((len(captions), length), PADDING_ID, dtype=np.int64), 0
    for number, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise TypeError(f"caption {number} is {caption!r}: expected is a text")
        ids = _encode(caption, mask, length - 2)
        cut += len(ids) > length - 2
        ids = [START_ID, *ids[: length - 2], END_ID]
        tokens[number, : len(ids)] = ids
    if cut:
        said = f"{cut:,} of {len(captions):,} captions have more than {length} tokens: the rest of them is not read"
        warnings.warn(f"{said}. `-p text_length N` makes a model that reads N", stacklevel=2)
    return torch.from_numpy(tokens)


def _encode(caption: str, mask: str, most: int) -> list[int]:
    """The token ids of a caption's words and masks; of a longer caption more than `most`."""
    if not mask or mask not in caption:
        return _encode_words(caption, most)
    ids: list[int] = []
    for number, part in enumerate(caption.split(mask)):
        ids += [MASK_ID] * (number > 0)
        for token in _encode_words(part, most):
            ids += MASK_WORD if token == MASK_ID else [token]
        if len(ids) > most:
            break
    return ids


def _encode_words(text: str, most: int) -> list[int]:
    """The token ids of a text without masks; of a longer text more than `most`."""
    words = islice(WORDS.finditer(_cleaned(text)), most + 1)  # each word has at least one token
    return [token for word in words for token in _word_ids(word[0][: LONGEST * most])]


@lru_cache(maxsize=2**16)
def _word_ids(word: str) -> tuple[int, ...]:
    """The token ids of one word, cached because captions share few words."""
    if word in (START, END):
        return (_bpe().token_to_id(word),)
    letters = word.encode().decode("latin-1").translate(_LETTERS)
    return tuple(token.id for token in _bpe().tokenize(letters))


def _cleaned(text: str) -> str:
    """The text as open_clip cleans it: damaged encodings repaired, HTML unescaped, single spaces, lower case."""
    text = text if len(text) <= LONGEST_TEXT else " ".join(text.split())[:LONGEST_TEXT]
    if not (text.isascii() and text.isprintable() and "&" not in text):  # others need no repair, and no import
        import ftfy

        text = ftfy.fix_text(text)
        for _ in range(2):
            text = html.unescape(HUGE_REFERENCE.sub("\ufffd", text))  # as html reads other numbers beyond Unicode
    return " ".join(text.split()).lower()


@lru_cache(maxsize=1)
def _bpe() -> BPE:
    """CLIP's byte-pair encoding, built from the vocabulary file in open_clip's package, which is not imported."""
    folder = Path(importlib.util.find_spec("open_clip").submodule_search_locations[0])
    lines = gzip.decompress((folder / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode().split("\n")
    letters = [*(chr(byte) for byte in range(256) if byte not in _LETTERS), *_LETTERS.values()]
    merges = [tuple(line.split()) for line in lines[1 : 1 + VOCABULARY - 2 - 2 * len(letters)]]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), START, END]
    return BPE({word: token for token, word in enumerate(words)}, merges, end_of_word_suffix="</w>")


def detokenize_words(tokens: Int[Tensor, " length"]) -> list[tuple[str, list[int]]]:
    """The words of one tokenised caption with the positions of their tokens; a mask is the word "[MASK]".

    Start, end and padding are no words. Of a word that was cut at the last token, the part that is left.
    """
    ids = tokens.tolist()
    last = ids.index(END_ID) if END_ID in ids else int(np.flatnonzero(ids)[-1:].sum()) + 1
    words, positions = [], []
    for position, token in enumerate(ids[:last]):
        if token == START_ID:
            continue
        positions.append(position)
        if token == MASK_ID or position == last - 1 or _bpe().id_to_token(token).endswith("</w>"):
            words.append((spelt(ids[each] for each in positions), positions))
            positions = []
    return words


def spelt(ids: Iterable[int]) -> str:
    """The text of a word's token ids; a mask is "[MASK]"."""
    pieces = ("[MASK]" if token == MASK_ID else _bpe().id_to_token(token).removesuffix("</w>") for token in ids)
    return "".join(pieces).translate(_BYTES).encode("latin-1").decode("utf-8", errors="replace")


def mask_tokens(
    tokens: Int[Tensor, "n length"],
    generator: Generator,
    probability: float = 0.15,
    vocabulary: int = VOCABULARY,
    mask_id: int = MASK_ID,
) -> tuple[Int[Tensor, "n length"], Int[Tensor, "n length"]]:
    """The tokens with some replaced, and the labels: the original id where one is to be predicted, 0 elsewhere.

    A share of `probability` of the words is chosen, and at least one a caption; of those 80 % become the mask, 10 %
    a random word and 10 % stay. Words are the ids from 1 to mask_id - 1 before the end token, as in the released
    code, which draws its random words from the same range; start, end and padding are never chosen, and a caption
    without words has no label. Where the draw chose no word, it is the one that came nearest; the released code
    masks position 1, which is the end token of an empty caption. Source: BERT's masking, as IRRA uses it.
    """
    device = generator.device
    chance, kind = torch.rand((2, *tokens.shape), generator=generator, device=device).to(tokens.device)
    words = torch.randint(1, mask_id, tokens.shape, generator=generator, device=device).to(tokens.device)
    before_end = (tokens == vocabulary - 1).cumsum(1) == 0
    maskable = (tokens > PADDING_ID) & (tokens < mask_id) & before_end
    chance = chance.masked_fill(~maskable, 2.0)
    chosen = maskable & ((chance < probability) | (chance == chance.amin(1, keepdim=True)))
    replaced = torch.where(kind < 0.8, mask_id, torch.where(kind < 0.9, words, tokens))
    return torch.where(chosen, replaced, tokens), torch.where(chosen, tokens, 0)


def trim(*tokens: Int[Tensor, "n length"], device: torch.device | None = None) -> tuple[Int[Tensor, "n shorter"], ...]:
    """The tensors cut to the longest caption of the first: its end token, the largest id, is the last one kept.

    For a GPU the length is rounded up to a multiple of GPU_LENGTHS: a kernel is chosen anew for each shape.
    """
    length = int(tokens[0].argmax(1).max()) + 1 if len(tokens[0]) else 0
    multiple = GPU_LENGTHS if device is not None and device.type == "cuda" else 1
    return tuple(each[:, : -(-length // multiple) * multiple] for each in tokens)
