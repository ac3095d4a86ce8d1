"""Chosen works → one result with the machine and its limits, its table, and the time per part of a training step."""

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import torch
from pandas import DataFrame

from irra_core import runs
from irra_core.backbone import build_model
from irra_core.batches import Batches
from irra_core.benchmark.workloads import (
    LIMIT_SIZES,
    ON_REQUEST,
    WORKS,
    Bench,
    clock,
    measure_limits,
    noise_batches,
    precisions,
    seconds_of,
)
from irra_core.model import IRRA
from irra_core.objective import loss_parts
from irra_core.recipes import recipe
from irra_core.released import clone as released
from irra_core.scale.machine import machine
from irra_core.settings import progress_bar, smoke, unknown
from irra_core.training import build_optimiser

FORMAT = 1  # of benchmark.json
PARTS = (  # of a training step, in the order in which they run
    "data",
    "image encoder",
    "text encoder",
    "interaction encoder",
    "MLM head",
    "identities",
    "losses",
    "backward",
    "optimiser",
)


def measure(
    work: str | None = None,
    device: str | None = None,
    repeats: int = 5,
    official: str | Path | None = None,
    root: str | Path | None = None,
    progress: Callable | None = None,
) -> dict[str, Any]:
    """The rows of the works joined by plus in `work` (None: all except those that take minutes), machine and limits.

    `official` is a local clone of the released code, timed in turns with ours on the same batch, weights and machine;
    without it nothing is compared. `root` is the folder of the data sets. `progress` is a tqdm-like class. Raises
    ValueError for an unknown work or device, FileNotFoundError for a folder that is no clone, RuntimeError where the
    two codes do not compute the same losses or scores.
    """
    names = work.split("+") if work else [name for name in WORKS if name not in ON_REQUEST]
    for name in names:
        if name not in WORKS:
            raise unknown("work", name, WORKS)
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}: accepted is 1 or more")
    bench = Bench(_device(device), repeats, released.load_code(official) if official else None, root)
    limits, rows = measure_limits(bench.device), []
    with progress_bar(progress, total=len(names), unit="work") as bar:
        for name in names:
            bar.set_postfix(work=name)
            rows += [row.to_dict(limits) for row in WORKS[name](bench)]
            bar.update(1)
    about = {"format": FORMAT, "shrunken": smoke(), "repeats": repeats, "compared": official is not None}
    return about | {"machine": machine() | {"device": _name(bench.device)}, "limits": limits, "rows": rows}


def _device(name: str | None) -> torch.device:
    """The device of that name; without a name the GPU if there is one, else the CPU."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is unknown: accepted are cpu and cuda") from error
    if device.type not in LIMIT_SIZES or (device.type == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device {name!r} is not available here: accepted are cpu and, where torch sees a GPU, cuda")
    return device


def _name(device: torch.device) -> str:
    """The GPU's name, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def profile_step(device: str | None = None, repeats: int = 5, root: str | Path | None = None) -> DataFrame:
    """The time per part of a training step of the synthetic recipe, in each precision that the device computes.

    Columns precision, part, seconds (median), share (%). The backward pass is one part; forward parts are timed call by
    call, with a synchronisation of the GPU before and after each call.
    """
    bench = Bench(_device(device), repeats, None, root)
    return pd.concat([_profile(bench, precision) for precision in precisions(bench.device)], ignore_index=True)


def _profile(bench: Bench, precision: str) -> DataFrame:
    """The table of `profile_step` in one precision."""
    repeats = bench.repeats
    chosen = recipe("synthetic", pretrained="none", batch_size=bench.size("batch", 64, 4))
    batches = noise_batches(bench, chosen, chosen.batch_size * (repeats + 1))
    model = build_model(chosen, 500, device=bench.device).train()
    optimiser = build_optimiser(model, chosen)
    found = [_step_parts(batches, step, model, optimiser, precision, bench.device) for step in range(repeats + 1)][1:]
    seconds = [median(parts[name] for parts in found) for name in PARTS]
    shares = [100 * part / sum(seconds) for part in seconds]
    return DataFrame({"precision": precision, "part": PARTS, "seconds": seconds, "share": shares})


def _step_parts(batches: Batches, number: int, model: IRRA, optimiser, precision: str, device) -> dict[str, float]:
    """Seconds of each part of one training step."""
    spent = dict.fromkeys(PARTS, 0.0)
    inner = (
        (model, "image_tokens", "image encoder"),
        (model.clip, "begin_text", "text encoder"),
        (model.clip, "finish_text", "text encoder"),
        (model.interaction, "forward", "interaction encoder"),
        (model.mlm_head, "forward", "MLM head"),
        (model.classifier, "forward", "identities"),
    )
    made: dict[str, Any] = {}
    spent["data"] = seconds_of(lambda: made.update(batch=batches.at(number)), device)
    with contextlib.ExitStack() as clocks:
        for owner, name, part in inner:
            clocks.enter_context(clock(owner, name, part, spent, device))
        forward = seconds_of(
            lambda: made.update(parts=loss_parts(model, made["batch"], batches.recipe, precision)), device
        )
    spent["losses"] = forward - sum(spent[part] for part in {part for _, _, part in inner})
    loss = torch.stack(list(made["parts"].values())).sum()
    optimiser.zero_grad(set_to_none=True)
    spent["backward"] = seconds_of(loss.backward, device)
    spent["optimiser"] = seconds_of(optimiser.step, device)
    return spent


def merged(result: dict[str, Any], earlier: dict[str, Any] | None) -> dict[str, Any]:
    """The result, completed by an earlier one of the same machine for the works that it did not measure."""
    same = ("format", "shrunken", "machine")
    if earlier is None or any(earlier.get(name) != result[name] for name in same):
        return result
    measured = {row["work"] for row in result["rows"]}
    rows = result["rows"] + [row for row in earlier["rows"] if row["work"] not in measured]
    order = list(WORKS)
    return result | {"rows": sorted(rows, key=lambda row: order.index(row["work"]))}


def speed_table(result: Mapping[str, Any]) -> DataFrame:
    """The table to show: median and best of ours and of the other code, ratio, target, met, share of the limit."""
    lines = []
    for row in result["rows"]:
        target, ratio, share = row["target"], row["ratio"], row["share_of_limit"]
        named = "" if row["other_name"] == "released code" else f"{row['other_name']}: "
        lines.append(
            {
                "work": row["what"],
                "ours": _shown(row["ours"], row["unit"]),
                "released": named + _shown(row["other"], row["unit"]),
                "ratio": "" if ratio is None else f"{ratio:.2g}×",
                "target": _target_shown(target, row["unit"]),
                "met": {True: "yes", False: "no", None: ""}[row["met"]],
                "share of limit": "" if share is None else f"{100 * share:.0f} % of {row['limit']}",
            }
        )
    return DataFrame(lines)


def ratios(result: Mapping[str, Any]) -> DataFrame:
    """The rows that were compared, for `plots.speedups`: what, ratio, target (NaN where none is set for the ratio)."""
    rows = [row for row in result["rows"] if row["ratio"] is not None]
    targets = [row["target"] if row["target"] and row["target"]["of"] == "ratio" else None for row in rows]
    table = DataFrame({"what": [row["what"] for row in rows], "ratio": [row["ratio"] for row in rows]})
    return table.assign(target=[float("nan") if target is None else target["value"] for target in targets])


def _shown(values: Mapping[str, float] | None, unit: str) -> str:
    """The median and, in brackets, the best: `0.25 s (0.24)`."""
    if values is None:
        return "not measured"
    best = values["max"] if unit.endswith("/s") else values["min"]
    return f"{_digits(values['median'])} {unit} ({_digits(best)})"


def _digits(value: int | float) -> str:
    """A number with three significant digits, or all digits before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _target_shown(target: Mapping[str, Any] | None, unit: str) -> str:
    """A target as the table shows it: `≥ 8×` or `≤ 10 s`."""
    if target is None:
        return ""
    return f"{target['sign']} {_digits(target['value'])}{'×' if target['of'] == 'ratio' else f' {unit}'}"


def save_benchmark(result: Mapping[str, Any], folder: str | Path) -> None:
    """Write benchmark.json, and benchmark.md with the table and the machine, into a folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    runs.write_text(folder / "benchmark.json", json.dumps(result, indent=1, ensure_ascii=False))
    runs.write_text(folder / "benchmark.md", to_markdown(result))


def load_benchmark(folder: str | Path) -> dict[str, Any] | None:
    """The result that `save_benchmark` wrote into a folder; None where there is none."""
    file = Path(folder) / "benchmark.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def to_markdown(result: Mapping[str, Any]) -> str:
    """The table of a result in Markdown, and below it the machine, its limits and its load."""
    table = speed_table(result)
    lines = [table.columns, ["---"] * len(table.columns), *table.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + f"\n\n{machine_line(result)}\n"


def machine_line(result: Mapping[str, Any]) -> str:
    """The machine, its measured limits and its load in two sentences."""
    machine, limits = result["machine"], result["limits"]
    loads = sorted(row["load"] for row in result["rows"])
    counts = sorted({len(row["ours"]["all"]) for row in result["rows"] if row["ours"]})
    times = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1])))) if counts else "0"
    device = f"{machine['processor']}, {machine['cores']} cores, torch threads: {machine['threads']}"
    if machine["device"] != "cpu":
        device = f"{machine['device']} ({device})"
    bf16 = f"{limits['bf16'] / 1e9:,.0f} in bf16" if "bf16" in limits else "no bf16"
    return (
        f"{device}; torch {machine['packages']['torch']}. Measured limits: {limits['fp32'] / 1e9:,.0f} GFLOP/s in "
        f"fp32, {bf16}, {limits['memory'] / 1e9:.1f} GB/s copied. Median "
        f"of {times} in turns (best in brackets); load average {loads[0]:.1f} to {loads[-1]:.1f}."
    )
