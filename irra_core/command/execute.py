"""`irra train`, `evaluate` and `study`: a notebook and its parameters → the executed notebook, by papermill."""

import argparse
import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from irra_core.command.notebooks import notebook
from irra_core.hub.runs import latest_run
from irra_core.settings import put_in_place, reports_root, runs_root

STUDIES = {  # study → its notebook, and the parameter that chooses it there
    **{name: ("ablation", ["-p", "study", name]) for name in ("rq1", "rq2", "rq3", "rq4", "plugins", "noise")},
    "rq5": ("transfer", []),
    "released": ("released_vs_paper", []),
    "attention": ("attention", []),
    "similarity": ("similarity", []),
}
PAPERMILL = {  # papermill's options that give parameters: spellings → number of words that follow, their names, help
    ("-p", "--parameters"): (2, ("NAME", "VALUE"), "gives a parameter of the notebook a value"),
    ("-r", "--parameters_raw"): (2, ("NAME", "TEXT"), "the same, with the value taken as text"),
    ("-y", "--parameters_yaml"): (1, "YAML", "parameters as YAML"),
    ("-f", "--parameters_file"): (1, "FILE", "parameters from a YAML file"),
}
QUIET = 12  # seconds without a line from the kernel, after which the running cell is named
# Of the kernel: that it listens on this machine's loopback without encryption; that its end interrupted it.
NOISE = (b"[IPKernelApp] WARNING", b"[IPKernelApp] ERROR | KeyboardInterrupt caught in kernel")
MOST_LINES = 8  # of an error message


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """papermill's options for parameters, and the name of a study; the help ends in the notebook's parameters."""
    name = parser.prog.split()[-1]
    if name == "study":
        parser.add_argument("study", choices=STUDIES, help="rq1 to rq5: the paper's questions; rq5 is the transfer")
    for spelling, (count, shown, help) in PAPERMILL.items():
        parser.add_argument(*spelling, nargs=count, metavar=shown, action="append", default=[], help=help)
    stem, plain = "ablation" if name == "study" else name, parser.format_help
    parser.format_help = lambda: f"{plain()}\nparameters of {stem}.ipynb:\n{_parameters(notebook(stem))}"


def _parameters(path: Path) -> str:
    """The parameters cell of a notebook, indented."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    lines = next(cell["source"] for cell in cells if "parameters" in cell["metadata"].get("tags", []))
    return "".join(f"  {line}" for line in lines) + "\n"


def run(arguments: argparse.Namespace) -> int:
    """Execute the notebook, then print the scores of a run and where the notebook and its HTML page are."""
    name, chosen = STUDIES[arguments.study] if arguments.command == "study" else (arguments.command, [])
    given = [word for each in PAPERMILL for words in getattr(arguments, each[1][2:]) for word in (each[0], *words)]
    reports_root().mkdir(parents=True, exist_ok=True)
    aside = reports_root() / f".{name}.{os.getpid()}.ipynb"
    print(f"{name}.ipynb: starting its kernel", file=sys.stderr, flush=True)
    try:
        if error := _papermill(notebook(name), aside, [*chosen, *given]):
            failed = reports_root() / f"{name}.failed.ipynb"
            put_in_place(aside, failed)
            print(f"{name}.ipynb stopped, executed so far: {failed}\n{_short(error)}", file=sys.stderr)
            return 1
        executed = _home(arguments, name, given) / f"{name}.ipynb"
        executed.parent.mkdir(parents=True, exist_ok=True)
        put_in_place(aside, executed)
    except KeyboardInterrupt:
        print(f"stopped; this command goes on from {_reached(aside)}:\n    {_this_command()}", file=sys.stderr)
        return 130
    finally:
        aside.unlink(missing_ok=True)
    if name == "train":
        from irra_core.scale.summary import summary

        print(summary(executed.parent))
    if arguments.command == "study":
        from irra_core.studies import write_markdown

        print(f"      markdown: {write_markdown(executed, executed.parent).resolve()}")
    print(f"      notebook: {executed.resolve()}\n          html: {_html(executed).resolve()}")
    return 0


def _home(arguments: argparse.Namespace, name: str, given: list[str]) -> Path:
    """The folder of an executed notebook: of train its run's, of a study the study's, else the reports folder."""
    reports = runs_root()
    if name == "train":
        return latest_run(reports).resolve()
    if name not in ("ablation", "released_vs_paper"):
        return reports
    from irra_core.studies import sized, study_folder

    dataset, size = (given[given.index(word) + 1] if word in given else None for word in ("dataset", "size"))
    return study_folder(arguments.study, dataset or sized(size or "full")["dataset"])


def _papermill(source: Path, executed: Path, words: list[str]) -> str:
    """Do what `papermill SOURCE EXECUTED WORDS` does; returns the error that stopped the notebook, or nothing.

    Raises KeyboardInterrupt after Ctrl-C, when the kernel has ended.
    """
    from click import Abort, ClickException
    from papermill.cli import papermill
    from papermill.exceptions import PapermillExecutionError

    command = [str(source), str(executed), *words, "--no-progress-bar", "--log-level", "ERROR"]
    try:
        with _terminal(executed, source.name), contextlib.redirect_stderr(io.StringIO()):
            papermill.main(command, "papermill", standalone_mode=False)
    except Abort:
        raise KeyboardInterrupt from None
    except PapermillExecutionError as error:
        return f"{error.ename}: {error.evalue}"
    except ClickException as error:
        return error.format_message()
    except SystemExit:  # papermill's end when the kernel is dead
        return (
            "the kernel was killed, as the system does where memory is full: take a smaller batch_size or micro_batch"
        )
    return ""


@contextlib.contextmanager
def _terminal(executed: Path, name: str) -> Iterator[None]:
    """Within, the lines that a kernel writes to its stderr reach the terminal, until Ctrl-C; where none come, ours do.

    After Ctrl-C libraries have tracebacks to show, and Ctrl-C once more would leave the kernel behind.
    """
    terminal, (read, write) = os.dup(2), os.pipe()
    stopped, ended = threading.Event(), threading.Event()
    began = heard = time.monotonic()

    def stop(*_) -> None:
        stopped.set()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    def pass_on() -> None:
        nonlocal heard
        rest = b""
        while new := os.read(read, 65536):
            heard = time.monotonic()
            *lines, rest = (rest + new).split(b"\n")
            if not stopped.is_set():
                os.write(terminal, b"".join(line + b"\n" for line in lines if not line.startswith(NOISE)))

    def name_cell() -> None:
        nonlocal heard
        while not ended.wait(1):
            if (now := time.monotonic()) - heard >= QUIET and not stopped.is_set():
                heard = now
                os.write(terminal, f"{name}: {_running(executed)}, {now - began:.0f} s\n".encode())

    thread, before = threading.Thread(target=pass_on, daemon=True), signal.signal(signal.SIGINT, stop)
    thread.start()
    threading.Thread(target=name_cell, daemon=True).start()
    os.dup2(write, 2)
    try:
        yield
    finally:
        ended.set()
        os.dup2(terminal, 2)
        os.close(write)
        thread.join(5)  # a process that the kernel left behind may hold the other end
        signal.signal(signal.SIGINT, before)


def _running(executed: Path) -> str:
    """The cell that is running, as `cell 3 of 14`."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        cells = json.loads(executed.read_text(encoding="utf-8"))["cells"]
        states = [cell["metadata"]["papermill"]["status"] for cell in cells]
        return f"cell {states.index('running') + 1} of {len(cells)}"
    return "starting its kernel"


def _reached(executed: Path) -> str:
    """Where an interrupted notebook goes on: the step of its run's last evaluation."""
    with contextlib.suppress(OSError):
        if found := re.search(r"this run lives in (.*?)(?:\\n)?\"", executed.read_text(encoding="utf-8")):
            *_, last = (Path(json.loads(f'"{found[1]}"')) / "history.csv").read_text(encoding="utf-8").split()
            return f"step {last.split(',')[1]}"
    return "the last evaluation, if there was one"


def _this_command() -> str:
    """What was typed, as the shell takes it again."""
    program = Path(sys.argv[0])
    words = [sys.executable, "-m", "irra_core.command"] if program.name == "__main__.py" else [_typed(program)]
    return shlex.join([*words, *sys.argv[1:]])


def _typed(program: Path) -> str:
    """The name of a program on the search path, else its path from here."""
    found = shutil.which(program.name)
    if found and Path(found).with_suffix("") == program.with_suffix(""):
        return program.stem  # which Windows finds with .exe
    with contextlib.suppress(ValueError):  # on another drive
        return os.path.relpath(program)
    return str(program)


def _short(message: str) -> str:
    """A message without the middle of its lines, if they are many; its last one stays the last."""
    lines = message.splitlines()
    if len(lines) > MOST_LINES:
        lines = [*lines[: MOST_LINES - 3], f"… {len(lines) - MOST_LINES + 1} more lines …", *lines[-2:]]
    return "\n".join(lines)


def _html(executed: Path) -> Path:
    """Write an executed notebook as a page beside it; returns the page's path."""
    from nbconvert import HTMLExporter

    page = executed.with_suffix(".html")
    page.write_text(HTMLExporter().from_filename(str(executed))[0], encoding="utf-8")
    return page
