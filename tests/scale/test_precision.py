"""A step in bf16: weights cast once give gradients as good as autocast's, and are as they were afterwards."""

from statistics import geometric_mean
from unittest.mock import patch

import numpy as np
import pytest
import torch
from pandas import DataFrame
from torch import nn

import irra_core as irra
from irra_core.batches import Batches
from irra_core.objective import Objective, autocast
from irra_core.scale import gradients as gradients_module
from irra_core.scale import precision as precision_module
from irra_core.scale.precision import is_adapted, weights_in
from irra_core.text import mask_tokens, tokenize, trim

pytestmark = pytest.mark.usefixtures("narrow")

CPU = torch.device("cpu")
CASES = {  # name → what the recipe says
    "irra": {"losses": "sdm+id+mlm"},
    "in pieces": {"losses": "sdm+id+mlm", "micro_batch": 5},
    "co": {"losses": "sdm+mlm", "interaction": "co"},
    "merged": {"losses": "sdm+id+mlm", "interaction": "merged"},
    "a frozen encoder": {"losses": "sdm+id+mlm", "frozen": "image"},
    "frozen encoders": {"losses": "sdm+id+mlm", "frozen": "both"},
    "adapters": {"losses": "sdm+id+mlm", "adapter_rank": 2},
}


def setting(case: str, seed: int = 0):
    """Recipe, model and batches of a case. With the usual temperature random features' errors differ by tens."""
    given = {"pretrained": "none", "batch_size": 16, "interaction_depth": 1, "temperature": 0.5, "seed": seed}
    recipe = irra.recipe(**given | CASES[case])
    colours = ["red", "green", "blue", "white", "black"]
    captions = [f"a person in a {colours[n % 5]} coat{' who carries a bag' * (n % 3 == 0)}" for n in range(32)]
    rows = [(n // 2, n, f"{n}.png", caption, "train") for n, caption in enumerate(captions)]
    table = DataFrame(rows, columns=["pid", "image_id", "path", "caption", "split"])
    shape = (32, 3, recipe.image_height, recipe.image_width)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    return recipe, irra.build_model(recipe, num_ids=16), Batches(table, pixels, tokenize(captions), recipe)


def gradient(case: str, precision: str, seed: int) -> dict[str, torch.Tensor]:
    recipe, model, batches = setting(case, seed)
    Objective(model, recipe, precision)(batches.at(0))
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def by_autocast(case: str, seed: int) -> dict[str, torch.Tensor]:
    def arithmetic(model, precision):
        return autocast(CPU, precision)

    with (
        patch.object(precision_module, "step_arithmetic", arithmetic),
        patch.object(gradients_module, "step_arithmetic", arithmetic),
    ):
        return gradient(case, "bf16", seed)


def distance(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    assert found.keys() == exact.keys()
    errors = torch.stack([(found[name] - exact[name]).norm() for name in exact])
    return float(errors.norm() / torch.stack([value.norm() for value in exact.values()]).norm())


def test_gradients_in_bf16_are_as_near_to_single_precisions_as_those_of_autocast():
    """One draw says little: between two arithmetics of the same precision, single ratios lie between 0.7 and 1.4."""
    ratios = {}
    for case in CASES:
        pairs = []
        for seed in range(4):
            exact, found = gradient(case, "fp32", seed), gradient(case, "bf16", seed)
            assert all(value.dtype == torch.float32 for value in found.values())
            ours, theirs = distance(found, exact), distance(by_autocast(case, seed), exact)
            assert ours > 1e-4
            pairs.append(ours / theirs)
        ratios[case] = geometric_mean(pairs)
    assert geometric_mean(ratios.values()) <= 1.1, ratios
    assert max(ratios.values()) <= 1.2, ratios
    assert ratios["adapters"] == 1  # their steps are autocast's


@pytest.mark.parametrize("case", ["irra", "adapters"])
def test_a_step_that_fails_leaves_the_model_as_it_was(case):
    recipe, model, batches = setting(case)
    weights, batch = dict(model.named_parameters()), batches.at(0)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    before = model.encode_text(batch.tokens)

    def fail(*_):
        assert is_adapted(model) or model.clip.visual.proj.dtype == torch.bfloat16
        raise RuntimeError("in the middle")

    handle = model.clip.visual.ln_post.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        Objective(model, recipe, "bf16")(batch)
    handle.remove()
    now = dict(model.named_parameters())
    assert now.keys() == weights.keys()
    assert all(now[name] is weights[name] for name in weights)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert torch.equal(model.encode_text(batch.tokens), before)


def test_weights_are_cast_within_and_those_that_the_scores_need_are_not():
    _, model, _ = setting("irra")
    names = ["clip.token_embedding.weight", "clip.positional_embedding", "clip.visual.positional_embedding"]
    names += ["clip.visual.class_embedding", "classifier.weight", "clip.visual.ln_post.weight"]  # LayerNorms on a CPU
    own = dict(model.named_parameters())
    with weights_in(model, torch.bfloat16):
        for path, module in model.named_modules():
            for name, weight in module._parameters.items():
                full = f"{path}.{name}"
                if full in names or isinstance(module, nn.LayerNorm):
                    assert weight is own[full]
        assert model.clip.visual.conv1.weight.dtype == torch.bfloat16
        linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module.bias is not None]
        assert {module.weight.dtype for module in linear if module is not model.classifier} == {torch.bfloat16}
        assert model.classifier.weight.dtype == torch.float32


def test_a_weights_copies_pass_their_gradient_on_in_its_own_precision():
    layer = nn.Linear(5, 3)
    states = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    with weights_in(layer, torch.bfloat16):
        layer(states).sum().backward()
    expected = states.float().sum(0).expand(3, 5)
    assert layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(layer.weight.grad, expected, rtol=0.01, atol=0.01)
    torch.testing.assert_close(layer.bias.grad, torch.full((3,), 4.0))


@pytest.mark.parametrize("kind", ["cross", "co", "merged"])
def test_lengths_rounded_for_a_gpu_change_no_feature_and_no_word(kind):
    recipe = irra.recipe(pretrained="none", losses="sdm+id+mlm", interaction=kind, interaction_depth=2)
    model = irra.build_model(recipe, num_ids=4).double().eval()
    tokens = tokenize(["a man in a red coat", "a woman who carries a bag and wears a hat", "blue shoes"])
    draw = torch.Generator().manual_seed(0)
    given = (tokens, *mask_tokens(tokens, draw))
    images = torch.randn(3, 3, recipe.image_height, recipe.image_width, dtype=torch.float64, generator=draw)
    exact, rounded = trim(*given), trim(*given, device=torch.device("cuda"))
    assert exact[0].shape[1] % 8
    assert rounded[0].shape[1] == -(-exact[0].shape[1] // 8) * 8
    full = torch.full((2, 77), 5).index_fill(1, torch.tensor([76]), 49407)
    assert trim(full, device=torch.device("cuda"))[0].shape[1] == 77
    found = [model(images, *cut) for cut in (exact, rounded)]
    for name in ("image", "text", "image_logits", "text_logits", "word_logits"):
        torch.testing.assert_close(*(getattr(each, name) for each in found), rtol=1e-12, atol=1e-12)
    assert torch.equal(*(each.word_labels for each in found))
