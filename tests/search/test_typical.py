"""How unusual a score is: the share of other sentences that score lower, against cosines taken one by one."""

import numpy as np
import pytest
import torch

import irra_core as irra
from irra_core.search import typical
from irra_core.search.typical import kept_sentences, shares_below
from irra_core.settings import cache_root

SENTENCES = ["a man in red", "a woman in a green coat", "somebody with a blue bag", "two dogs", "a person in yellow"]


@pytest.fixture(scope="module")
def gallery(annotations, narrow):
    model = irra.build_model(irra.recipe(pretrained="none", losses="itc"), 5)
    return irra.Gallery.build(model, annotations[annotations.split == "test"])


def test_the_share_is_that_of_the_sentences_whose_cosine_is_lower(gallery):
    found = gallery.search("a person in a red shirt", k=8)
    features = kept_sentences(gallery, SENTENCES)
    shares = shares_below(gallery, found.image_id.to_numpy(), found.score.to_numpy(np.float32), features)
    for row, share in zip(found.itertuples(), shares):
        lower = 0
        for sentence in SENTENCES:
            scores = gallery.search(sentence, k=len(gallery)).set_index("image_id").score
            lower += scores[row.image_id] < row.score
        assert share == pytest.approx(lower / len(SENTENCES))
    assert 0 < shares.mean() < 1


def test_sentences_are_encoded_once_and_again_where_their_file_is_damaged(gallery, monkeypatch):
    first = kept_sentences(gallery, SENTENCES)
    encode, calls = typical.encoded_queries, []
    monkeypatch.setattr(typical, "encoded_queries", lambda *given: calls.append(1) or encode(*given))
    assert np.array_equal(kept_sentences(gallery, SENTENCES), first)
    assert calls == []
    for file in (cache_root() / "sentences").iterdir():
        file.write_bytes(file.read_bytes()[:-7])
    assert np.array_equal(kept_sentences(gallery, SENTENCES), first)
    assert calls == [1]
    other = irra.build_model(irra.recipe(pretrained="none", losses="itc", seed=1), 5)
    gallery_of_another = irra.Gallery(other, gallery._store)
    assert not np.array_equal(kept_sentences(gallery_of_another, SENTENCES), first)
    assert torch.isfinite(torch.from_numpy(first)).all()
