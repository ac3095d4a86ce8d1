"""The released code's tiny model: its features, token features, word scores, losses and gradient norms, reproduced."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import irra_core as irra
from irra_core.released.checkpoint import released_name

FOLDER = Path(__file__).parent / "reference"
NUMBERS = np.load(FOLDER / "irra_reference.npz")
GRADIENT_NORMS = json.loads((FOLDER / "irra_reference.json").read_text())["grad_norms"]


def reference(name):
    """An array of the released model: inputs and results, integers as int64."""
    array = torch.from_numpy(NUMBERS[f"tiny_{name}"])
    return array.float() if array.is_floating_point() else array.long()


@pytest.fixture(scope="module")
def model():
    return irra.load_official(FOLDER / "irra_tiny.pth", image_size=(64, 32))


@pytest.fixture(scope="module")
def features(model):
    names = ("images", "caption_ids", "mlm_ids", "mlm_labels")
    return model(*(reference(name) for name in names))


@pytest.fixture(scope="module")
def losses(features):
    pids = reference("pids")
    return {
        "sdm": irra.sdm_loss(features.image, features.text, pids),
        "itc": irra.itc_loss(features.image, features.text),
        "cmpm": irra.cmpm_loss(features.image, features.text, pids),
        "id": irra.id_loss(features.image_logits, features.text_logits, pids),
        "mlm": irra.mlm_loss(features.word_logits, features.word_labels),
    }


def test_image_and_text_tokens_are_the_released_models(model):
    images, tokens = reference("images"), reference("caption_ids")
    torch.testing.assert_close(model.image_tokens(images), reference("image_tokens"), atol=1e-4, rtol=0)
    torch.testing.assert_close(model.text_tokens(tokens), reference("text_tokens"), atol=1e-4, rtol=0)


def test_global_features_are_the_released_models(model, features):
    images, tokens = reference("images"), reference("caption_ids")
    for image, text in ((features.image, features.text), (model.encode_image(images), model.encode_text(tokens))):
        torch.testing.assert_close(image, reference("image_features"), atol=1e-4, rtol=0)
        torch.testing.assert_close(text, reference("text_features"), atol=1e-4, rtol=0)


def test_word_scores_are_the_released_models(model):
    found = model.word_logits(reference("images"), reference("mlm_ids"))
    assert found.shape == (12, 77, 300)
    torch.testing.assert_close(found[:, :8], reference("mlm_scores"), atol=1e-4, rtol=0)


def test_trimmed_masked_captions_have_the_released_word_scores_too(model):
    found = model.word_logits(reference("images"), reference("mlm_ids")[:, :65])
    torch.testing.assert_close(found[:, :8], reference("mlm_scores"), atol=1e-4, rtol=0)


def test_without_padding_attention_the_word_scores_differ_from_the_released_ones(model):
    model.padding_attention = False
    try:
        found = model.word_logits(reference("images"), reference("mlm_ids"))
    finally:
        model.padding_attention = True
    assert (found[:, :8] - reference("mlm_scores")).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["sdm", "itc", "cmpm", "id", "mlm"])
def test_a_loss_is_the_released_codes(name, losses):
    assert losses[name].item() == pytest.approx(reference(f"{name}_loss").item(), rel=1e-4)


def test_the_share_of_words_guessed_right_is_the_released_codes(features):
    right = (features.word_logits.argmax(1) == features.word_labels).float().mean()
    assert right.item() == pytest.approx(reference("mlm_acc").item(), rel=1e-4)


def test_every_gradient_norm_is_the_released_codes(model, losses):
    model.zero_grad()
    (losses["sdm"] + losses["id"] + losses["mlm"]).backward(retain_graph=True)
    found = {released_name(name): parameter.grad.norm().item() for name, parameter in model.named_parameters()}
    assert found.keys() == GRADIENT_NORMS.keys()
    for name, norm in found.items():
        assert norm == pytest.approx(GRADIENT_NORMS[name], rel=1e-3), name
