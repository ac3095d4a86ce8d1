"""Photos' features and ids → the photos nearest to a query, by faiss, in this process's memory."""

import sys
from collections.abc import Iterable
from pathlib import Path

import faiss
import numpy as np
import pandas as pd
import torch
from jaxtyping import Float32, Int64
from pandas import DataFrame

from irra_core.search.hnsw import GRAPH, Graph, load_graph

Shard = tuple[DataFrame, Float32[np.ndarray, "_ dim"]]  # some photos' rows (image_id, path, pid) and features


class Memory:
    """Features and rows in this process's memory, searched by faiss: exactly, or through an HNSW graph."""

    def __init__(self, dim: int, index: str):
        self.dim, self.index = dim, index
        self.images = DataFrame({"image_id": np.empty(0, np.int64)}).assign(
            path=pd.array([], "str"), pid=pd.array([], "Int64")
        )
        self.features: Float32[np.ndarray, "n dim"] = np.empty((0, dim), np.float32)
        self.graph = Graph(dim) if index == "hnsw" else None
        self._row_of = pd.Index(self.images.image_id)

    def __len__(self) -> int:
        return len(self.images)

    def __str__(self) -> str:
        return f"{self.index} index in memory"

    def extend(self, shards: Iterable[Shard], graph: Path | None = None) -> None:
        """Append shards; `graph` is the file of a saved HNSW graph of the first rows."""
        tables, features = ([self.images], [self.features]) if len(self) else ([], [])
        for photos, more in shards:
            tables.append(photos)
            features.append(more)
        if not tables:
            return
        self.images = pd.concat(tables, ignore_index=True)
        self.features = np.concatenate(features) if len(features) > 1 else features[0]  # which may stay in its file
        self._row_of = pd.Index(self.images.image_id)
        if self.graph is None:
            return
        if graph is not None and graph.is_file():
            self.graph = load_graph(graph, self.features, self.images.image_id.to_numpy())
        _share_threads()
        self.graph.add(self.features[len(self.graph) :])

    def rows(self, ids: Int64[np.ndarray, " q"], known: bool = True) -> DataFrame:
        """The photos' rows in the order of the ids.

        Raises ValueError for an id that is not in the gallery; with `known` False, skips it.
        """
        row = self._row_of.get_indexer(ids)
        if known and (row < 0).any():
            raise ValueError(f"image_id {ids[row < 0][0]} is not in the gallery")
        return self.images.iloc[row[row >= 0]].reset_index(drop=True)

    def features_of(self, ids: Int64[np.ndarray, " q"]) -> Float32[np.ndarray, "q dim"]:
        """The photos' features in the order of the ids."""
        return self.features[self._row_of.get_indexer(ids)]

    def remove(self, ids: Int64[np.ndarray, " q"]) -> None:
        """Remove photos; all of them must be in the gallery."""
        stays = np.ones(len(self), bool)
        stays[self._row_of.get_indexer(ids)] = False
        self.images = self.images[stays].reset_index(drop=True)
        self.features = self.features[stays]
        if self.graph is not None:
            self.graph.nodes = self.graph.nodes[stays]
        self._row_of = pd.Index(self.images.image_id)

    def nearest(
        self, queries: Float32[np.ndarray, "q dim"], k: int, exact: bool = False
    ) -> tuple[Float32[np.ndarray, "q k2"], Int64[np.ndarray, "q k2"]]:
        """Scores, best first, and image_ids of the k nearest photos; missing results have the score −inf."""
        k = min(k, len(self))
        if not k:
            return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        _share_threads()
        queries = np.ascontiguousarray(queries)
        if exact or self.graph is None:
            scores, rows = faiss.knn(queries, self.features, k, metric=faiss.METRIC_INNER_PRODUCT)
        else:
            scores, rows = self.graph.nearest(queries, k)
        return np.where(rows < 0, -np.inf, scores).astype(np.float32), self.images.image_id.to_numpy()[rows]

    def save_graph(self, folder: Path) -> None:
        """Write the HNSW graph, if there is one, into a gallery's folder."""
        if self.graph is not None:
            self.graph.save(folder / GRAPH, self.images.image_id.to_numpy())


def _share_threads() -> None:
    """Let faiss use as many threads as torch; on macOS only one, where the OpenMP libraries of the two crash."""
    faiss.omp_set_num_threads(1 if sys.platform == "darwin" else torch.get_num_threads())
