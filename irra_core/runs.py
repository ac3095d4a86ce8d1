"""Run folders: their names, what they keep, when one is finished, and many of them collected into one table."""

import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import pandas as pd
from pandas import DataFrame

from irra_core.annotations import photo_table, table_digest
from irra_core.checkpoints import replaced
from irra_core.evaluation import METRICS, readable, scores_table
from irra_core.images import image_array
from irra_core.recipes import NEUTRAL, RECIPES, Recipe, own_file, read_recipe
from irra_core.settings import cores, reports_root, smoke

FORMAT = 1  # of what a run folder keeps; a run with another is made again
WEIGHTS, STATE, STATE_BEFORE = "weights.safetensors", "state.safetensors", "state.previous.safetensors"
FAILED, FAILED_BATCH = "failed.safetensors", "failed-batch.safetensors"  # before the step whose loss was no number
UNREADABLE = "unreadable.csv"  # photos that were left out, with the reasons
TABLE = "annotations.parquet"  # for the processes of torchrun, until the run is finished
LOCK = ".lock"


class RunFolder(NamedTuple):
    """Where a run lives, and why folders of the same name were passed over: path → the differences."""

    path: Path
    passed_over: dict[Path, list[str]]


def dataset_name(dataset: str) -> str:
    """The data set's name in folders: as it is; for own data the file's stem and 8 hex digits of its hash."""
    if dataset in RECIPES:
        return dataset
    path = own_file(dataset)
    return f"{path.stem}-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}"


def run_name(recipe: Recipe) -> str:
    """What differs from the data set's own recipe, as `epochs=1,seed=3`; `default` where nothing does."""
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
    """A value in letters that every file system takes; a path by its last part and a hash of the whole."""
    text = str(value)
    if "/" in text or "\\" in text:
        text = f"{Path(text).stem}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return re.sub(r"[^\w.+-]", "-", text)


def data_digest(annotations: DataFrame, recipe: Recipe, progress=None) -> str:
    """The fingerprint of a run's data: the table and its image files (which this decodes if need be)."""
    photos = photo_table(annotations)
    pixels = image_array(list(photos.path), recipe.image_height, recipe.image_width, progress=progress)
    return hashlib.sha256(f"{table_digest(annotations)} {pixels.digest}".encode()).hexdigest()


def run_folder(recipe: Recipe, data: str, root: str | Path | None = None) -> RunFolder:
    """The folder of this recipe on this data below `root`: a new one, or the one where it was begun or finished.

    A folder of the same name that holds another recipe, other data or another format is passed over, and named.
    """
    parent = reports_root(root) / ("smoke" if smoke() else "") / dataset_name(recipe.dataset)
    name, passed_over = run_name(recipe), {}
    for count in range(1, 1000):
        path = parent / (name if count == 1 else f"{name}~{count}")
        different = differences(path, recipe, data)
        if not different:
            return RunFolder(path, passed_over)
        passed_over[path] = different
    raise ValueError(f"{parent / name} and 999 more folders hold other runs: remove what is no longer needed")


def differences(path: Path, recipe: Recipe, data: str) -> list[str]:
    """What sets the run recorded in a folder apart from this one, a sentence each; none where nothing is recorded."""
    file = Path(path) / "recipe.json"
    if not file.exists():
        return []
    try:
        kept = json.loads(file.read_text())
        if kept["format"] != FORMAT:
            return [f"its format is {kept['format']}, this version writes {FORMAT}"]
        theirs, ours = NEUTRAL | kept["recipe"], json.loads(recipe.to_json())
    except (ValueError, KeyError, TypeError) as error:
        return [f"its recipe.json cannot be read ({error})"]
    names = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    found = [f"its {name} is {theirs.get(name)!r}, now {ours.get(name)!r}" for name in names]
    return found + (["its data (annotations or images) were others"] if kept["data"] != data else [])


def begin(path: Path, recipe: Recipe, data: str) -> None:
    """Record what a run is in its folder. Raises ValueError if the folder holds another run."""
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
    """This process alone may write to a run folder; the lock goes with the process, however that ends.

    What a killed process left half written is cleared away. Waits for the process that is there, which a bar of the
    tqdm-like class `progress` names, or, without `wait`, raises RuntimeError naming it.
    """
    path.mkdir(parents=True, exist_ok=True)
    file = path / LOCK
    with _lock(file, wait, progress) as opened:
        with suppress(OSError):  # on a full disk: whoever waits reads no name, and the first result says what is full
            os.ftruncate(opened.fileno(), 0)
            os.write(opened.fileno(), f"process {os.getpid()} on {platform.node()}".encode())
        for part in _half_written(path):
            part.unlink(missing_ok=True)
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


def _half_written(path: Path) -> list[Path]:
    """Files that a killed process was writing: ours, and those of safetensors, which has names of its own."""
    return [*path.glob(".*.part"), *path.glob(".tmp*")]


def clear(path: Path) -> None:
    """Remove from a finished run's folder what only an unfinished one needs; a process killed just then left it."""
    left = [path / name for name in (STATE, STATE_BEFORE, FAILED, FAILED_BATCH, TABLE)] + _half_written(path)
    for file in left:
        file.unlink(missing_ok=True)


def _lock(file: Path, wait: bool, progress) -> TextIO:
    """The open lock file, locked until it is closed or this process dies.

    Raises OSError, naming the folder, where it is not to be had: in a read-only folder, through a link, or on a disk
    without locks.
    """
    while True:
        try:
            opened = os.fdopen(os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+", encoding="utf-8")
        except OSError as error:
            raise _no_lock(file, error) from error
        try:
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _wait(opened, file, wait, progress)
            except OSError as error:
                raise _no_lock(file, error) from error
            if file.exists() and os.path.samestat(os.fstat(opened.fileno()), file.stat()):
                return opened  # else the one before us has just finished and taken its file away
        except BaseException:
            opened.close()
            raise
        opened.close()


def _no_lock(file: Path, error: OSError) -> OSError:
    remedy = f"make room or grant access there, delete {file.name} if it is a link, or set IRRA_REPORTS to a local disk"
    return OSError(error.errno, f"run folder {file.parent} cannot be locked ({error.strerror}): {remedy}")


def _wait(opened: TextIO, file: Path, wait: bool, progress) -> None:
    """Wait until the process that has locked a run folder has ended; RuntimeError without `wait`, or if it is this."""
    opened.seek(0)
    holder = opened.read() or "another process"
    own = f"process {os.getpid()} on {platform.node()}" == holder
    if own or not wait:
        remedy = "that is this one: restart the kernel" if own else "wait for it, or end it"
        raise RuntimeError(f"{file.parent} is being trained by {holder}: {remedy}")
    bar = (
        progress(total=1, unit="run", desc=f"{file.parent.name} is being trained by {holder}: waiting")
        if progress
        else None
    )
    try:
        fcntl.flock(opened, fcntl.LOCK_EX)
        if bar:
            bar.update(1)
    finally:
        if bar:
            bar.close()


def finished(path: str | Path) -> bool:
    """True when a run folder holds the result of a whole run: its weights and its metrics."""
    return all((Path(path) / name).exists() for name in (WEIGHTS, "metrics.json", "recipe.json"))


def load_run(path: str | Path) -> dict[str, Any]:
    """What a run folder keeps: recipe, history, metrics, machine and queries (None where a file is absent).

    Raises ValueError naming a file that cannot be read.
    """
    path = Path(path)
    if (kept := _read(path / "recipe.json", _described)) is None:
        raise FileNotFoundError(errno.ENOENT, "no run is here: recipe.json is absent", str(path))
    for name in ("metrics", "machine"):
        kept[name] = _read(path / f"{name}.json", lambda file: dict(json.loads(file.read_text())))
    for name in ("history", "queries"):
        kept[name] = _read(path / f"{name}.csv", pd.read_csv)
    return kept


def _described(file: Path) -> dict[str, Any]:
    """Recipe and data of a run, from its recipe.json."""
    kept = json.loads(file.read_text())
    return {"recipe": read_recipe(kept["recipe"]), "data": kept["data"]}


def _read(file: Path, reader: Callable[[Path], Any]) -> Any:
    """What the reader makes of a file, None if it is absent; ValueError, with name and remedy, where it fails."""
    try:
        return reader(file)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        remedy = f"copy {file.parent.name} again, or remove it and run it again"
        raise ValueError(f"{file} cannot be read ({type(error).__name__}: {error}): {remedy}") from error


def seconds_a_step(run: Mapping[str, Any]) -> float:
    return run["machine"]["seconds"]["training"] / int(run["history"].step.iloc[-1])


def collect(root: str | Path | None = None) -> DataFrame:
    """Every finished run below the reports folder, a row each: dataset, run, the recipe's fields, the test scores.

    A folder that cannot be read is left out, with a warning; `attrs["broken"]` is path → reason.
    """
    rows, broken = [], {}
    for file in sorted(reports_root(root).glob("**/metrics.json")):
        try:
            rows.append(_row(file.parent))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            broken[str(file.parent)] = str(error)
            warnings.warn(f"a run is left out: {error}", stacklevel=2)
    table = DataFrame(rows)
    table.attrs["broken"] = broken
    return table


def _row(path: Path) -> dict[str, Any]:
    """A run's row in the table of all runs."""
    run = load_run(path)
    row = {"dataset": path.parent.name, "run": path.name, "path": str(path)}
    row |= {name: value for name, value in json.loads(run["recipe"].to_json()).items() if name != "dataset"}
    for name, (value, low, high) in run["metrics"].get("text_to_image", {}).items():
        row |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return row


def beside_published(metrics: Mapping[str, Any], recipe: Recipe) -> DataFrame:
    """Test scores of a run with their intervals, and its data set's published rows with the difference, as text."""
    names = {"text_to_image": "this run", "pretrained": "its CLIP before fine-tuning", "untrained": "random weights"}
    measured = {label: metrics[name] for name, label in names.items() if name in metrics}
    if "hard_negatives" in metrics:
        measured["this run, people with a near-twin only"] = metrics["hard_negatives"]["text_to_image"]
    table = readable(scores_table(measured))
    if "ceiling_R1" in metrics:
        table.loc["the best that the captions allow", "R1 (%)"] = f"{metrics['ceiling_R1']:.1f}"
    from irra_core.released.published import published

    rows = published()
    for row in rows[(rows.table == "results") & (rows.dataset == recipe.dataset)].itertuples():
        label = f"published: {row.method} ({row.source})"
        pairs = [(getattr(row, name), metrics["text_to_image"][name][0]) for name in METRICS]
        table.loc[label] = [f"{theirs:.1f} (this run {ours - theirs:+.1f})" for theirs, ours in pairs]
    return table.fillna("")


def gains(metrics: Mapping[str, Any]) -> DataFrame:
    """How much the trained model gains on the same captions over what it began from, paired, as text for the eye."""
    names = {"gain_over_pretrained": "over its CLIP before fine-tuning", "gain_over_untrained": "over random weights"}
    return readable(scores_table({label: metrics[name] for name, label in names.items() if name in metrics}))


def mark_latest(path: Path) -> None:
    """Point the link `latest` in the reports folder (of a shrunken run: in its folder `smoke`) to a run."""
    root = path.parent.parent
    aside = root / f".latest.{os.getpid()}"
    aside.unlink(missing_ok=True)
    aside.symlink_to(os.path.relpath(path, root))
    os.replace(aside, root / "latest")


def summary(path: str | Path) -> str:
    """The test scores of a run folder in a few lines, and what lies in it."""
    path = Path(path).resolve()
    run = load_run(path)
    metrics, lines = run["metrics"], []
    for name in ("text_to_image", "pretrained", "untrained"):
        if name in metrics:
            shown = [
                f"{score} {value:.1f} [{low:.1f}, {high:.1f}]" for score, (value, low, high) in metrics[name].items()
            ]
            lines.append(f"{name.replace('_', ' '):>14}: {'  '.join(shown)}")
    if "ceiling_R1" in metrics:
        lines.append(f"{'ceiling':>14}: R1 {metrics['ceiling_R1']:.1f} (the best that the captions allow)")
    marked = " (weights selected on test: not comparable)" if metrics["selected"]["on"] == "test" else ""
    head = f"test, per cent with 95 % intervals{marked}" if lines else "no test split: nothing was scored"
    return "\n".join([head, *lines, *_size(run["machine"] or {}), *_left_out(metrics), f"    run folder: {path}"])


def _left_out(metrics: Mapping[str, Any]) -> list[str]:
    """A line on the photos that could not be read; none where all could."""
    if not (count := metrics.get("unreadable_images", 0)):
        return []
    return [f"{'left out':>14}: {count:,} photo{'s' * (count > 1)} that cannot be read, see {UNREADABLE}"]


def _size(machine: Mapping[str, Any]) -> list[str]:
    """A line on how much of the model was trained, and in how much memory; none for a run that did not record it."""
    if "trainable_parameters" not in machine:
        return []
    trained, total = (machine[name] / 1e6 for name in ("trainable_parameters", "parameters"))
    memory = f"peak memory {machine['peak_memory_bytes'] / 1e9:.2f} GB"
    if machine["peak_gpu_memory_bytes"] is not None:
        memory += f", of the GPU {machine['peak_gpu_memory_bytes'] / 1e9:.2f} GB"
    return [f"{'trained':>14}: {trained:.2f} M of {total:.2f} M parameters, {memory}"]


def write_table(folder: Path, annotations: DataFrame) -> None:
    """Keep the table that a run learns from in its folder, for processes that are started there."""
    with replaced(Path(folder) / TABLE) as aside:
        annotations.to_parquet(aside)


def read_table(folder: Path) -> DataFrame:
    """The table that `write_table` kept. Raises FileNotFoundError where there is none."""
    if not (file := Path(folder) / TABLE).is_file():
        raise FileNotFoundError(f"{file} is not there: irra_core.training.prepare_run(recipe, annotations) writes it")
    return pd.read_parquet(file)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: aside, flushed to the disk, then renamed."""
    with replaced(path) as aside, aside.open("w", encoding="utf-8") as file:
        file.write(text)


def peak_memory() -> int:
    """The most bytes that this process has held."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def machine() -> dict[str, Any]:
    """What can change a run's last digits or its speed: versions, device, threads."""
    import torch

    packages = ("irra-core", "torch", "open_clip_torch", "numpy", "pandas", "pillow")
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}",
        "processor": _processor(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "packages": {name: version(name) for name in packages},
    }


def _processor() -> str:
    """The processor's model name where the system tells it."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found.group(1).strip() if found else platform.processor()
