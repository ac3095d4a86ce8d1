"""This machine → its versions, device, threads and peak memory."""

import platform
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from irra_core.settings import cores


def peak_memory() -> int:
    """This process's peak memory in bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def machine() -> dict[str, Any]:
    """Everything about this machine that can change rounding or speed: versions, device, threads."""
    import torch

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
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "packages": {name: version(name) for name in packages},
    }


def _processor() -> str:
    """The processor's model name, or the platform's general name if the system does not give it."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found.group(1).strip() if found else platform.processor()
