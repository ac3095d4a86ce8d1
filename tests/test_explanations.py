"""Why a photo has its score: against models whose answers can be worked out by hand, and a tiny real one."""

import numpy as np
import pytest
import torch
from torch import nn

from irra_core.explanations import explain, fill_masks
from irra_core.model import IRRA, build_model
from irra_core.recipes import recipe
from irra_core.text import MASK_ID, tokenize, trim


def tiny(losses="sdm+mlm"):
    """An untrained small model in evaluation mode."""
    return build_model(recipe("synthetic", pretrained="none", losses=losses, _smoke=False), 4).eval()


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture
def images():
    return torch.randn(3, 3, 96, 32, generator=torch.Generator().manual_seed(0))


def cosine(model, images, text):
    """Scores of a sentence, encoded alone and untrimmed."""
    with torch.no_grad():
        return torch.cosine_similarity(model.encode_image(images), model.encode_text(tokenize([text]))).numpy()


def test_a_words_contribution_is_what_the_score_loses_without_the_word(model, images):
    found = explain(model, images, "a man in red jeans")
    assert found.words == ["a", "man", "in", "red", "jeans"]
    whole = cosine(model, images, "a man in red jeans")
    shorter = ["man in red jeans", "a in red jeans", "a man red jeans", "a man in jeans", "a man in red"]
    assert np.allclose(found.scores, whole, atol=1e-5)
    for place, text in enumerate(shorter):
        assert np.allclose(found.contributions[:, place], whole - cosine(model, images, text), atol=1e-5)


def test_maps_are_the_models_attention_and_a_word_of_several_tokens_has_their_mean(model, images):
    found = explain(model, images, "a xyzzyqq hat")
    (tokens,) = trim(tokenize(["a xyzzyqq hat"]))
    with torch.no_grad():
        attention = model.attention(images, tokens.expand(3, -1)).numpy()
    assert found.method == "attention"
    assert found.maps.shape == (3, 3, *model.grid)
    assert np.allclose(found.maps[:, 2], attention[:, tokens.shape[1] - 2], atol=1e-6)
    assert np.allclose(found.maps[:, 1], attention[:, 2:-2].mean(1), atol=1e-6)


class LeftHat(IRRA):
    """A model without interaction encoder that answers the word "hat" with the red of the photo's upper left corner."""

    hat = int(tokenize(["hat"])[0, 1])

    def __init__(self):
        nn.Module.__init__(self)
        self.weight, self.interaction = nn.Parameter(torch.ones(1)), None

    def encode_image(self, images):
        red = images[:, 0, :8, :8].mean((1, 2))
        return torch.stack([red, torch.ones_like(red)], 1)

    def encode_text(self, tokens):
        said = (tokens == self.hat).any(1).float()
        return torch.stack([said, torch.ones_like(said)], 1)


def test_without_interaction_encoder_light_is_where_covering_the_photo_costs_the_word_its_share():
    photo = torch.zeros(1, 3, 96, 32)
    photo[0, 0, :8, :8] = 1.0
    found = explain(LeftHat(), photo, "a hat")
    assert found.method == "drop-one-patch"
    assert np.argwhere(found.maps[0] > 1e-3).tolist() == [[1, 0, 0]]  # the word hat, first row, first column
    assert found.maps.min() == 0


@pytest.mark.parametrize("losses", ["sdm+mlm", "sdm"])
def test_maps_of_some_photos_are_those_of_all(losses, images):
    some, every = (explain(tiny(losses), images, "a man in jeans", rows) for rows in ([2], None))
    assert np.allclose(some.maps[0], every.maps[2], atol=1e-6)
    assert np.allclose(some.contributions, every.contributions, atol=1e-6)
    assert explain(tiny(losses), images, "a man", []).maps.shape[:2] == (0, 2)


def test_a_sentence_without_words_has_no_contributions(model, images):
    found = explain(model, images, "")
    assert found.words == []
    assert found.contributions.shape == (3, 0)
    assert found.maps.shape == (3, 0, *model.grid)


def test_masks_are_filled_with_the_heads_likeliest_words_in_order(model, images):
    found = fill_masks(model, images, "a man in [MASK] jeans and a [MASK] hat", n=3)
    assert len(found) == 3 * 2 * 3
    tokens = tokenize(["a man in [MASK] jeans and a [MASK] hat"])
    with torch.no_grad():
        logits = model.word_logits(images, tokens.expand(3, -1))
    for (photo, mask), rows in found.groupby(["photo", "mask"]):
        place = (tokens[0] == MASK_ID).nonzero().flatten()[mask]
        scores = logits[photo, place].clone()
        scores[49405:] = -torch.inf
        expected = scores.softmax(0).sort(descending=True).values[:3].numpy()
        assert np.allclose(rows.sort_values("rank").probability, expected, rtol=1e-4)


def test_the_word_behind_a_mask_is_the_one_that_the_head_is_told(model, images, monkeypatch):
    red = int(tokenize(["red"])[0, 1])

    def word_logits(images, tokens):
        logits = torch.zeros(*tokens.expand(len(images), -1).shape, 49408)
        logits[..., red] = 20.0
        logits[..., MASK_ID] = 40.0  # a mask is no answer
        return logits

    monkeypatch.setattr(model, "word_logits", word_logits)
    found = fill_masks(model, images, "a [MASK] hat")
    assert list(found[found["rank"] == 1].word) == ["red"] * 3


def test_a_sentence_without_mask_has_nothing_to_fill_in(model, images):
    assert fill_masks(model, images, "a man like jekyll").empty


def test_filling_in_needs_a_model_with_mlm(images):
    with pytest.raises(ValueError, match="interaction encoder"):
        fill_masks(tiny("sdm"), images, "a [MASK] hat")
