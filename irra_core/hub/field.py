"""A weights file → whether its weights were selected on a test split, with a warning."""

import json
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

# Names of the released code and of the papers that extend it (LUPerson-MLLM, HAM, WebPerson); open_clip has no such.
PREFIXES = ("base_model.", "module.base_model.")


def origin(content: Mapping[str, Any], metadata: Mapping[str, str], path: str | Path) -> dict[str, str]:
    """{"pretrained_on": "test"} for weights that were selected on a test split, with a warning; {} for any other.

    The released code keeps the epoch with the best R@1 on test, and so do the papers that extend it: LUPerson-MLLM
    writes one file for each data set, best0 for CUHK-PEDES, best1 for ICFG-PEDES, best2 for RSTPReid. HAM's captions
    come from a model that was trained on the captions of CUHK-PEDES and ICFG-PEDES. A file of this library says in its
    recipe what selected it. A run that starts from such a file has the entry in metrics.json, and is marked as one
    whose weights were selected on test.
    """
    inner = content.get("model")
    names = inner if isinstance(inner, Mapping) else content
    if any(isinstance(name, str) and name.startswith(PREFIXES) for name in names):
        reason = (
            "has the released code's format. That code, and papers that extend it (LUPerson-MLLM, HAM), select their "
            "weights on a test split; HAM's captions come from a model trained on the captions of CUHK-PEDES and "
            "ICFG-PEDES"
        )
    elif _select_on(metadata) == "test":
        reason = "is of a run with select_on test, whose weights were selected on a test split"
    else:
        return {}
    warnings.warn(
        f"{path} {reason}. Scores after fine-tuning are marked as not comparable. For weights of your own that were "
        "not selected on test, give the .safetensors file of their run instead",
        stacklevel=3,
    )
    return {"pretrained_on": "test"}


def _select_on(metadata: Mapping[str, str]) -> str | None:
    """What selected the weights of a file of this library; None for others."""
    with suppress(ValueError, AttributeError, RecursionError):  # what cannot be read is refused when the weights are
        return json.loads(metadata.get("recipe", "{}")).get("select_on")
