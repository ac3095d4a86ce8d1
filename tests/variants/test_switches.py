"""Each switch from a later paper through training: resumed, saved, loaded, scored and searched."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pandas import DataFrame
from safetensors.torch import load_file

import irra_core as irra
from irra_core import runs
from irra_core.batches import Batches
from irra_core.evaluation import encode_images, encode_texts
from irra_core.model import IRRA
from irra_core.scale.failures import replay
from irra_core.training import build_optimiser, train
from irra_core.variants.joined import parts
from irra_core.variants.token_selection import HEAD_LR, TokenSelection

pytestmark = pytest.mark.usefixtures("narrow")

SWITCHES = {  # name → what the recipe says
    "identity sampler": {"losses": "sdm", "sampler": "identity", "per_identity": 2},
    "noisy pairs": {"losses": "sdm", "shuffled_captions": 0.5},
    "word augmentation": {"losses": "sdm", "word_augmentation": 0.4},
    "ibm": {"losses": "ibm"},
    "tbps": {"losses": "nitc+ritc", "learned_temperature": True, "temperature": 0.05, "word_deletion": 0.2},
    "tse": {"losses": "tal+tse"},
    "layers": {"losses": "tal+tse", "token_selection": "layers"},
}
SELECTING = ("tse", "layers")


def switched(tiny, name):
    return tiny.replace(interaction_depth=1, **SWITCHES[name])


@pytest.fixture(scope="module")
def whole(narrow, annotations, tmp_path_factory):
    """Switch → recipe, folder and rows of a run that nothing interrupted, trained when it is first asked for."""
    steps = {"batch_size": 8, "epochs": 2, "max_steps": 5, "evaluate_every": 2, "erase_probability": 0.2}
    found = {}

    def run(name):
        if name not in found:
            recipe = irra.recipe(pretrained="none", **steps, **SWITCHES[name])
            folder = tmp_path_factory.mktemp("runs") / "whole"
            found[name] = recipe, folder, list(train(recipe, annotations, folder))
        return found[name]

    return run


@pytest.mark.parametrize("name", SWITCHES)
def test_an_interrupted_run_ends_bit_for_bit_where_the_whole_run_does(whole, annotations, tmp_path, name):
    recipe, folder, rows = whole(name)
    first = next(train(recipe, annotations, tmp_path / "cut"))
    assert [first, *train(recipe, annotations, tmp_path / "cut")] == rows
    expected, got = (load_file(each / runs.WEIGHTS) for each in (folder, tmp_path / "cut"))
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[weight], expected[weight]) for weight in expected)
    assert np.isfinite([value for row in rows for value in row.values()]).all()


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_changes_the_first_losses(whole, annotations, tmp_path, name):
    """Or, for a loss, is named in the row."""
    recipe, _, rows = whole(name)
    changed = {field: value for field, value in SWITCHES[name].items() if field != "losses"}
    for field in changed:
        before = irra.recipes.Recipe.__dataclass_fields__[field].default
        if field == "per_identity" or (field, before) == ("temperature", 0.02):
            continue
        fields = {field: before} | ({"per_identity": 4} if field == "sampler" else {})
        plain = recipe.replace(max_steps=2, select_on="last", **fields)
        (row,) = train(plain, annotations, tmp_path / field)
        assert row["loss"] != rows[0]["loss"], field
    assert set(recipe.loss_names) <= set(rows[0])


@pytest.mark.parametrize("name", ["tbps", *SELECTING])
def test_a_loaded_checkpoint_scores_as_the_run_did(whole, annotations, name):
    _, folder, _ = whole(name)
    model, kept = irra.load_checkpoint(folder / runs.WEIGHTS)
    assert kept == runs.load_run(folder)["recipe"]
    found = irra.evaluate(model, annotations, "test").metrics
    metrics = json.loads((folder / "metrics.json").read_text())
    for direction in ("text_to_image", "image_to_text"):
        for score, values in found[direction].items():
            assert metrics[direction][score] == pytest.approx(values), score


@pytest.mark.parametrize("name", SELECTING)
def test_a_gallery_ranks_by_the_mean_of_both_cosines(whole, annotations, tmp_path, name):
    _, folder, _ = whole(name)
    model, _ = irra.load_checkpoint(folder / runs.WEIGHTS)
    test = annotations[annotations.split == "test"]
    sentence = test.caption.iloc[0]
    irra.Gallery.build(model, test).save(tmp_path / "gallery")
    ranked = irra.Gallery.load(tmp_path / "gallery", model).search(sentence, k=8)
    pixels = irra.images.image_array(list(test.path), 96, 32).pixels
    images, texts = encode_images(model, pixels), encode_texts(model, [sentence])
    assert images.shape[1] == texts.shape[1] == 3 * 64
    halves = [F.normalize(a) @ F.normalize(b).T for a, b in zip(parts(images), parts(texts), strict=True)]
    expected = dict(zip(test.path, ((halves[0] + halves[1]) / 2)[:, 0].tolist(), strict=True))
    assert list(ranked.path) == sorted(expected, key=expected.get, reverse=True)
    assert dict(zip(ranked.path, ranked.score, strict=True)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", SELECTING)
def test_the_heads_of_token_selection_learn_at_their_own_rate(tiny, name):
    recipe = switched(tiny, name).replace(lr=1e-5)
    model = irra.build_model(recipe, 10)
    rates = {}
    for group in build_optimiser(model, recipe).param_groups:
        rates |= dict.fromkeys(map(id, group["params"]), (group["lr"], group["weight_decay"]))
    for weight, parameter in model.named_parameters():
        rate, decay = rates[id(parameter)]
        assert (rate == pytest.approx(HEAD_LR)) == weight.startswith("selection."), weight
        assert (decay == 0) == weight.endswith("bias")
    own = sum(parameter.numel() for parameter in model.selection.parameters())
    assert own == sum(parameter.numel() for parameter in TokenSelection(64).parameters())
    assert sum(p.numel() for p in model.parameters()) - own == sum(p.numel() for p in model.clip.parameters())


def test_a_model_with_token_selection_has_the_global_features_of_one_without(tiny):
    model = irra.build_model(tiny.replace(losses="tal+tse+id+mlm", interaction_depth=1), 10).eval()
    images, tokens = torch.randn(3, 3, 96, 32), irra.tokenize(["a man", "a woman in a red coat", ""])[:, :12]
    both = model.encode_image(images), model.encode_text(tokens)
    model.selection = None
    plain = model.encode_image(images), model.encode_text(tokens)
    for joined, whole_feature in zip(both, plain, strict=True):
        torch.testing.assert_close(parts(joined)[0], whole_feature, rtol=1e-4, atol=1e-5)


def test_with_mlm_the_features_are_those_without_it(tiny):
    model: IRRA = irra.build_model(tiny.replace(losses="tal+tse+id+mlm", interaction_depth=1), 10).eval()
    images, tokens = torch.randn(3, 3, 96, 32), irra.tokenize(["a man", "a woman in a red coat", "a child"])[:, :12]
    labels = torch.zeros_like(tokens)
    labels[:, 1] = tokens[:, 1]
    found = model(images, tokens, tokens, labels)
    torch.testing.assert_close(found.image, model.encode_image(images))
    torch.testing.assert_close(found.text, model.encode_text(tokens))
    logits = model.classifier(torch.cat([parts(found.image)[0], parts(found.text)[0]]))
    torch.testing.assert_close(torch.cat([found.image_logits, found.text_logits]), logits)


def test_fewer_tokens_are_selected_as_training_goes_on(tiny, monkeypatch):
    model, ratios = irra.build_model(switched(tiny, "layers"), 10), []
    real = TokenSelection.of_image
    monkeypatch.setattr(TokenSelection, "of_image", lambda s, t, a, ratio: ratios.append(ratio) or real(s, t, a, ratio))
    for elapsed in (0.0, 0.5, 1.0):
        model.encode_image(torch.randn(2, 3, 96, 32), elapsed)
    assert ratios == pytest.approx([0.65, (0.65 * 0.5) ** 0.5, 0.5])


def test_the_share_of_training_that_is_done_is_that_of_all_epochs(tiny):
    rows = [(n // 2, n, f"{n}.png", "a man", "train") for n in range(20)]
    table = DataFrame(rows, columns=["pid", "image_id", "path", "caption", "split"])
    batches = Batches(table, np.zeros((20, 3, 96, 32), np.uint8), irra.tokenize(table.caption), tiny)
    assert [batches.at(step).elapsed for step in (0, 3, 5)] == [0.0, 0.5, 5 / 6]  # 2 epochs of 3 steps


def test_the_models_to_compare_with_have_no_head_of_random_weights(whole, annotations):
    recipe, folder, _ = whole("tse")
    plain = irra.build_model(recipe.replace(losses="tal"), 10)
    expected = irra.evaluate(plain, annotations, "test").metrics["text_to_image"]
    metrics = json.loads((folder / "metrics.json").read_text())
    for score, values in expected.items():
        assert metrics["untrained"][score] == pytest.approx(values), score


def test_a_learned_temperature_is_learned_and_stays_above_that_of_clip(tiny, annotations, tmp_path):
    recipe = switched(tiny, "tbps").replace(temperature=0.0101, lr=0.1, bias_lr_factor=0.0, select_on="last")
    rows = list(train(recipe, annotations, tmp_path / "run"))
    learned = load_file(tmp_path / "run" / runs.WEIGHTS)["log_scale"]
    assert learned != pytest.approx(-np.log(0.0101), abs=1e-3)
    assert np.isfinite([row["loss"] for row in rows]).all()


def test_a_step_of_a_schedule_is_replayed_where_it_stopped(tiny, annotations, tmp_path):
    recipe = switched(tiny, "layers").replace(lr=1e30, max_steps=4)
    with pytest.raises(FloatingPointError) as error:
        list(train(recipe, annotations, tmp_path / "run"))
    assert str(replay(tmp_path / "run")) in str(error.value)


def test_the_released_format_has_no_token_selection_and_no_temperature(tiny, tmp_path):
    with pytest.raises(ValueError, match="no token selection"):
        irra.save_official(irra.build_model(switched(tiny, "tse"), 10), tmp_path / "model.pth")
    model = irra.build_model(switched(tiny, "tbps"), 10)
    irra.save_official(model, tmp_path / "model.pth")
    again = irra.load_official(tmp_path / "model.pth", (96, 32), 8)
    assert again.log_scale is None
    assert torch.equal(again.clip.text_projection, model.clip.text_projection)
