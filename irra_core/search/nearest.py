"""Photos' features and ids → the nearest of them to a query, by faiss, in this process's memory."""

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import faiss
import numpy as np
import pandas as pd
import torch
from jaxtyping import Float32, Int64
from pandas import DataFrame
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from irra_core.checkpoints import replaced

GRAPH = "hnsw.safetensors"
NEIGHBOURS, BUILD_WIDTH, SEARCH_WIDTH = 32, 200, 64  # of the HNSW graph: recall 0.98 on 5,000 random vectors
Shard = tuple[DataFrame, Float32[np.ndarray, "_ dim"]]  # some photos' rows (image_id, path, pid) and features


class Memory:
    """Features and rows in this process's memory, searched by faiss.

    With HNSW, `places` says where in the graph each row is; a removed photo stays in the graph as a bridge that is
    never returned, so nothing is rebuilt.
    """

    def __init__(self, dim: int, index: str):
        self.dim, self.index = dim, index
        self.images = DataFrame({"image_id": np.empty(0, np.int64)}).assign(
            path=pd.array([], "str"), pid=pd.array([], "Int64")
        )
        self.features: Float32[np.ndarray, "n dim"] = np.empty((0, dim), np.float32)
        self.graph = _new_graph(dim) if index == "hnsw" else None
        self.places: Int64[np.ndarray, " n"] = np.empty(0, np.int64)
        self._row_of = pd.Index(self.images.image_id)

    def __len__(self) -> int:
        return len(self.images)

    def __str__(self) -> str:
        return f"{self.index} index in memory"

    def extend(self, shards: Iterable[Shard], graph: Path | None = None) -> None:
        """Append shards; `graph` is the file of a saved HNSW graph of their first rows."""
        tables, features = [self.images], [self.features]
        for photos, found in shards:
            tables.append(photos)
            features.append(found)
        self.images = pd.concat(tables, ignore_index=True)
        self.features = np.concatenate(features)
        self._row_of = pd.Index(self.images.image_id)
        if self.graph is None:
            return
        if graph is not None and graph.is_file():
            self.graph, self.places = _read_graph(graph, self.features)
        new = self.features[len(self.places) :]
        self.places = np.append(self.places, np.arange(self.graph.ntotal, self.graph.ntotal + len(new)))
        _share_threads()
        self.graph.add(new)

    def rows(self, ids: Int64[np.ndarray, " q"], known: bool = True) -> DataFrame:
        """The photos' rows in the order of the ids. Raises ValueError for one that is not here, unless not `known`."""
        row = self._row_of.get_indexer(ids)
        if known and (row < 0).any():
            raise ValueError(f"image_id {ids[row < 0][0]} is not in the gallery")
        return self.images.iloc[row[row >= 0]].reset_index(drop=True)

    def features_of(self, ids: Int64[np.ndarray, " q"]) -> Float32[np.ndarray, "q dim"]:
        """The photos' features in the order of the ids."""
        return self.features[self._row_of.get_indexer(ids)]

    def remove(self, ids: Int64[np.ndarray, " q"]) -> None:
        """Take photos out; they must be here."""
        stays = np.ones(len(self), bool)
        stays[self._row_of.get_indexer(ids)] = False
        self.images = self.images[stays].reset_index(drop=True)
        self.features = self.features[stays]
        self.places = self.places[stays] if self.graph is not None else self.places
        self._row_of = pd.Index(self.images.image_id)

    def nearest(
        self, queries: Float32[np.ndarray, "q dim"], k: int, exact: bool = False
    ) -> tuple[Float32[np.ndarray, "q k2"], Int64[np.ndarray, "q k2"]]:
        """Scores, best first, and image_ids of the k nearest photos; where fewer are found the score is −inf."""
        k = min(k, len(self))
        if not k:
            return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        _share_threads()
        queries = np.ascontiguousarray(queries)
        if exact or self.graph is None:
            scores, rows = faiss.knn(queries, self.features, k, metric=faiss.METRIC_INNER_PRODUCT)
        else:
            scores, rows = self._walk(queries, k)
        return np.where(rows < 0, -np.inf, scores).astype(np.float32), self.images.image_id.to_numpy()[rows]

    def _walk(self, queries: Float32[np.ndarray, "q dim"], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and rows (−1: none) of the nearest photos that the graph leads to."""
        row_at = np.full(self.graph.ntotal, -1)
        row_at[self.places] = np.arange(len(self))
        settings = {"efSearch": max(SEARCH_WIDTH, 2 * k)}
        if len(self) < self.graph.ntotal:
            here = np.packbits(row_at >= 0, bitorder="little")
            settings["sel"] = faiss.IDSelectorBitmap(here)
        scores, places = self.graph.search(queries, k, params=faiss.SearchParametersHNSW(**settings))
        return scores, np.where(places < 0, -1, row_at[places])

    def save_graph(self, folder: Path) -> None:
        """Write the HNSW graph, if there is one; its vectors are the features beside it, and those of the removed."""
        if self.graph is None:
            return
        vectors = faiss.rev_swig_ptr(faiss.downcast_index(self.graph.storage).get_xb(), self.graph.ntotal * self.dim)
        gone = np.setdiff1d(np.arange(self.graph.ntotal), self.places)
        hnsw = self.graph.hnsw
        arrays = {name: faiss.vector_to_array(getattr(hnsw, name)) for name in ("levels", "offsets", "neighbors")}
        arrays["entry"] = np.array([hnsw.entry_point, hnsw.max_level], np.int64)
        arrays |= {"places": self.places, "removed": vectors.reshape(-1, self.dim)[gone]}
        with replaced(folder / GRAPH) as aside:
            save_file(arrays, aside)


def _share_threads() -> None:
    """Give faiss the threads that torch has; on macOS one, since there the two bring OpenMPs that crash together."""
    faiss.omp_set_num_threads(1 if sys.platform == "darwin" else torch.get_num_threads())


def _new_graph(dim: int) -> faiss.IndexHNSWFlat:
    graph = faiss.IndexHNSWFlat(dim, NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction = BUILD_WIDTH
    return graph


def _read_graph(path: Path, features: Float32[np.ndarray, "n dim"]) -> tuple[faiss.IndexHNSWFlat, np.ndarray]:
    """A saved graph over the features (and the removed ones it keeps), and each row's place in it.

    The arrays are checked before faiss, which trusts its own file format, follows them through memory.
    """
    graph = _new_graph(features.shape[1])
    steps = faiss.vector_to_array(graph.hnsw.cum_nneighbor_per_level)
    try:
        arrays = load_file(path)
        vectors, places = _graph_vectors(arrays, features)
        _check_graph(arrays, steps.astype(np.int64), len(vectors))
    except (SafetensorError, OSError, KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, and loading builds the index again") from None
    faiss.downcast_index(graph.storage).add(vectors)
    graph.ntotal = len(vectors)
    for name in ("levels", "offsets", "neighbors"):
        faiss.copy_array_to_vector(arrays[name], getattr(graph.hnsw, name))
    graph.hnsw.entry_point, graph.hnsw.max_level = (int(value) for value in arrays["entry"])
    return graph, places


def _graph_vectors(
    arrays: Mapping[str, np.ndarray], features: Float32[np.ndarray, "n dim"]
) -> tuple[Float32[np.ndarray, "m dim"], Int64[np.ndarray, " p"]]:
    """The vectors in the order of the graph, and each row's place among them."""
    places, removed = arrays["places"], arrays["removed"]
    if removed.dtype != np.float32 or removed.ndim != 2 or removed.shape[1] != features.shape[1]:
        raise ValueError(f"removed features are {removed.dtype} {removed.shape}")
    count = len(places) + len(removed)
    if places.dtype != np.int64 or len(places) > len(features) or len(np.unique(places)) != len(places):
        raise ValueError(f"{len(places)} places for {len(features)} photos")
    if len(places) and not (places.min() >= 0 and places.max() < count):
        raise ValueError(f"places from {places.min()} to {places.max()} among {count}")
    vectors = np.empty((count, features.shape[1]), np.float32)
    vectors[places] = features[: len(places)]
    vectors[np.setdiff1d(np.arange(count), places)] = removed
    return vectors, places


def _check_graph(arrays: Mapping[str, np.ndarray], steps: Int64[np.ndarray, " layers"], count: int) -> None:
    """Raise ValueError unless every walk through the graph stays inside it."""
    dtypes = {"levels": np.int32, "offsets": np.uint64, "neighbors": np.int32, "entry": np.int64}
    for name, dtype in dtypes.items():
        if arrays[name].dtype != dtype or arrays[name].ndim != 1:
            raise ValueError(f"{name} is {arrays[name].dtype} {arrays[name].shape}")
    levels, offsets, neighbours = arrays["levels"], arrays["offsets"].astype(np.int64), arrays["neighbors"]
    entry, top = arrays["entry"]
    if len(levels) != count or not count or levels.min() < 1 or levels.max() >= len(steps):
        raise ValueError(f"{len(levels)} levels for {count} vectors")
    if len(offsets) != count + 1 or offsets[0] != 0 or not np.array_equal(np.diff(offsets), steps[levels]):
        raise ValueError("offsets do not fit the levels")
    if len(neighbours) != offsets[-1] or neighbours.min() < -1 or neighbours.max() >= count:
        raise ValueError("a neighbour is not in the graph")
    within = np.arange(len(neighbours)) - np.repeat(offsets[:-1], np.diff(offsets))
    layer = np.searchsorted(steps, within, side="right") - 1
    if (levels[neighbours] <= layer)[neighbours >= 0].any():
        raise ValueError("a neighbour is on another layer")
    if not 0 <= entry < count or levels[entry] != top + 1 or levels.max() != top + 1:
        raise ValueError(f"walks start at {entry}, layer {top}")
