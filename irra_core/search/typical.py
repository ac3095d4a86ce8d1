"""A gallery and other descriptions → how unusual a score is: the share of them that score lower on the same photo."""

import hashlib
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
from jaxtyping import Float32, Int64

from irra_core.checkpoints import replaced
from irra_core.retrieval import Gallery
from irra_core.search.encoding import encoded_queries
from irra_core.search.stores import model_fingerprint
from irra_core.settings import cache_root


def kept_sentences(gallery: Gallery, sentences: Sequence[str]) -> Float32[np.ndarray, "sentences dim"]:
    """The sentences' features under the gallery's model, encoded once: they are kept in the cache folder."""
    digest = hashlib.blake2b(repr((model_fingerprint(gallery.model), *sentences)).encode(), digest_size=16)
    file = cache_root() / "sentences" / f"{digest.hexdigest()}.npy"
    with suppress(OSError, ValueError):  # not there, or damaged
        found = np.load(file)
        if found.shape == (len(sentences), gallery._store.dim) and found.dtype == np.float32:
            return found
    features = encoded_queries(gallery.model, sentences, gallery._store.dim, gallery.precision)[1]
    with suppress(OSError):  # a full disk: the next page encodes them again
        file.parent.mkdir(parents=True, exist_ok=True)
        with replaced(file) as aside, aside.open("wb") as stream:
            np.save(stream, features)
    return features


def shares_below(
    gallery: Gallery,
    image_ids: Int64[np.ndarray, " photos"],
    scores: Float32[np.ndarray, " photos"],
    sentences: Float32[np.ndarray, "sentences dim"],
) -> Float32[np.ndarray, " photos"]:
    """For each photo the share of these sentences, given by their features, whose cosine with it is below its score."""
    theirs = gallery._store.features_of(image_ids) @ sentences.T
    return (theirs < scores[:, None]).mean(1, dtype=np.float32)
