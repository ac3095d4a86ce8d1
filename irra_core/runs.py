"""A recipe and its data → a run folder: its name, its lock, the files it keeps, whether it is finished."""

import errno
import hashlib
import json
import os
import platform
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from filelock import FileLock, Timeout
from pandas import DataFrame

from irra_core.annotations import photo_table, table_digest
from irra_core.backbone import GENERAL
from irra_core.checkpoints import replaced
from irra_core.images import image_array
from irra_core.recipes import NEUTRAL, OWN_DATA, RECIPES, Recipe, own_file, read_recipe
from irra_core.settings import progress_bar, runs_root, smoke

FORMAT = 1  # of what a run folder keeps; a run with another is made again
WEIGHTS, STATE, STATE_BEFORE = "weights.safetensors", "state.safetensors", "state.previous.safetensors"
FAILED, FAILED_BATCH = "failed.safetensors", "failed-batch.safetensors"  # before the step with a non-finite loss
UNREADABLE = "unreadable.csv"  # photos left out, with the reasons
TABLE = "annotations.parquet"  # for the processes of torchrun, until the run is finished
LOCK = ".lock"


class RunFolder(NamedTuple):
    """A run's folder, and the folders of the same name that hold other runs: path → the differences."""

    path: Path
    passed_over: dict[Path, list[str]]


def dataset_name(dataset: str) -> str:
    """The folder name of a data set: its name; for own data the file's stem, cut, and 8 hex digits of its hash."""
    if dataset in RECIPES:
        return dataset
    path = own_file(dataset)
    sizes = sorted((file.name, file.stat().st_size) for file in (path.iterdir() if path.is_dir() else [path]))
    content = path.read_bytes() if path.suffix.lower() in OWN_DATA[:3] else repr(sizes).encode()  # of photos: too much
    return f"{path.stem[:60]}-{hashlib.sha256(content).hexdigest()[:8]}"


def run_name(recipe: Recipe) -> str:
    """The fields that differ from the data set's own recipe, as `epochs=1,seed=3`; `default` if none does."""
    parts = ["smoke"] if smoke() else []
    shrunk = ("identities", "max_steps") if smoke() else ()
    for name, value in recipe.differences().items():
        if name not in shrunk:
            parts.append(f"{name}={_plain(value)}")
    name = ",".join(parts) or "default"
    if len(name) > 120:  # file systems allow 255 bytes; the rest stays in recipe.json
        name = f"{name[:100]}…{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name


def _plain(value: Any) -> str:
    """A value in characters that every file system accepts; of a path, its stem and a hash of the whole."""
    text = str(value)
    if "/" in text or "\\" in text:
        text = f"{Path(text).stem}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return re.sub(r"[^\w.+-]|\.$", "-", text)


def data_digest(annotations: DataFrame, recipe: Recipe, progress=None) -> str:
    """The fingerprint of a run's data: the table, its image files (which this decodes if need be), the shipped CLIP."""
    photos = photo_table(annotations)
    pixels = image_array(list(photos.path), recipe.image_height, recipe.image_width, progress=progress)
    start = GENERAL.read_bytes() if recipe.pretrained == "general" else b""  # another CLIP makes another run
    return hashlib.sha256(f"{table_digest(annotations)} {pixels.digest}".encode() + start).hexdigest()


def run_folder(recipe: Recipe, data: str, root: str | Path | None = None) -> RunFolder:
    """The folder of this recipe on this data below `root`: a new one, or the one that holds the run already.

    A folder of the same name with another recipe, other data or another format is passed over and reported.
    """
    parent = runs_root(root) / dataset_name(recipe.dataset)
    name, passed_over = run_name(recipe), {}
    for count in range(1, 1000):
        path = parent / (name if count == 1 else f"{name}~{count}")
        different = differences(path, recipe, data)
        if not different:
            return RunFolder(path, passed_over)
        passed_over[path] = different
    raise ValueError(f"{parent / name} and 999 more folders hold other runs: remove what is no longer needed")


def differences(path: Path, recipe: Recipe, data: str) -> list[str]:
    """How the run recorded in a folder differs from this one, a sentence each; empty where nothing is recorded."""
    file = Path(path) / "recipe.json"
    if not file.exists():
        return []
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["format"] != FORMAT:
            return [f"its format is {kept['format']}, this version writes {FORMAT}"]
        theirs, ours = NEUTRAL | kept["recipe"], json.loads(recipe.to_json())
    except (ValueError, KeyError, TypeError) as error:
        return [f"its recipe.json cannot be read ({error})"]
    names = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    if own_file(recipe.dataset) and kept["data"] == data:  # the same table by another path
        names = [name for name in names if name != "dataset"]
    found = [f"its {name} is {theirs.get(name)!r}, now {ours.get(name)!r}" for name in names]
    return found + (["its data (annotations, images or the shipped CLIP) were others"] if kept["data"] != data else [])


def begin(path: Path, recipe: Recipe, data: str) -> None:
    """Write a run's recipe.json into its folder. Raises ValueError if the folder holds another run."""
    different = differences(path, recipe, data)
    if different:
        raise ValueError(f"{path} holds another run: {'; '.join(different)}. Take another folder or remove it")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        remedy = "grant access there, or set IRRA_REPORTS to another folder"
        raise OSError(error.errno, f"run folder {path} cannot be made ({error.strerror}): {remedy}") from error
    if not (path / "recipe.json").exists():
        kept = {"format": FORMAT, "data": data, "recipe": json.loads(recipe.to_json())}
        write_text(path / "recipe.json", json.dumps(kept, indent=2))


@contextmanager
def locked(path: Path, wait: bool = False, progress=None) -> Iterator[None]:
    """Within, no other process can lock this run folder; the system frees the lock when the process ends or is killed.

    Deletes the incomplete files that a killed process left. Where another process holds the lock, raises RuntimeError
    naming it, or with `wait` waits for it and shows a bar of the tqdm-like class `progress`. Raises OSError, naming the
    folder, where it cannot be locked: read-only, the lock file a link, or a disk without locks.
    """
    path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path / LOCK, thread_local=False, fallback_to_soft=False, on_acquired=_sign)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        _wait(lock, path, wait, progress)
    except OSError as error:
        remedy = f"make room or grant access there, delete {LOCK} if it is a link, or set IRRA_REPORTS to a local disk"
        raise OSError(error.errno, f"run folder {path} cannot be locked ({error.strerror}): {remedy}") from error
    try:
        for part in _half_written(path):
            part.unlink(missing_ok=True)
        yield
    finally:
        with suppress(PermissionError):  # on Windows, where releasing the lock deletes the file
            (path / LOCK).unlink(missing_ok=True)
        lock.release()


def _holder() -> str:
    return f"process {os.getpid()} on {platform.node()}"


def _sign(descriptor: int) -> None:
    """Write this process's name into the lock file, for the error message or the bar of others."""
    with suppress(OSError):  # on a full disk: others read no name, and the first result says what is full
        os.ftruncate(descriptor, 0)
        os.write(descriptor, _holder().encode())


def _wait(lock: FileLock, path: Path, wait: bool, progress) -> None:
    """Wait until the process that holds the lock has ended; RuntimeError without `wait`, or if it is this process."""
    try:
        holder = (path / LOCK).read_text(encoding="utf-8") or "another process"
    except OSError:  # released just now, or on Windows, where a locked file cannot be read
        holder = "another process"
    own = holder == _holder()
    if own or not wait:
        remedy = "that is this one: restart the kernel" if own else "wait for it, or end it"
        raise RuntimeError(f"{path} is being trained by {holder}: {remedy}")
    with progress_bar(progress, total=1, unit="run", desc=f"{path.name} is being trained by {holder}: waiting") as bar:
        lock.acquire()
        bar.update(1)


def _half_written(path: Path) -> list[Path]:
    """Files that a killed process was writing: ours, and those of safetensors."""
    return [*path.glob(".*.part"), *path.glob(".tmp*")]


def clear(path: Path) -> None:
    """Delete from a finished run's folder the files that only an unfinished run needs."""
    left = [path / name for name in (STATE, STATE_BEFORE, FAILED, FAILED_BATCH, TABLE)] + _half_written(path)
    for file in left:
        file.unlink(missing_ok=True)


def finished(path: str | Path) -> bool:
    """True if a run folder holds a complete run: weights and metrics."""
    return all((Path(path) / name).exists() for name in (WEIGHTS, "metrics.json", "recipe.json"))


def load_run(path: str | Path) -> dict[str, Any]:
    """The contents of a run folder: recipe, history, metrics, machine and queries (None where a file is absent).

    Raises ValueError naming a file that cannot be read.
    """
    from irra_core.hub.runs import linked

    path = linked(Path(path))
    if (kept := _read(path / "recipe.json", _described)) is None:
        raise FileNotFoundError(errno.ENOENT, "no run is here: recipe.json is absent", str(path))
    for name in ("metrics", "machine"):
        kept[name] = _read(path / f"{name}.json", lambda file: dict(json.loads(file.read_text("utf-8"))))
    for name in ("history", "queries"):
        kept[name] = _read(path / f"{name}.csv", pd.read_csv)
    return kept


def _described(file: Path) -> dict[str, Any]:
    """Recipe and data of a run, from its recipe.json."""
    kept = json.loads(file.read_text(encoding="utf-8"))
    return {"recipe": read_recipe(kept["recipe"]), "data": kept["data"]}


def _read(file: Path, reader: Callable[[Path], Any]) -> Any:
    """The reader's result for a file, None if it is absent; ValueError, with name and remedy, where it fails."""
    try:
        return reader(file)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        remedy = f"copy {file.parent.name} again, or remove it and run it again"
        raise ValueError(f"{file} cannot be read ({type(error).__name__}: {error}): {remedy}") from error


def mark_latest(path: Path) -> None:
    """Name a run in latest.txt of the reports folder (of a smoke run: of its folder `smoke`); `latest` is a link to it.

    There is no link where the system does not allow it, as Windows does to few users.
    """
    root = path.parent.parent
    write_text(root / "latest.txt", f"{path.relative_to(root).as_posix()}\n")
    aside = root / f".latest.{os.getpid()}"
    with suppress(OSError):
        aside.unlink(missing_ok=True)
        aside.symlink_to(os.path.relpath(path, root), target_is_directory=True)
        os.replace(aside, root / "latest")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically: to a temporary file, flushed to the disk, then renamed."""
    with replaced(path) as aside, aside.open("w", encoding="utf-8", newline="") as file:  # the same bytes everywhere
        file.write(text)
