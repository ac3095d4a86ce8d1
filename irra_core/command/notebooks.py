"""`irra notebooks`: the package's notebooks → a folder of the user's."""

import argparse
import shutil
import sys
from pathlib import Path

from irra_core.settings import notebooks_root, unknown


def notebook(name: str) -> Path:
    """The path of a notebook of the package, by its name without the ending."""
    path = notebooks_root() / f"{name}.ipynb"
    if not path.is_file():
        raise unknown("notebook", name, (each.stem for each in path.parent.glob("*.ipynb")))
    return path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder to copy to."""
    parser.add_argument("folder", type=Path, help="made if there is none; a notebook that is there is not replaced")


def run(arguments: argparse.Namespace) -> int:
    """Copy every notebook that the folder does not hold yet; 1 if one was there already with other contents."""
    arguments.folder.mkdir(parents=True, exist_ok=True)
    kept = []
    for source in sorted(notebooks_root().glob("*.ipynb")):
        target = arguments.folder / source.name
        if not target.exists():
            shutil.copy(source, target)
            print(target)
        elif target.read_bytes() != source.read_bytes():
            kept.append(source.name)
    if kept:
        print(f"not replaced in {arguments.folder}: {', '.join(kept)}; remove them first", file=sys.stderr)
    return int(bool(kept))
