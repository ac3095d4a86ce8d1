"""Encoders of which less learns: what is frozen stays; what adapters learn has a low rank and merges whole."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import irra_core as irra
from irra_core import runs
from irra_core.batches import Batch
from irra_core.objective import Objective
from irra_core.released.checkpoint import save_official
from irra_core.scale.failures import replay
from irra_core.scale.summary import summary
from irra_core.training import build_optimiser, factor_and_decay, train
from irra_core.variants.adapters import MATRICES, is_adapter, merge, merged

IMAGES = torch.randn(3, 3, 96, 32, generator=torch.Generator().manual_seed(0))
TOKENS = torch.tensor([[49406, 320, 518, 49407], [49406, 530, 49407, 0], [49406, 736, 1045, 49407]])


def built(**changes):
    return irra.build_model(irra.recipe(pretrained="none", **changes), 5)


def moved(**changes):
    """A model whose adapters have learnt something, in double precision."""
    model = built(**changes).double()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith(".up"):
            parameter.data = torch.randn(parameter.shape, dtype=torch.float64, generator=generator) * 0.1
    return model


def side(name):
    """The encoder that a parameter belongs to; None for the parts behind them."""
    if not name.startswith("clip."):
        return None
    return "image" if name.startswith("clip.visual.") else "text"


@pytest.mark.parametrize("frozen", ["none", "image", "text", "both"])
def test_every_weight_but_a_frozen_encoders_learns_without_adapters(frozen):
    for name, parameter in built(frozen=frozen).named_parameters():
        kept = side(name) is not None and frozen in (side(name), "both")
        assert parameter.requires_grad == (not kept), name


@pytest.mark.parametrize(("frozen", "adapted"), [("none", {"image", "text"}), ("image", {"text"}), ("text", {"image"})])
def test_with_adapters_nothing_else_of_the_encoders_learns_and_a_frozen_one_has_none(frozen, adapted):
    model = built(frozen=frozen, adapter_rank=4)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    inside = {name for name in learning if side(name)}
    assert {side(name) for name in inside} == adapted
    assert all(name.endswith((".up", ".down")) for name in inside)
    assert len(inside) == len(adapted) * 3 * len(MATRICES) * 2  # three blocks, two factors a matrix
    assert learning - inside == {name for name, _ in model.named_parameters() if side(name) is None}


def test_adapters_change_nothing_before_they_learn():
    plain, adapted = built(), built(adapter_rank=4)
    assert torch.equal(adapted.encode_image(IMAGES), plain.encode_image(IMAGES))
    assert torch.equal(adapted.encode_text(TOKENS), plain.encode_text(TOKENS))


def test_an_adapted_model_is_the_plain_one_with_each_factor_pair_multiplied_by_hand():
    adapted, plain = moved(adapter_rank=3), built().double()
    values = {name: value.numpy() for name, value in adapted.state_dict().items()}
    for name in plain.state_dict():
        path, _, last = name.rpartition(".")
        inner = f"{path}.parametrizations.{last}"
        if f"{inner}.original" in values:
            up, down = values[f"{inner}.0.up"], values[f"{inner}.0.down"]
            change = sum(np.outer(up[:, place], down[place]) for place in range(3))
            plain.state_dict()[name].copy_(torch.from_numpy(values[f"{inner}.original"] + change))
    images = IMAGES.double()
    torch.testing.assert_close(adapted.encode_image(images), plain.encode_image(images), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(adapted.encode_text(TOKENS), plain.encode_text(TOKENS), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(adapted.encode_image(images), built().double().encode_image(images))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_merged_weights_give_the_adapted_models_features_bit_for_bit(precision):
    adapted, plain = moved(adapter_rank=3).float(), built()
    state = merged(adapted)
    assert state.keys() == plain.state_dict().keys()
    plain.load_state_dict(state)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        assert torch.equal(adapted.encode_image(IMAGES), plain.encode_image(IMAGES))
        assert torch.equal(adapted.encode_text(TOKENS), plain.encode_text(TOKENS))


def test_merging_in_place_leaves_the_plain_models_names_and_the_same_features():
    model = moved(adapter_rank=3)
    before = model.encode_image(IMAGES.double())
    merge(model)
    assert model.state_dict().keys() == built().state_dict().keys()
    assert torch.equal(model.encode_image(IMAGES.double()), before)


def test_an_adapted_model_is_written_for_the_released_code_as_the_merged_one(tmp_path):
    model = moved(adapter_rank=3).float()
    save_official(model, tmp_path / "adapted.pth")
    merge(model)
    save_official(model, tmp_path / "merged.pth")
    found, expected = (torch.load(tmp_path / f"{name}.pth")["model"] for name in ("adapted", "merged"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_adapters_learn_as_fast_as_new_parts_and_frozen_weights_are_not_with_the_optimiser():
    recipe = irra.recipe(pretrained="none", adapter_rank=4, frozen="text", losses="sdm")
    model = irra.build_model(recipe, 5)
    (group,) = build_optimiser(model, recipe).param_groups
    assert (group["lr"], group["weight_decay"]) == (recipe.lr * recipe.new_lr_factor, recipe.weight_decay)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(group["params"]) == len(names) == 3 * len(MATRICES) * 2
    assert all(is_adapter(name) for name in names)
    assert factor_and_decay("clip.visual.proj", recipe)[0] == 1.0


def kept_bytes(model: torch.nn.Module) -> tuple[int, tuple[torch.Tensor, torch.Tensor]]:
    """Bytes that autograd keeps between the forward pass and the gradient beside the weights, and both features."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = (model.encode_image(IMAGES), model.encode_text(TOKENS))
        return sum(size for place, size in storages.items() if place not in own), found


def test_a_frozen_encoder_keeps_nothing_for_a_gradient():
    all_bytes, _ = kept_bytes(built(losses="sdm"))
    image_frozen, (image, text) = kept_bytes(built(losses="sdm", frozen="image"))
    text_frozen, _ = kept_bytes(built(losses="sdm", frozen="text"))
    assert image.grad_fn is None
    assert text.grad_fn is not None
    assert image_frozen + text_frozen == all_bytes
    assert kept_bytes(built(losses="sdm+id", frozen="both"))[0] == 0


@pytest.mark.parametrize("rank", [128, 400])
def test_a_rank_that_is_not_low_is_refused(rank):
    with pytest.raises(ValueError, match=rf"adapter_rank {rank}: .*matrices of 384×128, .*rank below 128"):
        built(adapter_rank=rank)


@pytest.fixture
def adapted(tiny):
    return tiny.replace(adapter_rank=2, frozen="text", lr=1e-2)


def test_an_interrupted_run_with_adapters_ends_bit_for_bit_where_the_whole_run_does(adapted, annotations, tmp_path):
    whole = list(train(adapted, annotations, tmp_path / "whole"))
    first = next(train(adapted, annotations, tmp_path / "cut"))
    state = load_file(tmp_path / "cut" / runs.STATE)
    assert any(name.endswith(".up") and value.any() for name, value in state.items())  # not merged while it goes on
    assert [first, *train(adapted, annotations, tmp_path / "cut")] == whole
    expected, got = (load_file(tmp_path / name / runs.WEIGHTS) for name in ("whole", "cut"))
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_what_a_run_with_adapters_keeps_is_a_plain_model_with_changes_of_low_rank(adapted, annotations, tmp_path):
    list(train(adapted, annotations, tmp_path / "run"))
    model, recipe = irra.load_checkpoint(tmp_path / "run" / runs.WEIGHTS)
    assert recipe == adapted
    start = irra.build_model(adapted.replace(adapter_rank=0, frozen="none"), 10).state_dict()
    changed = set()
    for name, value in model.state_dict().items():
        change = (value.double() - start[name].double()).numpy()
        if side(name) == "image" and name.endswith(MATRICES):
            sizes = np.linalg.svd(change, compute_uv=False)
            assert sizes[0] > 1e-3, name
            assert sizes[2] < 1e-5 * sizes[0] + 1e-6, name
            changed.add(name)
        elif side(name):
            assert not change.any(), name
    assert len(changed) == 3 * len(MATRICES)
    test = annotations[annotations.split == "test"]
    kept = runs.load_run(tmp_path / "run")["metrics"]["text_to_image"]
    found = irra.evaluate(model, test, "test").metrics["text_to_image"]
    assert {name: list(values) for name, values in found.items()} == kept


@pytest.mark.parametrize("frozen", ["image", "text", "both"])
def test_a_frozen_encoder_ends_as_it_began_and_the_rest_does_not(frozen, tiny, annotations, tmp_path):
    recipe = tiny.replace(frozen=frozen, max_steps=2, select_on="last")
    list(train(recipe, annotations, tmp_path / "run"))
    start = irra.build_model(recipe, 10).state_dict()
    for name, value in irra.load_checkpoint(tmp_path / "run" / runs.WEIGHTS)[0].state_dict().items():
        kept = (side(name) is not None and frozen in (side(name), "both")) or name == "clip.logit_scale"
        assert torch.equal(value, start[name]) == kept, name


def test_a_run_says_how_many_of_its_parameters_were_trained(adapted, annotations, tmp_path):
    recipe = adapted.replace(max_steps=1, select_on="last", losses="itc")
    list(train(recipe, annotations, tmp_path / "run"))
    machine = json.loads((tmp_path / "run" / "machine.json").read_text())
    sizes = [(3 * 128, 128), (128, 128), (512, 128), (128, 512)]  # of a block of the small CLIP
    assert machine["trainable_parameters"] == 3 * sum(2 * sum(size) for size in sizes)
    plain = irra.build_model(recipe.replace(adapter_rank=0, frozen="none"), 10)
    assert machine["parameters"] == sum(math.prod(parameter.shape) for parameter in plain.parameters())
    assert f"trained: {machine['trainable_parameters'] / 1e6:.2f} M of" in summary(tmp_path / "run")


def test_a_run_with_adapters_that_explodes_computes_the_same_loss_again(adapted, annotations, tmp_path):
    recipe = adapted.replace(lr=1e30, max_steps=None, epochs=5)
    with pytest.raises(FloatingPointError) as error:
        list(train(recipe, annotations, tmp_path / "run"))
    assert str(replay(tmp_path / "run")) in str(error.value)


@pytest.mark.parametrize("changes", [{"adapter_rank": 2}, {"frozen": "image"}], ids=["adapters", "frozen"])
def test_a_step_is_computed_again_from_what_was_kept_unmerged_with_the_gradient_of_what_learns(changes, tmp_path):
    recipe = irra.recipe(pretrained="none", **changes)
    model = moved(**changes).float()
    irra.save_checkpoint(model, recipe, tmp_path / "kept.safetensors", merge=False)
    again, _ = irra.load_checkpoint(tmp_path / "kept.safetensors")
    for each in (model, again):
        loss_and_gradients(each, recipe)
    found, expected = (
        {name: parameter.grad for name, parameter in each.named_parameters() if parameter.requires_grad}
        for each in (again, model)
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


@pytest.mark.parametrize(
    "changes",
    [{"adapter_rank": 2}, {"frozen": "image"}, {"frozen": "text", "adapter_rank": 2}, {"frozen": "both"}],
    ids=str,
)
def test_a_batch_in_pieces_gives_what_learns_the_gradient_of_the_whole(changes):
    recipe = irra.recipe(pretrained="none", **changes)
    models = [moved(**changes) for _ in range(2)]
    whole, pieces = (
        loss_and_gradients(model, recipe.replace(micro_batch=size)) for model, size in zip(models, (None, 2))
    )
    torch.testing.assert_close(pieces, whole, rtol=1e-10, atol=0)
    for (name, found), (_, expected) in zip(*(model.named_parameters() for model in reversed(models)), strict=True):
        assert (found.grad is None) == (not found.requires_grad), name
        if found.grad is not None:
            torch.testing.assert_close(found.grad, expected.grad, rtol=1e-8, atol=1e-12)


def loss_and_gradients(model, recipe):
    """The loss parts of one batch of five pairs; gradients are left in the model."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(5, 3, 96, 32, generator=generator).to(model.clip.visual.proj.dtype)
    tokens = torch.cat([TOKENS, TOKENS[:2]])
    labels = torch.where((tokens > 0) & (tokens < 49406), tokens, 0)
    pids = torch.tensor([0, 1, 2, 0, 4])
    batch = Batch(
        images, tokens, tokens.masked_fill(labels != 0, 49405), labels, pids, torch.arange(5), pids, (labels != 0).sum()
    )
    return Objective(model, recipe, "fp32")(batch)


def test_half_precision_weights_learn_through_adapters(adapted, annotations, tmp_path):
    recipe = adapted.replace(precision="fp16", max_steps=2, adam_eps=1e-3, lr=1e-3, select_on="last")
    (row,) = train(recipe, annotations, tmp_path / "run")
    assert np.isfinite(row["loss"])
