"""Why a photo has its score: against models whose answers can be worked out by hand, and a tiny real one."""

import numpy as np
import pytest
import torch
from torch import nn

from irra_core.analysis.explanations import (
    attention_mass,
    box_cover,
    explain,
    fill_masks,
    named_words,
    rollout,
    word_evidence,
)
from irra_core.annotations import load_annotations
from irra_core.augmentation import load_images
from irra_core.backbone import build_model
from irra_core.model import IRRA
from irra_core.recipes import recipe
from irra_core.synthetic.people import attributes, make_synthetic
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


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """The test captions of twelve rendered people."""
    root = tmp_path_factory.mktemp("rendered")
    make_synthetic(root, people=12)
    return load_annotations("synthetic", root).query("split == 'test'")


def slow_rollout(model, image, tokens):
    """One caption without padding, with torch's own attention: each block keeps half, mixes half."""
    encoder = model.interaction
    words, patches = encoder.ln_text(model.text_tokens(tokens)), encoder.ln_image(model.image_tokens(image))
    states, flow = encoder.attention(words, patches, patches)
    flow = flow[0]
    for block in encoder.blocks:
        context = block.ln_1(states)
        change, weights = block.attn(context, context, context)
        states = states + change
        states = states + block.mlp(block.ln_2(states))
        mixed = torch.zeros_like(flow)
        for word in range(len(flow)):
            mixed[word] = 0.5 * flow[word] + 0.5 * sum(weights[0, word, k] * flow[k] for k in range(len(flow)))
        flow = mixed
    return flow[:, 1:].reshape(-1, *model.grid)


def test_rollout_is_the_blocks_attention_multiplied_out_word_by_word(model, images):
    sentences = ["a man in red jeans and a hat", "a woman"]
    (tokens,) = trim(tokenize(sentences))
    found = rollout(model, images[:2], tokens)
    for row, sentence in enumerate(sentences):
        (alone,) = trim(tokenize([sentence]))
        with torch.no_grad():
            expected = slow_rollout(model, images[row : row + 1], alone)
        assert torch.allclose(found[row, : alone.shape[1]], expected, atol=1e-6)


def test_rollout_needs_text_blocks_behind_the_image(images):
    merged = build_model(recipe("synthetic", pretrained="none", interaction="merged", _smoke=False), 4)
    with pytest.raises(ValueError, match="MergedEncoder has none, cross has"):
        rollout(merged, images, tokenize(["a man"] * 3))


@pytest.mark.parametrize("box", [[0, 0, 32, 96], [3, 10, 20, 11], [31, 90, 32, 96], [8, 8, 16, 24]])
def test_box_cover_is_the_share_of_each_patchs_pixels_inside_the_box(box):
    inside = np.zeros((96, 32))
    inside[box[1] : box[3], box[0] : box[2]] = 1
    expected = inside.reshape(12, 8, 4, 8).mean((1, 3))
    assert np.allclose(box_cover(box, (32, 96), (12, 4)), expected)


def test_named_words_are_where_their_tokens_are():
    (tokens,) = tokenize(["She wears a pale blue t-shirt and xyzzy red boots"])
    found = [(thing, kind, word) for thing, kind, word, _ in named_words(tokens)]
    assert found == [
        ("upper", "colour", "pale blue"),
        ("upper", "noun", "t - shirt"),
        ("shoes", "colour", "red"),
        ("shoes", "noun", "boots"),
    ]
    for *_, word, positions in named_words(tokens):
        assert tokens[positions].tolist() == tokenize([word])[0, 1 : 1 + len(positions)].tolist()


def test_attention_mass_is_the_share_of_a_words_attention_inside_the_box_of_its_thing(model, rendered):
    found = attention_mass(model, rendered)
    assert set(found.thing) >= {"upper", "lower", "shoes"}
    boxes = attributes(rendered).set_index("image_id").boxes
    done = 0
    for caption in rendered.drop_duplicates("image_id").itertuples():
        (tokens,) = trim(tokenize([caption.caption]))
        photo = load_images([caption.path], recipe("synthetic", _smoke=False))
        with torch.no_grad():
            weights = model.attention(photo, tokens)[0]
        for thing, _, word, positions in named_words(tokens[0]):
            if thing not in boxes[caption.image_id]:
                continue
            x0, y0, x1, y1 = boxes[caption.image_id][thing]
            pixels = weights[positions].mean(0).repeat_interleave(16, 0).repeat_interleave(16, 1)  # 192 by 64
            row = found.query("image_id == @caption.image_id and thing == @thing and word == @word")
            expected = float(pixels[y0:y1, x0:x1].sum() / pixels.sum())
            assert np.isclose(row.attention, expected, atol=1e-5).any(), (caption.caption, word)
            assert np.allclose(row.area, (y1 - y0) * (x1 - x0) / (192 * 64))
            done += 1
    assert done > 20


def test_an_even_look_has_the_boxs_share_of_the_area(model, rendered, monkeypatch):
    def even(images, tokens, heads=False):
        return torch.full((*tokens.shape, *model.grid), 0.01)

    monkeypatch.setattr(model, "attention", even)
    found = attention_mass(model, rendered)
    assert np.allclose(found.attention, found.area)
    assert found.area.between(0, 1).all()


def test_word_evidence_compares_the_true_words_probability_with_its_own_photo_and_with_anothers(model, rendered):
    pair = rendered.drop_duplicates("pid").head(2)  # the other photo is always the same one
    found = word_evidence(model, pair, others=3)
    photos = load_images(list(pair.path), recipe("synthetic", _smoke=False))
    assert len(found) >= 6
    left = found.to_dict("records")
    for place, caption in enumerate(pair.itertuples()):
        (tokens,) = trim(tokenize([caption.caption]))
        for thing, kind, word, positions in named_words(tokens[0]):
            if len(positions) > 1:
                continue
            masked = tokens.clone()
            masked[0, positions] = MASK_ID
            with torch.no_grad():
                chance = model.word_logits(photos, masked.expand(2, -1))[:, positions[0]].softmax(1)
            own, other = chance[place], chance[1 - place]
            true, row = int(tokens[0, positions[0]]), left.pop(0)
            assert (row["pid"], row["thing"], row["kind"], row["word"]) == (caption.pid, thing, kind, word)
            assert row["with_image"] == pytest.approx(float(own[true]), rel=1e-4)
            assert row["without_image"] == pytest.approx(float(other[true]), rel=1e-4)
            assert row["bits"] == pytest.approx(float(torch.log2(own[true] / other[true])), abs=1e-3)
            assert row["right_with"] == (int(own.argmax()) == true)
    assert not left


def test_a_model_that_sees_no_photo_is_told_nothing_by_it(model, rendered, monkeypatch):
    pair = rendered.drop_duplicates("pid").head(2)
    monkeypatch.setattr(model, "image_tokens", lambda images: images.new_ones(len(images), 49, 128))
    blind = word_evidence(model, pair, others=2)
    assert np.allclose(blind.bits, 0, atol=1e-4)
    assert np.allclose(blind.with_image, blind.without_image, rtol=1e-4)
