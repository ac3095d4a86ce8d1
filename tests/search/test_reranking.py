"""Re-ranking: against slow references in loops, and its behaviour in a gallery's search."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import irra_core as irra
from irra_core.retrieval import Gallery
from irra_core.search import reranking
from irra_core.search.reranking import CANDIDATES, hidden_words, reciprocal_scores, word_scores
from irra_core.text import MASK_ID


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def slow_reciprocal(cosines, features, k1=6, k2=2, share=0.6):
    """Section 3 of the paper with sets and loops, one photo at a time."""
    count, similarity = len(cosines), features @ features.T
    nearest = [sorted(range(count), key=lambda j, i=i: (-similarity[i, j], j)) for i in range(count)]

    def reciprocal(i, k):
        return {i} | {j for j in nearest[i][: k + 1] if i in nearest[j][: k + 1]}

    described = []
    for i in range(count):
        near = reciprocal(i, k1)
        members = set(near)
        for j in near:
            closest = reciprocal(j, k1 // 2)
            if len(near & closest) >= 2 / 3 * len(closest):
                members |= closest
        weights = {j: math.exp(similarity[i, j] - 1) for j in members}
        described.append({j: weight / sum(weights.values()) for j, weight in weights.items()})
    best = sorted(range(count), key=lambda j: (-cosines[j], j))[:k1]
    total = sum(math.exp(cosines[j] - 1) for j in best)
    query = {j: math.exp(cosines[j] - 1) / total for j in best}
    scores = []
    for i in range(count):
        mean = {j: sum(described[n].get(j, 0) for n in nearest[i][:k2]) / k2 for j in range(count)}
        least = sum(min(query.get(j, 0), mean[j]) for j in range(count))
        most = sum(max(query.get(j, 0), mean[j]) for j in range(count))
        scores.append(share * cosines[i] + (1 - share) * least / most)
    return np.array(scores)


@pytest.mark.parametrize("count", [60, 4, 1], ids=["many", "fewer than neighbours", "one"])
def test_reciprocal_scores_are_the_papers_sets(count):
    draw = np.random.default_rng(0)
    people = draw.standard_normal((15, 12))
    features = unit(people[np.arange(count) % 15] + 0.6 * draw.standard_normal((count, 12)))
    cosines = (features @ unit(people[3])).astype(np.float32)
    expected = slow_reciprocal(cosines, features, k2=min(2, count))
    assert np.allclose(reciprocal_scores(cosines, features), expected, atol=1e-6)


def test_a_photo_that_belongs_to_the_best_ones_overtakes_a_lonely_one():
    draw = np.random.default_rng(1)
    person, stranger = unit(draw.standard_normal((2, 32)))
    group = unit(person + 0.05 * draw.standard_normal((5, 32)))
    features = np.vstack([group, stranger[None], unit(draw.standard_normal((40, 32)))])
    cosines = np.r_[np.full(4, 0.5), 0.3, 0.4, np.full(40, 0.1)].astype(np.float32)
    again = reciprocal_scores(cosines, features)
    assert again[4] > again[5]  # the group's unlucky photo; the stranger who was before it


def test_every_word_is_hidden_exactly_once_and_nothing_else():
    (tokens,) = irra.tokenize(["A man, in an extraordinarily reddish coat [MASK] and jeans."])
    masked, labels = hidden_words(tokens)
    assert len(masked) == reranking.WORD_GROUPS
    assert (labels != 0).sum(0).max() == 1
    hidden = labels.sum(0)
    words = irra.tokenize(["A man in an extraordinarily reddish coat and jeans"])[0]
    assert hidden[hidden != 0].tolist() == words[(words != 0) & (words < 49406)].tolist()
    assert torch.equal(torch.where(labels != 0, labels, masked), tokens.expand_as(masked))
    assert (masked[labels != 0] == MASK_ID).all()


def test_word_scores_are_the_mlm_heads_likelihoods_word_by_word(tiny, annotations):
    model = irra.build_model(tiny, 10)
    pixels = irra.images.image_array(list(annotations.path[:3]), 96, 32).pixels
    text, cosines = "a person in a red shirt", np.array([0.3, 0.2, 0.1], np.float32)
    masked, labels = hidden_words(irra.tokenize([text])[0])
    expected = []
    for row in range(3):
        image = irra.augmentation.normalise(torch.tensor(pixels[row : row + 1]))
        total = 0.0
        for turn in range(len(masked)):
            with torch.no_grad():
                logits = model.eval().word_logits(image, masked[turn : turn + 1])[0].double()
            for place in labels[turn].nonzero().flatten().tolist():
                total += float(logits[place].log_softmax(0)[labels[turn, place]])
        expected.append(cosines[row] + reranking.WORD_WEIGHT * total / 6)
    assert word_scores(model, text, np.array(pixels), cosines) == pytest.approx(expected, abs=1e-5)
    assert np.array_equal(word_scores(model, "[MASK] !", np.array(pixels), cosines), cosines)


@pytest.mark.parametrize("rerank", ["reciprocal", "words"])
def test_a_reranked_search_orders_its_candidates_anew_and_leaves_the_rest(tiny, annotations, rerank, monkeypatch):
    monkeypatch.setitem(CANDIDATES, rerank, 12)
    gallery = Gallery.build(irra.build_model(tiny, 10), annotations)
    queries = list(annotations.caption[:3])
    plain, again = gallery.search(queries, k=30), gallery.search(queries, k=30, rerank=rerank)
    assert list(again.columns) == [*plain.columns, "reranked"]
    for query in queries:
        before, after = (found[found["query"] == query].reset_index(drop=True) for found in (plain, again))
        assert after.image_id[12:].tolist() == before.image_id[12:].tolist()
        assert sorted(after.image_id[:12]) == sorted(before.image_id[:12])
        assert after.reranked.is_monotonic_decreasing
        assert dict(zip(after.image_id, after.score, strict=True)) == pytest.approx(
            dict(zip(before.image_id, before.score, strict=True)), abs=1e-6
        )
    assert plain.image_id.tolist() != again.image_id.tolist()
    few = gallery.search(queries, k=3, rerank=rerank)
    assert few.image_id.tolist() == again[again["rank"] <= 3].image_id.tolist()


def test_what_cannot_be_reranked_is_refused(tiny, annotations, tmp_path):
    gallery = Gallery.build(irra.build_model(tiny.replace(losses="sdm"), 10), annotations[:4])
    with pytest.raises(ValueError, match="rerank 'word' is unknown: did you mean 'words'"):
        gallery.search("a man", rerank="word")
    with pytest.raises(ValueError, match="needs the interaction encoder"):
        gallery.search("a man", rerank="words")
    photo = tmp_path / "photo.png"
    photo.write_bytes(Path(annotations.path[0]).read_bytes())
    gallery = Gallery.build(irra.build_model(tiny, 10), tmp_path)
    photo.unlink()
    with pytest.raises(ValueError, match=r"1 image cannot be read.*\n.*photo\.png: "):
        gallery.search("a man", rerank="words")
