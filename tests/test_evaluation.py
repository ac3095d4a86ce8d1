"""Evaluation: the scores of a table of features, their intervals, and what a reader sees of them."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from pandas import DataFrame

import irra_core as irra
from irra_core.evaluation import (
    encode_images,
    encode_texts,
    gain,
    known_ceiling,
    known_twins,
    rank_features,
    readable,
    scores,
)
from irra_core.images import image_array
from irra_core.synthetic.people import near_twins

QUERIES = DataFrame({"pid": [1, 1, 2, 3], "image_id": [0, 0, 1, 2], "caption": list("abcd")})
PHOTOS = DataFrame({"pid": [1, 2, 3], "image_id": [0, 1, 2]})


def found(text, hard=()):
    return rank_features(torch.eye(3), torch.tensor(text), PHOTOS, QUERIES, hard)


TEXT = [[1.0, 0.0, 0.0], [0.4, 0.5, 0.0], [0.0, 1.0, 0.0], [0.9, 0.8, 0.7]]  # ranks 1, 2, 1, 3


def test_a_caption_searches_all_photos_and_a_photo_all_captions():
    evaluation = found(TEXT)
    assert evaluation.text_to_image["rank"].tolist() == [1, 2, 1, 3]
    assert evaluation.image_to_text["rank"].tolist() == [1, 1, 1]
    metrics = evaluation.metrics
    assert (metrics["queries"], metrics["images"], metrics["identities"]) == (4, 3, 3)
    assert metrics["text_to_image"]["R1"][0] == 50.0
    assert metrics["text_to_image"]["mAP"][0] == pytest.approx(100 * (1 + 1 / 2 + 1 + 1 / 3) / 4)


def test_hard_negatives_are_scored_apart():
    metrics = found(TEXT, hard=[3]).metrics
    assert metrics["hard_negatives"]["queries"] == 1
    assert metrics["hard_negatives"]["text_to_image"]["R1"] == (0.0, 0.0, 0.0)
    assert "hard_negatives" not in found(TEXT).metrics
    assert "text to image, hard negatives" in found(TEXT, hard=[3]).table().index


def test_the_gain_is_paired_and_refuses_other_queries():
    after, before = found(TEXT).text_to_image, found([[0.0, 1.0, 0.0]] * 4).text_to_image
    difference = gain(after, before)["R1"]
    assert difference[0] == pytest.approx(scores(after)["R1"][0] - scores(before)["R1"][0])
    assert gain(after, after)["mAP"] == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="different queries"):
        gain(after, before.iloc[:2])


def test_the_table_for_the_eye_has_value_and_interval():
    shown = readable(found(TEXT).table())
    assert shown.loc["text to image", "R1 (%)"].startswith("50.0 [")
    assert "R1 (%)" in found(TEXT)._repr_html_()


@pytest.fixture(scope="module")
def model():
    return irra.build_model(irra.recipe(pretrained="none"), 3)


def test_features_do_not_depend_on_the_batch_and_have_length_one(model, annotations):
    captions = [*list(annotations.caption[:7]), "short", "a much longer sentence about a person who walks by slowly"]
    whole, pieces = encode_texts(model, captions), encode_texts(model, captions, batch_size=2)
    assert torch.allclose(whole, pieces, atol=1e-5)
    one = torch.nn.functional.normalize(model.encode_text(irra.tokenize(captions[-1:])), dim=1)
    assert torch.allclose(whole[-1:], one, atol=1e-5)
    assert torch.allclose(whole.norm(dim=1), torch.ones(len(captions)))
    pixels = image_array(list(annotations.path[:5]), 96, 32).pixels
    expected = torch.nn.functional.normalize(
        model.encode_image(irra.load_images(annotations.path[:5], irra.recipe(pretrained="none"))), dim=1
    )
    assert torch.allclose(encode_images(model, pixels, batch_size=2), expected, atol=1e-5)


def test_of_nothing_there_are_features_of_the_right_width(model):
    """A process of a team that has no share of few queries."""
    none = np.zeros((0, 3, *model.image_size), dtype=np.uint8)
    width = encode_texts(model, ["a person"]).shape[1]
    assert encode_texts(model, []).shape == encode_images(model, none).shape == (0, width)


def test_features_leave_their_device_once_however_many_batches_they_came_in(model, monkeypatch):
    photos = np.random.default_rng(0).integers(0, 256, (5, 3, *model.image_size), np.uint8)
    cpu, left = torch.Tensor.cpu, []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: left.append(len(tensor)) or cpu(tensor))
    encode_images(model, photos, batch_size=2)
    encode_texts(model, ["a man", "a woman in red", "a dog"], batch_size=1)
    assert left == [5, 3]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_features_from_the_gpu_are_the_cpus_in_order(model):
    photos = np.random.default_rng(0).integers(0, 256, (300, 3, *model.image_size), np.uint8)
    captions = [f"a person {'in a red coat ' * (n % 7)}{n}" for n in range(300)]
    near = copy.deepcopy(model).cuda()
    for encode, given in ((encode_images, photos), (encode_texts, captions)):
        found = encode(near, given, batch_size=16, precision="fp32")
        assert torch.allclose(found, encode(model, given, batch_size=16), atol=1e-3)


def test_encoding_leaves_the_model_as_it_was(model, annotations):
    model.train()
    features = encode_texts(model, list(annotations.caption[:2]))
    assert model.training
    assert not features.is_inference()


def test_pixels_given_or_decoded_give_the_same_scores(model, annotations):
    pixels = image_array(list(annotations.path), 96, 32).pixels
    given, decoded = irra.evaluate(model, annotations, pixels=pixels), irra.evaluate(model, annotations)
    assert given.metrics == decoded.metrics
    assert np.array_equal(given.text_to_image.AP, decoded.text_to_image.AP)


def test_a_split_without_rows_is_named(model, annotations):
    with pytest.raises(ValueError, match="split 'test' has no rows: the table has train"):
        irra.evaluate(model, annotations[annotations.split == "train"])


def test_a_model_with_another_vocabulary_is_refused(annotations):
    path = Path(__file__).parent / "reference" / "irra_tiny.pth"
    with pytest.raises(ValueError, match="vocabulary has 300 words"):
        irra.evaluate(irra.load_official(path, (64, 32)), annotations)


def test_twins_and_ceiling_are_known_of_rendered_people_alone(annotations, tmp_path):
    recipe = irra.recipe()
    assert known_twins(annotations, recipe) == set()
    assert known_ceiling(annotations, recipe) is None
    irra.make_synthetic(tmp_path, people=40)
    rendered = irra.load_annotations("synthetic", tmp_path)
    assert known_twins(rendered, recipe) == {pid for pid, twins in near_twins(rendered).items() if twins} != set()
    assert known_ceiling(rendered, recipe) == irra.synthetic_ceiling(rendered)
