"""What parts of a model cost: sizes against the paper's numbers, times of every finished variant."""

import pytest
import torch
from pandas import DataFrame

import irra_core as irra
from irra_core import runs
from irra_core.benchmark.costs import inference_ms, interaction_costs
from irra_core.checkpoints import save_checkpoint


def test_the_interaction_encoders_have_the_papers_parameters_at_its_width():
    paper = irra.recipe(interaction_depth=4)
    table = interaction_costs(paper, width=512, batch_size=1, words=8, repeats=1).set_index("interaction")
    for name, millions in {"cross": 13.66, "co": 33.62, "merged": 12.61}.items():
        assert table.parameters[name] / 1e6 == pytest.approx(millions, rel=1e-3)
    assert table.times["cross"] == 1.0
    assert (table.forward_ms > 0).all()


def test_every_finished_variant_has_its_time_per_photo_and_sentence(tmp_path):
    recipe = irra.recipe(pretrained="none")
    torch.manual_seed(0)
    save_checkpoint(irra.build_model(recipe, 3), recipe, tmp_path / runs.WEIGHTS)
    rows = [("sdm", str(tmp_path), "finished"), ("sdm", "absent", "finished"), ("itc", None, "not run")]
    times = inference_ms(DataFrame(rows, columns=["variant", "path", "status"]), batch_size=2, repeats=1)
    assert list(times) == ["sdm"]
    assert times["sdm"] > 0
