"""Gradients: of two processes as of one, in pieces as at once, for every loss. Run by torchrun, this file is a process.

`annotations` are 20 train captions, batches 7 or 8 pairs: shares, pieces and the epoch's last batch all differ in size.
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NARROW
from torch.utils._python_dispatch import TorchDispatchMode

import irra_core as irra
from irra_core import backbone
from irra_core.batches import ALONE, Batches
from irra_core.objective import Objective, loss_parts
from irra_core.scale.distributed import joined
from irra_core.scale.gradients import pieces_of
from irra_core.text import tokenize
from irra_core.training import build_optimiser, optimise

pytestmark = pytest.mark.usefixtures("narrow")

BATCH = 7  # the third and last batch of an epoch of 20 captions has 6 pairs
CASES = {  # name → what the recipe says
    "every loss": {"losses": "sdm+itc+cmpm+cmpc+tal+id+mlm"},
    "co": {"losses": "itc+mlm", "interaction": "co"},
    "merged": {"losses": "tal+id+mlm", "interaction": "merged"},
    "cmpm/c": {"losses": "cmpm+cmpc"},
    "released": {"preset": "released", "precision": "fp32"},
    "tbps": {"losses": "nitc+ritc+id", "temperature": 0.05, "learned_temperature": True, "word_deletion": 0.2},
    "ibm": {"losses": "ibm+mlm", "sampler": "identity", "per_identity": BATCH, "word_augmentation": 0.4},
    "tse": {"losses": "tal+tse+id+mlm"},
    "layers": {"losses": "sdm+tse", "token_selection": "layers"},
}
WHOLE = ("tse", "layers")  # cases whose batch norm needs the whole batch in memory
SIZES = [(case, size) for case in CASES for size in (None, 3) if size is None or case not in WHOLE]
FEW = 19  # captions left in the table so that an epoch ends in a batch of one pair: one process then has none


def setting(case: str, double: bool, device: str = "cpu", **changes):
    """Recipe, model and batches of a case on random photos, the same in every process."""
    given = {"pretrained": "none", "batch_size": BATCH, "interaction_depth": 1, "lr": 1e-3} | CASES[case] | changes
    if "mlm" not in given.get("losses", "mlm"):
        del given["interaction_depth"]
    recipe = irra.recipe(**given)
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (20, 3, recipe.image_height, recipe.image_width), np.uint8)
    colours = ["red", "green", "blue", "white", "black"]
    captions = [f"a person in a {colours[n % 5]} coat{' who carries a bag' * (n % 3 == 0)}" for n in range(20)]
    rows = [(n // 2, n, f"{n}.png", caption, "train") for n, caption in enumerate(captions)]
    table = irra.annotations.DataFrame(rows, columns=["pid", "image_id", "path", "caption", "split"])
    model = irra.build_model(recipe, num_ids=10, device=device)
    batches = Batches(table, pixels, tokenize(captions), recipe, device)
    return recipe, model.double() if double else model, batches


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.fixture(autouse=True)
def _one_thread():
    """As each of the two processes has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trained(case: str, team, steps: int, double: bool, **changes):
    """The loss parts of every step, the first step's gradients and the last weights."""
    recipe, model, batches = setting(case, double, **changes)
    objective = Objective(model, recipe, changes.get("precision", "fp32"), team)
    optimiser = build_optimiser(model, recipe)
    parts = []
    for step in range(steps):
        optimiser.zero_grad(set_to_none=True)
        parts.append(objective(batches.at(step, *team)))
        if step == 0:
            first = {name: gradient.clone() for name, gradient in gradients(model).items()}
        optimiser.step()
    return torch.stack(parts), first, {name: weight.detach() for name, weight in model.named_parameters()}


# In single precision, the bias of attention's keys has nothing but rounding for a gradient, and must not step by it.
CALM = {"adam_eps": 1e-4}
RUNS = {  # what both sides compute: name → case, steps, double, changes
    "20 steps in double": ("every loss", 20, True, {}),
    "20 steps in single": ("every loss", 20, False, CALM),
    **{f"{case} in single": (case, 1, False, CALM) for case in CASES},
    "in bf16": ("every loss", 1, False, {"precision": "bf16"}),
    "in bf16, in pieces": ("every loss", 1, False, {"precision": "bf16", "micro_batch": 2}),
    "in pieces": ("every loss", 2, True, {"micro_batch": 2}),
    "co in pieces": ("co", 1, True, {"micro_batch": 2}),
    "cmpm/c in pieces": ("cmpm/c", 1, True, {"micro_batch": 2}),
    "tbps in pieces": ("tbps", 1, True, {"micro_batch": 2}),
    "tse in double": ("tse", 3, True, {}),
    "layers in double": ("layers", 3, True, {}),
    "tse in bf16": ("tse", 1, False, {"precision": "bf16"}),
    "tse, one pair left": ("tse", 2, True, {"batch_size": FEW}),
    "one pair left": ("every loss", 2, True, {"batch_size": FEW}),
    "one pair left, in pieces": ("every loss", 2, True, {"batch_size": FEW, "micro_batch": 2}),
}


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    """What two processes computed, by the name of the run; each has seen that it agrees with the other."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: torch.load(folder / f"{n}.pt", weights_only=True) for n, name in enumerate(RUNS)}


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one(by_two, name):
    case, steps, double, changes = RUNS[name]
    parts, first, weights = trained(case, ALONE, steps, double, **changes)
    their_parts, their_first, their_weights = by_two[name]
    bf16 = "precision" in changes  # each process rounds the gradients of its own pairs
    close, first_close = (1e-7, 1e-12) if double else (2e-2, 1e-2) if bf16 else (1e-3, 1e-6)
    torch.testing.assert_close(their_parts[0], parts[0], rtol=first_close, atol=first_close)
    torch.testing.assert_close(their_parts, parts, rtol=close, atol=close)
    assert their_first.keys() == first.keys()
    whole = torch.stack([gradient.norm() for gradient in first.values()]).norm()
    for weight, gradient in first.items():
        assert (their_first[weight] - gradient).norm() <= (
            1e-9 * gradient.norm() + 1e-12 if double else (3e-2 if bf16 else 1e-5) * whole
        )
    for weight, value in weights.items():
        assert (their_weights[weight] - value).abs().max() <= close, weight


@pytest.mark.parametrize(
    ("case", "size"),
    [*((case, 3) for case in CASES if case not in WHOLE), *(("every loss", size) for size in (1, 6, 7, 100))],
)
def test_pieces_have_the_whole_batchs_losses_and_gradients(case, size):
    parts, first, _ = trained(case, ALONE, 1, True)
    their_parts, their_first, _ = trained(case, ALONE, 1, True, micro_batch=size)
    torch.testing.assert_close(their_parts, parts, rtol=1e-9, atol=1e-9)
    assert their_first.keys() == first.keys()
    for name, gradient in first.items():
        assert (their_first[name] - gradient).norm() <= 1e-9 * gradient.norm() + 1e-12, name


def test_losses_of_the_pieces_alone_would_be_others():
    """What the pieces must not be: averaged losses of small batches, as plain accumulation has them."""
    recipe, model, batches = setting("every loss", True)
    batch = batches.at(0)
    whole = loss_parts(model, batch, recipe, "fp32")["itc"]
    pieces = [irra.itc_loss(model.encode_image(p.images), model.encode_text(p.tokens)) for p in pieces_of(batch, 4)]
    assert abs(sum(pieces) / len(pieces) - whole) > 0.1 * whole


def test_pieces_of_a_batch_are_the_batch_in_order():
    _, _, batches = setting("every loss", False)
    batch = batches.at(0)
    pieces = pieces_of(batch, 3)
    assert [len(piece.rows) for piece in pieces] == [3, 3, 1]
    for name in ("images", "tokens", "masked_tokens", "labels", "pids", "rows"):
        assert torch.equal(torch.cat([getattr(piece, name) for piece in pieces]), getattr(batch, name))
    assert all(torch.equal(piece.all_pids, batch.pids) for piece in pieces)
    assert {int(piece.word_count) for piece in pieces} == {int((batch.labels != 0).sum())}
    assert [len(piece.words_each) for piece in pieces] == [3, 3, 1]
    assert sum((piece.words_each for piece in pieces), ()) == batch.words_each


@pytest.mark.parametrize("size", [None, 3])
@pytest.mark.parametrize("case", ["every loss", "co", "merged", "released"])
def test_a_batch_that_does_not_say_where_its_words_are_learns_the_same_bit_for_bit(case, size):
    found = []
    for unknown in ({}, {"words_each": None}):
        recipe, model, batches = setting(case, False, micro_batch=size)
        found.append((Objective(model, recipe, "fp32")(replace(batches.at(0), **unknown)), gradients(model)))
    (parts, first), (their_parts, their_first) = found
    assert torch.equal(parts, their_parts)
    assert all(torch.equal(first[name], their_first[name]) for name in first | their_first)


aten = torch.ops.aten
WAITING = {aten.nonzero, aten.masked_select, aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten._unique2}
READING = ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__contains__")


class NeverWaiting(TorchDispatchMode):
    """Refuses what a host waits for on a GPU: shapes that depend on values, and values read."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        indexing = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
        by_mask = indexing and any(index is not None and index.dtype == torch.bool for index in args[1])
        if by_mask or func.overloadpacket in WAITING:
            pytest.fail(f"a GPU would be waited for: {func}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("case", "size"), SIZES)
def test_a_training_step_reads_nothing_back_from_the_device(case, precision, size, monkeypatch):
    recipe, model, batches = setting(case, False, micro_batch=size)
    objective, optimiser, batch = Objective(model, recipe, precision), build_optimiser(model, recipe), batches.at(0)
    for name in READING:
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"a GPU would be waited for: {name}"))
    with NeverWaiting():
        numbers = optimise(objective, optimiser, batch)
    monkeypatch.undo()
    assert numbers.isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("case", "size"), SIZES)
def test_no_training_step_after_the_first_waits_for_the_gpu(case, size):
    recipe, model, batches = setting(case, False, "cuda", micro_batch=size)
    objective, optimiser = Objective(model, recipe, "bf16"), build_optimiser(model, recipe)
    optimise(objective, optimiser, batches.at(0))
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimise(objective, optimiser, batches.at(1))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_smaller_piece_keeps_less_for_the_gradient():
    """Counted, not timed: the bytes that autograd keeps at once."""
    kept = {}
    for size in (None, 4):
        recipe, model, batches = setting("every loss", False, batch_size=16, micro_batch=size)
        kept[size] = most_saved(Objective(model, recipe, "fp32"), batches.at(0))
    assert kept[4] < 0.4 * kept[None]


def most_saved(objective, batch) -> int:
    """The most bytes of tensors that autograd held for the backward pass at one time, weights left out."""
    weights = {weight.data_ptr() for weight in objective.model.parameters()}
    now, most = 0, 0

    class Held:
        def __init__(self, tensor):
            nonlocal now, most
            self.tensor, self.bytes = tensor, 0 if tensor.data_ptr() in weights else tensor.nbytes
            now += self.bytes
            most = max(most, now)

        def __del__(self):
            nonlocal now
            now -= self.bytes

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        objective(batch)
    return most


if __name__ == "__main__":
    backbone.SMALL_CLIP = NARROW
    with joined() as team:
        torch.set_num_threads(1)
        for number, (case, steps, double, changes) in enumerate(RUNS.values()):
            found = trained(case, team, steps, double, **changes)
            theirs = [torch.empty_like(found[0]) for _ in range(team.processes)]
            torch.distributed.all_gather(theirs, found[0])
            assert all(torch.equal(parts, found[0]) for parts in theirs), "two processes had different losses"
            if team.leads:
                torch.save(found, Path(sys.argv[1]) / f"{number}.pt")
    # Threads of gloo that outlive their group end Python with SIGABRT now and then, as it exits.
    left = [name for task in Path("/proc/self/task").glob("*/comm") if "gloo" in (name := task.read_text())]
    assert not left, f"threads outlive their process group: {left}"
