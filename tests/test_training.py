"""Training: the released optimiser and schedule, resuming bit for bit, selection, and what a run leaves."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import irra_core as irra
from irra_core import images, objective, runs, training
from irra_core.analysis.checks import check_annotations
from irra_core.annotations import hold_out
from irra_core.datasets.mapped import CheckedPixels
from irra_core.evaluation import METRICS
from irra_core.losses import total_loss
from irra_core.objective import step_precision
from irra_core.scale.failures import replay
from irra_core.scale.precision import half_weights
from irra_core.scale.summary import summary
from irra_core.training import build_optimiser, learning_rate, train

REFERENCE = Path(__file__).parent / "reference"
pytestmark = pytest.mark.usefixtures("narrow")


def test_the_learning_rate_of_every_epoch_is_the_released_one():
    recipe = irra.recipe("cuhk")
    ours = [learning_rate(epoch, recipe) for epoch in range(60)]
    assert ours == pytest.approx(np.load(REFERENCE / "irra_reference.npz")["lr_cosine60"], rel=1e-9)


def test_every_parameter_has_the_released_learning_rate_and_decay_in_four_groups():
    expected = json.loads((REFERENCE / "irra_reference.json").read_text())["groups"]
    model = irra.load_official(REFERENCE / "irra_tiny.pth", (64, 32), 16)
    optimiser = build_optimiser(model, irra.recipe("cuhk", preset="released"))
    ours = {}
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            ours[parameter] = [group["lr"], group["weight_decay"], group["eps"], list(group["betas"])]
    names = official_names(model)
    assert {names[name] for name, _ in model.named_parameters()} == set(expected)
    for name, parameter in model.named_parameters():
        *numbers, betas = ours[parameter]
        *theirs, their_betas = expected[names[name]]
        assert (numbers, betas) == (pytest.approx(theirs), their_betas), name
    assert len(optimiser.param_groups) == 4


def official_names(model):
    """Our parameter's name → the released file's, through what save_official would write."""
    from irra_core.released.checkpoint import released_name

    return {name: released_name(name) for name, _ in model.named_parameters()}


def test_twenty_steps_follow_the_released_losses():
    """Rounding grows about twofold a step here: in float64 the last losses differ from the released fp32 ones by 1.4 %,
    in fp32 by 0.4 to 4.2 % with the number of threads, torch's version and the processor's instructions. So the first
    steps are held tightly, the last ones loosely."""
    given = np.load(REFERENCE / "irra_reference.npz")
    model = irra.load_official(REFERENCE / "irra_tiny.pth", (64, 32), 16)
    recipe = irra.recipe("cuhk", preset="released", lr=1e-3, precision="fp32")
    optimiser = build_optimiser(model, recipe)
    names = ("images", "caption_ids", "mlm_ids", "mlm_labels", "pids")
    batches = [[torch.from_numpy(given[f"traj_{name}"][index]) for name in names] for index in range(4)]
    for step, expected in enumerate(given["traj_losses"]):
        *batch, pids = batches[step % 4]
        parts = total_loss(model(*batch), pids, recipe)
        assert [parts[name].item() for name in ("sdm", "id", "mlm")] == pytest.approx(
            expected, rel=1e-3 if step < 10 else 0.06
        ), step
        optimiser.zero_grad()
        sum(parts.values()).backward()
        optimiser.step()


def weights(folder):
    return load_file(folder / runs.WEIGHTS)


def test_an_interrupted_run_ends_bit_for_bit_where_the_whole_run_does(tiny, annotations, tmp_path):
    whole = list(train(tiny, annotations, tmp_path / "whole"))
    first = next(train(tiny, annotations, tmp_path / "cut"))  # dropping the generator is the interruption
    rest = list(train(tiny, annotations, tmp_path / "cut"))
    assert len(whole) == 3
    assert [first, *rest] == whole
    expected, got = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    for name in ("history.csv", "metrics.json", "queries.csv", "recipe.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.fixture(scope="module")
def finished(narrow, tmp_path_factory, annotations):
    """A finished run's folder and its recipe."""
    recipe = irra.recipe(pretrained="none", batch_size=8, max_steps=2, epochs=1, losses="sdm+id+mlm")
    folder = tmp_path_factory.mktemp("runs") / "finished"
    return folder, recipe, list(train(recipe, annotations, folder))


def test_a_finished_run_is_loaded_and_not_repeated(finished, annotations, monkeypatch):
    folder, recipe, history = finished
    monkeypatch.setattr(training, "_Run", None)  # whoever trains again, fails
    again = list(train(recipe, annotations, folder))
    assert [row["step"] for row in again] == [row["step"] for row in history]
    assert again[-1]["loss"] == pytest.approx(history[-1]["loss"], rel=1e-12)


def test_what_a_process_killed_at_its_very_end_left_is_cleared_away_when_its_run_is_loaded(
    finished, annotations, tmp_path
):
    folder, recipe, history = finished
    shutil.copytree(folder, tmp_path / "run")
    kept = {path.name for path in folder.iterdir()}
    for name in (runs.STATE, runs.STATE_BEFORE, runs.LOCK, ".tmpAbCdEf", ".history.csv.17.part"):
        (tmp_path / "run" / name).write_text("half")
    assert len(list(train(recipe, annotations, tmp_path / "run"))) == len(history)
    assert {path.name for path in (tmp_path / "run").iterdir()} == kept


def test_a_run_folder_keeps_what_a_reader_needs(finished, annotations):
    folder, recipe, _ = finished
    kept = runs.load_run(folder)
    assert kept["recipe"] == recipe
    metrics, test = kept["metrics"], annotations[annotations.split == "test"]
    assert (metrics["queries"], metrics["images"], metrics["identities"]) == (len(test), 8, 4)
    for direction in ("text_to_image", "image_to_text"):
        for value, low, high in metrics[direction].values():
            assert 0 <= low <= value <= high <= 100
    assert set(metrics["untrained"]) == {"R1", "R5", "R10", "mAP", "mINP"}
    assert kept["machine"]["threads"] == torch.get_num_threads()
    assert not (folder / runs.STATE).exists()
    assert "caption" not in kept["queries"]


def test_the_scores_are_those_of_a_ranking_made_by_hand(finished, annotations):
    folder, _, _ = finished
    model, recipe = irra.load_checkpoint(folder / runs.WEIGHTS)
    test = annotations[annotations.split == "test"].reset_index(drop=True)
    photos = test.drop_duplicates("image_id")
    with torch.inference_mode():
        image = model.eval().encode_image(irra.load_images(photos.path, recipe))
        text = model.encode_text(irra.tokenize(list(test.caption)))
    similarity = torch.nn.functional.cosine_similarity(text[:, None], image[None], dim=2)
    hits = [photos.pid.iloc[int(row.argmax())] == pid for row, pid in zip(similarity, test.pid, strict=True)]
    assert runs.load_run(folder)["metrics"]["text_to_image"]["R1"][0] == pytest.approx(100 * np.mean(hits))


def test_test_is_read_once_and_only_at_the_end(tiny, annotations, tmp_path, monkeypatch):
    splits = []
    real = training.evaluate
    monkeypatch.setattr(training, "evaluate", lambda *a, **k: splits.append(a[2]) or real(*a, **k))
    history = list(train(tiny, annotations, tmp_path / "val"))
    assert splits == ["val"] * len(history) + ["test", "test"]  # the trained and the untrained model
    splits.clear()
    list(train(tiny.replace(select_on="test"), annotations, tmp_path / "test"))
    assert splits == ["test"] * (len(history) + 2)
    assert runs.load_run(tmp_path / "test")["metrics"]["selected"]["on"] == "test"
    assert "not comparable" in summary(tmp_path / "test")


def test_the_kept_weights_are_those_of_the_best_evaluation(annotations, tmp_path, tiny):
    scripted = iter([10.0, 30.0, 20.0])
    real = training.scores

    class Scripted(training._Run):
        def evaluation_row(self, losses):
            value = next(scripted)
            training.scores = lambda queries: dict.fromkeys(real(queries), (value, 0.0, 0.0))
            return super().evaluation_row(losses)

    original, training._Run = training._Run, Scripted
    try:
        list(train(tiny, annotations, tmp_path / "run"))
    finally:
        training._Run, training.scores = original, real
    assert runs.load_run(tmp_path / "run")["metrics"]["selected"]["step"] == 4


def test_without_a_val_split_train_people_are_held_out_and_test_untouched(annotations, tmp_path, tiny):
    without = (
        annotations[annotations.split != "val"]
        .assign(image_id=lambda table: pd.factorize(table.image_id)[0])
        .reset_index(drop=True)
    )
    history = list(train(tiny, without, tmp_path / "run"))
    assert "val_R1" in history[-1]
    assert (hold_out(without).split == "val").sum() == 4  # two people with two captions
    assert runs.load_run(tmp_path / "run")["metrics"]["queries"] == 8


def test_a_loss_that_is_no_number_stops_the_run_and_names_step_and_part(tiny, annotations, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        parts = total_loss(*args, **kwargs)
        return parts | {"mlm": parts["mlm"] * float("nan")}

    monkeypatch.setattr(objective, "total_loss", broken)
    with pytest.raises(FloatingPointError, match=r"step 1: .*'mlm': nan.*lr"):
        list(train(tiny, annotations, tmp_path / "run"))
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_a_gradient_that_is_no_number_stops_the_run_at_its_step_though_the_losses_are_finite(
    tiny, annotations, tmp_path, monkeypatch
):
    steps = []

    def steep(*args, **kwargs):
        parts, zero = total_loss(*args, **kwargs), (args[0].class_weight * 0).sum()
        steps.append(len(steps))
        return parts | {"mlm": parts["mlm"] + zero.sqrt()} if len(steps) > 1 else parts  # the slope of √ at 0

    monkeypatch.setattr(objective, "total_loss", steep)
    with pytest.raises(FloatingPointError, match=r"step 2: .*'gradient': nan.*failed-batch"):
        list(train(tiny.replace(evaluate_every=5), annotations, tmp_path / "run"))
    again = replay(tmp_path / "run")
    assert np.isnan(again.pop("gradient"))
    assert np.isfinite(list(again.values())).all()
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "run" / runs.FAILED).values())


def test_the_norm_of_the_gradients_is_that_of_all_their_entries_in_one_vector():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2).half(), torch.nn.Linear(2, 2))
    entries, generator = [], torch.Generator().manual_seed(0)
    for parameter in [*model[0].parameters(), *model[1].parameters()]:
        parameter.grad = (torch.randn(parameter.shape, generator=generator) * 6e4).to(parameter.dtype)
        entries += parameter.grad.flatten().double().tolist()
    assert training.gradient_norm(model).item() == pytest.approx(sum(x * x for x in entries) ** 0.5, rel=1e-6)
    for bad in (np.nan, np.inf):
        parameter.grad[0] = bad
        assert not training.gradient_norm(model).isfinite()


def test_a_folder_of_another_run_is_refused_and_passed_over(finished, annotations):
    folder, recipe, _ = finished
    other = recipe.replace(seed=5)
    with pytest.raises(ValueError, match="its seed is 0, now 5"):
        next(train(other, annotations, folder))
    changed = annotations.assign(caption=annotations.caption + ".")
    with pytest.raises(ValueError, match="its data"):
        next(train(recipe, changed, folder))


def test_every_combination_of_losses_trains(annotations, tmp_path, tiny):
    for losses in ("itc", "cmpm+cmpc", "tal+id", "sdm+mlm", "cmpm+id+mlm"):
        recipe = tiny.replace(losses=losses, max_steps=1, select_on="last")
        (row,) = train(recipe, annotations, tmp_path / losses)
        assert row["loss"] == pytest.approx(sum(row[name] for name in recipe.loss_names))
        assert row["loss"] > 0


def test_masked_captions_change_what_the_aligning_loss_sees(annotations, tmp_path, tiny):
    rows = {}
    for switch in (False, True):
        recipe = tiny.replace(max_steps=1, mask_captions=switch, select_on="last", mask_probability=0.9)
        (rows[switch],) = train(recipe, annotations, tmp_path / str(switch))
    assert rows[True]["sdm"] != rows[False]["sdm"]
    assert rows[True]["mlm"] == pytest.approx(rows[False]["mlm"], rel=1e-5)


def test_half_weights_leave_norms_and_embeddings_in_full_precision(annotations, tmp_path, tiny):
    recipe = tiny.replace(precision="fp16", max_steps=2, select_on="last", adam_eps=1e-3)
    model = half_weights(irra.build_model(recipe, 3))
    halves = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float16}
    assert "clip.visual.conv1.weight" in halves
    assert not any("ln_" in name or "embedding" in name for name in halves)
    (row,) = train(recipe, annotations, tmp_path / "run")
    assert np.isfinite(row["loss"])


def test_a_step_takes_bf16_where_the_processor_has_it_and_fp32_where_it_does_not(monkeypatch):
    cpu = torch.device("cpu")
    for ability, expected in (("avx512_bf16", "bf16"), ("amx_bf16", "bf16"), ("avx2", "fp32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda ability=ability: {ability: True}, raising=False)
        assert step_precision("auto", cpu) == expected
        assert step_precision("fp32", cpu) == "fp32"
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert step_precision("auto", cpu) == "fp32"
    with pytest.warns(UserWarning, match="precision bf16: this device has no instructions for it"):
        assert step_precision("bf16", cpu) == "bf16"
    for able, expected in ((True, "bf16"), (False, "fp32")):  # the GPU's own instructions, not their imitation
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, able=able: able)
        assert step_precision("auto", torch.device("cuda")) == expected


def test_an_image_array_that_lies_on_the_device_gives_the_same_run(annotations, tiny, tmp_path, monkeypatch):
    expected = list(train(tiny, annotations, tmp_path / "mapped"))
    taken = []
    monkeypatch.setattr(training, "resides", lambda pixels, device: taken.append(type(pixels)) or True)
    assert list(train(tiny, annotations, tmp_path / "resident")) == expected
    assert taken == [CheckedPixels]


@pytest.mark.parametrize(("free", "kept"), [(12_000, True), (11_999, False)])
def test_the_array_is_kept_on_a_gpu_where_it_takes_an_eighth_of_the_free_memory(free, kept, monkeypatch):
    pixels = np.zeros((5, 3, 10, 10), dtype=np.uint8)  # 1,500 bytes
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
    assert training.resides(pixels, torch.device("cuda")) == kept
    assert not training.resides(pixels, torch.device("cpu"))


@pytest.mark.filterwarnings("ignore:precision bf16")
def test_what_a_bf16_run_learns_stays_near_fp32_and_its_machine_says_bf16(annotations, tmp_path, tiny):
    rows = {}
    for precision in ("fp32", "bf16"):
        recipe = tiny.replace(precision=precision, losses="itc", adam_eps=1e-3)
        rows[precision] = list(irra.train(recipe, annotations, tmp_path / precision))
        assert json.loads((tmp_path / precision / "machine.json").read_text())["precision"] == precision
    losses = {name: [row["loss"] for row in found] for name, found in rows.items()}
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)


def test_a_run_that_explodes_saves_what_computes_the_same_loss_again(tiny, annotations, tmp_path):
    recipe = tiny.replace(lr=1e30, max_steps=None, epochs=5)
    with pytest.raises(FloatingPointError, match=r"not finite at step (\d+): .*lr 1e\+29.*failed-batch") as error:
        list(train(recipe, annotations, tmp_path / "run"))
    again = replay(tmp_path / "run")
    assert str(again) in str(error.value)
    assert not all(np.isfinite(list(again.values())))
    _, kept = irra.load_checkpoint(tmp_path / "run" / runs.FAILED)
    assert kept == recipe
    batch = load_file(tmp_path / "run" / runs.FAILED_BATCH)
    table = annotations[annotations.split == "train"].reset_index(drop=True)
    assert table.image_id[batch["rows"].tolist()].tolist() == batch["image_ids"].tolist()


def flip(file: Path) -> None:
    """Turn one bit in the middle of a file's tensors."""
    content = bytearray(file.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    file.write_bytes(content)


def tear(file: Path) -> None:
    """Leave the first half of a file."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.fixture(scope="module")
def halfway(narrow, tmp_path_factory, annotations):
    """A run stopped after its second evaluation, and the same run as it ends when nobody stops it."""
    recipe = irra.recipe(pretrained="none", batch_size=8, epochs=2, max_steps=5, evaluate_every=2)
    base = tmp_path_factory.mktemp("halfway")
    running = train(recipe, annotations, base / "half")
    next(running), next(running)
    running.close()
    return recipe, base / "half", list(train(recipe, annotations, base / "whole")), weights(base / "whole")


@pytest.mark.parametrize("damage", [flip, tear])
def test_a_damaged_state_is_said_out_loud_and_the_one_before_it_goes_on(halfway, annotations, tmp_path, damage):
    recipe, half, whole, expected = halfway
    shutil.copytree(half, tmp_path / "run")
    damage(tmp_path / "run" / runs.STATE)
    with pytest.warns(UserWarning, match=r"state\.safetensors.*Going on from the state before it, of step 2"):
        rest = list(train(recipe, annotations, tmp_path / "run"))
    assert rest == whole[1:]
    got = weights(tmp_path / "run")
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_a_run_with_no_whole_state_says_so_and_begins_again(halfway, annotations, tmp_path):
    recipe, half, whole, _ = halfway
    shutil.copytree(half, tmp_path / "run")
    tear(tmp_path / "run" / runs.STATE)
    flip(tmp_path / "run" / runs.STATE_BEFORE)
    with pytest.warns(UserWarning, match="No state is whole: training begins again"):
        assert list(train(recipe, annotations, tmp_path / "run")) == whole


def test_weights_of_an_abandoned_branch_are_lost_ones(tiny, annotations, tmp_path, monkeypatch):
    """A run killed between weights and state, then resumed with another rounding, in which its step 4 scores less."""
    values = iter([50.0, 50.0, 60.0])
    monkeypatch.setattr(training, "scores", lambda queries: dict.fromkeys(METRICS, (next(values, 40.0), 0.0, 0.0)))
    running = train(tiny, annotations, tmp_path / "before")
    next(running)
    running.close()
    shutil.copytree(tmp_path / "before", tmp_path / "run")
    running = train(tiny, annotations, tmp_path / "after")
    assert [next(running)["step"], next(running)["step"]] == [2, 4]
    running.close()
    shutil.copyfile(tmp_path / "after" / runs.WEIGHTS, tmp_path / "run" / runs.WEIGHTS)
    list(train(tiny, annotations, tmp_path / "run"))
    assert runs.load_run(tmp_path / "run")["metrics"]["selected"]["step"] == 2
    expected, got = weights(tmp_path / "before"), weights(tmp_path / "run")
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("damage", [flip, tear])
def test_damaged_weights_of_a_finished_run_are_refused_by_name(finished, tmp_path, damage):
    shutil.copytree(finished[0], tmp_path / "run")
    damage(tmp_path / "run" / runs.WEIGHTS)
    with pytest.raises(ValueError, match=r"run/weights\.safetensors.*opy it again"):
        irra.load_checkpoint(tmp_path / "run" / runs.WEIGHTS)


def test_an_interrupt_leaves_a_run_that_goes_on_as_if_nothing_had_been(halfway, annotations, tmp_path, monkeypatch):
    recipe, _, whole, expected = halfway
    real, calls = training.optimise, []

    def interrupted(*given):
        calls.append(given)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(training, "optimise", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(train(recipe, annotations, tmp_path / "run"))
    assert not (tmp_path / "run" / runs.LOCK).exists()
    assert list(train(recipe, annotations, tmp_path / "run")) == whole[1:]
    assert all(torch.equal(weights(tmp_path / "run")[name], expected[name]) for name in expected)


def test_unreadable_photos_are_left_out_listed_and_counted(annotations, tmp_path, tiny, monkeypatch):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no photo")
    more = annotations.copy()
    more.loc[3, "path"] = str(broken)
    monkeypatch.setattr(images, "MOST_UNREADABLE", 0.05)
    with pytest.warns(UserWarning, match=r"left out with their 1 captions(?s:.*)broken\.png.*no image"):
        table = images.leave_out_unreadable(more, tiny)
    assert table.path.tolist() == [path for path in more.path if path != str(broken)]
    assert sorted(table.image_id) == list(range(len(more) - 1))
    assert "cannot be read was left out" in " ".join(check_annotations(table).finding)
    list(train(tiny.replace(max_steps=1), table, tmp_path / "run"))
    assert pd.read_csv(tmp_path / "run" / runs.UNREADABLE).path.tolist() == [str(broken)]
    assert runs.load_run(tmp_path / "run")["metrics"]["unreadable_images"] == 1
    assert "left out: 1 photo that cannot be read, see unreadable.csv" in summary(tmp_path / "run")


def test_one_unreadable_photo_stops_a_run_whose_recipe_says_so(annotations, tmp_path, tiny, monkeypatch):
    more = annotations.copy()
    more.loc[3, "path"] = str(tmp_path / "absent.png")
    monkeypatch.setattr(images, "MOST_UNREADABLE", 0.05)
    with pytest.raises(images.UnreadableImages, match=r"1 image cannot be read(?s:.*)absent\.png"):
        images.leave_out_unreadable(more, tiny.replace(unreadable="stop"))


def test_many_unreadable_photos_stop_a_run_before_it_begins(annotations, tmp_path, tiny):
    with pytest.raises(images.UnreadableImages, match="18 images cannot be read"):
        images.leave_out_unreadable(annotations.assign(path=annotations.path.str.replace("-0.png", "-7.png")), tiny)
