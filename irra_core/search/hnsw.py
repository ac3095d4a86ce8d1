"""Features → an HNSW graph over them, by faiss: fast approximate search; rows can be added, and the graph saved."""

from pathlib import Path

import faiss
import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from safetensors import SafetensorError, safe_open

from irra_core.backbone import CHECKSUM, checksum
from irra_core.checkpoints import save_tensors

GRAPH = "hnsw.safetensors"
NEIGHBOURS, BUILD_WIDTH, SEARCH_WIDTH = 32, 200, 64  # of the HNSW graph: recall 0.98 on 5,000 random vectors


class Graph:
    """An HNSW graph over rows of features; `nodes[i]` is the graph's node of row i.

    The node of a removed row stays in the graph, so that the graph is not rebuilt, but a search never returns it.
    """

    def __init__(self, dim: int):
        self.hnsw = faiss.IndexHNSWFlat(dim, NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
        self.hnsw.hnsw.efConstruction = BUILD_WIDTH
        self.nodes: Int64[np.ndarray, " n"] = np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self.nodes)

    def add(self, features: Float32[np.ndarray, "m dim"]) -> None:
        """Append rows."""
        self.nodes = np.append(self.nodes, np.arange(self.hnsw.ntotal, self.hnsw.ntotal + len(features)))
        self.hnsw.add(features)

    def nearest(self, queries: Float32[np.ndarray, "q dim"], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and numbers of the nearest rows that the search reaches; number −1 where there are fewer than k."""
        row_of = np.full(self.hnsw.ntotal, -1)
        row_of[self.nodes] = np.arange(len(self))
        settings = {"efSearch": max(SEARCH_WIDTH, 2 * k)}
        if len(self) < self.hnsw.ntotal:
            remaining = np.packbits(row_of >= 0, bitorder="little")
            settings["sel"] = faiss.IDSelectorBitmap(remaining)
        scores, nodes = self.hnsw.search(queries, k, params=faiss.SearchParametersHNSW(**settings))
        return scores, np.where(nodes < 0, -1, row_of[nodes])

    def save(self, path: Path, ids: Int64[np.ndarray, " n"]) -> None:
        """Write the graph in faiss's format with a checksum, and the rows' image_ids.

        The vectors of the rows are stored in the gallery's parts; only those of removed rows are written here.
        """
        writer = faiss.VectorIOWriter()
        faiss.write_index(self.hnsw, writer, faiss.IO_FLAG_SKIP_STORAGE)
        storage = faiss.downcast_index(self.hnsw.storage)
        vectors = faiss.rev_swig_ptr(storage.get_xb(), self.hnsw.ntotal * self.hnsw.d).reshape(-1, self.hnsw.d)
        removed = np.setdiff1d(np.arange(self.hnsw.ntotal), self.nodes)
        arrays = {"faiss": faiss.vector_to_array(writer.data), "nodes": self.nodes, "image_id": ids.copy()}
        arrays["removed"] = vectors[removed]
        save_tensors({name: torch.from_numpy(array) for name, array in arrays.items()}, path)


def load_graph(path: Path, features: Float32[np.ndarray, "n dim"], ids: Int64[np.ndarray, " n"]) -> Graph:
    """The saved graph of the first rows. Raises ValueError for a file that is damaged or indexes other photos.

    The checksum is verified before faiss reads the bytes, because faiss does not validate them.
    """
    graph = Graph(features.shape[1])
    try:
        with safe_open(path, "pt") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        if metadata.get(CHECKSUM) != checksum(tensors, metadata):
            raise ValueError("its checksum does not match its content")
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        graph.nodes = arrays["nodes"].copy()  # a copy, so that the file does not stay memory-mapped
        if not np.array_equal(arrays["image_id"], ids[: len(graph)]):
            raise ValueError("it indexes other photos")
        vectors = np.empty((len(graph) + len(arrays["removed"]), features.shape[1]), np.float32)
        vectors[graph.nodes] = features[: len(graph)]
        vectors[np.setdiff1d(np.arange(len(vectors)), graph.nodes)] = arrays["removed"]
        graph.hnsw = _with_vectors(arrays["faiss"], vectors)
    except (SafetensorError, OSError, LookupError, ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, and loading builds the index again") from None
    return graph


def _with_vectors(content: UInt8[np.ndarray, " bytes"], vectors: Float32[np.ndarray, "m dim"]) -> faiss.IndexHNSWFlat:
    """The index from faiss's bytes, which do not contain the vectors, joined with these vectors."""
    reader = faiss.VectorIOReader()
    faiss.copy_array_to_vector(content, reader.data)
    index = faiss.read_index(reader, faiss.IO_FLAG_SKIP_STORAGE)
    storage = faiss.IndexFlatIP(vectors.shape[1])
    storage.add(vectors)
    if (index.ntotal, index.d) != (storage.ntotal, storage.d):
        raise ValueError(f"it indexes {index.ntotal} vectors of width {index.d}, expected {vectors.shape}")
    index.storage, index.own_fields = storage, True
    storage.this.disown()  # the index frees it
    return index
