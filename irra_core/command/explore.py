"""`irra explore`: the search page over a data set or a folder of photos, served to a browser on this machine."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from irra_core import settings
from irra_core.hub.runs import newest_run, weights_file
from irra_core.recipes import RECIPES, own_file
from irra_core.settings import cache_root, data_root, reports_root, short

EXPLORER = Path(__file__).parent.parent / "explorer"
SETTINGS = "IRRA_EXPLORE"  # as in explorer.app, which imports ipywidgets
NOTHING_FROM_ELSEWHERE = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
IDLE = 600  # seconds without a page after which a kernel is ended


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is searched, by which models, and where the page is served."""
    parser.add_argument(
        "photos",
        nargs="?",
        default="synthetic",
        metavar="PHOTOS_OR_DATASET",
        help="a folder of photos, the name of a data set or its annotation file (default: synthetic)",
    )
    models = parser.add_mutually_exclusive_group()
    models.add_argument(
        "--model",
        metavar="SOURCE",
        help="latest, a run, a checkpoint, hub:owner/name or clip (default: the data set's newest run; folder: clip)",
    )
    models.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two models, one ranking below the other")
    parser.add_argument("--port", type=int, default=8866, help="of the address (default: 8866)")
    parser.add_argument("--ip", default="127.0.0.1", help="of the address (default: 127.0.0.1, this machine only)")
    parser.add_argument("--no-browser", action="store_true", help="prints the address and opens no browser")


def run(arguments: argparse.Namespace) -> int:
    """Serve the page to who has the token, until Ctrl-C; returns the exit status."""
    try:
        page = chosen(arguments)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    roots = {"IRRA_DATA": data_root(), "IRRA_REPORTS": reports_root(), "IRRA_CACHE": cache_root()}
    environment = os.environ | {name: str(path) for name, path in roots.items()} | {SETTINGS: json.dumps(page)}
    templates = [str(EXPLORER / "served"), *filter(None, [os.environ.get("JUPYTER_PATH")])]
    environment["JUPYTER_PATH"] = os.pathsep.join(templates)
    command = [sys.executable, "-m", "irra_core.explorer.server", *served(arguments)]
    if not settings.WINDOWS:
        os.execve(sys.executable, command, environment)  # one process, which gets every signal
    return subprocess.run(command, env=environment).returncode


def chosen(arguments: argparse.Namespace) -> dict[str, Any]:
    """The page's settings, with absolute paths. Raises ValueError or OSError for what is not there."""
    given = arguments.photos
    settings: dict[str, Any] = {"photos": None, "dataset": None}
    if given in RECIPES or own_file(given) is not None:
        settings["dataset"] = given if given in RECIPES else str(own_file(given))
    elif Path(given).expanduser().is_dir():
        settings["photos"] = str(Path(given).expanduser().resolve())
    else:
        raise ValueError(f"{short(given)} is no folder of photos, no annotation file and none of {', '.join(RECIPES)}")
    sources = arguments.compare or [arguments.model or _usual(settings)]
    letters = ("A: ", "B: ") if arguments.compare else ("",)
    labels = (letter + _label(source) if letter else "" for letter, source in zip(letters, sources))
    settings["models"] = list(zip(labels, map(_found, sources)))
    return settings


def _usual(settings: dict[str, Any]) -> str:
    """The model that is taken where none is given."""
    if settings["photos"]:
        return "clip"
    if (run := newest_run(settings["dataset"])) is None:
        command = "irra train" + ("" if settings["dataset"] == "synthetic" else f" -p dataset {settings['dataset']}")
        raise ValueError(
            f"{reports_root()} has no finished run of data set {settings['dataset']!r}: train one with `{command}`, or "
            "choose a model with --model (clip needs no training)"
        )
    return str(run)


def _label(source: str) -> str:
    """A short name of a model: the last two parts of its path, without that of a run's weights."""
    parts = Path(source).parts
    return "/".join((parts[:-1] if parts[-1] == "weights.safetensors" else parts)[-2:])


def _found(source: str) -> str:
    """The source, where it is a run or file as its absolute path."""
    return source if source == "clip" or source.startswith("hub:") else str(weights_file(source))


def served(arguments: argparse.Namespace) -> list[str]:
    """Voilà's words: one notebook without its code, a token, nothing from elsewhere, no kernel without a page."""
    return [
        str(EXPLORER / "app.ipynb"),
        "--template=irra",
        f"--Voila.ip={arguments.ip}",
        f"--port={arguments.port}",
        "--token",
        f"--Voila.tornado_settings={ {'headers': {'Content-Security-Policy': NOTHING_FROM_ELSEWHERE}}!r}",
        f"--MappingKernelManager.cull_idle_timeout={IDLE}",
        "--MappingKernelManager.cull_interval=60",
        *(["--no-browser"] if arguments.no_browser else []),
    ]
