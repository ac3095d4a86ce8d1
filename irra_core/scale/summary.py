"""A run folder → its test scores and size in a few lines, as a terminal shows them at the end of a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from irra_core import runs


def summary(path: str | Path) -> str:
    """The test scores of a run folder in a few lines, with the model's size and the folder's path."""
    path = Path(path).resolve()
    run = runs.load_run(path)
    metrics, machine, lines = run["metrics"], run["machine"] or {}, []
    for name in ("text_to_image", "pretrained", "untrained"):
        shown = [
            f"{score} {value:.1f} [{low:.1f}, {high:.1f}]"
            for score, (value, low, high) in metrics.get(name, {}).items()
        ]
        lines += [f"{name.replace('_', ' '):>14}: {'  '.join(shown)}"] if shown else []
    if "ceiling_R1" in metrics:
        lines.append(f"{'ceiling':>14}: R1 {metrics['ceiling_R1']:.1f} (the best that the captions allow)")
    marked = " (weights selected on test: not comparable)" if "test" in metrics["selected"].values() else ""
    head = f"test, per cent with 95 % intervals{marked}" if lines else "no test split: nothing was scored"
    if "trainable_parameters" in machine:  # older runs did not record it
        lines.append(_size(machine))
    if count := metrics.get("unreadable_images", 0):
        lines.append(f"{'left out':>14}: {count:,} photo{'s' * (count > 1)} that cannot be read, see {runs.UNREADABLE}")
    return "\n".join([head, *lines, f"    run folder: {path}"])


def _size(machine: Mapping[str, Any]) -> str:
    """A line on trained parameters and peak memory."""
    trained, total = (machine[name] / 1e6 for name in ("trainable_parameters", "parameters"))
    memory = f"peak memory {machine['peak_memory_bytes'] / 1e9:.2f} GB"
    if machine["peak_gpu_memory_bytes"] is not None:
        memory += f", of the GPU {machine['peak_gpu_memory_bytes'] / 1e9:.2f} GB"
    return f"{'trained':>14}: {trained:.2f} M of {total:.2f} M parameters, {memory}"
