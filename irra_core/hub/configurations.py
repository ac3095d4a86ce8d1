"""open_clip's model configurations, read from its package without importing it (nor torch)."""

import functools
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from irra_core.settings import unknown

OPENAI = tuple(f"ViT-{size}-quickgelu" for size in ("B-16", "B-32", "L-14", "L-14-336"))  # backbones with that tag
# The options of open_clip's two encoders that the forward pass follows; it would silently ignore any other.
FOLLOWED = {"layers", "width", "mlp_ratio", "ls_init_value", "act_kwargs", "norm_kwargs"}
FOLLOWED_VISION = FOLLOWED | {"image_size", "patch_size", "head_width"}
FOLLOWED_TEXT = FOLLOWED | {"context_length", "vocab_size", "heads"}


def backbones() -> list[str]:
    """`small` and every open_clip model that IRRA can use; read from its files, so that torch is not imported."""
    return ["small", *sorted(name for name, config in open_clip_models().items() if not unsuited(config))]


def check_open_clip(backbone: str, pretrained: str) -> None:
    """Raise ValueError for an open_clip model that is unknown or unsuited, and for weights that it cannot have."""
    models = open_clip_models()
    if backbone not in models:
        raise unknown("backbone", backbone, backbones())
    if reason := unsuited(models[backbone]):
        accepted = ", ".join(backbones())
        raise ValueError(f"backbone {backbone!r} is not supported: {reason}; accepted are {accepted}")
    if pretrained == "general":
        raise ValueError(
            "pretrained 'general' is the small CLIP's: give an open_clip tag (openai), a file or none "
            f"to backbone {backbone!r}"
        )
    if pretrained == "openai" and backbone not in OPENAI:
        raise ValueError(
            f"pretrained 'openai' does not fit backbone {backbone!r}: OpenAI's weights are those of "
            f"{', '.join(OPENAI)}. Take one of these, or give another of open_clip's tags, a file or none"
        )


def unsuited(config: Mapping[str, Any]) -> str | None:
    """Why IRRA cannot use an open_clip configuration, or None: it takes CLIP's vision transformer and text encoder."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    if "timm_model_name" in vision or not isinstance(vision["layers"], int):
        return "its image encoder is not CLIP's vision transformer"
    words = text.get("context_length", 77), text.get("vocab_size", 49408), text.get("pool_type", "argmax")
    if "hf_model_name" in text or words != (77, 49408, "argmax"):
        return "its text encoder is not CLIP's (77 tokens of 49,408, causal, end token)"
    if "multimodal_cfg" in config or vision.get("pool_type", "tok") != "tok" or vision.get("attentional_pool"):
        return "its global image feature is not a class token"
    ignored = [name for name in vision if vision[name] and name not in FOLLOWED_VISION | {"pool_type"}]
    ignored += [name for name in text if text[name] and name not in FOLLOWED_TEXT | {"pool_type"}]
    if ignored:
        return f"the forward pass does not follow its options {', '.join(ignored)}"
    return None


@functools.cache
def open_clip_models() -> dict[str, dict[str, Any]]:
    """Name → configuration of every model that open_clip knows."""
    folder = Path(importlib.util.find_spec("open_clip").submodule_search_locations[0]) / "model_configs"
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}
