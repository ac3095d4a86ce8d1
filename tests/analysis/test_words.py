"""Captions as masked language modelling reads them."""

import torch

from irra_core.analysis.words import masked_words
from irra_core.text import MASK_ID, tokenize


def test_masked_words_show_what_the_model_reads_and_which_word_it_must_predict():
    tokens = tokenize(["a backpackz coat"])[0]
    masked, labels = tokens.clone(), torch.zeros_like(tokens)
    masked[2], labels[2] = MASK_ID, tokens[2]
    words, answers = masked_words(masked, labels)
    assert words[1].startswith("[MASK]")
    assert words[1].endswith("z")
    assert [words[0], words[2]] == ["a", "coat"]
    assert answers == ["", "backpackz", ""]
