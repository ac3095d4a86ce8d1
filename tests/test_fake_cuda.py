"""The GPU's path on a GPU that computes nothing: no operand on the wrong device, no wait of the host, no slow copy.

What is computed once per process, as the constants of `normalise`, is there before a test begins (`warm`).
"""

import re
from dataclasses import replace
from pathlib import Path

import fake_cuda as fake
import numpy as np
import pytest
import torch
from fake_cuda import fake_cuda, unusable
from test_objective import CASES, setting

import irra_core as irra
from irra_core import training
from irra_core.analysis import explanations
from irra_core.augmentation import moved_together, normalise
from irra_core.batches import Batches
from irra_core.benchmark import workloads
from irra_core.evaluation import encode_images
from irra_core.objective import Objective
from irra_core.scale.failures import replay
from irra_core.scale.precision import half_weights
from irra_core.text import tokenize
from irra_core.training import build_optimiser, optimise

if reason := unusable():
    pytest.skip(reason, allow_module_level=True)

pytestmark = pytest.mark.usefixtures("narrow", "warm")
REFERENCE = Path(__file__).parent / "reference" / "irra_tiny.pth"
COPY = "aten._to_copy.default"  # the wait for results that the host asked for
# torch.use_deterministic_algorithms: what it lists, and what of it docs/determinism.md names: the gradients of
# `embedding`, `gather` and `index_select`.
LISTED = re.compile(
    r"aten\.(_?index_(put|copy|add|reduce)|_?put|scatter|cumsum|bincount|histc|median|kthvalue|embedding_dense|nll_loss2d"
    r"|_embedding_bag|_?upsample|grid_sampler|\w*convolution|\w*pool|\w*_pad\d|max_unpool|_ctc|repeat_interleave)"
)
IN_ANY_ORDER = {f"aten.{name}.default" for name in ("embedding_dense_backward", "scatter_add", "index_add")}
VARIANTS = [(case, precision, {}) for case in CASES for precision in ("fp32", "bf16", "fp16")]
VARIANTS += [("every loss", precision, {"micro_batch": 2, "batch_size": 4}) for precision in ("bf16", "fp16")]
VARIANTS += [
    ("every loss", "bf16", {"adapter_rank": 4, "frozen": "image"}),
    ("every loss", "bf16", {"frozen": "text", "padding_attention": True, "mask_captions": True, "cmpm_target": "l2"}),
    ("co", "fp32", {"micro_batch": 2, "batch_size": 4, "adapter_rank": 4}),
    ("merged", "bf16", {"stride": 8, "frozen": "both"}),  # overlapping patches
]


@pytest.fixture(scope="module")
def warm():
    with fake_cuda():
        normalise(torch.zeros(1, 3, 8, 8, dtype=torch.uint8, device="cuda"))


@pytest.fixture(scope="module")
def chosen() -> irra.Recipe:
    return irra.recipe(pretrained="none", interaction_depth=1)


def stepper(case: str, precision: str, **changes):
    """A model on `cuda` and a function that takes one training step of it."""
    recipe, model, batches = setting(case, False, "cuda", **changes)
    model = half_weights(model) if precision == "fp16" else model
    objective, optimiser = Objective(model, recipe, precision), build_optimiser(model, recipe)
    return model, lambda step: optimise(objective, optimiser, batches.at(step))


def check_gradients(model) -> None:
    """Every gradient has its weight's device, type and shape."""
    gradients = [(weight, weight.grad) for weight in model.parameters() if weight.grad is not None]
    assert gradients
    for weight, gradient in gradients:
        assert (gradient.device, gradient.dtype, gradient.shape) == (weight.device, weight.dtype, weight.shape)


def summed_in_any_order(gpu) -> set[str]:
    """The operations whose result may differ between two runs on one GPU, by torch's own list."""
    return set(filter(LISTED.match, gpu.operations))


@pytest.mark.parametrize(("case", "precision", "changes"), VARIANTS, ids=str)
def test_a_step_on_a_gpu_mixes_no_devices_and_never_waits(case, precision, changes):
    with fake_cuda() as gpu:
        model, step = stepper(case, precision, **changes)
        gpu.clear()
        numbers = step(2)  # a short batch, where 7 pairs are a batch
        assert numbers.is_cuda
        assert (gpu.waits, gpu.slow) == ([], [])
        check_gradients(model)
        assert summed_in_any_order(gpu) <= IN_ANY_ORDER


def test_a_step_of_the_papers_model_and_batch_never_waits():
    recipe = irra.recipe("cuhk", pretrained="none", precision="bf16")
    captions = [f"a person {'who walks ' * (number % 5)}in a red coat" for number in range(recipe.batch_size)]
    rows = [(number // 2, number, f"{number}.png", caption, "train") for number, caption in enumerate(captions)]
    table = irra.annotations.DataFrame(rows, columns=["pid", "image_id", "path", "caption", "split"])
    pixels = np.zeros((len(rows), 3, recipe.image_height, recipe.image_width), np.uint8)
    with torch.device("meta"):  # no random weights are drawn
        model = irra.build_model(recipe, 11_003, device="meta")
    with fake_cuda() as gpu:
        model.to_empty(device="cuda")
        batches = Batches(table, pixels, tokenize(captions), recipe, "cuda")
        objective, optimiser = Objective(model, recipe, "bf16"), build_optimiser(model, recipe)
        gpu.clear()
        numbers = optimise(objective, optimiser, batches.at(0))
        assert numbers.shape == (4,)
        assert (gpu.waits, gpu.slow) == ([], [])
        check_gradients(model)
        assert summed_in_any_order(gpu) == IN_ANY_ORDER


def test_small_tensors_of_any_strides_are_sent_in_one_copy():
    column, number = torch.arange(64).view(4, 16)[:, :1], torch.tensor(3)
    given = [column, column[:, 0], column[:1, 0], number, number.expand(1, 3), column[:0], column.expand(4, 3) > 1]
    with fake_cuda() as gpu:
        found = moved_together(given, torch.device("cuda"))
        assert (sum(gpu.operations.values()), gpu.waits, gpu.slow) == (1, [], [])
    assert [(part.is_cuda, part.dtype, part.shape) for part in found] == [(True, t.dtype, t.shape) for t in given]


# runs


@pytest.mark.parametrize(
    "changes", [{}, {"precision": "fp16", "adam_eps": 1e-3}, {"adapter_rank": 2}, {"losses": "tal+tse"}], ids=str
)
def test_a_run_on_a_gpu_stops_and_resumes_and_waits_only_to_evaluate(tiny, annotations, tmp_path, monkeypatch, changes):
    recipe, begins, ends = tiny.replace(interaction_depth=1, **changes), [], []
    at, take = Batches.at, training.optimise

    def watched_at(*given):
        begins.append((len(gpu.waits), len(gpu.slow)))
        return at(*given)

    def watched_step(*given):
        numbers = take(*given)
        ends.append((len(gpu.waits), len(gpu.slow)))
        return numbers

    monkeypatch.setattr(Batches, "at", watched_at)
    monkeypatch.setattr(training, "optimise", watched_step)
    with fake_cuda() as gpu:  # the photos are in the GPU's memory
        stopped = irra.train(recipe, annotations, tmp_path / "run")
        assert next(stopped)["step"] == 2
        stopped.close()
        assert len(gpu.waits) == 3 + 2  # losses' finiteness, shown and kept; features of photos and sentences
    with fake_cuda(free=0) as gpu:  # the photos are in the host's memory
        assert [row["step"] for row in irra.train(recipe, annotations, tmp_path / "run")] == [4, 5]
        assert len(gpu.waits) == 2 * (3 + 2) + 2 * 2  # then two models on the test split
    assert len(begins) == 5
    assert begins == ends
    assert devices(irra.load_checkpoint(tmp_path / "run" / irra.runs.WEIGHTS)[0]) == {"cpu"}


def test_a_failed_step_is_replayed_on_the_gpu(tiny, annotations, tmp_path, monkeypatch):
    recipe = tiny.replace(interaction_depth=1, lr=1e30, max_steps=4)
    with pytest.raises(FloatingPointError, match="not finite at step"):
        list(irra.train(recipe, annotations, tmp_path / "run"))
    with fake_cuda() as gpu:
        parts = replay(tmp_path / "run")
        assert gpu.waits == [COPY]
    assert list(parts) == ["sdm", "id", "mlm", "gradient"]


# where models are


def devices(model) -> set[str]:
    """The devices of a model's weights and constants."""
    return {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}


def test_models_are_built_and_loaded_on_the_gpu_unless_another_device_is_given(chosen, tmp_path):
    file = tmp_path / "model.safetensors"
    irra.save_checkpoint(irra.build_model(chosen, 3), chosen, file)
    adapted = chosen.replace(adapter_rank=2)
    with fake_cuda():
        assert irra.settings.default_device() == torch.device("cuda")
        for device, found in ((None, {"cuda"}), ("cpu", {"cpu"}), (torch.device("cpu"), {"cpu"})):
            assert devices(irra.build_model(chosen, 3, device=device)) == found
            assert devices(irra.build_model(adapted, 3, device=device)) == found
            assert devices(irra.load_checkpoint(file, device=device)[0]) == found
            assert devices(irra.load_official(REFERENCE, (64, 32), device=device)) == found
        assert devices(irra.checkpoints.open_checkpoint(file)[0]) == {"cuda"}
    assert irra.settings.default_device() == torch.device("cpu")
    assert devices(irra.load_checkpoint(file)[0]) == {"cpu"}


def test_files_written_from_a_gpu_are_read_without_one(chosen, tmp_path):
    with fake_cuda():
        model = irra.build_model(chosen, 3)
        irra.save_official(model, tmp_path / "model.pth")
        irra.save_checkpoint(model, chosen, tmp_path / "model.safetensors")
    state = torch.load(tmp_path / "model.pth", weights_only=True)["model"]  # no map_location
    assert {value.device.type for value in state.values()} == {"cpu"}
    assert devices(irra.load_checkpoint(tmp_path / "model.safetensors")[0]) == {"cpu"}


# what is done with a model


@pytest.mark.parametrize("precision", ["auto", "fp32", "fp16"])
def test_an_evaluation_waits_once_for_the_photos_and_once_for_the_sentences(chosen, annotations, precision):
    with fake_cuda() as gpu:
        model = irra.build_model(chosen, 10)
        gpu.clear()
        found = irra.evaluate(model, annotations, "test", precision=precision)
        assert (gpu.waits, gpu.slow) == ([COPY] * 2, [])
        assert not summed_in_any_order(gpu)
    assert len(found.text_to_image) == 8


def test_batches_of_an_encoder_are_sent_without_a_wait_between_them(chosen):
    with fake_cuda() as gpu:
        model = irra.build_model(chosen, 10)
        gpu.clear()
        features = encode_images(model, np.zeros((5, 3, 96, 32), np.uint8), batch_size=2)
        assert (gpu.waits, gpu.slow) == ([COPY], [])
    assert features.shape == (5, 64)


def test_a_gallery_is_built_searched_and_ranked_again_on_the_gpu(chosen, annotations, tmp_path):
    with fake_cuda() as gpu:
        model = irra.build_model(chosen, 10)
        gpu.clear()
        gallery = irra.Gallery.build(model, annotations, folder=tmp_path / "gallery")
        again = irra.Gallery.load(tmp_path / "gallery", model)
        assert gpu.slow == []
        for rerank in (None, "reciprocal", "words"):
            gpu.clear()
            found = again.search("a person in a red shirt", k=3, rerank=rerank)
            assert (len(found), gpu.slow) == (3, [])
            assert gpu.waits == [COPY] * (2 if rerank == "words" else 1)  # the query's features, the words' scores
    assert len(gallery) == 36


def test_a_photo_is_explained_on_the_gpu(chosen, annotations):
    shown = irra.load_images(annotations.path[:3], chosen)
    asked = annotations[annotations.split == "test"][:1]
    with fake_cuda() as gpu:
        model = irra.build_model(chosen, 10)
        blind = irra.build_model(chosen.replace(losses="itc", interaction_depth=1), 10)
        gpu.clear()
        assert explanations.explain(model, shown, "a man in red").maps.shape == (3, 4, 12, 4)
        assert explanations.explain(blind, shown, "a man in red", [2]).maps.shape == (1, 4, 12, 4)
        assert len(explanations.fill_masks(model, shown, "a [MASK] in [MASK]", n=2)) == 3 * 2 * 2
        assert explanations.rollout(model, shown, tokenize(["a man in red"] * 3)).is_cuda
        assert set(gpu.waits) == {COPY}
        assert gpu.slow == []
        gpu.clear()
        words = explanations.word_evidence(model, annotations.loc[[*asked.index, 0]], others=1)
        assert gpu.waits == [COPY] * 2  # one per caption
    assert len(words) > 2


def test_the_explorer_searches_and_explains_on_the_gpu(chosen, annotations):
    with fake_cuda():
        gallery = irra.Gallery.build(irra.build_model(chosen, 10), annotations)
        page = irra.QueryExplorer(gallery, annotations, query="a man in [MASK]", k=2)
        for kind in ("explain", "fill"):
            page._receive(None, {"kind": kind, "serial": page._serial, "strip": 0, "place": 0}, None)
        assert page.failure is None
    assert len(page.explanation["strips"][0]["photos"]) == 2
    assert len(page.fills["strips"][0]["photos"]) == 2


def test_the_benchmarks_rows_of_a_gpu_are_measured(annotations, monkeypatch):
    sizes = {"batch": 4, "people": 24, "captions": 8, "photos": 8, "encoded": 4}
    monkeypatch.setattr(workloads, "_idle", lambda call, device: [0.0])  # the profiler needs a real GPU
    with fake_cuda():
        bench = workloads.Bench(torch.device("cuda"), 1, sizes=sizes)
        bench.annotations = annotations
        rows = [*workloads.gpu(bench), *workloads.small_step(bench)]
    assert [row.what for row in rows if row.ours is None] == []


# the fake GPU itself

FAULTS = {
    "a tensor left on the CPU": lambda losses: losses + torch.ones(3),
    "a boolean index": lambda losses: losses[losses > 0],
    "an index in a list": lambda losses: losses[[0, 2]],
    "a number read": lambda losses: losses * losses[0].item(),
    "a new tensor of numbers": lambda losses: losses + losses.new_tensor([1.0, 2.0, 3.0]),
    "a copy from memory that is not pinned": lambda losses: losses + torch.ones(3).to("cuda"),
    "a strided copy": lambda losses: losses + torch.ones(3, 2)[:, 0].pin_memory().to("cuda", non_blocking=True),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_refused_or_recorded(fault):
    with fake_cuda() as gpu:
        assert caught(FAULTS[fault], gpu)


def test_a_copy_from_pinned_memory_is_no_fault():
    with fake_cuda() as gpu:
        assert not caught(lambda losses: losses + torch.ones(3).pin_memory().to("cuda", non_blocking=True), gpu)


def caught(fault, gpu) -> bool:
    """True if the fault raises an error, or if the GPU records a wait or a slow copy."""
    losses = torch.zeros(3, device="cuda")
    try:
        fault(losses)
    except RuntimeError:
        return True
    return bool(gpu.waits or gpu.slow)


def waiting(features):
    features.text.sum().item()
    return features


FAULTS_OF_A_STEP = {  # method, and what becomes of its result
    "a wait in the model": (irra.model.IRRA, "classified", waiting),
    "a tensor on the CPU in the model": (irra.model.IRRA, "_padded", lambda tokens: tokens + torch.zeros(1).long()),
    "a blocking copy of the batch": (Batches, "at", lambda batch: replace(batch, pids=torch.zeros(7).long().cuda())),
}


@pytest.mark.parametrize("fault", FAULTS_OF_A_STEP)
def test_a_fault_planted_in_a_step_is_found(fault, monkeypatch):
    owner, name, wrong = FAULTS_OF_A_STEP[fault]
    sound = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda self, *given: wrong(sound(self, *given)))
    with fake_cuda() as gpu:
        _, step = stepper("every loss", "fp32")
        gpu.clear()
        assert caught(lambda _: step(0), gpu)


def test_numbers_are_read_from_a_gpu_by_one_wait():
    with fake_cuda() as gpu:
        assert len(torch.ones(2, 3, device="cuda").tolist()[1]) == 3
        assert gpu.waits == [COPY]
        assert torch.ones(0, device="cuda").tolist() == []
        assert gpu.waits == [COPY]


def test_work_on_the_cpu_is_real_and_not_recorded():
    with fake_cuda() as gpu:
        product = torch.full((2, 3), 2.0) @ torch.full((3, 2), 4.0)
    assert product.tolist() == [[24.0, 24.0], [24.0, 24.0]]
    assert not gpu.operations


def test_a_torch_that_it_cannot_run_on_is_named_with_the_error(monkeypatch):
    def missing():
        raise AttributeError("no _engine_run_backward")

    monkeypatch.setattr(fake, "_try", missing)
    assert re.fullmatch(r"torch \S+ has changed .*: AttributeError: no _engine_run_backward", unusable.__wrapped__())


def test_nothing_of_it_is_left_behind():
    with fake_cuda():
        torch.zeros(1, device="cuda")
    assert not torch.cuda.is_available()
    assert torch.accelerator.current_accelerator() is None or not torch.accelerator.is_available()
    with torch.random.fork_rng():
        assert torch.rand(2, 2).sum() > 0
