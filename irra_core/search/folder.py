"""A gallery's folder ↔ a `Memory`: the head `gallery.json`, parts of features and rows, and the HNSW graph.

A part of format 2 is one safetensors file with a checksum over its content: `features` (float32), `image_id` (int64),
`pid` (int64) and `pid_known` (bool), `paths` (the UTF-8 bytes of all paths, joined) and `offsets` (int64: path i is
bytes offsets[i] to offsets[i + 1]). A part of format 1 has its rows in a Parquet file beside it. Parts of format 1 can
be read; new parts are always written in format 2. The arrays of a part show its format.
"""

import glob
import json
import os
import platform
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from filelock import FileLock, Timeout
from jaxtyping import Float32
from pandas import DataFrame
from safetensors import SafetensorError, safe_open
from torch import Tensor

from irra_core.backbone import CHECKSUM, checksum
from irra_core.batches import ALONE, Team
from irra_core.checkpoints import save_tensors
from irra_core.runs import write_text
from irra_core.search.encoding import check_unit
from irra_core.search.hnsw import GRAPH
from irra_core.search.nearest import Memory, Shard
from irra_core.search.photo_table import photo_id
from irra_core.search.stores import check_index, feature_width, model_fingerprint
from irra_core.settings import WINDOWS, put_in_place

FORMAT = 2  # written; format 1 can still be read
HEAD = "gallery.json"
PATIENCE = 20  # seconds that `load_folder` waits while another process replaces the folder
LARGE_ID = 2**32  # most hashes of paths are larger, most numbers that people give to photos are smaller


@contextmanager
def building(folder: Path, team: Team) -> Iterator[None]:
    """Within, no other process can build this folder with the same process number, or alone.

    The system frees the lock when the process ends or is killed. Raises RuntimeError naming the process that has it,
    and OSError, naming the folder, where it cannot be locked.
    """
    _check_free(folder)
    with _build_lock(folder, "alone" if team == ALONE else str(team.process)):
        numbers = {path.name.split("-")[1] for path in folder.glob(".build-*-lock")} - {"alone"}
        for number in numbers if team == ALONE else ["alone"]:
            with _build_lock(folder, number, wait=5.0):  # raises if another process keeps it: one that looks lets go
                pass
        yield


@contextmanager
def _build_lock(folder: Path, number: str, wait: float = 0.0) -> Iterator[None]:
    """Hold the lock of one process number in a gallery's folder, got at once or within `wait` seconds."""
    path = folder / f".build-{number}-lock"
    lock = FileLock(path, timeout=wait, poll_interval=0.02, fallback_to_soft=False, on_acquired=_sign)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        holder = ""
        with suppress(OSError):  # released just now, or on Windows, where a locked file cannot be read
            holder = path.read_text(encoding="utf-8")
        what = "" if number == "alone" else f" as process {number}"
        raise RuntimeError(
            f"{folder} is being built{what} by {holder or 'another process'}: wait for it, or end it"
        ) from None
    except OSError as error:
        remedy = "grant access there, or build the gallery in a folder on a local disk and copy it"
        raise OSError(error.errno, f"gallery {folder} cannot be locked ({error.strerror}): {remedy}") from error
    try:
        yield
    finally:
        with suppress(PermissionError):  # on Windows, where releasing the lock deletes the file
            path.unlink(missing_ok=True)
        lock.release()


def _sign(descriptor: int) -> None:
    """Write this process's name into its lock file, for the error message of another process."""
    with suppress(OSError):  # on a full disk
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {platform.node()}".encode())


def open_or_begin(folder: Path, model, index: str, team: Team) -> Memory:
    """The photos stored in a folder, none if it is new; other processes may create the folder at the same time."""
    if not (folder / HEAD).is_file():
        begin_folder(folder, model, index)
    head = _read_head(folder, model)  # raises if another process has just created another model's gallery
    if head["format"] < FORMAT:
        (folder / GRAPH).unlink(missing_ok=True)  # format 1 did not store the graph in faiss's format
    if (head["format"], head["index"]) != (FORMAT, index):
        begin_folder(folder, model, index, head["photos"])
    head |= {"format": FORMAT, "index": index if team == ALONE else "exact"}  # a process's share has no graph
    return _filled(folder, head, whole=False)


def load_folder(folder: Path, model, index: str | None = None) -> Memory:
    """A folder's photos, every file checked; `index` replaces the one in the head.

    Reads again while another process's `save_folder` replaces the folder.
    """
    end = time.monotonic() + PATIENCE
    while True:
        before = _version(folder)
        try:
            head = _read_head(folder, model)
            store = _filled(folder, head | {"index": check_index(index or head["index"])}, whole=True)
            if _version(folder) == before:
                return store
        except (ValueError, OSError) as error:
            aside = next(folder.parent.glob(f"{glob.escape(folder.name)}.old-*"), None) if before is None else None
            if time.monotonic() > end and aside:
                raise FileNotFoundError(
                    f"{folder} is not there and {aside} is: a save was ended before the new gallery got its name. "
                    "Rename the latter to the former"
                ) from error
            if time.monotonic() > end or (_version(folder) == before and not aside):
                raise
        time.sleep(0.05)


def _version(folder: Path) -> tuple[int, ...] | None:
    """What tells a gallery from the one that replaces it: its head's file and time; None without a head."""
    try:
        found = os.stat(folder / HEAD)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns


def _filled(folder: Path, head: Mapping[str, Any], whole: bool) -> Memory:
    """The photos of all parts. Raises ValueError for missing parts if `whole`; else the caller encodes those photos."""
    store, graph = Memory(head["dim"], head["index"]), folder / GRAPH
    parts = _without_repeats([_read_part(path, head["dim"]) for path in sorted(folder.glob("part-*.safetensors"))])
    if (count := sum(len(photos) for photos, _ in parts)) < head["photos"]:
        if whole:
            raise ValueError(
                f"{folder} has {count:,} of its {head['photos']:,} photos, a part is missing: copy the gallery "
                "again, or call Gallery.build(…, folder=) with the same photos, which adds the missing ones"
            )
        graph.unlink(missing_ok=True)  # photos that are encoded again are stored in another order
    store.extend(parts, graph if head["format"] == FORMAT else None)
    if (twice := store.images.image_id.duplicated()).any():
        raise ValueError(f"{folder}: image_id {store.images.image_id[twice].iloc[0]} is there twice: build it again")
    return store


def _without_repeats(parts: list[Shard]) -> list[Shard]:
    """The parts without rows that are already in one before: two processes may have encoded the same photo."""
    if not parts:
        return parts
    repeated = pd.concat([photos for photos, _ in parts]).duplicated(["image_id", "path", "pid"]).to_numpy()
    starts = np.cumsum([0, *(len(photos) for photos, _ in parts)])
    stays = [~repeated[start:end] for start, end in pairwise(starts)]
    return [
        (photos, features) if rows.all() else (photos[rows].reset_index(drop=True), features[rows])
        for (photos, features), rows in zip(parts, stays)
    ]


def save_folder(folder: Path, model, store: Memory) -> None:
    """Write a gallery to a folder, which is renamed into place once complete; it replaces an existing gallery."""
    _check_free(folder)
    with _saving(folder):
        aside, old = (folder.with_name(f"{folder.name}.{word}-{os.getpid()}") for word in ("partial", "old"))
        try:
            begin_folder(aside, model, store.index, len(store))
            _write_part(aside, store.images, store.features)
            store.save_graph(aside)
            if folder.exists():
                put_in_place(folder, old)
            put_in_place(aside, folder)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            if old.exists() and not folder.exists():
                old.replace(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _saving(folder: Path) -> Iterator[None]:
    """Within, no other process saves to the folder; deletes what an ended process left beside it."""
    lock = FileLock(folder.with_name(f".{folder.name}.lock"), fallback_to_soft=False)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError:  # a file system without locks: two savers at once are then not told apart
        yield
        return
    try:
        for word in ("partial", "old") if (folder / HEAD).is_file() else ("partial",):
            for left in folder.parent.glob(f"{glob.escape(folder.name)}.{word}-*"):
                shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        with suppress(PermissionError):  # on Windows, where releasing the lock deletes the file
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def complete_folder(folder: Path, model, store: Memory) -> None:
    """Write what is known only after all parts are written: the number of photos, and the graph."""
    store.save_graph(folder)
    begin_folder(folder, model, store.index, len(store))


def begin_folder(folder: Path, model, index: str, photos: int = 0) -> None:
    """Write a folder's head; `photos` is the minimum number of photos in the folder."""
    _check_free(folder)
    folder.mkdir(parents=True, exist_ok=True)
    head = {"format": FORMAT, "model": model_fingerprint(model), "dim": feature_width(model), "index": index}
    write_text(folder / HEAD, json.dumps(head | {"photos": photos}, indent=2) + "\n")


def _check_free(folder: Path) -> None:
    """Raise ValueError for a path that holds anything but a gallery.

    Another process may create the gallery at the same time. It writes the head first, so the head is checked last.
    """
    taken = folder.exists() and (not folder.is_dir() or any(folder.glob("[!.]*")))
    if taken and not (folder / HEAD).is_file():
        raise ValueError(f"{folder} holds something that is no gallery: give the path of a new folder")


def _read_head(folder: Path, model) -> dict[str, Any]:
    """The head of a folder, checked against the model."""
    path = folder / HEAD
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no gallery: it has no {HEAD}; Gallery.build(…, folder=) creates one")
    try:
        head = {"photos": 0} | json.loads(path.read_text(encoding="utf-8"))  # an unfinished gallery may lack it
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): build the gallery again") from None
    kinds = {"format": int, "model": str, "dim": int, "index": str, "photos": int}
    if {name: type(head.get(name)) for name in kinds} != kinds or head["format"] not in (1, FORMAT):
        raise ValueError(f"{path} is no gallery of format 1 or {FORMAT}: build the gallery again")
    try:
        check_index(head["index"])
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): build the gallery again") from None
    mine, width = model_fingerprint(model), feature_width(model)
    if head["model"] != mine:
        raise ValueError(
            f"{folder} was built by model {head['model'][:12]} and this is model {mine[:12]}: features of two "
            "models cannot be compared; load the checkpoint that built it, or build another gallery"
        )
    if head["dim"] != width:
        raise ValueError(
            f"{path} is damaged: it says that features have width {head['dim']}, the model's have width {width}: "
            "build the gallery again"
        )
    return head


def written(shards: Iterable[Shard], folder: Path, team: Team) -> Iterator[Shard]:
    """Yields the same shards, each one after writing it to the folder."""
    for photos, features in shards:
        _write_part(folder, photos, features, team)
        yield photos, features


def _write_part(folder: Path, photos: DataFrame, features: Float32[np.ndarray, "n dim"], team: Team = ALONE) -> None:
    """Write the next part. Process p of n uses part numbers p, p + n, p + 2n, …, so that no two write the same part."""
    process, processes = team
    numbers = [int(path.stem.removeprefix("part-")) for path in folder.glob("part-*.safetensors")]
    free = max(numbers, default=-1) + 1
    encoded = [path.encode() for path in photos.path]
    arrays = {
        "features": np.ascontiguousarray(features),
        "image_id": photos.image_id.to_numpy(np.int64, copy=True),
        "pid": photos.pid.fillna(0).to_numpy(np.int64, copy=True),
        "pid_known": photos.pid.notna().to_numpy(bool, copy=True),
        "paths": np.frombuffer(bytearray(b"".join(encoded)), np.uint8),
        "offsets": np.cumsum([0, *map(len, encoded)], dtype=np.int64),
    }
    part = folder / f"part-{free + (process - free) % processes:05}.safetensors"
    save_tensors({name: torch.from_numpy(array) for name, array in arrays.items()}, part)


def _read_part(path: Path, dim: int) -> Shard:
    """The rows and features of one part. Raises ValueError if the part is damaged."""
    try:
        if not path.is_file():
            raise ValueError("it is not a regular file")
        path.open("rb").close()  # without the permission, safetensors says that the file is absent
        with safe_open(path, "pt") as file:  # torch supports every dtype, numpy does not
            arrays, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        earlier = "paths" not in arrays
        if (CHECKSUM in metadata or not earlier) and metadata.get(CHECKSUM) != checksum(arrays, metadata):
            raise ValueError("its checksum does not match its content")
        photos, features = (_format_1 if earlier else _rows)(arrays, path), arrays["features"].numpy()
        if WINDOWS:  # a file that stayed mapped could not be replaced by the next save
            features = features.copy()
        if features.dtype != np.float32 or features.shape != (len(photos), dim):
            raise ValueError(f"features are {features.dtype} {features.shape}, expected float32 {(len(photos), dim)}")
    except PermissionError as error:
        raise PermissionError(error.errno, f"{path} may not be read by this user: grant access to it") from error
    except (SafetensorError, OSError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): delete it, then call Gallery.build(…, folder=) with the same photos, which "
            "adds the missing ones"
        ) from None
    return photos, features


def _rows(arrays: Mapping[str, Tensor], path: Path) -> DataFrame:
    """The rows stored in the arrays of a part of format 2."""
    content = arrays["paths"].numpy().tobytes()
    paths = [content[start:end].decode() for start, end in pairwise(arrays["offsets"].tolist())]
    pids = pd.arrays.IntegerArray(arrays["pid"].numpy().copy(), ~arrays["pid_known"].numpy())
    return DataFrame({"image_id": arrays["image_id"].numpy().copy(), "path": pd.array(paths, "str"), "pid": pids})


def _format_1(arrays: Mapping[str, Tensor], path: Path) -> DataFrame:
    """The rows in the Parquet file beside a part of format 1, fully checked because the part may have no checksum.

    Raises TypeError for a column of an unexpected dtype, because a conversion could lose information.
    """
    import pyarrow
    from pyarrow import parquet, types

    file = path.with_suffix(".parquet")
    try:
        table = parquet.read_table(file, columns=["image_id", "path", "pid"], page_checksum_verification=True)
        table.validate(full=True)  # else a path that is not UTF-8 is noticed later, or never
    except pyarrow.ArrowException as error:
        raise ValueError(f"{file.name}: {error}") from None
    for name, kind in zip(table.column_names, table.schema.types, strict=True):
        if not (types.is_string(kind) or types.is_large_string(kind) if name == "path" else types.is_integer(kind)):
            raise TypeError(f"column {name} of {file.name} is {kind}")
    photos = table.replace_schema_metadata(None).to_pandas()
    photos = photos.astype({"image_id": np.int64, "path": "str", "pid": "Int64"})
    ids = arrays["image_id"]
    if ids.dtype != torch.int64 or not np.array_equal(ids.numpy(), photos.image_id) or photos.path.isna().any():
        raise ValueError(f"{file.name} does not belong to this part")
    _check_hashed_paths(photos, file.name)
    check_unit(arrays["features"].numpy(), list(photos.path), "the part is damaged")
    return photos


def _check_hashed_paths(photos: DataFrame, name: str) -> None:
    """Raise ValueError for a path whose hash is not its image_id, where most image_ids of the part are such hashes."""
    hashed = photos.path.map(photo_id) == photos.image_id
    wrong = ~hashed & (photos.image_id >= LARGE_ID)
    if wrong.any() and hashed.mean() > 0.5:
        raise ValueError(f"{name}: path {photos.path[wrong].iloc[0]!r} is not the one that its image_id was made of")
