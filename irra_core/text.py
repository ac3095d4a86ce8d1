"""Captions → token ids; token ids → masked ids and labels."""

import html
from collections.abc import Iterable
from functools import lru_cache
from itertools import chain

import numpy as np
import torch
from jaxtyping import Int
from torch import Generator, Tensor

CONTEXT = 77  # tokens a caption, start and end included
VOCABULARY = 49408
MASK_ID = 49405  # as in the released code; in CLIP's vocabulary it is the word "jekyll"
START_ID, END_ID, PADDING_ID = 49406, 49407, 0
START = "<start_of_text>"  # the tokeniser's name of START_ID
REMEMBERED = 2**16  # pieces of text whose token ids are kept
TOGETHER = 1024  # captions whose words are looked up at once
ORDINARY = 600  # letters of a caption at most that is among them: of longer ones most words may not be wanted
LONGEST = 3000  # letters of a word; 75 tokens of at most 32 bytes end before, and time grows with the square


def whole_characters(text: str) -> str:
    """The text with a "?" for each half of a character, which a browser may send and no encoding can hold."""
    return text.encode("utf-8", "replace").decode()


def tokenize(captions: Iterable[str], mask: str = "[MASK]") -> Int[Tensor, "n 77"]:
    """CLIP's token ids of each caption: start, words, end, padding 0; a caption that is too long keeps its end token.

    Every literal `mask` becomes MASK_ID. CLIP's vocabulary gives that id to one word, "jekyll" (the released
    tokeniser stops at it with a KeyError). A caption with a mask spells it in its two pieces, so that there MASK_ID
    is always a mask; in every other caption the word keeps CLIP's id. Raises TypeError for what is no text.
    """
    if isinstance(captions, str):
        raise TypeError(f"captions is one text, {captions[:40]!r}: give a list of texts")
    captions = list(captions)
    starts = range(0, max(len(captions), 1), TOGETHER)
    rows = [_tokens(captions[start : start + TOGETHER], start, mask) for start in starts]
    return torch.from_numpy(np.concatenate(rows))


def _tokens(captions: list, start: int, mask: str) -> Int[np.ndarray, "n 77"]:
    """`tokenize` of a few captions, the first of them number `start`."""
    ids, lengths = _of_plain(captions, mask) or _of_any(captions, start, mask)
    kept = np.minimum(lengths, CONTEXT - 2)
    if len(ids) > kept.sum():
        place = np.arange(len(ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        ids = ids[place < CONTEXT - 2]
    tokens = np.full((len(captions), CONTEXT), PADDING_ID, dtype=np.int64)
    tokens[:, 0] = START_ID
    tokens[:, 1:-1][np.arange(CONTEXT - 2) < kept[:, None]] = ids
    tokens[np.arange(len(captions)), kept + 1] = END_ID
    return tokens


def _of_plain(captions: list, mask: str) -> tuple[Int[np.ndarray, " ids"], Int[np.ndarray, " captions"]] | None:
    """All captions' token ids in a row and how many each has; None unless every one is plain, as nearly all are.

    Plain texts need no mending, are of ordinary length and hold no mask and no "<", with which the tokeniser's own
    words begin: with START before each, all are split and looked up at once.
    """
    try:
        text = " ".join(captions)
    except TypeError:  # one is no text
        return None
    if "<" in text or not _is_plain(text) or (mask and mask in text) or max(map(len, captions), default=0) > ORDINARY:
        return None
    text = f" {START} ".join(["", *captions])
    ids = np.fromiter(chain.from_iterable(map(_PIECES.__getitem__, text.lower().split())), np.int64)
    starts = np.flatnonzero(ids == START_ID)
    return ids[ids != START_ID], np.diff(starts, append=len(ids)) - 1


def _of_any(captions: list, start: int, mask: str) -> tuple[Int[np.ndarray, " ids"], Int[np.ndarray, " captions"]]:
    """`_of_plain` of captions one by one, whatever they hold."""
    rows: list[list[int]] = []
    for caption in captions:
        if not isinstance(caption, str):
            raise TypeError(f"caption {start + len(rows)} is {caption!r}: expected is a text")
        rows.append(_encode(caption, mask)[: CONTEXT - 2])
    return np.fromiter(chain.from_iterable(rows), np.int64), np.fromiter(map(len, rows), np.int64, len(rows))


def _encode(caption: str, mask: str) -> list[int]:
    """The token ids of a caption's words and masks; at least the first 75 of them."""
    if not mask or mask not in caption:
        return _encode_plain(caption)
    ids: list[int] = []
    for number, part in enumerate(caption.split(mask)):
        words = _encode_plain(part)
        ids += [MASK_ID] * (number > 0)
        for token in words:
            ids += _mask_word() if token == MASK_ID else [token]
    return ids


def _encode_plain(text: str) -> list[int]:
    """The first token ids of a text without masks, at least 75 where it has so many."""
    pieces = _pieces(text)
    if len(pieces) <= CONTEXT and len(text) <= LONGEST:  # as captions are
        return list(chain.from_iterable(map(_PIECES.__getitem__, pieces)))
    ids: list[int] = []
    for piece in pieces:
        ids += _PIECES[piece[:LONGEST]]
        if len(ids) >= CONTEXT - 2:
            break
    return ids


def _pieces(text: str) -> list[str]:
    """What stands between spaces in the text as CLIP reads it: mended, unescaped, lower case. ASCII is not broken."""
    if not _is_plain(text):
        import ftfy

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return text.lower().split()


def _is_plain(text: str) -> bool:
    """True for text with nothing in it to mend or to unescape."""
    return text.isascii() and text.isprintable() and "&" not in text


class _Pieces(dict[str, tuple[int, ...]]):
    """What stands between two spaces → its token ids (no token spans one), remembered: captions share few words."""

    def __missing__(self, piece: str) -> tuple[int, ...]:
        bpe = _bpe()
        ids: list[int] = []
        for word in bpe.pat.findall(piece):
            letters = "".join(bpe.byte_encoder[byte] for byte in word.encode("utf-8")[:LONGEST])
            ids += [bpe.encoder[token] for token in bpe.bpe(letters).split(" ")]
        if len(self) >= REMEMBERED:
            self.clear()
        self[piece] = tuple(ids)
        return self[piece]


_PIECES = _Pieces()


@lru_cache(maxsize=1)
def _mask_word() -> list[int]:
    """The two pieces of the word that has the mask's id: CLIP's last merge, undone."""
    bpe = _bpe()
    return [bpe.encoder[piece] for piece in max(bpe.bpe_ranks, key=bpe.bpe_ranks.get)]


@lru_cache(maxsize=1)
def _bpe():
    """open_clip's tokeniser; imported here because open_clip takes seconds."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


def detokenize_words(tokens: Int[Tensor, " length"]) -> list[tuple[str, list[int]]]:
    """The words of one tokenised caption with the positions of their tokens; a mask is the word "[MASK]".

    Start, end and padding are no words. A word that was cut at the 77th token is what is left of it.
    """
    bpe = _bpe()
    words: list[tuple[str, list[int]]] = []
    letters, positions = "", []
    ids = tokens.tolist()
    last = ids.index(END_ID) if END_ID in ids else int(np.flatnonzero(ids)[-1:].sum()) + 1
    for position, token in enumerate(ids[:last]):
        if token == START_ID:
            continue
        piece = "[MASK]</w>" if token == MASK_ID else bpe.decoder[token]
        letters += piece.removesuffix("</w>")
        positions.append(position)
        if piece.endswith("</w>") or position == last - 1:
            content = bytes(bpe.byte_decoder[letter] for letter in letters)
            words.append((content.decode("utf-8", errors="replace"), positions))
            letters, positions = "", []
    return words


def masked_words(masked: Int[Tensor, " length"], labels: Int[Tensor, " length"]) -> tuple[list[str], list[str]]:
    """The words of one masked caption as MLM reads them, and beside each the word to predict ("" where none is)."""
    words, answers = [], []
    for word, positions in detokenize_words(torch.where(labels != 0, labels, masked)):
        words.append("".join(_letters(int(masked[position])) for position in positions))
        answers.append(word if labels[positions].any() else "")
    return words, answers


def _letters(token: int) -> str:
    """What one token spells; the mask is "[MASK]"."""
    bpe = _bpe()
    if token == MASK_ID:
        return "[MASK]"
    letters = bpe.decoder[token].removesuffix("</w>")
    return bytes(bpe.byte_decoder[letter] for letter in letters).decode("utf-8", errors="replace")


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


def trim(*tokens: Int[Tensor, "n length"]) -> tuple[Int[Tensor, "n shorter"], ...]:
    """The tensors cut to the longest caption of the first: its end token, the largest id, is the last one kept."""
    length = int(tokens[0].argmax(1).max()) + 1 if len(tokens[0]) else 0
    return tuple(each[:, :length] for each in tokens)
