"""A model that reads more tokens than CLIP: its positions, checkpoints, training, evaluation and gallery."""

import numpy as np
import pytest
import torch

import irra_core as irra
from irra_core.analysis.words import token_counts
from irra_core.backbone import build_model, stretched
from irra_core.text import tokenize
from irra_core.training import train

pytestmark = pytest.mark.usefixtures("narrow")
LONG = "and a bag " * 40  # 120 tokens, then what tells the people apart


def test_positions_are_stretched_linearly_and_keep_a_ramp():
    ramp = torch.stack([torch.arange(77.0), torch.full((77,), 5.0)], 1)
    found = stretched(ramp, 168)
    places = ((np.arange(168) + 0.5) * 77 / 168 - 0.5).clip(0, 76)  # centres of equal parts of the same line
    np.testing.assert_allclose(found[:, 0].numpy(), np.interp(places, np.arange(77), np.arange(77)), atol=1e-4)
    np.testing.assert_allclose(found[:, 1].numpy(), 5.0, atol=1e-6)
    assert torch.equal(stretched(ramp, 77), ramp)


def test_pretrained_weights_of_77_tokens_fill_a_model_of_168(tiny, tmp_path):
    short = build_model(tiny, 10, device="cpu")
    irra.save_checkpoint(short, tiny, tmp_path / "short.safetensors")
    long = build_model(tiny.replace(pretrained=str(tmp_path / "short.safetensors"), text_length=168), 10, device="cpu")
    found, given = long.clip.state_dict(), short.clip.state_dict()
    assert torch.equal(found.pop("positional_embedding"), stretched(given.pop("positional_embedding"), 168))
    assert all(torch.equal(found[name], given[name]) for name in given)


@pytest.mark.filterwarnings("error:.*captions have more than")
@pytest.mark.parametrize("padding", [False, True], ids=["up to the end token", "padding_attention"])
def test_a_long_model_trains_evaluates_and_comes_back_from_its_checkpoint(padding, tiny, annotations, tmp_path):
    recipe = tiny.replace(text_length=168, max_steps=2, precision="fp32", padding_attention=padding)
    table = annotations.assign(caption=LONG + annotations.caption)
    assert (token_counts(table.caption) > 77).all()
    list(train(recipe, table, tmp_path / "run"))
    model, kept = irra.load_checkpoint(tmp_path / "run" / "weights.safetensors", device="cpu")
    assert (kept.text_length, model.clip.context_length) == (168, 168)
    queries = table[table.split == "test"].caption.tolist()
    features = irra.evaluation.encode_texts(model, queries, precision="fp32")
    expected = torch.cat([model.encode_text(tokenize([caption], length=168)) for caption in queries])
    torch.testing.assert_close(features, torch.nn.functional.normalize(expected), atol=1e-5, rtol=0)
    assert len(torch.unique(features, dim=0)) > 1  # what follows the 77th token is read
    gallery = irra.Gallery.build(model, table[table.split == "test"])
    gallery.save(tmp_path / "gallery")
    searched = irra.Gallery.load(tmp_path / "gallery", model).search(queries[0], k=3)
    image = irra.evaluation.encode_images(model, irra.images.image_array(searched.path, 96, 32).pixels)
    torch.testing.assert_close(torch.tensor(searched.score), (image @ features[0]).double(), atol=1e-4, rtol=0)


def test_a_released_file_of_another_text_length_is_read(tiny, tmp_path):
    recipe = tiny.replace(text_length=100)
    model = build_model(recipe, 10, device="cpu")
    irra.save_official(model, tmp_path / "long.pth")
    again = irra.load_official(tmp_path / "long.pth", (96, 32), 8, device="cpu")
    assert torch.equal(again.clip.positional_embedding, model.clip.positional_embedding)
    assert again.clip.context_length == 100


def test_token_counts_are_those_of_the_untruncated_captions():
    captions = ["", "a man", "a " * 75, "a " * 76, "a " * 600]
    assert token_counts(captions).tolist() == [2, 4, 77, 78, 512]


def test_a_recipe_of_77_tokens_has_the_key_it_had():
    assert "text_length" not in irra.recipe().key()
    assert "text_length" in irra.recipe(text_length=168).key()
    with pytest.raises(ValueError, match="text_length' is 60: accepted is at least 77"):
        irra.recipe(text_length=60)
