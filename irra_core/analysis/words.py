"""Captions → their lengths in tokens; their words as masked language modelling reads them, with the answers."""

import warnings
from collections.abc import Iterable

import numpy as np
import torch
from jaxtyping import Int
from pandas import DataFrame
from torch import Tensor

from irra_core.recipes import Recipe
from irra_core.text import detokenize_words, mask_tokens, spelt, tokenize


def token_counts(captions: Iterable[str], most: int = 512) -> Int[np.ndarray, " captions"]:
    """How many tokens each caption has, start and end included; `most` for a caption that has more."""
    counts, captions = [np.empty(0, np.int64)], list(captions)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tokenize warns of captions that are longer
        for start in range(0, len(captions), 4096):  # 17 MB of tokens at a time
            counts.append(tokenize(captions[start : start + 4096], length=most).argmax(1).numpy() + 1)
    return np.concatenate(counts)


def sample_masked(annotations: DataFrame, recipe: Recipe, n: int = 5) -> list[tuple[list[str], list[str]]]:
    """Some train captions as MLM reads them: (the words, the answers), an answer "" where nothing is asked."""
    captions = annotations[annotations.split == "train"].caption.sample(n, random_state=recipe.seed)
    masked, labels = mask_tokens(
        tokenize(list(captions), length=recipe.text_length),
        torch.Generator().manual_seed(recipe.seed),
        recipe.mask_probability,
    )
    return [masked_words(*row) for row in zip(masked, labels, strict=True)]


def masked_words(masked: Int[Tensor, " length"], labels: Int[Tensor, " length"]) -> tuple[list[str], list[str]]:
    """The words of one masked caption as MLM reads them, and beside each the word to predict ("" where none is)."""
    words, answers = [], []
    for word, positions in detokenize_words(torch.where(labels != 0, labels, masked)):
        words.append(spelt(masked[positions].tolist()))
        answers.append(word if labels[positions].any() else "")
    return words, answers
