"""Galleries in Milvus, embedded and on a real server on loopback: they rank as the ones in memory do."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_retrieval import QUERIES, Interrupted, RandomModel, brute_force, model, photos, same_ranking, shard

from irra_core.retrieval import Gallery
from irra_core.search import encoding, milvus
from irra_core.search.milvus import Milvus

pytest.importorskip("pymilvus", reason="the extra [milvus] is not installed")

__all__ = ["model", "photos"]  # fixtures

SERVER = """
import socket, sys, time
from milvus import MilvusServer, MilvusServerConfig

def bound(self, port):  # the package's own avoids a port of which an old connection is not forgotten yet
    trial = socket.socket()
    trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        trial.bind(("127.0.0.1", port))
        return trial
    except OSError:
        return None

MilvusServerConfig.try_bind_port = bound
server = MilvusServer()
server.set_base_dir(sys.argv[1])
server.listen_port = int(sys.argv[2])
server.start()
print(server.listen_port, flush=True)
time.sleep(3600)
"""


class Server:
    """PyPI's standalone Milvus in a folder, on a free port; stopped and started again with its data."""

    def __init__(self, folder: Path):
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-W", "ignore", "-c", SERVER, str(self.folder), str(self.port)]
        self.starter = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert self.starter.stdout.readline() == f"{self.port}\n", "the Milvus server did not start on its port"

    def stop(self) -> None:
        os.killpg(self.starter.pid, signal.SIGKILL)
        self.starter.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    pytest.importorskip("milvus", reason="PyPI's Milvus server is not installed")
    running = Server(tmp_path_factory.mktemp("milvus"))
    running.start()
    yield running
    running.stop()


@pytest.fixture(params=["lite", pytest.param("server", marks=pytest.mark.notebook)])
def url(request, tmp_path) -> str:
    """A place for a gallery of the test's own."""
    if request.param == "lite":
        pytest.importorskip("milvus_lite", reason="Milvus Lite is not installed")
        return str(tmp_path / "new" / "gallery.db")
    return f"{request.getfixturevalue('server').url}#test{time.monotonic_ns()}"


@pytest.mark.parametrize("index", ["exact", "hnsw"])
def test_a_gallery_in_milvus_ranks_as_sorting_all_cosines_does(model, photos, url, index):
    gallery = Gallery.build(model, photos, url=url, index=index)
    assert len(gallery) == 30
    same_ranking(gallery.search(QUERIES, k=9), brute_force(model, photos, QUERIES, 9))
    same_ranking(gallery.search(QUERIES, k=1000), brute_force(model, photos, QUERIES, 1000))
    assert gallery.recall(k=5, queries=QUERIES) == gallery.recall(k=5) == 1.0
    table = photos.drop_duplicates("image_id")[["image_id", "path", "pid"]].reset_index(drop=True)
    pd.testing.assert_frame_equal(gallery.images, table.astype({"pid": "Int64"}))


def test_unknown_identities_stay_unknown_and_features_come_back_bit_for_bit(model, photos, url):
    gallery = Gallery.build(model, photos.drop(columns="pid"), url=url)
    assert gallery.search("a man", k=30).pid.isna().all()
    ids = photos.image_id.unique()[[7, 2, 7]]
    expected = Gallery.build(model, photos)._store.features_of(ids)
    assert np.array_equal(gallery._store.features_of(ids), expected)


def test_photos_are_added_removed_and_never_encoded_twice(model, photos, url):
    gallery = Gallery.build(model, photos[:40], url=url)
    assert gallery.add(photos[20:]) == 10
    assert gallery.remove([100, 121]) == 2
    stays = photos[~photos.image_id.isin([100, 121])]
    same_ranking(gallery.search(QUERIES, k=30), brute_force(model, stays, QUERIES, 30))
    with pytest.raises(ValueError, match="image_id 100 is not in the gallery"):
        gallery.remove([107, 100])
    with pytest.raises(ValueError, match=r"image_id 107 is .* in the gallery and elsewhere\.png"):
        gallery.add(photos[2:3].assign(path="elsewhere.png"))
    with pytest.raises(ValueError, match="the gallery is kept in"):
        gallery.save("anywhere")
    model.encoded = 0
    again = Gallery.build(model, photos, url=url)
    assert model.encoded == 2
    same_ranking(again.search(QUERIES, k=30), brute_force(model, photos, QUERIES, 30))


def test_a_gallery_is_opened_by_its_url_and_only_by_its_model(model, photos, url):
    with pytest.raises(FileNotFoundError, match="has no gallery"):
        Gallery.load(url, model)
    built = Gallery.build(model, photos, url=url, index="hnsw")
    opened = Gallery.load(url, RandomModel())
    pd.testing.assert_frame_equal(opened.search(QUERIES), built.search(QUERIES))
    with pytest.raises(ValueError, match=r"was built by model .*load the checkpoint"):
        Gallery.load(url, RandomModel(seed=1))
    with pytest.raises(ValueError, match="has index 'hnsw', asked for is 'exact'"):
        Gallery.build(model, photos, url=url)
    base = url.partition("#")[0]
    other = Gallery.build(RandomModel(seed=1), photos[:6], url=f"{base}#another{time.monotonic_ns()}")
    assert (len(other), len(opened)) == (3, 30)
    with pytest.raises(ValueError, match=r"gallery name 'a\.b'"):
        Gallery.load(f"{base}#a.b", model)


def test_an_interrupted_build_goes_on_where_it_was(model, photos, url, monkeypatch):
    monkeypatch.setattr(encoding, "SHARD", 8)
    monkeypatch.setattr(milvus, "BATCH", 3)
    with pytest.raises(KeyboardInterrupt):
        Gallery.build(model, photos, url=url, progress=Interrupted)
    assert model.encoded == 16
    gallery = Gallery.build(model, photos, url=url)
    assert model.encoded == 30
    same_ranking(gallery.search(QUERIES, k=9), brute_force(model, photos, QUERIES, 9))
    assert len(gallery.images) == 30


def test_hnsw_in_milvus_states_its_recall_against_exact_search(url):
    rows, features = shard(5000)
    store = Milvus(url, 24, "hnsw", "0" * 32)
    store.extend([(rows, features)])
    queries = shard(50, seed=1)[1]
    true = rows.image_id.to_numpy()[np.argsort(-(queries @ features.T), axis=1)[:, :10]]
    assert np.array_equal(store.nearest(queries, 10, exact=True)[1], true)
    found = store.nearest(queries, 10)[1]
    assert np.mean([np.isin(t, f).mean() for t, f in zip(true, found, strict=True)]) > 0.95


@pytest.mark.parametrize("url", ["gallery.sqlite", "ftp://somewhere", "localhost:19530"])
def test_what_is_no_milvus_url_is_refused(model, photos, url):
    with pytest.raises(ValueError, match=r"accepted is one, url a path ending in \.db or http"):
        Gallery.build(model, photos, url=url)


def test_a_server_that_is_not_there_is_one_clear_error(model, photos):
    with pytest.raises(ConnectionError, match=r"no Milvus answers at http://127\.0\.0\.1:9 .*start it"):
        Gallery.build(model, photos, url="http://127.0.0.1:9")


@pytest.mark.notebook
def test_a_lost_server_is_waited_for_then_named_and_nothing_is_lost(
    model, photos, server, monkeypatch, capfd, tmp_path
):
    monkeypatch.setattr(encoding, "SHARD", 8)
    url = f"{server.url}#lost"

    class Cut(Interrupted):
        """A progress bar during which the server dies."""

        def update(self, count):
            self.left -= 1
            if not self.left:
                server.stop()

    monkeypatch.setattr(milvus, "PATIENCE", 1.0)
    with pytest.raises(ConnectionError, match=r"did not answer 'upsert' for 1 s .*start it and repeat"):
        Gallery.build(model, photos, url=url, progress=Cut)
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(milvus, "PATIENCE", 60.0)
    server.start()
    model.encoded = 0
    gallery = Gallery.build(model, photos, url=url)
    assert model.encoded == 14  # two shards of 8 were stored
    same_ranking(gallery.search(QUERIES, k=9), brute_force(model, photos, QUERIES, 9))
