"""A data set's name and overrides → `Recipe`, a frozen dataclass: every number of a run, its default, its source."""

import dataclasses
import functools
import html
import importlib.util
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

from irra_core.settings import SMOKE_IDENTITIES, SMOKE_STEPS, project_root, short, smoke, unknown

LOSS_NAMES = ("sdm", "itc", "cmpm", "cmpc", "tal", "id", "mlm")
ALIGNING = ("sdm", "itc", "cmpm", "tal")  # only these bring a sentence and its photo together
USED_BY = {  # fields that only some losses read: changed without them, they would be ignored in silence
    "interaction": ("mlm",),
    "interaction_depth": ("mlm",),
    "padding_attention": ("mlm",),
    "temperature": ("sdm", "itc"),
    "cmpm_target": ("cmpm",),
}
# Fields younger than the first runs, at the values that leave a run as it was without them: what is kept of a run or
# of weights made before such a field existed stays valid.
NEUTRAL = {"frozen": "none", "adapter_rank": 0, "micro_batch": None, "unreadable": "leave_out"}
PLAIN = {"pretrained": "none", "pretrained_towers": "both"} | NEUTRAL  # a model of random weights that all learn
OPENAI = tuple(f"ViT-{size}-quickgelu" for size in ("B-16", "B-32", "L-14", "L-14-336"))  # backbones with that tag


def _number(
    default: Any,
    why: str,
    choices: Iterable[str] = (),
    least: int | float | None = None,
    most: int | float | None = None,
    above: float | None = None,
    below: float | None = None,
):
    """A field of the recipe with the reason for its default and the values it accepts; `above` and `below` exclude."""
    bounds = {"least": least, "most": most, "above": above, "below": below}
    return field(default=default, metadata={"why": why, "choices": tuple(choices), **bounds})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every number of a run: what is not here does not change a result.

    The defaults are the paper's, for CUHK-PEDES. `recipe(dataset, **overrides)` makes one; the table that a notebook
    shows for it says where each number comes from. Raises ValueError or TypeError, naming field, value and remedy.
    """

    dataset: str = _number("synthetic", "rendered pedestrians: the data set that everybody has")
    identities: int | None = _number(None, "none: all; else about so many identities, spread over the splits", least=6)
    preset: str = _number(
        "paper",
        "paper; study: short runs to compare; released: the departures of the released code",
        ("paper", "study", "released"),
    )
    backbone: str = _number("ViT-B-16-quickgelu", "paper: CLIP ViT-B/16; `small` is the synthetic recipe's")
    pretrained: str = _number("openai", "an open_clip tag, a file, `general` (small only) or `none`")
    pretrained_towers: str = _number(
        "both", "paper; the other encoder keeps its random weights", ("both", "image", "text")
    )
    frozen: str = _number(
        "none",
        "encoders that keep their first weights; the paper trains all",
        ("none", "image", "text", "both"),
    )
    adapter_rank: int = _number(
        0, "0: none, as the paper; else the encoders learn nothing but changes of this rank to their matrices", least=0
    )
    image_height: int = _number(384, "paper, pixels", least=8)
    image_width: int = _number(128, "paper, pixels", least=8)
    stride: int = _number(16, "paper: the patch size, as for every backbone; smaller strides overlap, pixels", least=1)
    losses: str = _number("sdm+id+mlm", f"paper; joined by plus signs from {', '.join(LOSS_NAMES)}")
    interaction: str = _number("cross", "paper: one cross-attention, then blocks", ("cross", "co", "merged"))
    interaction_depth: int = _number(4, "paper: transformer blocks", least=1)
    padding_attention: bool = _number(False, "the released blocks also attend to padding")
    temperature: float = _number(0.02, "paper (tau); fixed, not learned", least=1e-4)
    cmpm_target: str = _number("sum", "same-identity row divided by its sum, or by its l2 norm", ("sum", "l2"))
    mask_probability: float = _number(0.15, "paper: share of caption words that MLM predicts", least=0.0, most=1.0)
    mask_captions: bool = _number(False, "the released code masks the captions of the other losses too")
    flip_probability: float = _number(0.5, "released: mirrored images", least=0.0, most=1.0)
    crop_padding: int = _number(10, "released: padding before the random crop, pixels", least=0)
    erase_probability: float = _number(0.5, "released: random erasing", least=0.0, most=1.0)
    epochs: int = _number(60, "paper; an epoch is every caption once", least=1)
    max_steps: int | None = _number(None, "none: all epochs; else stop after so many steps", least=1)
    batch_size: int = _number(64, "released run_irra.sh, over all processes", least=2)
    micro_batch: int | None = _number(
        None, "none: the whole batch; else so many pairs in memory at once (GradCache), the same gradients", least=1
    )
    lr: float = _number(1e-5, "paper: pretrained weights move slowly", above=0.0)
    new_lr_factor: float = _number(5.0, "paper: parts without pretrained weights learn at 5e-5", least=0.0)
    bias_lr_factor: float = _number(2.0, "released: biases learn twice as fast", least=0.0)
    weight_decay: float = _number(4e-5, "released; biases have none", least=0.0)
    adam_beta1: float = _number(0.9, "paper", least=0.0, below=1.0)
    adam_beta2: float = _number(0.999, "paper", least=0.0, below=1.0)
    adam_eps: float = _number(1e-8, "torch's default; the released code writes 1e-3", above=0.0)
    warmup_epochs: int = _number(5, "paper", least=0)
    warmup_factor: float = _number(0.1, "paper: the first epoch's share of lr", least=0.0, most=1.0)
    evaluate_every: int | None = _number(None, "none: once an epoch; else steps between evaluations", least=1)
    select_on: str = _number("val", "the released code picks its best epoch on test", ("val", "last", "test"))
    precision: str = _number("auto", "auto: bf16 where the device has it, else fp32", ("auto", "fp32", "bf16", "fp16"))
    unreadable: str = _number(
        "leave_out",
        "leave_out: up to 1 photo in 100 that cannot be read; stop: the run at the first",
        ("leave_out", "stop"),
    )
    seed: int = _number(0, "data order, masks, augmentation, new weights", least=0, most=2**31 - 1)

    def __post_init__(self):
        for item in fields(self):
            object.__setattr__(self, item.name, _checked(item, getattr(self, item.name)))
        _check_backbone(self)
        check_patches((self.image_height, self.image_width), patch_size(self.backbone), self.stride)
        _check_losses(self)
        _check_trained(self)

    @property
    def loss_names(self) -> tuple[str, ...]:
        """The losses in use, as ("sdm", "id", "mlm")."""
        return tuple(self.losses.split("+"))

    def to_json(self) -> str:
        """The recipe as indented JSON; `Recipe(**json.loads(text))` reads it back."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    def key(self) -> str:
        """What tells weights of one recipe from another's: the JSON, a younger field only where it changes a run."""
        values = dataclasses.asdict(self)
        return json.dumps({n: v for n, v in values.items() if n not in NEUTRAL or v != NEUTRAL[n]}, indent=2)

    def replace(self, **changes: Any) -> "Recipe":
        """The same recipe with some fields changed."""
        return dataclasses.replace(self, **changes)

    def sources(self) -> dict[str, str]:
        """Field → where its value comes from: `given`, or the layer that set it."""
        layers = _layers(self.dataset, self.backbone, self.pretrained, self.preset)
        found = {item.name: "paper" for item in fields(self)}
        values = {item.name: item.default for item in fields(self)}
        for name, layer in layers:
            found |= dict.fromkeys(layer, name)
            values |= layer
        return {name: found[name] if values[name] == getattr(self, name) else "given" for name in found}

    def differences(self) -> dict[str, Any]:
        """What differs from the data set's own recipe, in the order preset, backbone, weights, the rest."""
        own = recipe(self.dataset, _smoke=False)
        layered = _resolve(self.dataset, self.backbone, self.pretrained, self.preset)
        leading = ("preset", "backbone")
        given = {name: getattr(self, name) for name in leading if getattr(self, name) != getattr(own, name)}
        usual = _resolve(self.dataset, self.backbone, None, self.preset)["pretrained"]
        if self.pretrained != usual:
            given["pretrained"] = self.pretrained
        rest = {n: v for n, v in dataclasses.asdict(self).items() if n not in ("dataset", *leading, "pretrained")}
        return given | {name: value for name, value in rest.items() if value != layered[name]}

    def _repr_html_(self) -> str:
        """The table that a notebook shows: every field, its value, its source and its reason."""
        sources = self.sources()
        rows = []
        for item in fields(self):
            cells = (item.name, getattr(self, item.name), sources[item.name], item.metadata["why"])
            style = " style='font-weight:bold'" if sources[item.name] == "given" else ""
            rows.append(f"<tr{style}>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells) + "</tr>")
        head = "<tr><th>field</th><th>value</th><th>from</th><th>why</th></tr>"
        return f"<table>{head}{''.join(rows)}</table>"


# The little CLIP of the synthetic recipe: ViT of width 128, 3 layers, patch 8. Its numbers were chosen on val.
SMALL = {
    "pretrained": "general",
    "image_height": 96,
    "image_width": 32,
    "stride": 8,
    "crop_padding": 3,  # pixels: the released 10 in proportion
    "erase_probability": 0.2,  # half of all photos, as released, hides more than it teaches in few epochs
    "lr": 3e-4,  # higher ones undo the pretraining in the first epoch
    "new_lr_factor": 2.0,
    "adam_beta2": 0.98,  # from random weights 0.999 stays on InfoNCE's first plateau for epochs
    "epochs": 13,
    "warmup_epochs": 0,
}
SMALL_FROM_SCRATCH = {  # nothing is pretrained, nothing is slow; few epochs see a photo too seldom to vary it much
    "crop_padding": 1,
    "erase_probability": 0.0,
    "lr": 5e-4,
    "new_lr_factor": 1.0,
    "epochs": 8,
    "warmup_epochs": 1,
}

RECIPES: dict[str, dict[str, Any]] = {
    "synthetic": {"backbone": "small"},
    "synthetic-night": {"backbone": "small"},
    "synthetic-campus": {"backbone": "small"},
    "synthetic-general": {"backbone": "small"},
    "cuhk": {},
    "icfg": {},
    "rstp": {},
}

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "study": {"epochs": 2},  # many runs are compared, so each is short
    "released": {
        "select_on": "test",
        "mask_captions": True,
        "adam_eps": 1e-3,
        "precision": "fp16",
        "padding_attention": True,
        "cmpm_target": "l2",
    },
}


def recipe(dataset: str = "synthetic", *, _smoke: bool | None = None, **overrides: Any) -> Recipe:
    """The recipe of a data set (a name in RECIPES, or the path of an annotation file) with some fields overridden.

    An override of None means "what the recipe says". With IRRA_SMOKE=1 in the environment the run is shrunk to at
    most 24 identities and 3 steps. Raises ValueError for an unknown field, data set, loss or backbone, and TypeError
    for a value of the wrong type; each names the field, the nearest accepted name and what is accepted.
    """
    items = {item.name: item for item in fields(Recipe)}
    for name in overrides:
        if name not in items:
            raise unknown("recipe field", name, items)
    given = {name: _checked(items[name], value) for name, value in overrides.items() if value is not None}
    _check_dataset(_checked(items["dataset"], dataset))
    backbone = given.get("backbone", RECIPES.get(dataset, {}).get("backbone", "ViT-B-16-quickgelu"))
    values = _resolve(dataset, backbone, given.get("pretrained"), given.get("preset", "paper")) | given
    if smoke() if _smoke is None else _smoke:
        values["identities"] = min(values["identities"] or SMOKE_IDENTITIES, SMOKE_IDENTITIES)
        values["max_steps"] = min(values["max_steps"] or SMOKE_STEPS, SMOKE_STEPS)
    return Recipe(**values)


def check_processes(processes: int | None, chosen: Recipe) -> int:
    """So many processes, 1 for None. Raises ValueError unless each can have a pair of the recipe's batches."""
    count = 1 if processes is None else processes
    if not 1 <= count <= chosen.batch_size:
        raise ValueError(
            f"processes is {processes}: accepted is from 1 to the batch size, {chosen.batch_size} pairs, which are "
            "shared out among them"
        )
    return count


def _layers(dataset: str, backbone: str, pretrained: str | None, preset: str) -> list[tuple[str, dict[str, Any]]]:
    """What changes the defaults, first to last: the data set, the backbone, the preset."""
    named = {"dataset": dataset, "backbone": backbone, "preset": preset}
    layers = [(f"recipe {dataset}", RECIPES.get(dataset, {}) | named)]
    if backbone == "small":
        layers.append(("small CLIP", SMALL))
        if pretrained == "none":
            layers.append(("small CLIP from scratch", SMALL_FROM_SCRATCH))
    elif (patch := patch_size(backbone)) not in (None, 16):
        layers.append((f"patch of {backbone}", _whole_patches(patch)))
    return [*layers, (f"preset {preset}", PRESETS[preset])]


def patch_size(backbone: str) -> int | None:
    """Side of a backbone's patches in pixels; None for a name that is unknown or cannot be used."""
    if backbone == "small":
        return SMALL["stride"]
    config = _open_clip_models().get(backbone)
    return config["vision_cfg"].get("patch_size", 16) if config and not unsuited(config) else None


def _whole_patches(patch: int) -> dict[str, int]:
    """The paper's image cut to whole patches side by side: 378×126 for patches of 14, as 384×128 would lose 6 rows."""
    return {"image_height": 384 // patch * patch, "image_width": 128 // patch * patch, "stride": patch}


def _resolve(dataset: str, backbone: str, pretrained: str | None, preset: str) -> dict[str, Any]:
    """Every field's value before anything is overridden, except that a given `pretrained` picks its numbers."""
    values = {item.name: item.default for item in fields(Recipe)}
    for _, layer in _layers(dataset, backbone, pretrained, preset):
        values |= layer
    return values


def _checked(item: dataclasses.Field, value: Any) -> Any:
    """The value in its field's type, or an error that names the field and what it accepts."""
    types = get_args(item.type) or (item.type,)
    if float in types and type(value) is int and abs(value) <= sys.float_info.max:
        value = float(value)
    if type(value) not in types and not (float in types and type(value) is int):
        accepted = " or ".join("None" if t is type(None) else t.__name__ for t in types)
        raise TypeError(f"recipe field {item.name!r} is {short(value)}: accepted is {accepted}")
    if item.metadata["choices"] and value is not None:
        _check_choice(item.name, value, item.metadata["choices"])
    if type(value) in (int, float) and not _within(item.metadata, value):
        words = {"least": "at least", "above": "above", "most": "at most", "below": "below"}
        accepted = " and ".join(f"{words[n]} {item.metadata[n]}" for n in words if item.metadata[n] is not None)
        accepted += f" and at most {sys.float_info.max:.2g}" if value > sys.float_info.max else ""
        raise ValueError(f"recipe field {item.name!r} is {short(value)}: accepted is {accepted}")
    return value


def _within(bounds: Mapping[str, Any], value: int | float) -> bool:
    """True of a finite number between a field's bounds."""
    least, most, above, below = (bounds[name] for name in ("least", "most", "above", "below"))
    return (
        (least is None or value >= least)
        and (above is None or value > above)
        and (below is None or value < below)
        and value <= (sys.float_info.max if most is None else most)
    )


def _check_choice(name: str, value: object, accepted: Iterable[str]) -> None:
    if value not in accepted:
        raise unknown(name, value, accepted)


def _check_dataset(dataset: str) -> None:
    """Accept a name in RECIPES or an annotation file that exists."""
    if dataset in RECIPES or (isinstance(dataset, str) and own_file(dataset) is not None):
        return
    error = unknown("data set", dataset, RECIPES)
    raise ValueError(f"{error}, or the path of an annotation file (.json, .csv, .parquet) that exists")


def own_file(dataset: str) -> Path | None:
    """The annotation file of own data, looked for from the working directory, then from the project's root."""
    if Path(dataset).suffix.lower() not in (".json", ".csv", ".parquet"):
        return None
    for folder in (Path.cwd(), project_root()):
        try:
            if (folder / dataset).is_file():
                return (folder / dataset).resolve()
        except OSError:  # such as a name that is too long for a file
            continue
    return None


def backbones() -> list[str]:
    """`small` and every open_clip model that IRRA can use; read from its files, so that torch is not imported."""
    return ["small", *sorted(name for name, config in _open_clip_models().items() if not unsuited(config))]


# The options of open_clip's two encoders that the forward pass follows; every other one would be ignored in silence.
FOLLOWED = {"layers", "width", "mlp_ratio", "ls_init_value", "act_kwargs", "norm_kwargs"}
FOLLOWED_VISION = FOLLOWED | {"image_size", "patch_size", "head_width"}
FOLLOWED_TEXT = FOLLOWED | {"context_length", "vocab_size", "heads"}


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
def _open_clip_models() -> dict[str, dict[str, Any]]:
    """Name → configuration of every model that open_clip knows."""
    folder = Path(importlib.util.find_spec("open_clip").submodule_search_locations[0]) / "model_configs"
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def _check_backbone(recipe: Recipe) -> None:
    """Accept an open_clip model that fits or `small`, and weights that it can have."""
    if recipe.pretrained == "none" and recipe.pretrained_towers != "both":
        raise ValueError(
            f"pretrained_towers {recipe.pretrained_towers!r} has no effect with pretrained 'none', where no encoder is "
            "pretrained: give weights, or leave pretrained_towers at 'both'"
        )
    if recipe.backbone == "small":
        if recipe.pretrained not in ("general", "none") and not Path(recipe.pretrained).suffix:
            raise unknown("pretrained", recipe.pretrained, ("general", "none", "the path of a weights file"))
        return
    models = _open_clip_models()
    if recipe.backbone not in models:
        raise unknown("backbone", recipe.backbone, backbones())
    if reason := unsuited(models[recipe.backbone]):
        accepted = ", ".join(backbones())
        raise ValueError(f"backbone {recipe.backbone!r} is not supported: {reason}; accepted are {accepted}")
    if recipe.pretrained == "general":
        raise ValueError(
            "pretrained 'general' is the small CLIP's: give an open_clip tag (openai), a file or none "
            f"to backbone {recipe.backbone!r}"
        )
    if recipe.pretrained == "openai" and recipe.backbone not in OPENAI:
        raise ValueError(
            f"pretrained 'openai' does not fit backbone {recipe.backbone!r}: OpenAI's weights are those of "
            f"{', '.join(OPENAI)}. Take one of these, or give another of open_clip's tags, a file or none"
        )


def check_patches(image_size: tuple[int, int], patch: int, stride: int) -> None:
    """Raise ValueError for patches larger than the image, and for a stride that would skip pixels between them."""
    height, width = image_size
    if not 1 <= stride <= patch <= min(height, width):
        raise ValueError(
            f"stride {stride}, patch {patch}, image {height}×{width}: accepted is 1 ≤ stride ≤ patch ≤ image"
        )


def _check_trained(recipe: Recipe) -> None:
    """Refuse a recipe in which nothing learns, and adapters without a place."""
    if recipe.frozen != "both":
        return
    if recipe.adapter_rank:
        raise ValueError(
            f"adapter_rank {recipe.adapter_rank} has no effect with frozen 'both': adapters go into the encoders that "
            "are not frozen. Leave adapter_rank at 0, or freeze one encoder (image or text) or none"
        )
    if not {"id", "cmpc", "mlm"} & set(recipe.loss_names):
        raise ValueError(
            f"frozen 'both' leaves losses {recipe.losses!r} nothing to train: freeze one encoder (image or text) or "
            "none, or add id or mlm, which have weights of their own"
        )


def _check_losses(recipe: Recipe) -> None:
    """Refuse unknown, doubled, unaligned and ignored combinations."""
    names = recipe.loss_names
    for name in names:
        _check_choice("loss", name, LOSS_NAMES)
    if len(set(names)) < len(names):
        raise ValueError(f"losses {recipe.losses!r} name one twice: each counts once, with weight 1")
    if not set(names) & set(ALIGNING):
        raise ValueError(f"losses {recipe.losses!r} align nothing: add one of {', '.join(ALIGNING)}")
    usual = _resolve(recipe.dataset, recipe.backbone, recipe.pretrained, recipe.preset)
    for field_name, users in USED_BY.items():
        value = getattr(recipe, field_name)
        if value != usual[field_name] and not set(names) & set(users):
            raise ValueError(f"{field_name} {value!r} has no effect with losses {recipe.losses!r}: add {users[0]}")


def read_recipe(values: Mapping[str, Any]) -> Recipe:
    """The recipe that `Recipe.to_json` wrote. Raises ValueError for a field that this version does not know."""
    names = [item.name for item in fields(Recipe)]
    for name in values:
        if name not in names:
            raise unknown("recipe field", name, names)
    return Recipe(**values)
