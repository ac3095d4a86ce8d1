"""A weights file of a later paper → on which split its authors selected it, with a warning."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Names of the released code and of the papers that extend it (LUPerson-MLLM, HAM, WebPerson); open_clip has no such.
PREFIXES = ("base_model.", "module.base_model.")


def origin(content: Mapping[str, Any], path: str | Path) -> dict[str, str]:
    """{"pretrained_on": "test"} for a file in the released code's format, with a warning; {} for any other.

    The released code keeps the epoch with the best R@1 on test, and so do the papers that extend it: LUPerson-MLLM
    writes one file for each data set, best0 for CUHK-PEDES, best1 for ICFG-PEDES, best2 for RSTPReid. HAM's captions
    come from a model that was trained on the captions of CUHK-PEDES and ICFG-PEDES. A run that starts from such a file
    has the entry in metrics.json, and is marked as one whose weights were selected on test.
    """
    inner = content.get("model")
    names = inner if isinstance(inner, Mapping) else content
    if not any(isinstance(name, str) and name.startswith(PREFIXES) for name in names):
        return {}
    warnings.warn(
        f"{path} has the released code's format. That code, and papers that extend it (LUPerson-MLLM, HAM), select "
        "their weights on a test split; HAM's captions come from a model trained on the captions of CUHK-PEDES and "
        "ICFG-PEDES. Scores after fine-tuning are marked as not comparable. For weights of your own that were not "
        "selected on test, give the .safetensors file instead",
        stacklevel=3,
    )
    return {"pretrained_on": "test"}
