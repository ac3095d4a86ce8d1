"""HNSW graphs: against exact search; a damaged or foreign file is refused before faiss reads it."""

import subprocess
import sys

import faiss
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import load_file, save_file
from test_retrieval import shard

from irra_core.checkpoints import save_tensors
from irra_core.search.hnsw import GRAPH
from irra_core.search.nearest import Memory


@pytest.fixture(scope="module")
def graph() -> Memory:
    """3,000 vectors in an HNSW graph, 100 of them removed again."""
    memory = Memory(24, "hnsw")
    memory.extend([shard(3000)])
    memory.remove(memory.images.image_id.to_numpy()[::30])
    return memory


def test_hnsw_finds_nearly_all_that_exact_search_finds_and_nothing_removed(graph):
    rows, features = shard(3000)
    stays = np.arange(3000) % 30 != 0
    queries = shard(200, seed=1)[1]
    true = rows.image_id.to_numpy()[stays][np.argsort(-(queries @ features[stays].T), axis=1)[:, :10]]
    scores, found = graph.nearest(queries, 10)
    assert np.mean([np.isin(t, f).mean() for t, f in zip(true, found, strict=True)]) > 0.95
    assert not np.isin(found, rows.image_id[~stays]).any()
    cosine = (features * queries[0]).sum(1)[pd.Index(rows.image_id).get_indexer(found[0])]
    assert np.allclose(scores[0], cosine, atol=1e-6)
    assert np.array_equal(graph.nearest(queries, 10, exact=True)[1], true)


def test_a_saved_graph_gives_the_same_results_and_goes_on_growing(graph, tmp_path):
    graph.save_graph(tmp_path)
    loaded = Memory(24, "hnsw")
    loaded.extend([(graph.images, graph.features)], tmp_path / GRAPH)
    queries = shard(50, seed=1)[1]
    for before, after in zip(graph.nearest(queries, 10), loaded.nearest(queries, 10), strict=True):
        assert np.array_equal(before, after)
    more, features = shard(200, seed=2)
    loaded.extend([(more.assign(image_id=more.image_id + 10**6), features)])
    assert np.isin(more.image_id + 10**6, loaded.nearest(features, 1)[1]).mean() > 0.99


def _flip(place):
    """Change one bit at a share of the file's length."""

    def damage(path):
        content = bytearray(path.read_bytes())
        content[int(place * len(content))] ^= 4
        path.write_bytes(content)

    return damage


def _resaved(**changes):
    """Write changed arrays with the checksum that belongs to them."""

    def damage(path):
        arrays = load_file(path)
        save_tensors({name: torch.tensor(value) for name, value in (arrays | changes).items()}, path)

    return damage


SMALL = faiss.serialize_index(faiss.IndexFlatIP(24))
GRAPH_DAMAGES = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-8]),
    "empty": lambda path: path.write_bytes(b""),
    "no checksum": lambda path: save_file(load_file(path), path),
    "arrays of format 1": lambda path: save_file({"levels": np.ones(3, np.int32)}, path),
    "arrays of something else": lambda path: save_tensors({"weight": torch.ones(3)}, path),
} | {f"a bit at {place}": _flip(place) for place in (0.001, 0.05, 0.3, 0.6, 0.9, 0.999)}
FOREIGN = {
    "other photos": (_resaved(image_id=np.arange(2900)), "it indexes other photos"),
    "more photos": (_resaved(image_id=np.arange(9000)), "it indexes other photos"),
    "bytes that are not faiss's": (_resaved(faiss=np.arange(99, dtype=np.uint8)), "is damaged"),
    "faiss's bytes cut short": (_resaved(faiss=SMALL[:20]), "is damaged"),
    "another index of faiss": (_resaved(faiss=SMALL), "is damaged"),
    "removed features of another width": (_resaved(removed=np.zeros((100, 3), np.float32)), "is damaged"),
    "fewer removed features": (_resaved(removed=np.zeros((99, 24), np.float32)), "is damaged"),
}


@pytest.mark.parametrize("damage", GRAPH_DAMAGES.values(), ids=GRAPH_DAMAGES.keys())
def test_a_damaged_graph_is_refused_before_faiss_reads_it(graph, tmp_path, damage, monkeypatch):
    graph.save_graph(tmp_path)
    damage(tmp_path / GRAPH)
    monkeypatch.setattr(faiss, "read_index", lambda *_: pytest.fail("faiss reads a damaged file"))
    with pytest.raises(
        ValueError, match=r"hnsw\.safetensors is damaged .*delete it, and loading builds the index again"
    ):
        Memory(24, "hnsw").extend([(graph.images, graph.features)], tmp_path / GRAPH)


@pytest.mark.parametrize(("damage", "words"), FOREIGN.values(), ids=FOREIGN.keys())
def test_a_graph_that_belongs_to_something_else_is_refused(graph, tmp_path, damage, words):
    graph.save_graph(tmp_path)
    damage(tmp_path / GRAPH)
    with pytest.raises(ValueError, match=words):
        Memory(24, "hnsw").extend([(graph.images, graph.features)], tmp_path / GRAPH)


def test_a_saved_graph_holds_no_vectors_but_the_removed(graph, tmp_path):
    graph.save_graph(tmp_path)
    size = (tmp_path / GRAPH).stat().st_size
    whole = len(faiss.serialize_index(graph.graph.hnsw))
    assert size < whole - 2900 * 24 * 4 + 2900 * 16 + 2000  # the vectors go, node and image_id of each row come


TOGETHER = """
import threading
import {first}, {second}
import numpy as np
x = np.random.default_rng(0).standard_normal((2000, 64)).astype("float32")
def search():
    for _ in range(20):
        faiss.knn(x[:50], x, 5, metric=faiss.METRIC_INNER_PRODUCT)
def multiply():
    for _ in range(20):
        torch.from_numpy(x) @ torch.from_numpy(x).T
for work in (search, multiply, search):
    work()
threads = [threading.Thread(target=work) for work in (search, multiply)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""


@pytest.mark.parametrize(("first", "second"), [("torch", "faiss"), ("faiss", "torch")])
def test_torch_and_faiss_work_in_one_process_whichever_comes_first(first, second):
    subprocess.run([sys.executable, "-c", TOGETHER.format(first=first, second=second)], check=True, timeout=120)
