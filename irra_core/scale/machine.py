"""This machine → its versions, device, threads and peak memory; what a run cost on it."""

import contextlib
import platform
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from irra_core.settings import cores, default_device


def peak_memory() -> int:
    """This process's peak memory in bytes, on Linux since `forget_peak`, elsewhere since it began."""
    status = Path("/proc/self/status")  # `getrusage` there also counts the process that started this one
    if found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="utf-8") if status.exists() else ""):
        return int(found[1]) * 1024
    held = psutil.Process().memory_info()
    if (peak := getattr(held, "peak_wset", None)) is not None:  # Windows
        return peak
    try:
        import resource
    except ImportError:
        return held.rss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak() -> None:
    """Measure peak memory from now on, of the GPU too; that of the process only where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def run_machine(
    model: torch.nn.Module, optimiser: torch.optim.Optimizer, seconds: dict[str, float], photos: int
) -> dict[str, Any]:
    """This machine and what a run cost on it: parameters, seconds, throughput, peak memory since `forget_peak`."""
    return machine() | {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "trainable_parameters": sum(w.numel() for group in optimiser.param_groups for w in group["params"]),
        "seconds": seconds,
        "images_per_second": photos / max(seconds["training"], 1e-9),
        "peak_memory_bytes": peak_memory(),
        "peak_gpu_memory_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    }


def machine() -> dict[str, Any]:
    """Everything about this machine that can change rounding or speed: versions, device, threads."""
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
        "device": torch.cuda.get_device_name() if cuda else default_device().type,
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "packages": {name: version(name) for name in packages},
    }


def _processor() -> str:
    """The processor's model name, or the platform's general name if the system does not give it."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text(encoding="utf-8")) if info.exists() else None
    return found.group(1).strip() if found else platform.processor()
