"""The words after `irra` → a subcommand's exit status."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from irra_core.command import execute, explore, notebooks, report
from irra_core.settings import INSTALLED, folders

COMMANDS: dict[str, tuple[Any, str]] = {  # subcommand → its module, with add_arguments and run, and its help
    "train": (execute, "trains and evaluates a model: executes train.ipynb"),
    "evaluate": (execute, "scores a checkpoint on a data set: executes evaluate.ipynb"),
    "explore": (explore, "serves the search page"),
    "study": (execute, "answers one of the paper's questions: rq1, rq2, …"),
    "report": (report, "puts every finished run and study on one page"),
    "notebooks": (notebooks, "copies the notebooks into a folder, to read and change them"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns its exit status: 0 if it did its work, 1 after an error, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="irra", description="Finds photos of a person from a description in words.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, help) in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=help, description=f"irra {name}: {help}."))
    try:
        given = parser.parse_args(arguments)
        elsewhere = getattr(given, "parameters_yaml", []) or getattr(given, "parameters_file", [])
        if INSTALLED and given.command != "notebooks" and not elsewhere:  # then the notebook says it first
            data = dict([*getattr(given, "parameters", []), *getattr(given, "parameters_raw", [])]).get("data_root")
            print(folders(data), file=sys.stderr, flush=True)
        return COMMANDS[given.command][0].run(given)
    except KeyboardInterrupt:
        return 130
    except (OSError, ValueError) as error:  # the library's sentences say what to do; its frames do not
        print(f"irra: {error}", file=sys.stderr)
        return 1
