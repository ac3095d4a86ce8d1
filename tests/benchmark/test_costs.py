"""What parts of a model cost: sizes against the paper's numbers, times of every finished variant."""

import pytest
import torch
from pandas import DataFrame

import irra_core as irra
from irra_core import runs
from irra_core.benchmark import costs
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
    rows += [("tal", "without weights", "committed")]
    table = DataFrame(rows, columns=["variant", "path", "status"]).assign(recipe=recipe)
    times = inference_ms(table, batch_size=2, repeats=1)
    assert list(times) == ["sdm", "tal"]
    assert min(times.values()) > 0


def test_steps_are_timed_in_turns_each_with_the_losses_of_its_recipe(annotations, monkeypatch):
    made = irra.recipe(pretrained="none", batch_size=4)
    recipes = {name: made.replace(losses=name) for name in ("sdm", "sdm+id+mlm")}
    recipes["half"] = made.replace(precision="fp16", adam_eps=1e-3)
    steps, real = [], costs.optimise

    def optimise(objective, optimiser, batch):
        numbers = real(objective, optimiser, batch)
        steps.append((objective.recipe.losses, len(numbers) - 1, tuple(batch.tokens.flatten().tolist())))
        return numbers

    monkeypatch.setattr(costs, "optimise", optimise)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    seconds = costs.step_seconds(recipes, annotations, repeats=2)
    assert list(seconds) == ["sdm", "sdm+id+mlm"]
    assert seconds["sdm+id+mlm"] > seconds["sdm"] > 0
    assert [step[:2] for step in steps] == [("sdm", 1), ("sdm+id+mlm", 3)] * 3
    assert len({step[2] for step in steps}) == 1
