"""The works are timed in turns, compared before they are timed, and judged by their targets."""

import contextlib
import json
import os
import time

import pytest
import torch
from clone import FILES, write_clone

import irra_core as irra
from irra_core.benchmark import workloads
from irra_core.benchmark.workloads import Bench, Row, Target
from irra_core.objective import autocast
from irra_core.released import clone as released
from irra_core.synthetic.people import ALONE, VIEWS

CPU = torch.device("cpu")
SMALL = {"batch": 4, "batches": 2, "queries": 40, "gallery": 20, "people": 10, "features": 60}


@pytest.fixture
def bench(annotations):
    """Small works on the coloured people."""
    made = Bench(CPU, 2, None, None, dict(SMALL))
    made.annotations = annotations
    return made


def test_calls_are_timed_in_turns_and_the_first_round_does_not_count():
    order, naps = [], iter([0.2, 0.0, 0.0])

    def sleepy():
        order.append("a")
        time.sleep(next(naps))

    seconds = workloads.interleave({"a": sleepy, "b": lambda: order.append("b")}, 2)
    assert order == ["a", "b"] * 3
    assert len(seconds["a"]) == len(seconds["b"]) == 2
    assert max(seconds["a"]) < 0.2


def test_a_ratio_above_one_is_better_for_seconds_and_for_rates():
    assert Row(work="step", what="", unit="s", ours=[1.0, 2.0, 9.0], other=[8.0, 4.0, 30.0]).ratio == 4
    assert Row(work="decode", what="", unit="photos/s", ours=[30.0, 20.0, 10.0], other=[10.0, 10.0, 10.0]).ratio == 2
    assert Row(work="step", what="", unit="s", ours=[1.0]).ratio is None


@pytest.mark.parametrize(
    ("target", "met"),
    [(("ratio", "≥", 4), True), (("ratio", "≥", 4.1), False), (("ours", "≤", 2), True), (("ours", "≤", 1.9), False)],
)
def test_a_row_is_judged_by_its_median(target, met):
    row = Row(work="step", what="", unit="s", ours=[1.0, 2.0, 9.0], other=[8.0, 8.0, 8.0], target=Target(*target))
    row.limit, row.reached = "fp32", 50.0
    kept = json.loads(json.dumps(row.to_dict({"fp32": 200.0})))
    assert kept["met"] is met
    assert kept["share_of_limit"] == 0.25
    assert kept["ours"] == {"min": 1, "median": 2, "max": 9, "all": [1, 2, 9]}


def test_what_was_not_measured_or_was_shrunken_is_not_judged(monkeypatch):
    target = Target("ratio", "≥", 4)
    assert Row(work="step", what="", unit="s", ours=[1.0], target=target).to_dict({})["met"] is None
    monkeypatch.setenv("IRRA_SMOKE", "1")
    assert Row(work="step", what="", unit="s", ours=[1.0], other=[9.0], target=target).to_dict({})["met"] is None


def test_the_ranking_is_compared_with_the_other_codes_before_it_is_timed(bench, tmp_path):
    bench.code = released.load_code(write_clone(tmp_path / "clone"))
    (row,) = workloads.ranking(bench)
    assert len(row.ours) == len(row.other) == 2
    assert "scores differ by at most" in row.note
    wrong = FILES["utils/metrics.py"].replace("len(places) / places[-1]", "1 / places[-1]")
    bench.code = released.load_code(write_clone(tmp_path / "wrong", utils_metrics=wrong))
    with pytest.raises(RuntimeError, match="not the same work"):
        workloads.ranking(bench)


def test_losses_that_differ_are_refused(bench, tmp_path):
    bench.code = released.load_code(write_clone(tmp_path / "clone"))  # its losses are not ours
    with pytest.raises(RuntimeError, match="not the same work: loss sdm"):
        workloads.small_step(bench)


def test_equal_losses_are_accepted_and_the_model_attends_as_before(bench):
    chosen = irra.recipe("synthetic", pretrained="none", batch_size=4)
    batch, model = workloads._batch(bench, chosen), irra.build_model(chosen, 10).train()
    attending = irra.build_model(chosen.replace(padding_attention=True), 10).train()  # as the released model
    with torch.no_grad():
        parts = workloads.loss_parts(attending, batch, chosen, "fp32")
    theirs = {f"{name}_loss": part for name, part in parts.items()}
    workloads._check_same_losses(model, batch, chosen, theirs)
    assert model.padding_attention is False
    theirs["mlm_loss"] = theirs["mlm_loss"] * 1.002
    with pytest.raises(RuntimeError, match="loss mlm"):
        workloads._check_same_losses(model, batch, chosen, theirs)


@pytest.mark.parametrize("able", [True, False])
def test_a_step_is_timed_in_the_precisions_that_the_device_has_and_its_arithmetic_counted(able, bench, monkeypatch):
    monkeypatch.setattr(workloads, "computes_bf16", lambda device: able)
    rows = workloads.small_step(bench)
    assert [row.limit for row in rows] == ["bf16", "fp32"]
    if not able:
        imitated, *rows = rows
        assert imitated.ours is None
        assert imitated.note == "this device has no instructions for bf16"
        assert imitated.to_dict({})["met"] is None
    for row in rows:
        assert len(row.ours) == 2
        assert row.other is None
        flops = row.reached * torch.tensor(row.ours).median().item()
        assert 1e8 < flops < 1e11


@pytest.mark.parametrize("arithmetic", [contextlib.nullcontext(), autocast(CPU, "fp32")], ids=["torch", "a step's"])
def test_the_arithmetic_of_a_linear_map_and_its_gradients_is_counted(arithmetic):
    tokens, weight = torch.randn(2, 5, 7, requires_grad=True), torch.randn(11, 7, requires_grad=True)
    with workloads.counting() as counted:
        with arithmetic:
            product = torch.nn.functional.linear(tokens, weight)
        assert counted.get_total_flops() == 2 * 10 * 7 * 11
        product.sum().backward()
    assert counted.get_total_flops() == 3 * 2 * 10 * 7 * 11


def test_peak_memory_is_what_was_held_at_most_since_it_was_forgotten():
    source = (
        "import torch; from irra_core.benchmark import workloads as w; before = w._forget_peak(); "
        "torch.ones(64 * 2**20); print(w._memory('VmHWM') - before)"  # 256 MiB, freed at once
    )
    assert float(workloads._in_child(source)) / 2**20 == pytest.approx(256, abs=16)


def test_ranking_from_features_is_measured_in_a_process_of_its_own(bench):
    seconds, memory = workloads.large_ranking(bench)
    assert all(0 < value < 60 for value in seconds.ours)
    assert all(0 <= value < 0.5 for value in memory.ours)
    with pytest.raises(RuntimeError, match="a measuring process ended with 3"):
        workloads._in_child("raise SystemExit(3)")


def test_planted_features_are_unit_vectors_that_find_their_person_more_often_than_chance():
    query, gallery, query_pids, gallery_pids = workloads._planted(200, 100, 50)
    assert torch.allclose(query.norm(dim=1), torch.ones(200))
    found = irra.retrieval_metrics(query @ gallery.T, query_pids, gallery_pids)
    assert 20 < found["R1"] < 100


def test_a_clock_adds_up_its_calls_and_leaves_no_trace():
    class Sleeper:
        def sleep(self):
            time.sleep(0.02)
            return 7

    sleeper, spent = Sleeper(), {}
    with workloads.clock(sleeper, "sleep", "naps", spent):
        assert [sleeper.sleep(), sleeper.sleep()] == [7, 7]
    sleeper.sleep()
    assert 0.04 <= spent["naps"] < 0.06 + 0.5
    assert vars(sleeper) == {}


def test_evaluation_and_loader_measure_every_repeat(bench):
    whole, share = workloads.evaluation(bench)
    assert len(whole.ours) == len(share.ours) == 2
    assert all(0 < value < 100 for value in share.ours)
    rate, background, waiting = workloads.loading(bench)
    assert len(rate.ours) == len(background.ours) == len(waiting.ours) == 2
    assert background.other == rate.ours
    assert "IRRA_ARRAY_GB" not in os.environ
    assert all(0 < value < 100 for value in waiting.ours)


def test_decoding_fills_a_cache_of_its_own_each_time(bench, tmp_path, monkeypatch):
    monkeypatch.setenv("IRRA_CACHE", str(tmp_path))
    rows = workloads.decoding(bench)
    for rate in rows[0::2]:
        assert len(rate.ours) == len(rate.other) == 2
    assert all(value < 1 for row in rows[1::2] for value in row.ours)
    assert list(tmp_path.iterdir()) == []


def test_rendering_is_measured_in_photos_of_one_core(bench, monkeypatch):
    monkeypatch.setattr(workloads, "make_synthetic", lambda folder, people: drawn.append(people))
    drawn = []
    (row,) = workloads.rendering(bench)
    assert len(drawn) == bench.repeats + 1
    assert len(row.ours) == bench.repeats
    assert len(VIEWS) * max(drawn) < ALONE  # with more photos, worker processes would share the work


def test_the_rows_of_a_gpu_are_not_measured_without_one_and_run_on_any_device(bench):
    bench.sizes = {}
    assert all(row.ours is None for row in workloads.gpu(bench))
    bench.sizes = SMALL | {"captions": 20, "photos": 10, "encoded": 4}
    train, peak, idle, whole, encode = workloads.gpu(bench)
    assert train.ours[0] * whole.ours[0] * 60 / 60 == pytest.approx(20)
    assert 0 < peak.ours[0] < 100
    assert idle.ours is None
    assert len(encode.ours) == 2


def test_what_overlaps_is_covered_once():
    spans = [(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 2.5), (6.0, 6.5)]
    assert workloads.covered(spans) == 3.0 + 1.5
    assert workloads.covered([]) == 0


def test_the_import_is_timed_in_a_fresh_process():
    assert float(workloads._in_child(workloads.IMPORT)) < 5


def test_a_kernel_is_started_and_one_that_cannot_import_is_told():
    assert 0 < workloads._kernel_ready("import json") < 60
    with pytest.raises(RuntimeError, match="No module named 'no_such'"):
        workloads._kernel_ready("import no_such")
