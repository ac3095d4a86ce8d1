"""Tables about similarities: against pairs counted one by one, and cases whose answer is plain."""

import math

import numpy as np
import pytest
import torch
from pandas import DataFrame

from irra_core.analysis import confusions as analysis
from irra_core.annotations import load_annotations
from irra_core.metrics import bootstrap_interval
from irra_core.synthetic.people import attributes, make_synthetic


@pytest.fixture(scope="module")
def case():
    """Similarities in tenths, so that there are ties; 12 queries of 6 people, 9 photos of the same."""
    draw = np.random.default_rng(0)
    queries = DataFrame({"pid": np.repeat(np.arange(6), 2)})
    photos = DataFrame({"pid": [0, 0, 1, 2, 3, 3, 4, 5, 5], "image_id": np.arange(100, 109)})
    similarity = torch.tensor(draw.integers(-5, 10, (12, 9)) / 10)
    return similarity, queries, photos, {0: [1, 2], 1: [0], 2: [0]}


def test_means_are_each_groups_mean_with_the_interval_over_its_identities():
    table = DataFrame({"pid": [1, 1, 2, 3, 4], "x": [0.0, 1, 5, 2, 3], "by": list("aabab"), "who": list("uvuvu")})
    found = analysis.means(table, "x", "by").set_index("by")
    for name, rows in table.groupby("by"):
        assert found.x[name] == pytest.approx(rows.x.sum() / len(rows))
        assert (found.x_low[name], found.x_high[name]) == bootstrap_interval(rows.x.to_numpy(), rows.pid.to_numpy())
        assert (found.rows[name], found.identities[name]) == (len(rows), len(set(rows.pid)))
    pairs = analysis.means(table, "x", ["by", "who"])
    assert list(zip(pairs.by, pairs.who, pairs.x, strict=True)) == [
        ("a", "u", 0.0), ("a", "v", 1.5), ("b", "u", 4.0),
    ]  # fmt: skip


def test_pair_kinds_tell_same_person_near_twin_and_somebody_else(case):
    _, queries, photos, twins = case
    kinds = analysis.pair_kinds(queries.pid.to_numpy(), photos.pid.to_numpy(), twins)
    for row, asked in enumerate(queries.pid):
        for column, shown in enumerate(photos.pid):
            expected = "same person" if asked == shown else "near-twin" if shown in twins.get(asked, []) else None
            assert analysis.KINDS[kinds[row, column]] == (expected or "somebody else")
    assert set(analysis.pair_kinds(queries.pid.to_numpy(), photos.pid.to_numpy()).flat) == {0, 2}


def test_pair_similarities_are_all_pairs_of_a_kind_or_so_many_of_them(case):
    similarity, queries, photos, twins = case
    kinds = analysis.pair_kinds(queries.pid.to_numpy(), photos.pid.to_numpy(), twins)
    found = analysis.pair_similarities(similarity, kinds)
    for place, kind in enumerate(analysis.KINDS):
        expected = [similarity[r, c].item() for r in range(12) for c in range(9) if kinds[r, c] == place]
        assert sorted(found[found.kind == kind].similarity) == sorted(expected)
    few = analysis.pair_similarities(similarity, kinds, most=5)
    assert few.kind.value_counts().to_dict() == dict.fromkeys(analysis.KINDS, 5)


@pytest.mark.parametrize("wrong", [1, 2])
def test_separation_counts_the_pairs_in_which_the_right_photo_is_above_and_half_the_ties(case, wrong):
    similarity, queries, photos, twins = case
    kinds = analysis.pair_kinds(queries.pid.to_numpy(), photos.pid.to_numpy(), twins)
    found = analysis.separation(similarity, kinds, wrong)
    for row in range(12):
        pairs = [
            (float(similarity[row, a] > similarity[row, b]) + float(similarity[row, a] == similarity[row, b]) / 2)
            for a in range(9) for b in range(9) if kinds[row, a] == 0 and kinds[row, b] == wrong
        ]  # fmt: skip
        assert math.isnan(found[row]) if not pairs else found[row] == pytest.approx(100 * sum(pairs) / len(pairs))
    assert np.isnan(found).any() == (wrong == 1)  # not everybody has a near-twin


def test_answers_are_the_first_photos_with_their_persons_share_of_the_softmax(case):
    similarity, queries, photos, _ = case
    similarity = similarity + torch.arange(9) / 1000  # no ties
    found = analysis.answers(similarity, queries, photos, 0.2)
    for row, answer in enumerate(found.itertuples()):
        scores = similarity[row].tolist()
        best = scores.index(max(scores))
        assert (answer.found_pid, answer.found_image) == (photos.pid[best], photos.image_id[best])
        assert answer.right == (photos.pid[best] == answer.pid)
        weights = [math.exp(score / 0.2) for score in scores]
        share = sum(w for w, pid in zip(weights, photos.pid, strict=True) if pid == photos.pid[best]) / sum(weights)
        assert answer.confidence == pytest.approx(share, rel=1e-9)
        right = max(s for s, pid in zip(scores, photos.pid, strict=True) if pid == answer.pid)
        wrong = max(s for s, pid in zip(scores, photos.pid, strict=True) if pid != answer.pid)
        assert answer.margin == pytest.approx(wrong - right)
        assert (answer.margin > 0) == (not answer.right)


def test_scores_by_attribute_are_those_of_the_people_who_have_it(tmp_path):
    make_synthetic(tmp_path, people=24)
    annotations = load_annotations("synthetic", tmp_path)
    queries = annotations[annotations.split == "train"].reset_index(drop=True)
    queries["R1"] = np.random.default_rng(0).choice([0.0, 100.0], len(queries))
    looks = {row.pid: row.attributes for row in attributes(annotations).itertuples()}
    found = analysis.by_attribute(queries, annotations, least=3)
    for row in found.itertuples():
        rows = [q for q in queries.itertuples() if looks[q.pid].get(row.attribute) == row.group]
        assert (row.R1, row.rows) == (pytest.approx(np.mean([q.R1 for q in rows])), len(rows))
        assert row.identities == len({q.pid for q in rows}) >= 3
    counted = {pair for pid in set(queries.pid) for pair in looks[pid].items()}
    holders = {pair: sum(looks[pid].get(pair[0]) == pair[1] for pid in set(queries.pid)) for pair in counted}
    assert set(zip(found.attribute, found.group)) == {pair for pair, people in holders.items() if people >= 3}


def test_contradictions_compare_what_the_caption_states_with_the_person_found(tmp_path):
    make_synthetic(tmp_path, people=24)
    test = load_annotations("synthetic", tmp_path).query("split == 'test'").reset_index(drop=True)
    looks = {row.pid: row.attributes for row in attributes(test).itertuples()}
    people = list(looks)
    found = test.assign(right=False, found_pid=[people[(people.index(pid) + 1) % len(people)] for pid in test.pid])
    found.loc[0, ["right", "found_pid"]] = [True, found.pid[0]]
    table = analysis.contradictions(found, test)
    assert set(table["query"]) == set(range(1, len(test)))
    for row in table.itertuples():
        person, other = looks[row.pid], looks[found.found_pid[row.query]]
        assert row.contradicted == (other.get(row.attribute) != person[row.attribute])
        others = [look for pid, look in looks.items() if pid != row.pid]
        assert row.chance == pytest.approx(
            sum(look.get(row.attribute) != person[row.attribute] for look in others) / len(others)
        )
    assert table.contradicted.any()
    assert not table.contradicted.all()


def test_length_groups_hold_about_as_many_captions_each_and_do_not_overlap():
    captions = [" ".join(["word"] * n) for n in [3, 9, 4, 4, 7, 8, 3, 5, 6, 9, 12, 30]]
    groups = analysis.length_groups(captions, groups=3)
    ends = sorted({tuple(int(n) for n in name.split(" to ")) for name in groups})
    assert ends == [(3, 4), (5, 8), (9, 30)]
    for caption, name in zip(captions, groups, strict=True):
        low, high = (int(n) for n in name.split(" to "))
        assert low <= len(caption.split()) <= high
    assert [groups.count(f"{low} to {high}") for low, high in ends] == [4, 4, 4]
    assert set(analysis.length_groups(["one two"] * 5)) == {"2"}


@pytest.fixture
def answered():
    draw = np.random.default_rng(1)
    confidence = draw.uniform(size=400)
    confidence[0] = 1.0
    return DataFrame({"pid": draw.integers(0, 40, 400), "confidence": confidence, "right": draw.random(400) < 0.5})


def test_reliability_and_its_error_are_those_of_answers_sorted_into_bins_by_hand(answered):
    table, total = analysis.reliability(answered, bins=10).to_dict("records"), 0.0
    for place in range(10):
        top = place == 9
        rows = [
            r
            for r in answered.itertuples()
            if place / 10 <= r.confidence < (place + 1) / 10 or (top and r.confidence == 1)
        ]
        right, sure = sum(r.right for r in rows) / len(rows), sum(r.confidence for r in rows) / len(rows)
        assert table[place]["right"] == pytest.approx(100 * right)
        assert table[place]["confidence"] == pytest.approx(100 * sure)
        assert table[place]["rows"] == len(rows)
        total += len(rows) / 400 * abs(right - sure)
    value, low, high = analysis.calibration_error(answered)
    assert value == pytest.approx(100 * total)
    assert low < high


def test_the_interval_of_the_calibration_error_is_that_of_people_drawn_again(answered):
    _, low, high = analysis.calibration_error(answered, bins=4, draws=50, seed=3)
    groups = [rows for _, rows in answered.groupby("pid")]
    draw, errors = np.random.default_rng(3).integers(len(groups), size=(50, len(groups)), dtype=np.int32), []
    for people in draw:
        rows = [row for place in people for row in groups[place].itertuples()]
        bins = [[r for r in rows if min(int(r.confidence * 4), 3) == k] for k in range(4)]
        errors.append(sum(abs(sum(r.confidence - r.right for r in each)) for each in bins) / len(rows))
    assert (low, high) == pytest.approx(tuple(100 * np.quantile(errors, [0.025, 0.975])))


def test_answers_that_are_right_as_often_as_they_say_have_a_small_error():
    draw = np.random.default_rng(0)
    confidence = draw.uniform(size=20_000)
    honest = DataFrame({"pid": np.arange(20_000), "confidence": confidence, "right": draw.random(20_000) < confidence})
    assert analysis.calibration_error(honest, draws=20)[0] < 2
    assert analysis.calibration_error(honest.assign(confidence=1.0), draws=20)[0] == pytest.approx(50, abs=1)


@pytest.mark.parametrize("true", [0.03, 0.2])
def test_the_calibrated_temperature_is_the_one_by_which_the_answers_were_drawn(true):
    draw = torch.Generator().manual_seed(0)
    similarity = 0.3 * torch.randn(3000, 12, generator=draw, dtype=torch.float64)
    pids = torch.multinomial((similarity / true).softmax(1), 1, generator=draw)[:, 0]
    photos = DataFrame({"pid": np.arange(12), "image_id": np.arange(12)})
    found = analysis.calibrated_temperature(similarity, DataFrame({"pid": pids.numpy()}), photos)
    assert found == pytest.approx(true, rel=0.25)
