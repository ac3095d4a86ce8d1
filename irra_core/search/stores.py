"""The arguments of `Gallery.build` or `load` → the store of its features: memory, a folder or Milvus.

Each engine is imported on first use.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from irra_core.batches import ALONE, Team
from irra_core.evaluation import encode_texts
from irra_core.search.encoding import checked_k, encoded_queries
from irra_core.settings import unknown

INDEXES = ("exact", "hnsw")


@contextmanager
def opened_store(model, index: str, url: str | None, folder: str | Path | None, team: Team) -> Iterator:
    """Gives the existing store with its photos, or a new one, to which photos can be added within.

    A folder is locked within, and completed at the end by a build alone. Raises ValueError for arguments that do not
    fit together, RuntimeError for a folder that another process is building.
    """
    from irra_core.search.folder import building, complete_folder, open_or_begin
    from irra_core.search.milvus import Milvus, is_milvus
    from irra_core.search.nearest import Memory

    check_index(index)
    if url and (folder or not is_milvus(url)):
        raise ValueError(f"url is {url!r} and folder {folder!r}: accepted is one, url a path ending in .db or http://…")
    if team.processes > 1 and not (folder or url):
        raise ValueError(f"processes is {team.processes}, but their shares would meet nowhere: give a folder or a url")
    if url:
        yield Milvus(url, feature_width(model), index, model_fingerprint(model))
    elif folder:
        with building(Path(folder), team):
            yield (store := open_or_begin(Path(folder), model, index, team))
            if team == ALONE:
                complete_folder(Path(folder), model, store)
    else:
        yield Memory(feature_width(model), index)


def load_store(place: str | Path, model, index: str | None):
    """The store in a folder or at a Milvus url; `index` replaces a folder's index; Milvus's must equal it, if given."""
    from irra_core.search.folder import load_folder
    from irra_core.search.milvus import Milvus, is_milvus

    if is_milvus(place):
        return Milvus(str(place), feature_width(model), index, model_fingerprint(model))
    return load_folder(Path(place), model, index)


def save_store(store, model, folder: Path) -> None:
    """Write a store to a folder. Raises ValueError for a store in Milvus."""
    from irra_core.search.folder import save_folder

    if url := getattr(store, "url", None):
        raise ValueError(f"the gallery is kept in {url}: Gallery.load(url, model) opens it")
    save_folder(folder, model, store)


def check_index(index: str) -> str:
    """The index. Raises ValueError for an unknown one."""
    if index not in INDEXES:
        raise unknown("index", index, INDEXES)
    return index


def feature_width(model) -> int:
    """The width of the model's features, from encoding a sentence."""
    return encode_texts(model, ["a person"]).shape[1]


def model_fingerprint(model) -> str:
    """32 hex digits that change with the weights of the two encoders or the size of the photos."""
    digest = hashlib.blake2b(str(tuple(model.image_size)).encode(), digest_size=16)
    state = getattr(model, "clip", model).state_dict()  # the interaction encoder does not affect features
    for name in sorted(state):
        values = state[name].detach().float().cpu().contiguous()
        digest.update(f"{name} {tuple(values.shape)}".encode())
        digest.update(values.reshape(-1).numpy())
    return digest.hexdigest()


def recall(store, model, precision: str, k: int, queries: Sequence[str] | None) -> float:
    """The share of the true k nearest photos that the index of a store (Memory or Milvus) returns.

    The queries are sentences, or, where none are given, up to 1,000 of the store's photos.
    """
    k = checked_k(k)
    if queries is None:
        rows = np.random.default_rng(0).permutation(len(store))[:1000]
        features = store.features_of(store.images.image_id.to_numpy()[rows])
    else:
        _, features = encoded_queries(model, queries, store.dim, precision)
    scores, ids = store.nearest(features, k)
    true = store.nearest(features, k, exact=True)[1]
    rows = zip(true, ids, np.isfinite(scores), strict=True)
    return float(np.mean([np.isin(best, returned[valid]).mean() for best, returned, valid in rows]))
