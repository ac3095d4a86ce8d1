"""`irra train`, `evaluate` and `study`: a notebook and its parameters → the executed notebook, by papermill."""

import argparse
import os
from pathlib import Path

from irra_core.command.notebooks import notebook
from irra_core.settings import reports_root, smoke

STUDIES = {  # study → its notebook, and the parameter that chooses it there
    **{name: ("ablation", ["-p", "study", name]) for name in ("rq1", "rq2", "rq3", "rq4")},
    "rq5": ("transfer", []),
    "released": ("released_vs_paper", []),
    "attention": ("attention", []),
    "similarity": ("similarity", []),
}
PAPERMILL = {  # papermill's options that give parameters, with the number of words that follow
    ("-p", "--parameters"): (2, ("NAME", "VALUE"), "gives a parameter of the notebook a value"),
    ("-r", "--parameters_raw"): (2, ("NAME", "TEXT"), "the same, with the value taken as text"),
    ("-y", "--parameters_yaml"): (1, "YAML", "parameters as YAML"),
    ("-f", "--parameters_file"): (1, "FILE", "parameters from a YAML file"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """papermill's options for parameters, and the name of a study."""
    name = parser.prog.split()[-1]
    if name == "study":
        parser.add_argument("study", choices=STUDIES, help="rq5 is the transfer between data sets")
    for spelling, (count, shown, help) in PAPERMILL.items():
        parser.add_argument(*spelling, nargs=count, metavar=shown, action="append", default=[], help=help)


def run(arguments: argparse.Namespace) -> int:
    """Execute the notebook, then print the scores of a run and where the notebook and its HTML page are."""
    name, chosen = STUDIES[arguments.study] if arguments.command == "study" else (arguments.command, [])
    given = [word for each in PAPERMILL for words in getattr(arguments, each[1][2:]) for word in (each[0], *words)]
    reports_root().mkdir(parents=True, exist_ok=True)
    aside = reports_root() / f".{name}.{os.getpid()}.ipynb"
    papermill([str(notebook(name)), str(aside), *chosen, *given])
    executed = _home(arguments, name, given) / f"{name}.ipynb"
    executed.parent.mkdir(parents=True, exist_ok=True)
    os.replace(aside, executed)
    if name == "train":
        from irra_core.scale.summary import summary

        print(summary(executed.parent))
    if arguments.command == "study":
        from irra_core.studies import write_markdown

        print(f"      markdown: {write_markdown(executed, executed.parent).resolve()}")
    print(f"      notebook: {executed.resolve()}\n          html: {html(executed).resolve()}")
    return 0


def _home(arguments: argparse.Namespace, name: str, given: list[str]) -> Path:
    """The folder of an executed notebook: of train its run's, of a study the study's, else the reports folder."""
    reports = reports_root() / ("smoke" if smoke() else "")
    if name == "train":
        return (reports / "latest").resolve()
    if name not in ("ablation", "released_vs_paper"):
        return reports
    from irra_core.studies import sized, study_folder

    dataset, size = (given[given.index(word) + 1] if word in given else None for word in ("dataset", "size"))
    return study_folder(arguments.study, dataset or sized(size or "full")["dataset"])


def papermill(words: list[str]) -> None:
    """What `papermill …` does, in this process."""
    from papermill.cli import papermill as program

    program.main([*words, "--no-progress-bar", "--log-level", "ERROR"], "papermill", standalone_mode=False)


def html(executed: Path) -> Path:
    """Write an executed notebook as a page beside it; returns the page's path."""
    from nbconvert import HTMLExporter

    page = executed.with_suffix(".html")
    page.write_text(HTMLExporter().from_filename(str(executed))[0], encoding="utf-8")
    return page
