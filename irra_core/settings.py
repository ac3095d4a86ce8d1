"""The environment → folders, cores, smoke mode; names that load on first use. Imports nothing but the standard library.

Every environment variable of the library is read here: IRRA_DATA, IRRA_REPORTS, IRRA_CACHE, IRRA_ARRAY_GB and
IRRA_SMOKE.
"""

import difflib
import importlib
import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent
INSTALLED = (PACKAGE / "notebooks").is_dir()  # from a wheel, which holds the notebooks; a checkout has them beside it
SMOKE_IDENTITIES, SMOKE_STEPS = 24, 3  # what IRRA_SMOKE=1 leaves of a run
WINDOWS = os.name == "nt"  # there a file that is open or memory-mapped can be neither replaced nor deleted
# On a CPU torch keeps the last 1,024 compiled operations, each with its memory. Captions have so many lengths that
# training fills both caches with gigabytes and hardly reuses them. torch reads the sizes once, when it is imported.
for _cache in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
    os.environ.setdefault(_cache, "128")


def project_root() -> Path:
    """The folder that relative data and report folders are taken from: the checkout, else the working directory."""
    return Path.cwd() if INSTALLED else PACKAGE.parent


def data_root(given: str | Path | None = None) -> Path:
    """The folder that holds the data sets: `given`, else IRRA_DATA, else `data` (relative to the project's root)."""
    return project_root() / Path(given or os.environ.get("IRRA_DATA") or "data").expanduser()


def reports_root(given: str | Path | None = None) -> Path:
    """The folder that keeps all runs: given (relative: from the project's root), else IRRA_REPORTS, else `reports`."""
    return project_root() / Path(given or os.environ.get("IRRA_REPORTS") or "reports").expanduser()


def runs_root(given: str | Path | None = None) -> Path:
    """The folder of the runs by data set: `reports_root`, of smoke mode its folder `smoke`."""
    return reports_root(given) / ("smoke" if smoke() else "")


def notebooks_root() -> Path:
    """The folder of the package's notebooks: of the checkout, else in the package."""
    return (PACKAGE if INSTALLED else PACKAGE.parent) / "notebooks"


def find_file(name: str, kind: Callable[[Path], bool] = Path.is_file) -> Path | None:
    """The absolute path of a file (`kind` Path.is_dir: folder) in the working directory or else the project's root."""
    for folder in (Path.cwd(), project_root()):
        try:
            if kind(folder / name):
                return (folder / name).resolve()
        except OSError:  # such as a name that is too long for a file
            continue
    return None


def cache_root() -> Path:
    """The folder of everything that can be made again: IRRA_CACHE, else irra-core in the user's cache folder."""
    if given := os.environ.get("IRRA_CACHE"):
        return project_root() / Path(given).expanduser()
    from platformdirs import user_cache_path

    with suppress(RuntimeError):  # a user without a home folder; older versions then return one that begins with ~
        if (found := user_cache_path("irra-core", appauthor=False)).is_absolute():
            return found
    raise OSError("this user has no home folder for the cache: set IRRA_CACHE to a folder")


def folders(data: str | Path | None = None) -> str:
    """One line: where the data sets (`data_root(data)`), the reports and the cache are."""
    return f"data: {data_root(data)}, reports: {reports_root()}, cache: {cache_root()}"


def put_in_place(made: Path, path: Path) -> None:
    """Rename a file or folder to `path`, in place of a file there; on Windows waits 5 s for whoever has that open."""
    for _ in range(100 if WINDOWS else 0):
        try:
            return os.replace(made, path)
        except PermissionError:
            time.sleep(0.05)
    os.replace(made, path)


def array_limit() -> float:
    """Bytes up to which photos are decoded into an array on the disk: IRRA_ARRAY_GB in gigabytes, else no limit."""
    given = os.environ.get("IRRA_ARRAY_GB") or "inf"
    try:
        return float(given) * 1e9
    except ValueError:
        raise ValueError(f"IRRA_ARRAY_GB is {short(given)}: accepted is a number of gigabytes, such as 50") from None


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_device() -> Any:
    """The torch.device that models are on by default: the CUDA GPU; Apple's, if it computes as the CPU; the CPU."""
    import torch

    if torch.backends.mps.is_available():
        from irra_core.scale.mps import scores_as_cpu

        return torch.device("mps" if scores_as_cpu() else "cpu")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def smoke() -> bool:
    """True when IRRA_SMOKE=1 asks for the shrunken runs of the tests."""
    return os.environ.get("IRRA_SMOKE", "0") not in ("", "0")


def unknown(what: str, name: object, accepted: Iterable[str]) -> ValueError:
    """The one sentence in which this library says that a name does not exist."""
    accepted = sorted(accepted)
    near = difflib.get_close_matches(name[:80], accepted, n=1) if isinstance(name, str) else ()
    hint = f"did you mean {near[0]!r}? " if near else ""
    shown = ", ".join(accepted[:40]) + (", …" if len(accepted) > 40 else "")
    return ValueError(f"{what} {short(name)} is unknown: {hint}accepted are {shown}")


def short(value: object) -> str:
    """A value as an error message shows it: its repr, truncated."""
    try:
        shown = repr(value)
    except ValueError:  # Python writes no number of more than 4,300 digits
        return "a number of more than 4,300 digits"
    except RecursionError:
        return f"a deeply nested {type(value).__name__}"
    return shown if len(shown) <= 80 else f"{shown[:60]}… ({len(shown):,} characters)"


def progress_bar(progress: Callable | None, **shown: Any) -> closing:
    """A bar of the tqdm-like class `progress`, opened with `shown`; without a class, one that shows nothing."""
    from tqdm import tqdm

    return closing(progress(**shown) if progress else tqdm(disable=True, **shown))


def lazily(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package whose names load on first use.

    `homes` maps a module below the package to the names that it gives, separated by spaces. The module's own last name
    among them gives the module itself, unless something in it has that name.
    """
    home = {name: module for module, names in homes.items() for name in names.split()}

    def find(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(f"{package}.{home[name]}")
        return module if home[name].split(".")[-1] == name and not hasattr(module, name) else getattr(module, name)

    return find, lambda: sorted(home), list(home)
