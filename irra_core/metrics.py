"""Similarities + identities → R@k, mAP, mINP and their confidence intervals: pure functions."""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from irra_core.augmentation import full_precision
from irra_core.settings import unknown

METRICS = {"R1": "R1", "R5": "R5", "R10": "R10", "mAP": "AP", "mINP": "INP"}  # score → its value for one query
CUTS = (1, 5, 10)  # the field's R@k
INTERVAL = (0.025, 0.975)  # quantiles of the bootstrap draws: 95 %
SORT_ABOVE = 400  # positives per query: from here one sort of the row costs less than counting for each (measured, CPU)
CHUNK_ENTRIES = {"cpu": 2**22, "cuda": 2**27}  # scores held at once: 16 MiB and 512 MiB in float32
CHUNK_ROWS = 256  # queries scored at once, at least: fewer leave the matrix product slow
BLOCK_ENTRIES = {"cpu": 2**19, "cuda": 2**27}  # scores compared at once: what fits a cache; all that are held


def retrieval_metrics(
    similarity: Float[Tensor, "queries gallery"],
    query_pids: Int[Tensor, " queries"],
    gallery_pids: Int[Tensor, " gallery"],
    absent: str = "error",
) -> dict[str, float]:
    """R1, R5, R10, mAP and mINP in per cent: the averages of `query_metrics`, whose rules hold, over the queries.

    With absent="skip", queries without a result do not count.
    """
    queries = query_metrics(similarity, query_pids, gallery_pids, absent)
    return {name: queries[column].nanmean().item() for name, column in METRICS.items()}


def query_metrics(
    similarity: Num[Tensor, "queries gallery"],
    query_pids: Int[Tensor, " queries"],
    gallery_pids: Int[Tensor, " gallery"],
    absent: str = "error",
) -> dict[str, Num[Tensor, " queries"]]:
    """Per query: R1, R5, R10 (0 or 100), AP and INP in per cent, and `rank`, the place of its first right item.

    With r_1 < r_2 < … < r_n the places of the n gallery items of the query's identity, best score first, places from 1:
        R@k = [r_1 ≤ k],   AP = mean_i i / r_i,   INP = n / r_n
    Ties count against the model: a wrong item with the score of a right one is placed before it. Scores are compared
    in their own precision. Results are float64 (`rank` int64) on the similarity's device, for MPS on the CPU.

    Raises ValueError for scores that are NaN, and for queries whose identity is not in the gallery; with absent="skip"
    those have NaN for results and rank 0. Source: INP is Ye et al., "Deep Learning for Person Re-identification: A
    Survey and Outlook", TPAMI 2021; equal to the released code's rank().
    """
    if similarity.shape != (len(query_pids), len(gallery_pids)):
        raise ValueError(
            f"similarity is {tuple(similarity.shape)}, but there are {len(query_pids)} query_pids and "
            f"{len(gallery_pids)} gallery_pids: one row per query, one column per gallery item"
        )
    if not similarity.is_floating_point():
        similarity = similarity.double()  # whole numbers, each exact up to 2⁵³
    return _ranked(lambda rows: similarity[rows], similarity, query_pids, gallery_pids, None, absent)


def query_metrics_from_features(
    query: Float[Tensor, "queries dim"],
    gallery: Float[Tensor, "gallery dim"],
    query_pids: Int[Tensor, " queries"],
    gallery_pids: Int[Tensor, " gallery"],
    chunk: int | None = None,
    absent: str = "error",
) -> dict[str, Num[Tensor, " queries"]]:
    """`query_metrics` of the similarity query · gallery, which is never held whole: `chunk` queries at a time.

    For the cosine, give L2-normalised features. Half precision is multiplied in float32. Without `chunk`, as many
    queries as a few MiB of scores hold, but at least 256.
    """
    gallery = full_precision(gallery)
    return _ranked(
        lambda rows: full_precision(query[rows]) @ gallery.T, gallery, query_pids, gallery_pids, chunk, absent
    )


def _ranked(
    scores_of: Callable[[Int[Tensor, " rows"]], Float[Tensor, "rows gallery"]],
    like: Tensor,
    query_pids: Int[Tensor, " queries"],
    gallery_pids: Int[Tensor, " gallery"],
    chunk: int | None,
    absent: str,
) -> dict[str, Num[Tensor, " queries"]]:
    """`query_metrics` of the rows that scores_of computes, on the device of `like`, chunk by chunk."""
    device = torch.device("cpu") if like.device.type == "mps" else like.device  # MPS has no float64
    for name, pids in (("query_pids", query_pids), ("gallery_pids", gallery_pids)):
        if pids.is_floating_point():
            raise ValueError(f"{name} are {pids.dtype}, which .long() would round: number the people by integers")
    query_pids, gallery_pids = query_pids.long().to(device), gallery_pids.long().to(device)
    sorted_pids, by_pid = gallery_pids.sort(stable=True)
    first = torch.searchsorted(sorted_pids, query_pids)
    count = torch.searchsorted(sorted_pids, query_pids, right=True) - first
    _check_absent(count, absent)
    held = CHUNK_ENTRIES.get(like.device.type, 2**22) // max(1, len(gallery_pids))
    result = torch.full((len(query_pids), 2), torch.nan, dtype=torch.float64, device=device)
    rank = torch.zeros_like(query_pids)
    order = count.argsort(stable=True)  # equal numbers of positives in a chunk: no padding to compare
    for rows in order[(count == 0).sum() :].split(chunk or max(CHUNK_ROWS, held)):
        if not len(rows):
            continue
        place = torch.arange(int(count[rows].max()), device=device)
        columns = by_pid[first[rows, None] + place.minimum(count[rows, None] - 1)]
        ranks = _positive_ranks(full_precision(scores_of(rows.to(like.device)).to(device)), columns, count[rows], rows)
        precision = ((place + 1) / ranks.double()).masked_fill(place >= count[rows, None], 0)
        total = precision.cumsum(1)[:, -1]  # in order, so that padding, and thus the chunk, changes no bit
        last = ranks.gather(1, count[rows, None] - 1).squeeze(1)
        result[rows] = torch.stack([total / count[rows], count[rows] / last.double()], 1) * 100
        rank[rows] = ranks[:, 0]
    hits = {f"R{k}": torch.where(rank > 0, (rank <= k) * 100.0, torch.nan).double() for k in CUTS}
    return {**hits, "AP": result[:, 0], "INP": result[:, 1], "rank": rank}


def _check_absent(count: Int[Tensor, " queries"], absent: str) -> None:
    """Raise ValueError for queries without a right item, unless they are to be skipped."""
    if absent not in ("error", "skip"):
        raise unknown("absent", absent, ("error", "skip"))
    missing = (count == 0).nonzero().flatten().tolist()
    if missing and absent == "error":
        shown = ", ".join(map(str, missing[:10])) + (", …" if len(missing) > 10 else "")
        raise ValueError(
            f"{len(missing)} of {len(count)} queries have an identity that is not in the gallery (queries {shown}): "
            "drop them, complete the gallery, or leave them out of the averages with absent='skip'"
        )


def _positive_ranks(
    scores: Float[Tensor, "rows gallery"],
    columns: Int[Tensor, "rows positives"],
    count: Int[Tensor, " rows"],
    queries: Int[Tensor, " rows"],
) -> Int[Tensor, "rows positives"]:
    """Places, best first, of the gallery items `columns`; only the first count[i] of row i mean anything.

    Overwrites `scores`. The place of the i-th positive is i plus the number of negatives that score as much or more.
    """
    if scores.amax().isnan():
        bad = queries[scores.isnan().any(1)]
        raise ValueError(
            f"similarity is NaN for query {bad.min()} and perhaps others: the features are not finite; "
            "look at the weights and the loss's history, or compute in float32"
        )
    place = torch.arange(columns.shape[1], device=scores.device)
    padding = place >= count[:, None]
    positives = scores.gather(1, columns).masked_fill(padding, -torch.inf).sort(1, descending=True).values
    scores.scatter_(1, columns, -torch.inf)
    negatives = scores.shape[1] - count[:, None]
    return place + 1 + _at_least(scores, positives).minimum(negatives)  # the minimum: where a positive scores −∞


def _at_least(
    scores: Float[Tensor, "rows gallery"], thresholds: Float[Tensor, "rows positives"]
) -> Int[Tensor, "rows positives"]:
    """How many scores of a row are at least its thresholds."""
    size = scores.shape[1]
    if thresholds.shape[1] > SORT_ABOVE or size >= 2**24:  # ones are summed in float32: exact below 2²⁴
        return size - torch.searchsorted(scores.sort(1).values, thresholds)
    counts = torch.empty(thresholds.T.shape, dtype=scores.dtype, device=scores.device)
    block = max(1, BLOCK_ENTRIES.get(scores.device.type, 2**19) // size)
    reached = torch.empty(block, size, dtype=scores.dtype, device=scores.device)
    for start in range(0, len(scores), block):
        rows = scores[start : start + block]
        for place, threshold in enumerate(thresholds[start : start + block].T):
            ones = torch.ge(rows, threshold[:, None], out=reached[: len(rows)])
            torch.sum(ones, 1, out=counts[place, start : start + block])
    return counts.T.long()


def bootstrap_interval(
    values: Float[Tensor, "*runs queries"] | Float[np.ndarray, "*runs queries"],
    pids: Int[Tensor, " queries"] | Int[np.ndarray, " queries"],
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Low and high end of the 95 % interval of the mean of `values`: the INTERVAL quantiles of bootstrap_means.

    values: one number per query, or for several runs (seeds) one row per run. The interval of a difference between two
    models on the same queries is that of the differences of their values. One identity and one run give an interval
    without width. Raises ValueError for NaN (queries that were skipped).
    """
    values, pids = (x.cpu().numpy() if isinstance(x, Tensor) else np.asarray(x) for x in (values, pids))
    low, high = np.quantile(bootstrap_means(values[..., None], pids, draws, seed)[:, 0], INTERVAL)
    return float(low), float(high)


def bootstrap_means(
    values: Float[np.ndarray, "*runs queries scores"],
    pids: Int[np.ndarray, " queries"],
    draws: int = 2000,
    seed: int = 0,
) -> Float[np.ndarray, "draws scores"]:
    """The mean of each score in each bootstrap draw, which draws identities and runs with replacement.

    Queries of one person resemble each other, so people are drawn, not queries: a draw has as many identities as there
    are, each with all its queries, and as many runs. Few runs make an interval too narrow: of three, the draws see two
    thirds of the variance.
    """
    if np.isnan(values).any():
        raise ValueError(f"{np.isnan(values).sum()} of {values.size} values are NaN: drop those queries first")
    runs = values.reshape(-1, *values.shape[-2:])
    _, person = np.unique(pids, return_inverse=True)
    columns = runs.transpose(0, 2, 1).reshape(-1, len(pids))  # one per run and score
    totals = np.stack([*(np.bincount(person, column) for column in columns), np.bincount(person)], axis=1)
    generator = np.random.default_rng(seed)
    people, weights = (torch.from_numpy(_drawn(generator, draws, size)) for size in (len(totals), len(runs)))
    parts = people.split(max(1, 2**22 // len(totals)))  # torch multiplies: another library's threads would compete
    sums = torch.cat([part.double() @ torch.from_numpy(totals) for part in parts])
    means = (sums[:, :-1] / sums[:, -1:]).unflatten(1, (len(runs), -1))
    return ((means * weights[:, :, None]).sum(1) / len(runs)).numpy()


def _drawn(generator: np.random.Generator, draws: int, size: int) -> Int[np.ndarray, "draws size"]:
    """How often each draw of `size` units, with replacement, has each unit."""
    counts = np.empty((draws, size), dtype=np.int16)
    for row, chosen in zip(counts, generator.integers(size, size=(draws, size), dtype=np.int32), strict=True):
        row[:] = np.bincount(chosen, minlength=size)
    return counts
