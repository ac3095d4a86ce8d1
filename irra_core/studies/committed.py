"""Finished runs ↔ their small files, which are committed: recipe, scores, history, machine and ranks, no weights."""

import gzip
import hashlib
import inspect
import json
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
from pandas import DataFrame
from safetensors import safe_open

from irra_core import runs
from irra_core.annotations import DATA_SETS
from irra_core.backbone import GENERAL, learned
from irra_core.recipes import RENDERED, Recipe, read_recipe
from irra_core.settings import SMOKE_IDENTITIES, data_root, project_root, put_in_place, reports_root, smoke
from irra_core.studies.tables import files_below
from irra_core.synthetic.people import MARKER, RENDERING, arguments_of, make_synthetic

FORMAT = 1  # of the files of a committed run
SHIPPED = Path(__file__).with_name("committed_runs")  # those that a wheel holds; not there in a checkout
RUN, RANKS = "run.json", "ranks.csv.gz"
DONE = ("finished", "committed")  # the statuses of a run whose scores are known
DIGITS = 4  # of AP and INP in per cent: a mean over queries changes by less than 0.00005
COLUMNS = ["pid", "image_id", "hard", "rank", "AP", "INP"]


def committed_root() -> Path:
    """The folder of the committed runs: `reports/example/studies/runs` of the project; shrunken runs have another."""
    return reports_root() / "smoke" / "runs" if smoke() else project_root() / "reports/example/studies/runs"


def run_key(recipe: Recipe, data: str = "") -> str:
    """16 hex digits for a recipe and its data, the same on every machine.

    Rendered people are identified by what they are made from (version of the renderer, number of people), because
    another processor may round a pixel differently. Other data need their `runs.data_digest`.
    """
    start = hashlib.sha256(GENERAL.read_bytes()).hexdigest() if recipe.pretrained == "general" else ""
    parts = (runs.FORMAT, recipe.key(), data_key(recipe.dataset, data), start)
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]


def data_key(dataset: str, data: str = "") -> str:
    """8 hex digits for a data set, see `run_key`; `data` is the fingerprint of one that is not rendered."""
    if dataset in RENDERED:
        usual = inspect.signature(make_synthetic).parameters["people"].default
        made = {"people": usual, "seed": 0, "rendering": RENDERING}
        data = json.dumps(made | arguments_of(dataset, SMOKE_IDENTITIES if smoke() else None), sort_keys=True)
    elif not data:
        raise ValueError(f"{dataset} is not rendered: its runs are found by the fingerprint of its files, give `data`")
    return hashlib.sha256(data.encode()).hexdigest()[:8]


def rendered_here(recipe: Recipe, root: str | Path | None = None) -> bool:
    """True where the people of a rendered data set are on this disk already; False for other data sets."""
    folder = data_root(root) / (f"smoke/rendering-{RENDERING}" if smoke() else "")
    folder = folder / ("" if recipe.image_height <= 192 else "384x128")
    return recipe.dataset in RENDERED and (folder / DATA_SETS[recipe.dataset].folder / MARKER).is_file()


def find(recipe: Recipe, data: str = "", root: str | Path | None = None) -> Path | None:
    """The folder of the committed run with this recipe and data (see `run_key`), None where there is none.

    Without `root` it is below `committed_root()`, or among those that a wheel holds.
    """
    for parent in [root] if root else [committed_root(), SHIPPED]:
        folder = Path(parent) / run_key(recipe, data)
        complete = (folder / RUN).is_file() and (folder / RANKS).is_file()
        if complete and json.loads((folder / RUN).read_text(encoding="utf-8"))["format"] == FORMAT:
            return folder
    return None


def export_run(path: str | Path, root: str | Path | None = None, replace: bool = False) -> Path:
    """The folder with the small files of a finished run, written below `root` (default: `committed_root()`).

    The folder is renamed into place once complete. A run that is committed already stays as it is unless `replace`;
    `disagreement` tells how it differs. Results on other data sets (`transfer`) are added. Raises ValueError for a run
    that is not finished, or was tested on other people than the data set of its name has.
    """
    path, root = Path(path), Path(root or committed_root())
    if not runs.finished(path):
        raise ValueError(f"{path} holds no finished run: finish it (`train` resumes it), then export it")
    run = runs.load_run(path)
    if (tested := run["metrics"].get("identities")) != (wanted := tested_people(run["recipe"]) or tested):
        raise ValueError(f"{path} was tested on {tested} people, {run['recipe'].dataset} has {wanted}: not exported")
    folder = root / run_key(run["recipe"], run["data"])
    others = sorted(path.glob("queries-*.csv.gz"))
    if (folder / RUN).is_file() and not replace:
        for file in others:
            if not (folder / file.name).exists():
                write_ranks(folder / file.name, read_ranks(file))
        return folder
    root.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=root))
    try:
        kept = {"format": FORMAT, "data": run["data"], "recipe": json.loads(run["recipe"].to_json())}
        kept |= {name: run[name] for name in ("metrics", "machine")} | {"parameters": parameters(path)}
        kept["seconds"] = run_seconds(path)
        runs.write_text(aside / RUN, json.dumps(kept, indent=1) + "\n")
        runs.write_text(aside / "history.csv", (path / "history.csv").read_text(encoding="utf-8"))
        write_ranks(aside / RANKS, run["queries"])
        for file in others:
            shutil.copy(file, aside)
        aside.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        put_in_place(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def tested_people(recipe: Recipe) -> int | None:
    """How many test people a rendered data set of that name has; None for other data and for a part of the people."""
    if recipe.dataset not in RENDERED or recipe.identities is not None:
        return None
    usual = inspect.signature(make_synthetic).parameters["people"].default
    return arguments_of(recipe.dataset).get("test", round(3 * usual / 20))


def write_ranks(file: Path, queries: DataFrame) -> None:
    """Write what the tables need of queries.csv, compressed; the same table gives the same bytes."""
    table = queries[COLUMNS].astype({"hard": int}).round({"AP": DIGITS, "INP": DIGITS})
    text = table.to_csv(index=False, float_format=f"%.{DIGITS}f", lineterminator="\n").replace(".0000", "")
    with runs.replaced(file) as aside:
        aside.write_bytes(gzip.compress(text.encode(), 9, mtime=0))


def read_ranks(file: Path) -> DataFrame:
    """The queries as queries.csv has them; R1, R5 and R10 follow from the rank of the first correct result."""
    table = pd.read_csv(file).astype({"hard": bool, "AP": float, "INP": float})
    return table.assign(**{f"R{k}": 100.0 * (table["rank"] <= k) for k in (1, 5, 10)})


def load(path: str | Path) -> dict[str, Any]:
    """A run as `runs.load_run` gives it, from its own folder or from its committed files, with its `parameters`."""
    path = Path(path)
    if not (path / RUN).is_file():
        return runs.load_run(path) | {"parameters": parameters(path)}
    kept = json.loads((path / RUN).read_text(encoding="utf-8"))
    kept["recipe"] = read_recipe(kept["recipe"])
    return kept | {"history": pd.read_csv(path / "history.csv"), "queries": read_ranks(path / RANKS)}


def parameters(path: str | Path) -> int | None:
    """The trained numbers of a run's network; None where its weights are not there."""
    file = Path(path) / runs.WEIGHTS
    if not file.is_file():
        return None
    with safe_open(file, "pt") as weights:
        shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118 (not a dict)
    return sum(int(np.prod(shape)) for shape in learned(shapes).values())


def run_seconds(path: str | Path) -> float:
    """The seconds that a finished run took: its notebook if there is one, else training and evaluations."""
    path = Path(path)
    if (path / RUN).is_file():
        return float(json.loads((path / RUN).read_text(encoding="utf-8"))["seconds"])
    if (notebook := path / "train.ipynb").exists():
        duration = nbformat.read(notebook, 4).metadata.get("papermill", {}).get("duration")
        if duration is not None:
            return float(duration)
    machine = runs.load_run(path)["machine"]
    return float(sum(machine["seconds"].values())) if machine else float("nan")


def disagreement(path: str | Path, folder: str | Path) -> str:
    """How a repeated run differs from the committed one, in one sentence with both machines; "" where they agree.

    They agree if every query has the same rank, AP and INP, as the committed files have them.
    """
    here, there = load(path), load(folder)
    ours, theirs = (run["queries"][COLUMNS].round({"AP": DIGITS, "INP": DIGITS}) for run in (here, there))
    machines = f"here {machine_of(here)}; committed {machine_of(there)}"
    if not ours[["pid", "image_id"]].equals(theirs[["pid", "image_id"]]):
        return f"other queries ({machines})"
    different = (ours["rank"] != theirs["rank"]).to_numpy()
    if not different.any() and (ours[["AP", "INP"]] - theirs[["AP", "INP"]]).abs().to_numpy().max() < 2 * 10.0**-DIGITS:
        return ""
    R1 = [100 * float((table["rank"] == 1).mean()) for table in (ours, theirs)]
    mAP = [float(table["AP"].mean()) for table in (ours, theirs)]
    photos = "; photos with other bytes" if here["data"] != there["data"] else ""
    return (
        f"{int(different.sum()):,} of {len(ours):,} ranks differ: R@1 {R1[0]:.2f} instead of {R1[1]:.2f}, "
        f"mAP {mAP[0]:.2f} instead of {mAP[1]:.2f} ({machines}{photos})"
    )


def machine_of(run: dict[str, Any]) -> str:
    """The machine of a run, as far as it changes rounding: processor, instructions, precision, threads, torch."""
    machine = run["machine"] or {}
    device = machine.get("device", "cpu")
    parts = [machine.get("processor"), machine.get("instructions")] if device == "cpu" else [device]
    parts += [machine.get("precision"), f"{machine['threads']} threads" if "threads" in machine else None]
    parts += [f"torch {machine['packages']['torch']}" if "packages" in machine else None]
    return ", ".join(str(part).replace("1 threads", "1 thread") for part in parts if part) or "an unknown machine"


def machines(paths: Iterable[str | Path]) -> dict[str, int]:
    """The machines on which these runs were made → how many of the runs; more than one entry mixes arithmetic."""
    counts: dict[str, int] = {}
    for path in paths:
        name = machine_of(load(path))
        counts[name] = counts.get(name, 0) + 1
    return counts


def main(paths: list[str]) -> None:
    """Export the finished runs in these folders; without any, every run below the reports folder made for a study."""
    found = [Path(path) for path in paths]
    if not found:
        found = [file.parent for file in files_below(reports_root(), f"/{runs.WEIGHTS}")]
        found = [path for path in found if runs.finished(path) and runs.load_run(path)["recipe"].preset == "study"]
    for path in found:
        folder = export_run(path)
        said = disagreement(path, folder)
        sys.stdout.write(f"{path.name} → {folder.name}{f': differs, {said}' if said else ''}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
