"""Similarities of captions and photos → tidy tables: who is confused with whom, over which words, and how surely."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from pandas import DataFrame
from torch import Tensor

from irra_core.metrics import INTERVAL, bootstrap_interval, bootstrap_means
from irra_core.synthetic.people import attributes, stated_attributes

KINDS = ("same person", "near-twin", "somebody else")


def means(values: DataFrame, value: str, by: str | Sequence[str]) -> DataFrame:
    """The mean of a column of per-query values for each group, with its 95 % interval over identities.

    values: columns `value`, `by` and pid. One row a group: by, `value`, `value`_low, `value`_high, and how many rows
    and identities it rests on.
    """
    rows = []
    for key, group in values.groupby(by, sort=False, observed=True):
        numbers, pids = group[value].to_numpy(dtype=np.float64), group["pid"].to_numpy()
        low, high = bootstrap_interval(numbers, pids)
        keys = dict(zip([by], [key])) if isinstance(by, str) else dict(zip(by, key, strict=True))
        rows.append({**keys, value: numbers.mean(), f"{value}_low": low, f"{value}_high": high,
                     "rows": len(group), "identities": group["pid"].nunique()})  # fmt: skip
    return DataFrame(rows)


def by_attribute(queries: DataFrame, annotations: DataFrame, value: str = "R1", least: int = 10) -> DataFrame:
    """`means` of a column of per-query values for the rendered people with each attribute, who are at least `least`.

    Columns attribute and group first (`hair`, `long`), in the order of the mean.
    """
    people = attributes(annotations[annotations.pid.isin(queries.pid)]).drop_duplicates("pid")
    groups = [(pid, *pair) for pid, person in zip(people.pid, people.attributes) for pair in person.items()]
    worn = queries.merge(DataFrame(groups, columns=["pid", "attribute", "group"]), on="pid")
    found = means(worn, value, ["attribute", "group"])
    return found[found.identities >= least].sort_values(value, ignore_index=True)


def pair_kinds(
    query_pids: Int[np.ndarray, " queries"],
    gallery_pids: Int[np.ndarray, " gallery"],
    twins: Mapping[int, Sequence[int]] | None = None,
) -> Int[np.ndarray, "queries gallery"]:
    """What each caption and photo are to each other, as a place in KINDS; near-twins where `twins` names them."""
    kinds = np.where(query_pids[:, None] == gallery_pids, 0, 2)
    for row, pid in enumerate(query_pids.tolist()):
        kinds[row, np.isin(gallery_pids, (twins or {}).get(pid, []))] = 1
    return kinds


def pair_similarities(
    similarity: Float[Tensor, "queries gallery"],
    kinds: Int[np.ndarray, "queries gallery"],
    most: int = 20_000,
    seed: int = 0,
) -> DataFrame:
    """Columns kind and similarity: all pairs of each kind, or `most` of them drawn from the seed."""
    draw = np.random.default_rng(seed)
    found = []
    for place, kind in enumerate(KINDS):
        values = similarity.numpy()[kinds == place]
        if len(values) > most:
            values = draw.choice(values, most, replace=False)
        found += [(kind, value) for value in values.tolist()]
    return DataFrame(found, columns=["kind", "similarity"])


def separation(
    similarity: Float[Tensor, "queries gallery"], kinds: Int[np.ndarray, "queries gallery"], wrong: int = 2
) -> Float[np.ndarray, " queries"]:
    """Each query's chance, in per cent, that a right photo scores above a wrong one of that kind (a tie is half).

    The area under the ROC curve of one query: 50 is blind. NaN for a query without photos of that kind.
    """
    values = np.full(len(kinds), np.nan)
    for row, (scores, kind) in enumerate(zip(similarity.numpy(), kinds, strict=True)):
        right, other = scores[kind == 0], np.sort(scores[kind == wrong])
        if len(right) and len(other):
            below = np.searchsorted(other, right, "left") + np.searchsorted(other, right, "right")
            values[row] = 100 * below.mean() / (2 * len(other))
    return values


def answers(
    similarity: Float[Tensor, "queries gallery"], queries: DataFrame, photos: DataFrame, temperature: float
) -> DataFrame:
    """The first answer to each query: the queries' columns and found_pid, found_image, right, confidence and margin.

    similarity: cosines, rows those of `queries`, columns those of `photos`. confidence is what the softmax at this
    temperature gives to all photos of the person found (between 0 and 1), margin how far the best wrong photo scores
    above the best right one: positive where the answer is wrong.
    """
    shown, asked = (torch.tensor(table["pid"].to_numpy()) for table in (photos, queries))
    best = similarity.argmax(1)
    shares = (similarity.double() / temperature).softmax(1)
    confidence = (shares * (shown[best][:, None] == shown)).sum(1)
    same = asked[:, None] == shown
    wrong, right = (similarity.masked_fill(hidden, -torch.inf).amax(1) for hidden in (same, ~same))
    return queries.assign(
        found_pid=shown[best].numpy(),
        found_image=photos["image_id"].to_numpy()[best.numpy()],
        right=(shown[best] == asked).numpy(),
        confidence=confidence.numpy(),
        margin=(wrong - right).numpy(),
    )


def contradictions(found: DataFrame, annotations: DataFrame) -> DataFrame:
    """Which words the wrong answers turn on: a row for each attribute that the caption of a wrong answer states.

    found: `answers` on rendered people; annotations: the table with the photos searched. Columns: query (row of found),
    pid, attribute, contradicted (the person found is otherwise), chance (the share of all wrong people who are). An
    attribute that the model reads is contradicted less often than by chance.
    """
    people = attributes(annotations).drop_duplicates("pid").set_index("pid")["attributes"]
    wrong = found[~found["right"]]
    rows = []
    for query, stated in zip(wrong.itertuples(), stated_attributes(wrong), strict=True):
        others = [person for pid, person in people.items() if pid != query.pid]
        for name, value in stated.items():
            contradicted = people[query.found_pid].get(name) != value
            chance = np.mean([person.get(name) != value for person in others])
            rows.append((query.Index, query.pid, name, contradicted, chance))
    return DataFrame(rows, columns=["query", "pid", "attribute", "contradicted", "chance"])


def length_groups(captions: Sequence[str], groups: int = 5) -> list[str]:
    """For each caption the range of word counts that it belongs to, as `12 to 15`; about as many captions in each."""
    words = np.array([len(caption.split()) for caption in captions])
    cuts = np.unique(np.quantile(words, np.linspace(0, 1, groups + 1)[1:-1], method="lower"))
    place = np.searchsorted(cuts, words, "left")
    ends = {k: (words[place == k].min(), words[place == k].max()) for k in np.unique(place)}
    return [f"{low} to {high}" if low < high else f"{low}" for low, high in (ends[k] for k in place)]


def reliability(found: DataFrame, bins: int = 10) -> DataFrame:
    """How often answers of like confidence are right: a row a bin of equal width that holds any.

    found: columns pid, confidence (0 to 1) and right. Columns: confidence (the bin's mean), right with its 95 %
    interval over identities (right_low, right_high), all in per cent, and rows, identities.
    """
    shown = found.assign(right=100.0 * found["right"], bin=_bins(found["confidence"].to_numpy(), bins))
    table = means(shown.sort_values("bin"), "right", "bin")
    return table.assign(confidence=100 * shown.groupby("bin")["confidence"].mean().loc[table["bin"]].to_numpy())


def _bins(confidence: Float[np.ndarray, " queries"], bins: int) -> Int[np.ndarray, " queries"]:
    return np.minimum((confidence * bins).astype(np.int64), bins - 1)


def calibration_error(found: DataFrame, bins: int = 10, draws: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Expected calibration error in per cent with its 95 % interval over identities: value, low, high.

    found: columns pid, confidence and right. The mean over bins of equal width, by their number of answers, of
    |share right − mean confidence|. Noise only adds to it, so the interval leans upwards.
    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, equation 3.
    """
    confidence, right = found["confidence"].to_numpy(), found["right"].to_numpy(dtype=np.float64)
    surplus = np.zeros((len(found), bins))  # each answer's surplus of confidence, in the column of its bin
    surplus[np.arange(len(found)), _bins(confidence, bins)] = confidence - right
    errors = np.abs(bootstrap_means(surplus, found["pid"].to_numpy(), draws, seed)).sum(1)
    low, high = np.quantile(errors, INTERVAL)
    return tuple(100 * float(value) for value in (np.abs(surplus.mean(0)).sum(), low, high))


def calibrated_temperature(
    similarity: Float[Tensor, "queries gallery"], queries: DataFrame, photos: DataFrame
) -> float:
    """The temperature at which the confidence of the first answers is nearest to whether they are right.

    The one of 49 between 0.002 and 0.5, each 12 % above the last, with the least mean square of confidence − right
    (Brier's score). Fit it on val, judge it on test.
    """
    grid = np.geomspace(0.002, 0.5, 49).tolist()
    tried = [answers(similarity, queries, photos, temperature) for temperature in grid]
    return grid[int(np.argmin([((each["confidence"] - each["right"]) ** 2).mean() for each in tried]))]
