"""R@k, mAP and mINP against the released code's numbers and a slow ranking; intervals against a slow bootstrap."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from irra_core import metrics
from irra_core.metrics import (
    bootstrap_interval,
    bootstrap_means,
    query_metrics,
    query_metrics_from_features,
    retrieval_metrics,
)

REFERENCE = np.load(Path(__file__).parent / "reference" / "irra_reference.npz")
NAMES = ["R1", "R5", "R10", "mAP", "mINP"]
pytestmark = pytest.mark.filterwarnings("error")  # torch only warns where an output of the wrong size is resized
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])


def reference(case):
    """Similarity, query and gallery identities of a case of the released code's numbers."""
    return [torch.from_numpy(REFERENCE[f"rank{case}_{name}"]) for name in ("sim", "query_pids", "gallery_pids")]


def gallery(queries=40, items=60, people=12, decimals=None, dtype=torch.float64, seed=0):
    """Random scores, rounded to `decimals` so that they tie, and identities of which everyone is in both."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(queries, items, dtype=torch.float64, generator=generator)
    pids = [torch.cat([torch.arange(people), torch.randint(people, (n - people,), generator=generator)]) * 7 + 3
            for n in (queries, items)]  # fmt: skip
    shuffled = [pid[torch.randperm(len(pid), generator=generator)] for pid in pids]
    return (scores if decimals is None else scores.round(decimals=decimals)).to(dtype), *shuffled


def slow_query_metrics(similarity, query_pids, gallery_pids):
    """One query at a time: sort the gallery, the wrong items first among equals, and read off the right places."""
    rows = []
    for scores, pid in zip(similarity.tolist(), query_pids.tolist(), strict=True):
        ranking = sorted(zip(scores, gallery_pids.tolist(), strict=True), key=lambda item: (-item[0], item[1] == pid))
        places = [place for place, (_, other) in enumerate(ranking, start=1) if other == pid]
        hits = {f"R{k}": 100.0 * (places[0] <= k) for k in (1, 5, 10)}
        precision = [found / place for found, place in enumerate(places, start=1)]
        rows.append({**hits, "AP": 100 * sum(precision) / len(places), "INP": 100 * precision[-1], "rank": places[0]})
    return {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in rows[0]}


def assert_equal(got, expected):
    assert list(got) == list(expected)
    for name in got:
        torch.testing.assert_close(got[name].cpu().double(), expected[name], rtol=0, atol=1e-9)


@DEVICES
@pytest.mark.parametrize("case", range(3))
def test_r1_to_r10_map_and_minp_are_the_released_ones(case, device):
    similarity, query_pids, gallery_pids = (tensor.to(device) for tensor in reference(case))
    queries = query_metrics(similarity, query_pids, gallery_pids)
    expected = REFERENCE[f"rank{case}_cmc"]
    recall = [(queries["rank"] <= k).double().mean().item() * 100 for k in range(1, 11)]
    assert recall == pytest.approx(expected.tolist(), abs=1e-4)
    expected = [*expected[[0, 4, 9]], REFERENCE[f"rank{case}_mAP"], REFERENCE[f"rank{case}_mINP"]]
    found = retrieval_metrics(similarity, query_pids, gallery_pids)
    assert found == pytest.approx(dict(zip(NAMES, map(float, expected), strict=True)), abs=1e-4)


@DEVICES
@pytest.mark.parametrize("transposed", [False, True], ids=["text to image", "image to text"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decimals", [None, 1, 0], ids=["few ties", "ties", "mostly ties"])
def test_every_query_has_the_metrics_of_the_slow_ranking(dtype, decimals, transposed, device):
    similarity, query_pids, gallery_pids = gallery(dtype=dtype, decimals=decimals)
    if transposed:
        similarity, query_pids, gallery_pids = similarity.T, gallery_pids, query_pids
    expected = slow_query_metrics(similarity, query_pids, gallery_pids)
    assert_equal(query_metrics(similarity.to(device), query_pids, gallery_pids), expected)


@pytest.mark.parametrize("case", range(3))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_reference_scores_transposed_have_the_metrics_of_the_slow_ranking(case, dtype):
    similarity, query_pids, gallery_pids = reference(case)
    known = torch.isin(gallery_pids, query_pids)
    back = similarity.to(dtype).T[known]
    expected = slow_query_metrics(back, gallery_pids[known], query_pids)
    assert_equal(query_metrics(back, gallery_pids[known], query_pids), expected)


def test_a_tie_counts_against_the_model():
    similarity = torch.tensor([[0.5, 0.5, 0.5, 0.1], [0.9, 0.9, 0.2, 0.2]])
    queries = query_metrics(similarity, torch.tensor([1, 2]), torch.tensor([1, 2, 3, 1]))
    assert queries["rank"].tolist() == [3, 2]
    assert queries["R1"].tolist() == [0, 0]
    assert queries["R5"].tolist() == [100, 100]
    assert queries["AP"].tolist() == pytest.approx([(1 / 3 + 2 / 4) / 2 * 100, 50])
    assert queries["INP"].tolist() == pytest.approx([50, 50])


def test_a_model_that_says_the_same_of_everything_finds_nothing():
    similarity, query_pids, gallery_pids = gallery(people=6, items=60)
    found = retrieval_metrics(torch.zeros_like(similarity), query_pids, gallery_pids)
    assert found["R1"] == found["R10"] == 0


def test_scores_that_differ_only_in_float64_are_told_apart():
    similarity = torch.tensor([[0.5, 0.5 + 1e-12]], dtype=torch.float64)
    assert query_metrics(similarity, torch.tensor([1]), torch.tensor([0, 1]))["rank"].item() == 1
    assert query_metrics(similarity.float(), torch.tensor([1]), torch.tensor([0, 1]))["rank"].item() == 2


def test_whole_numbers_as_scores_are_told_apart_above_what_float32_holds():
    scores = torch.tensor([[2**24, 2**24 + 1], [2**24 + 1, 2**24]])
    found = query_metrics(scores, torch.tensor([0, 0]), torch.tensor([1, 0]))
    assert found["rank"].tolist() == [1, 2]


def test_numbers_of_people_that_would_be_rounded_are_refused():
    lines = (
        "import torch; from irra_core.metrics import query_metrics\n"  # in a process without type checks
        "query_metrics(torch.zeros(1, 2), torch.tensor([0.5]), torch.tensor([0.7, 0.5]))"
    )
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert "ValueError: query_pids are torch.float32, which .long() would round: number the people by" in done.stderr


def test_the_order_of_queries_and_gallery_and_a_rising_function_of_the_scores_change_nothing():
    similarity, query_pids, gallery_pids = gallery(decimals=1)
    rows, columns = (torch.randperm(n, generator=torch.Generator().manual_seed(n)) for n in (40, 60))
    shuffled = (similarity * 3 + 1)[rows][:, columns]
    got = query_metrics(shuffled, query_pids[rows], gallery_pids[columns])
    expected = query_metrics(similarity, query_pids, gallery_pids)
    assert all(torch.equal(got[name], expected[name][rows]) for name in expected)


@pytest.mark.parametrize("decimals", [None, 1, 0])
@pytest.mark.parametrize("limit", ["SORT_ABOVE", "CHUNK_ENTRIES", "BLOCK_ENTRIES"])
def test_sorting_rows_small_chunks_and_small_blocks_give_the_same_bits(limit, decimals, monkeypatch):
    arguments = gallery(decimals=decimals)
    arguments[0][::3, ::4] = -torch.inf
    expected = query_metrics(*arguments)
    assert_equal(expected, slow_query_metrics(*arguments))
    monkeypatch.setattr(metrics, limit, 0 if limit == "SORT_ABOVE" else {"cpu": 420})  # 420: 7 rows of 60
    monkeypatch.setattr(metrics, "CHUNK_ROWS", 1)
    got = query_metrics(*arguments)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@DEVICES
@pytest.mark.parametrize("chunk", [None, 1, 7, 40, 1000])
def test_features_in_chunks_have_the_metrics_of_the_whole_similarity(chunk, device):
    _, query_pids, gallery_pids = gallery()
    numbers = torch.Generator().manual_seed(1)
    query = torch.randint(-3, 4, (40, 8), generator=numbers).float()  # whole numbers: the product is exact in any chunk
    items = torch.randint(-3, 4, (60, 8), generator=numbers).float()
    expected = slow_query_metrics(query @ items.T, query_pids, gallery_pids)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        got = query_metrics_from_features(
            query.to(device, dtype), items.to(device, dtype), query_pids, gallery_pids, chunk=chunk
        )
        assert_equal(got, expected)


def test_features_that_carry_a_gradient_are_ranked_like_any_others():
    similarity, query_pids, gallery_pids = gallery()
    numbers = torch.Generator().manual_seed(1)
    leaves = [torch.randn(n, 8, generator=numbers, requires_grad=True) for n in similarity.shape]
    query, items = (F.normalize(leaf, dim=1) for leaf in leaves)
    got = query_metrics_from_features(query, items, query_pids, gallery_pids)
    assert_equal(got, slow_query_metrics(query @ items.T, query_pids, gallery_pids))
    assert not got["AP"].requires_grad


def test_queries_without_anyone_in_the_gallery_are_an_error_that_names_them():
    similarity, query_pids, gallery_pids = gallery()
    query_pids[[4, 11]] = 999
    for rank in (retrieval_metrics, query_metrics):
        with pytest.raises(ValueError, match=r"2 of 40 queries have an identity .* \(queries 4, 11\): drop them"):
            rank(similarity, query_pids, gallery_pids)
    with pytest.raises(ValueError, match="absent 'ignore' is unknown: accepted are error, skip"):
        query_metrics(similarity, query_pids, gallery_pids, absent="ignore")


@pytest.mark.parametrize(("many", "said"), [(10, "7, 8, 9)"), (11, "7, 8, 9, …)")])
def test_of_many_queries_without_anyone_the_first_ten_are_named(many, said):
    similarity, query_pids, gallery_pids = gallery()
    query_pids[:many] = 999
    with pytest.raises(ValueError, match=rf"{many} of 40 queries .* \(queries 0, 1, .*{re.escape(said)}"):
        query_metrics(similarity, query_pids, gallery_pids)


def test_skipped_queries_have_no_result_and_leave_the_averages_to_the_others():
    similarity, query_pids, gallery_pids = gallery()
    query_pids[[4, 11]] = 999
    kept = query_pids != 999
    queries = query_metrics(similarity, query_pids, gallery_pids, absent="skip")
    assert all(queries[name][~kept].isnan().all() for name in ("R1", "R5", "R10", "AP", "INP"))
    assert queries["rank"][~kept].tolist() == [0, 0]
    expected = retrieval_metrics(similarity[kept], query_pids[kept], gallery_pids)
    assert retrieval_metrics(similarity, query_pids, gallery_pids, absent="skip") == pytest.approx(expected)


def test_the_averages_are_means_over_the_queries():
    arguments = gallery()
    slow = slow_query_metrics(*arguments)
    expected = [slow[name].mean().item() for name in ("R1", "R5", "R10", "AP", "INP")]
    assert retrieval_metrics(*arguments) == pytest.approx(dict(zip(NAMES, expected, strict=True)))


def test_a_score_that_is_no_number_is_an_error_that_names_the_query():
    similarity, query_pids, gallery_pids = gallery()
    similarity[23, 5] = torch.nan
    with pytest.raises(ValueError, match="NaN for query 23"):
        query_metrics(similarity, query_pids, gallery_pids)


def test_a_similarity_turned_the_wrong_way_is_an_error_that_names_the_shapes():
    similarity, query_pids, gallery_pids = gallery()
    unchecked = query_metrics.__wrapped__ if hasattr(query_metrics, "__wrapped__") else query_metrics
    with pytest.raises(ValueError, match=r"similarity is \(60, 40\), but there are 40 query_pids and 60 gallery_pids"):
        unchecked(similarity.T, query_pids, gallery_pids)
    with pytest.raises(ValueError, match=r"similarity is \(40, 60\), but there are 60 query_pids and 40 gallery_pids"):
        unchecked(similarity, gallery_pids, query_pids)


def slow_interval(values, pids, draws, seed):
    """The same draws, one resampled query at a time."""
    people, numbers, means = sorted(set(pids)), np.random.default_rng(seed), []
    for person in numbers.integers(len(people), size=(draws, len(people)), dtype=np.int32):
        drawn = [value for one in person for value, pid in zip(values, pids, strict=True) if pid == people[one]]
        means.append(sum(drawn) / len(drawn))
    means.sort()
    ends = []
    for share in (0.025, 0.975):
        place = share * (draws - 1)
        below = int(place)
        ends.append(means[below] + (place - below) * (means[min(below + 1, draws - 1)] - means[below]))
    return ends


def test_the_interval_is_that_of_the_slow_bootstrap_over_identities():
    numbers = torch.Generator().manual_seed(0)
    values, pids = (
        torch.rand(30, dtype=torch.float64, generator=numbers) * 100,
        torch.randint(8, (30,), generator=numbers) * 5,
    )
    expected = slow_interval(values.tolist(), pids.tolist(), draws=200, seed=4)
    assert bootstrap_interval(values, pids, draws=200, seed=4) == pytest.approx(expected, rel=1e-12)
    assert bootstrap_interval(values.numpy(), pids.numpy(), draws=200, seed=4) == pytest.approx(expected, rel=1e-12)
    assert bootstrap_interval(values, pids, draws=200, seed=5) != pytest.approx(expected, rel=1e-3)
    assert bootstrap_interval(values, pids) == bootstrap_interval(values, pids, draws=2000, seed=0)


def test_the_draws_of_several_scores_are_those_of_each_alone():
    numbers = np.random.default_rng(0)
    values, pids = numbers.random((30, 3)) * (1, 10, 100), numbers.integers(8, size=30)
    ends = np.quantile(bootstrap_means(values, pids), metrics.INTERVAL, axis=0).T
    alone = [bootstrap_interval(column, pids, draws=2000, seed=0) for column in values.T]
    assert ends.tolist() == [pytest.approx(each, rel=1e-12) for each in alone]
    values[2, 1] = np.nan
    with pytest.raises(ValueError, match="1 of 90 values are NaN"):
        bootstrap_means(values, pids)


def slow_interval_of_runs(values, pids, draws, seed=0):
    """The percentile interval one draw, one run, one person, one query at a time."""
    people = sorted(set(pids))
    generator = np.random.default_rng(seed)
    drawn_people = generator.integers(len(people), size=(draws, len(people)), dtype=np.int32)
    drawn_runs = generator.integers(len(values), size=(draws, len(values)), dtype=np.int32)
    means = []
    for draw in range(draws):
        picked = [
            values[run][query]
            for run in drawn_runs[draw]
            for place in drawn_people[draw]
            for query in range(len(pids))
            if pids[query] == people[place]
        ]
        means.append(sum(picked) / len(picked))
    return np.quantile(means, 0.025), np.quantile(means, 0.975)


def test_the_interval_over_runs_and_identities_is_that_of_plain_loops():
    noise = np.random.default_rng(1)
    pids = np.array([7, 7, 7, 2, 2, 9, 4, 4, 4, 4])
    values = noise.normal(size=(3, 10)) + np.array([[0.0], [1.0], [-2.0]])
    expected = slow_interval_of_runs(values, pids, 200)
    assert bootstrap_interval(values, pids, draws=200) == pytest.approx(expected, rel=1e-12)


def test_one_run_leaves_the_interval_over_identities():
    values, pids = np.random.default_rng(2).normal(size=(1, 40)), np.repeat(np.arange(10), 4)
    assert bootstrap_interval(values, pids) == pytest.approx(bootstrap_interval(values[0], pids), rel=1e-12)


def test_runs_that_disagree_widen_the_interval():
    values, pids = np.random.default_rng(2).normal(size=(3, 400)), np.repeat(np.arange(100), 4)
    apart = values + np.array([[-1.0], [0.0], [1.0]])
    ends = [bootstrap_interval(each, pids) for each in (values, apart)]
    assert ends[1][1] - ends[1][0] > 2 * (ends[0][1] - ends[0][0])


def test_the_interval_of_a_difference_is_narrower_than_those_of_two_models_that_err_alike():
    numbers = np.random.default_rng(0)
    pids = np.repeat(np.arange(100), 4)
    hard = numbers.normal(size=100)[pids] * 20
    one, other = (50 + gain + hard + numbers.normal(size=400) for gain in (0.0, 1.0))
    low, high = bootstrap_interval(other - one, pids)
    assert 0 < low < 1 < high
    assert bootstrap_interval(one, pids)[1] > bootstrap_interval(other, pids)[0]  # unpaired, they overlap


def test_the_interval_holds_the_truth_about_95_times_in_100_where_people_differ():
    numbers = np.random.default_rng(0)
    pids = np.repeat(np.arange(80), 5)
    held = {"people": 0, "queries": 0}
    for _ in range(300):
        values = numbers.normal(size=80)[pids] + 0.3 * numbers.normal(size=400)  # true mean 0
        for unit, group in (("people", pids), ("queries", np.arange(400))):
            low, high = bootstrap_interval(values, group, draws=200)
            held[unit] += low <= 0 <= high
    assert 270 <= held["people"] <= 297  # 90 to 99 in 100
    assert held["queries"] < 210  # queries resampled on their own would claim too much


def test_one_identity_gives_an_interval_without_width_and_a_missing_value_an_error():
    values = np.array([0.0, 100.0, 100.0])
    assert bootstrap_interval(values, np.zeros(3, dtype=int)) == pytest.approx((200 / 3, 200 / 3))
    with pytest.raises(ValueError, match="1 of 3 values are NaN: drop those queries first"):
        bootstrap_interval(np.array([0.0, np.nan, 1.0]), np.arange(3))
