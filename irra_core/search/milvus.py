"""Photos' features and ids → the photos nearest to a query, by Milvus: embedded, a server or a cluster."""

import contextlib
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float32, Int64
from pandas import DataFrame

from irra_core.search.hnsw import BUILD_WIDTH, NEIGHBOURS, SEARCH_WIDTH
from irra_core.search.nearest import Memory, Shard

INDEXES = {"exact": ("FLAT", {}), "hnsw": ("HNSW", {"M": NEIGHBOURS, "efConstruction": BUILD_WIDTH})}
BATCH = 1000  # rows or queries per message: 2 MB at width 512, and a server accepts 64 MB
MOST_RESULTS = 16_384  # Milvus's limit
TIMEOUT, PATIENCE = 30.0, 30.0  # seconds: for one response; for a lost server to return (it starts in 7)
UNKNOWN_PID = -(2**63)  # older servers do not support null values


def is_milvus(url: str | Path) -> bool:
    """True if the url names a Milvus database: a .db file, or http(s)://; `#name` selects one of its galleries."""
    base = str(url).partition("#")[0]
    return base.endswith(".db") or re.match(r"https?://", base) is not None


class Milvus:
    """Features and rows in a Milvus collection; it has the methods of `nearest.Memory`.

    The collection's name ends in the model's fingerprint, so that features of two models are never mixed. While the
    server does not respond, a call is repeated for 30 s; then it raises ConnectionError. Rows are written by image_id,
    so that repeating a write changes nothing.
    """

    def __init__(self, url: str, dim: int, index: str | None, fingerprint: str):
        """Connect, and create the gallery if it does not exist; with `index` None this raises FileNotFoundError."""
        self.url, _, name = str(url).partition("#")
        if not re.fullmatch(r"(?a:[A-Za-z]\w{0,99})?", name):
            raise ValueError(f"gallery name {name!r} after # in the url: accepted are letters, digits and _")
        self.dim, self._name = dim, f"{name or 'gallery'}_{fingerprint}"
        self._client = _connect(self.url)
        self._check_models(name or "gallery", fingerprint)
        there = self._call("has_collection", self._name)
        if not there and index is None:
            raise FileNotFoundError(
                f"{self.url} has no gallery {name or 'gallery'!r}: Gallery.build(…, url=) creates one"
            )
        if not there:
            self._create(index)
        self.index = self._found_index()
        if index not in (None, self.index):
            raise ValueError(
                f"{url} has index {self.index!r}, asked for is {index!r}: give index={self.index!r}, or another name "
                "after # in the url"
            )
        self._call("load_collection", self._name)

    def _check_models(self, name: str, fingerprint: str) -> None:
        """Raise ValueError for a gallery of this name that was built by another model."""
        for found in self._call("list_collections"):
            other = found.removeprefix(f"{name}_")
            if other != fingerprint and re.fullmatch(r"[0-9a-f]{32}", other):
                raise ValueError(
                    f"gallery {name!r} of {self.url} was built by model {other[:12]} and this is model "
                    f"{fingerprint[:12]}: load the checkpoint that built it, or give another name after # in the url"
                )

    def _create(self, index: str) -> None:
        """Create the collection, with strong consistency: a search sees every earlier write."""
        from pymilvus import DataType

        kind, settings = INDEXES[index]
        schema = self._client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("id", DataType.INT64, is_primary=True)
        schema.add_field("path", DataType.VARCHAR, max_length=16_384)
        schema.add_field("pid", DataType.INT64)
        schema.add_field("features", DataType.FLOAT_VECTOR, dim=self.dim)
        indexes = self._client.prepare_index_params()
        indexes.add_index("features", index_type=kind, metric_type="IP", params=settings)
        self._call("create_collection", self._name, schema=schema, index_params=indexes, consistency_level="Strong")

    def _found_index(self) -> str:
        kind = self._call("describe_index", self._name, "features")["index_type"]
        return {kind: index for index, (kind, _) in INDEXES.items()}[kind]

    def __len__(self) -> int:
        return int(self._call("query", self._name, filter="", output_fields=["count(*)"])[0]["count(*)"])

    def __str__(self) -> str:
        return f"{self.index} index in Milvus at {self.url}"

    @property
    def images(self) -> DataFrame:
        """All rows, sorted by image_id."""
        parts = [_table(rows) for rows in self._batches(["id", "path", "pid"])]
        return pd.concat([_table([]), *parts], ignore_index=True).sort_values("image_id", ignore_index=True)

    def _batches(self, fields: list[str]) -> Iterator[list[dict]]:
        """Yields all rows in batches."""
        rows = self._call("query_iterator", self._name, batch_size=BATCH, output_fields=fields)
        try:
            while batch := self._ask("query_iterator", rows.next):
                yield batch
        finally:
            with _quiet(), contextlib.suppress(Exception):  # a lost server was already reported
                rows.close()

    def extend(self, shards: Iterable[Shard]) -> None:
        """Write shards as they arrive; then the server builds an approximate index in the background."""
        written = False
        for photos, features in shards:
            written = True
            pids = photos.pid.fillna(UNKNOWN_PID).to_numpy(np.int64)
            columns = zip(photos.image_id.tolist(), photos.path, pids.tolist(), features, strict=True)
            rows = [dict(zip(("id", "path", "pid", "features"), row, strict=True)) for row in columns]
            for start in range(0, len(rows), BATCH):
                self._call("upsert", self._name, rows[start : start + BATCH])
        if written and self.index != "exact":  # unflushed rows have a coarser index: recall 0.33 instead of 0.55
            self._call("flush", self._name)

    def rows(self, ids: Int64[np.ndarray, " q"], known: bool = True) -> DataFrame:
        """The photos' rows in the order of the ids.

        Raises ValueError for an id that is not in the gallery; with `known` False, skips it.
        """
        found = _table(self._get(ids, ["id", "path", "pid"]))
        row = pd.Index(found.image_id).get_indexer(ids)
        if known and (row < 0).any():
            raise ValueError(f"image_id {ids[row < 0][0]} is not in the gallery")
        return found.iloc[row[row >= 0]].reset_index(drop=True)

    def _get(self, ids: Int64[np.ndarray, " q"], fields: list[str]) -> list[dict]:
        """The rows of those ids that are in the gallery, in no particular order."""
        found, ids = [], np.unique(ids).tolist()
        for start in range(0, len(ids), BATCH):
            found += self._call("get", self._name, ids[start : start + BATCH], output_fields=fields)
        return found

    def features_of(self, ids: Int64[np.ndarray, " q"]) -> Float32[np.ndarray, "q dim"]:
        """The photos' features in the order of the ids."""
        found = {row["id"]: row["features"] for row in self._get(ids, ["id", "features"])}
        return np.array([found[i] for i in ids.tolist()], np.float32).reshape(len(ids), self.dim)

    def remove(self, ids: Int64[np.ndarray, " q"]) -> None:
        """Remove photos."""
        for start in range(0, len(ids), BATCH):
            self._call("delete", self._name, ids=ids[start : start + BATCH].tolist())

    def nearest(
        self, queries: Float32[np.ndarray, "q dim"], k: int, exact: bool = False
    ) -> tuple[Float32[np.ndarray, "q k2"], Int64[np.ndarray, "q k2"]]:
        """Scores, best first, and image_ids of the k nearest photos; missing results have the score −inf."""
        if k > MOST_RESULTS and (k := min(k, len(self))) > MOST_RESULTS:
            raise ValueError(f"k is {k}: Milvus returns at most {MOST_RESULTS:,} results")
        if exact and self.index != "exact":
            return self._compare_all(queries, k)
        hits = []
        for start in range(0, len(queries), BATCH):
            settings = {"metric_type": "IP", "params": {"ef": max(SEARCH_WIDTH, 2 * k)}}
            vectors = list(queries[start : start + BATCH])
            hits += self._call("search", self._name, data=vectors, limit=k, search_params=settings)
        width = max((len(found) for found in hits), default=0)
        scores = np.full((len(queries), width), -np.inf, np.float32)
        ids = np.zeros((len(queries), width), np.int64)
        for row, found in enumerate(hits):
            scores[row, : len(found)] = [hit["distance"] for hit in found]
            ids[row, : len(found)] = [hit["id"] for hit in found]
        return scores, ids

    def _compare_all(self, queries: Float32[np.ndarray, "q dim"], k: int) -> tuple[np.ndarray, np.ndarray]:
        """The exact result, from fetching every feature: the reference for measuring an index's recall."""
        scores = np.empty((len(queries), 0), np.float32)
        ids = np.empty((len(queries), 0), np.int64)
        for rows in self._batches(["id", "features"]):
            part = Memory(self.dim, "exact")
            table = _table([row | {"path": "", "pid": UNKNOWN_PID} for row in rows])
            part.extend([(table, np.array([row["features"] for row in rows], np.float32))])
            found = part.nearest(queries, k)
            scores, ids = np.hstack([scores, found[0]]), np.hstack([ids, found[1]])
            best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            scores, ids = np.take_along_axis(scores, best, 1), np.take_along_axis(ids, best, 1)
        return scores, ids

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """The response to one request of the client."""
        return self._ask(name, lambda: getattr(self._client, name)(*args, timeout=TIMEOUT, **kwargs))

    def _ask(self, name: str, request: Callable[[], Any]) -> Any:
        """The response to a request, which is repeated while the server does not respond."""
        from pymilvus.exceptions import MilvusException

        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                with _quiet():
                    return request()
            except MilvusException as error:
                if time.monotonic() > deadline:
                    raise ConnectionError(
                        f"Milvus at {self.url} did not answer {name!r} for {PATIENCE:.0f} s ({error.message}): start "
                        "it and repeat the call; photos that are stored are not encoded again"
                    ) from error
            time.sleep(0.5)


def _connect(url: str):
    """A Milvus client. Raises ConnectionError at once if no server responds."""
    try:
        with _quiet():
            from pymilvus import MilvusClient
            from pymilvus.exceptions import MilvusException
    except ImportError as error:
        raise ImportError(f"{url} needs the package pymilvus ({error}): pip install 'irra-core[milvus]'") from None
    if not url.startswith("http"):
        Path(url).parent.mkdir(parents=True, exist_ok=True)
    try:
        with _quiet():
            return MilvusClient(url, timeout=TIMEOUT)
    except MilvusException as error:
        raise ConnectionError(f"no Milvus answers at {url} ({error.message}): start it, or correct the url") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Context manager that hides the tracebacks logged by pymilvus and by Milvus Lite's server in this process."""
    loggers = [logging.getLogger(name) for name in ("pymilvus", "grpc")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _table(rows: Iterable[dict]) -> DataFrame:
    """Milvus's rows as a table with the gallery's columns: image_id, path, pid."""
    table = DataFrame([(row["id"], row["path"], row["pid"]) for row in rows], columns=["image_id", "path", "pid"])
    table = table.astype({"image_id": np.int64, "path": "str", "pid": "Int64"})
    return table.assign(pid=table.pid.mask(table.pid == UNKNOWN_PID))
