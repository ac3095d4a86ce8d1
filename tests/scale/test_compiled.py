"""Compiled blocks against the same blocks run as they are written."""

import numpy as np
import pytest
import torch
from torch import nn

import irra_core as irra
from irra_core.batches import Batches
from irra_core.objective import Objective
from irra_core.scale.compiled import compile_blocks
from irra_core.text import tokenize
from irra_core.training import build_optimiser, optimise
from irra_core.transformer import ResidualAttentionBlock


def steps(recipe, annotations, compiled):
    """Loss parts and gradient norms of four steps, and features of sentences between them."""
    table = annotations[annotations.split == "train"].reset_index(drop=True)
    pixels = np.random.default_rng(0).integers(0, 256, (100, 3, 96, 32), dtype=np.uint8)
    model = irra.build_model(recipe, table.pid.nunique(), device="cpu")
    if compiled:
        compile_blocks(model, backend="aot_eager")
    batches = Batches(table, pixels, tokenize(table.caption.tolist()), recipe, torch.device("cpu"))
    objective, optimiser, found = Objective(model, recipe, "fp32"), build_optimiser(model, recipe), []
    for step in range(4):
        found.append(optimise(objective, optimiser, batches.at(step)))
        with torch.no_grad():
            found.append(model.eval().encode_text(tokenize(["a red coat", "a man with a blue bag"])).flatten())
    return torch.cat(found)


@pytest.mark.parametrize("losses", ["sdm+id", "itc+mlm"])
def test_compiled_blocks_take_the_same_steps(losses, annotations):
    recipe = irra.recipe("synthetic", pretrained="none", losses=losses, batch_size=8, precision="fp32")
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    found = steps(recipe, annotations, compiled=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
    torch.testing.assert_close(found, steps(recipe, annotations, compiled=False), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wanted", [True, False])
def test_a_run_compiles_every_block_of_a_recipe_that_says_so(wanted, annotations, tiny, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda block, **options: compiled.append((block, options)))
    list(irra.train(tiny.replace(compile=wanted, losses="sdm+mlm"), annotations, tmp_path / "run"))
    model, _ = irra.load_checkpoint(tmp_path / "run" / "weights.safetensors")
    blocks = sum(isinstance(part, ResidualAttentionBlock) for part in model.modules())
    assert len({id(block) for block, _ in compiled}) == len(compiled) == wanted * blocks
    assert all(options == {"dynamic": True, "backend": "inductor"} for _, options in compiled)
