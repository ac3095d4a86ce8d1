"""A data set's name and overrides → `Recipe`, a frozen dataclass: every number of a run, its default, its source."""

import dataclasses
import html
import json
import operator
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

from irra_core.settings import SMOKE_IDENTITIES, SMOKE_STEPS, find_file, short, smoke, unknown

LOSS_NAMES = ("sdm", "itc", "cmpm", "cmpc", "tal", "ibm", "nitc", "ritc", "tse", "id", "mlm")
ALIGNING = tuple(name for name in LOSS_NAMES if name not in ("cmpc", "tse", "id", "mlm"))  # pair caption and photo
USED_BY = {  # fields that only some losses read; changing one without its losses is an error
    "interaction": ("mlm",),
    "interaction_depth": ("mlm",),
    "padding_attention": ("mlm",),
    "temperature": ("sdm", "itc", "nitc", "ritc"),
    "learned_temperature": ("sdm", "itc", "nitc", "ritc"),
    "token_selection": ("tse",),
    "cmpm_target": ("cmpm",),
}
# Fields added after the first runs, at the values that change nothing: runs and weights made before stay valid.
NEUTRAL = {"frozen": "none", "adapter_rank": 0, "micro_batch": None, "unreadable": "leave_out", "compile": False}
PLAIN = {"pretrained": "none", "pretrained_towers": "both"} | NEUTRAL  # random weights, all of them trained
NEUTRAL |= {"text_length": 77}  # not in PLAIN: the untrained model reads as much as the trained one
NEUTRAL |= {"learned_temperature": False, "token_selection": "last", "word_augmentation": 0.0, "word_deletion": 0.0}
NEUTRAL |= {"shuffled_captions": 0.0, "sampler": "shuffle", "per_identity": 4}
OWN_DATA = (".json", ".csv", ".parquet", ".arrow", ".tar")  # files of your own; folders hold those from .parquet on
LEAST_HALF_EPS = 1e-4  # for fp16, whose second moments of small gradients are 0: steps grow with 1 / adam_eps
BOUNDS = {  # how a field's numbers can be bounded: the comparison and its words
    "least": (operator.ge, "at least"),
    "above": (operator.gt, "above"),
    "most": (operator.le, "at most"),
    "below": (operator.lt, "below"),
}

# The little CLIP of the synthetic recipe: ViT of width 128, 3 layers, patch 8. Its numbers were chosen on val.
SMALL = {
    "pretrained": "general",
    "image_height": 96,
    "image_width": 32,
    "stride": 8,
    "crop_padding": 3,  # pixels: the released 10 in proportion
    "erase_probability": 0.2,  # half of all photos, as released, hides more than it teaches in few epochs
    "interaction_depth": 1,  # a step with the paper's 4 blocks takes 1.2 times as long
    "lr": 1e-3,  # that of the pretraining; twice as much is worse
    "new_lr_factor": 2.0,
    "adam_beta2": 0.98,  # from random weights 0.999 stays on InfoNCE's first plateau for epochs
    "epochs": 4,  # R@1 on val still rises after 8, but the first run should take minutes
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

# Rendered people of three domains; the studies' sets have the same train and val people and more test people.
RENDERED = tuple(f"synthetic{size}{domain}" for size in ("", "-study") for domain in ("", "-night", "-campus"))
RECIPES: dict[str, dict[str, Any]] = {name: {"backbone": "small"} for name in RENDERED}
RECIPES |= {"cuhk": {}, "icfg": {}, "rstp": {}}

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "study": {"epochs": 4},  # many runs are compared; after four epochs MLM reads the photo (docs/study_design.md)
    "domain": {"batch_size": 128, "lr": 5e-6, "epochs": 60},  # HAM's fine-tuning of person-pretrained weights
    "released": {
        "select_on": "test",
        "mask_captions": True,
        "adam_eps": 1e-3,
        "precision": "fp16",
        "padding_attention": True,
        "cmpm_target": "l2",
    },
    "tbps": {  # TBPS-CLIP (AAAI 2024), authors' configuration; optimiser, image size and augmentation stay ours
        "losses": "nitc+ritc",
        "temperature": 0.01,  # CLIP's own at the end of its pretraining
        "learned_temperature": True,
        "word_deletion": 0.05,
        "epochs": 5,
        "warmup_epochs": 1,
        "batch_size": 80,
    },
}


def _number(default: Any, why: str, choices: Iterable[str] = (), **bounds: int | float):
    """A field of the recipe: its default, the reason for it, and the names or (see BOUNDS) the numbers accepted."""
    return field(default=default, metadata={"why": why, "choices": tuple(choices), "bounds": bounds})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every number of a run: nothing else changes a result.

    The defaults are the paper's, for CUHK-PEDES. `recipe(dataset, **overrides)` makes one; the table that a notebook
    shows for it says where each number comes from. Raises ValueError or TypeError, naming field, value and remedy.
    """

    dataset: str = _number("synthetic", "rendered pedestrians: needs no download")
    identities: int | None = _number(None, "none: all; else about this many, spread over the splits", least=6)
    preset: str = _number("paper", "study: short; domain: weights of people; released, tbps: as that code", PRESETS)
    backbone: str = _number("ViT-B-16-quickgelu", "paper: CLIP ViT-B/16; `small` is the synthetic recipe's")
    pretrained: str = _number("openai", "an open_clip tag, a file, hub:owner/name, `general` (small only) or `none`")
    pretrained_towers: str = _number("both", "paper; the other encoder stays random", ("both", "image", "text"))
    frozen: str = _number("none", "encoders that are not trained; paper: none", ("none", "image", "text", "both"))
    adapter_rank: int = _number(0, "0: none, as the paper; else encoders train only changes of this rank", least=0)
    image_height: int = _number(384, "paper, pixels", least=8)
    image_width: int = _number(128, "paper, pixels", least=8)
    stride: int = _number(16, "paper: the patch size, as for every backbone; smaller strides overlap, pixels", least=1)
    text_length: int = _number(77, "CLIP: tokens of a caption; more stretch its positions", least=77, most=512)
    losses: str = _number("sdm+id+mlm", f"paper; joined by plus signs from {', '.join(LOSS_NAMES)}")
    interaction: str = _number("cross", "paper: one cross-attention, then blocks", ("cross", "co", "merged"))
    interaction_depth: int = _number(4, "paper: transformer blocks", least=1)
    padding_attention: bool = _number(False, "the released blocks also attend to padding")
    temperature: float = _number(0.02, "paper (tau); fixed, not learned", least=1e-4)
    learned_temperature: bool = _number(False, "paper: fixed; TBPS-CLIP: learned, `temperature` is its first value")
    token_selection: str = _number("last", "tse: by attention of the last block; layers: of two", ("last", "layers"))
    cmpm_target: str = _number("sum", "same-identity row divided by its sum, or by its l2 norm", ("sum", "l2"))
    mask_probability: float = _number(0.15, "paper: share of caption words that MLM predicts", least=0.0, most=1.0)
    mask_captions: bool = _number(False, "the released code masks the captions of the other losses too")
    word_augmentation: float = _number(0.0, "caption words masked, replaced, deleted; RDE: 0.2", least=0.0, most=1.0)
    word_deletion: float = _number(0.0, "share of caption words deleted; TBPS-CLIP: 0.05", least=0.0, most=1.0)
    shuffled_captions: float = _number(0.0, "share of train captions put to wrong photos", least=0.0, most=1.0)
    flip_probability: float = _number(0.5, "released: mirrored images", least=0.0, most=1.0)
    crop_padding: int = _number(10, "released: padding before the random crop, pixels", least=0)
    erase_probability: float = _number(0.5, "released: random erasing", least=0.0, most=1.0)
    epochs: int = _number(60, "paper; an epoch is every caption once", least=1)
    max_steps: int | None = _number(None, "none: all epochs; else stop after this many steps", least=1)
    batch_size: int = _number(64, "released run_irra.sh, over all processes", least=2)
    sampler: str = _number("shuffle", "released; identity: people with per_identity captions", ("shuffle", "identity"))
    per_identity: int = _number(4, "released num_instance: captions per person, sampler identity only", least=1)
    micro_batch: int | None = _number(None, "none: all pairs in memory at once; else this many (GradCache)", least=1)
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
    compile: bool = _number(False, "torch.compile of the transformer blocks; not timed on a GPU yet")
    unreadable: str = _number("leave_out", "leave_out: up to 1 photo in 100; stop: at the first", ("leave_out", "stop"))
    seed: int = _number(0, "data order, masks, augmentation, new weights", least=0, most=2**31 - 1)

    def __post_init__(self):
        _check_backbone(self)
        check_patches((self.image_height, self.image_width), patch_size(self.backbone), self.stride)
        _check_losses(self)
        _check_batches(self)
        _check_trained(self)
        _check_precision(self)

    @property
    def loss_names(self) -> tuple[str, ...]:
        """The losses in use, as ("sdm", "id", "mlm")."""
        return tuple(self.losses.split("+"))

    def to_json(self) -> str:
        """The recipe as indented JSON; `read_recipe(json.loads(text))` reads it back."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    def key(self) -> str:
        """The JSON by which weights of different recipes are told apart; NEUTRAL fields appear only where changed."""
        values = dataclasses.asdict(self)
        return json.dumps({n: v for n, v in values.items() if n not in NEUTRAL or v != NEUTRAL[n]}, indent=2)

    def replace(self, **changes: Any) -> "Recipe":
        """The same recipe with some fields changed."""
        return dataclasses.replace(self, **_accepted(changes))

    def sources(self) -> dict[str, str]:
        """Field → where its value comes from: `given`, or the layer that set it."""
        usual = _usual(self.dataset, self.backbone, self.pretrained, self.preset)
        return {name: layer if getattr(self, name) == value else "given" for name, (value, layer) in usual.items()}

    def differences(self) -> dict[str, Any]:
        """The fields that differ from the data set's own recipe: preset, backbone and weights first, then the rest."""
        own, rest = _usual(self.dataset), _usual(self.dataset, self.backbone, self.pretrained, self.preset)
        weights = _usual(self.dataset, self.backbone, None, self.preset)["pretrained"]
        first = {"preset": own["preset"], "backbone": own["backbone"], "pretrained": weights}
        usual = first | {name: rest[name] for name in rest if name not in first}
        return {n: getattr(self, n) for n, (value, _) in usual.items() if getattr(self, n) != value}

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


def recipe(dataset: str = "synthetic", *, _smoke: bool | None = None, **overrides: Any) -> Recipe:
    """The recipe of a data set (a name in RECIPES, or the path of an annotation file) with some fields overridden.

    An override of None means "what the recipe says". With IRRA_SMOKE=1 in the environment the run is shrunk to at most
    24 identities and 3 steps. A model of the hub gets its commit. Raises ValueError for an unknown field, data set,
    loss or backbone, TypeError for a value of the wrong type; each names the field, the nearest name and the accepted.
    """
    given = {n: v for n, v in overrides.items() if v is not None or n not in Recipe.__dataclass_fields__}
    given = _accepted(given | {"dataset": dataset})  # an unknown name is refused whatever its value
    if dataset not in RECIPES and own_file(dataset) is None:
        error = f"{unknown('data set', dataset, RECIPES)}, or the path of an annotation file ({', '.join(OWN_DATA)})"
        raise ValueError(f"{error}, or of a folder with {', '.join(OWN_DATA[2:])} files in it, not in its subfolders")
    usual = _usual(dataset, given.get("backbone"), given.get("pretrained"), given.get("preset", "paper"))
    values = {name: value for name, (value, _) in usual.items()} | given
    if smoke() if _smoke is None else _smoke:
        values["identities"] = min(values["identities"] or SMOKE_IDENTITIES, SMOKE_IDENTITIES)
        values["max_steps"] = min(values["max_steps"] or SMOKE_STEPS, SMOKE_STEPS)
    if values["pretrained"].startswith("hub:"):
        from irra_core.hub.repositories import pinned

        values["pretrained"] = pinned(values["pretrained"])
    return Recipe(**values)


def read_recipe(values: Mapping[str, Any]) -> Recipe:
    """The recipe of these values, as `Recipe.to_json` wrote them, perhaps when the usual values were others.

    What its losses do not read gets today's usual value. Raises as `recipe` does.
    """
    chosen = {item.name: item.default for item in fields(Recipe)} | _accepted(values)
    usual = _usual(*(chosen[name] for name in ("dataset", "backbone", "pretrained", "preset")))
    return Recipe(**chosen | {name: usual[name][0] for name in _unread(chosen["losses"].split("+"))})


def check_processes(processes: int | None, chosen: Recipe) -> int:
    """The number of processes, 1 for None. Raises ValueError where a process would have no pair of a batch."""
    count = 1 if processes is None else processes
    if not 1 <= count <= chosen.batch_size:
        raise ValueError(f"processes is {processes}: accepted is from 1 to the batch size, {chosen.batch_size}")
    return count


def _usual(
    dataset: str, backbone: str | None = None, pretrained: str | None = None, preset: str = "paper"
) -> dict[str, tuple[Any, str]]:
    """Field → its value before anything is overridden, and the layer that sets it: the last one that names it."""
    own = RECIPES.get(dataset, {})
    backbone = backbone or own.get("backbone", Recipe.backbone)
    named = {"dataset": dataset, "backbone": backbone, "preset": preset}
    layers = [("paper", {item.name: item.default for item in fields(Recipe)}), (f"recipe {dataset}", own | named)]
    if backbone == "small":
        layers.append(("small CLIP", SMALL))
        if pretrained == "none":
            layers.append(("small CLIP from scratch", SMALL_FROM_SCRATCH))
    elif (patch := patch_size(backbone)) not in (None, 16):  # 378×126 for patches of 14: 384×128 would lose 6 rows
        whole = {"image_height": 384 // patch * patch, "image_width": 128 // patch * patch, "stride": patch}
        layers.append((f"patch of {backbone}", whole))
    layers.append((f"preset {preset}", PRESETS[preset]))
    return {name: (value, layer) for layer, values in layers for name, value in values.items()}


def patch_size(backbone: str) -> int | None:
    """Side of a backbone's patches in pixels; None for a name that is unknown or cannot be used."""
    if backbone == "small":
        return SMALL["stride"]
    from irra_core.hub.configurations import open_clip_models, unsuited

    config = open_clip_models().get(backbone)
    return config["vision_cfg"].get("patch_size", 16) if config and not unsuited(config) else None


def _accepted(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values in the types of their fields, or an error that names the field and what it accepts."""
    for name in values:
        if name not in Recipe.__dataclass_fields__:
            raise unknown("recipe field", name, Recipe.__dataclass_fields__)
    return {item.name: _checked(item, values[item.name]) for item in fields(Recipe) if item.name in values}


def _checked(item: dataclasses.Field, value: Any) -> Any:
    """One field's value in the field's type and between its bounds."""
    types, choices, bounds = get_args(item.type) or (item.type,), item.metadata["choices"], item.metadata["bounds"]
    if float in types and type(value) is int and abs(value) <= sys.float_info.max:
        value = float(value)
    if type(value) not in types and not (float in types and type(value) is int):
        accepted = " or ".join("None" if t is type(None) else t.__name__ for t in types)
        raise TypeError(f"recipe field {item.name!r} is {short(value)}: accepted is {accepted}")
    if choices and value not in choices:
        raise unknown(item.name, value, choices)
    if type(value) not in (int, float):
        return value
    if not (value <= sys.float_info.max and all(BOUNDS[name][0](value, bound) for name, bound in bounds.items())):
        accepted = " and ".join(f"{BOUNDS[name][1]} {bound}" for name, bound in bounds.items())
        accepted += f" and at most {sys.float_info.max:.2g}" if value > sys.float_info.max else ""
        raise ValueError(f"recipe field {item.name!r} is {short(value)}: accepted is {accepted}")
    return value


def own_file(dataset: str) -> Path | None:
    """The annotation file of own data, or the folder of its Arrow, Parquet or tar files; None without either."""
    if Path(dataset).suffix.lower() in OWN_DATA:
        return find_file(dataset)
    folder = find_file(dataset, Path.is_dir) if dataset else None
    return folder if folder and any(file.suffix in OWN_DATA[2:] for file in folder.iterdir()) else None


def _check_backbone(recipe: Recipe) -> None:
    """Accept an open_clip model that fits or `small`, and weights that it can have."""
    if recipe.pretrained == "none" and recipe.pretrained_towers != "both":
        raise ValueError(
            f"pretrained_towers {recipe.pretrained_towers!r} has no effect with pretrained 'none', where no encoder is "
            "pretrained: give weights, or leave pretrained_towers at 'both'"
        )
    if recipe.backbone == "small":
        named = recipe.pretrained in ("general", "none") or recipe.pretrained.startswith("hub:")
        if not named and not Path(recipe.pretrained).suffix:
            raise unknown("pretrained", recipe.pretrained, ("general", "none", "hub:owner/name", "a weights file"))
        return
    from irra_core.hub.configurations import check_open_clip

    check_open_clip(recipe.backbone, recipe.pretrained)


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
    if not {"id", "cmpc", "mlm", "tse"} & set(recipe.loss_names):
        raise ValueError(
            f"frozen 'both' leaves losses {recipe.losses!r} nothing to train: freeze one encoder (image or text) or "
            "none, or add id or mlm, which have weights of their own"
        )


def _check_batches(recipe: Recipe) -> None:
    """Refuse batches that cannot be balanced, and pieces for a loss that needs the whole batch."""
    size, each = recipe.batch_size, recipe.per_identity
    if recipe.sampler == "shuffle" and each != NEUTRAL["per_identity"]:
        raise ValueError(f"per_identity {each} has no effect with sampler 'shuffle': take sampler 'identity'")
    if recipe.sampler == "identity" and size % each:
        raise ValueError(f"batch_size {size} is no multiple of per_identity {each}: take {size // each * each or each}")
    if recipe.micro_batch and "tse" in recipe.loss_names:
        raise ValueError(
            f"micro_batch {recipe.micro_batch} does not work with loss tse, whose batch norm needs the whole batch: "
            "leave micro_batch out, or take several processes"
        )


def _check_precision(recipe: Recipe) -> None:
    """Refuse half precision where its rounding would enlarge Adam's steps."""
    if recipe.precision == "fp16" and recipe.adam_eps < LEAST_HALF_EPS:
        raise ValueError(
            f"precision 'fp16' with adam_eps {recipe.adam_eps:g}: squares of small gradients round to 0 in half "
            f"precision, so Adam's steps become many times too large. Accepted is adam_eps of at least "
            f"{LEAST_HALF_EPS:g}, such as that of preset 'released', or precision 'bf16'"
        )


def _check_losses(recipe: Recipe) -> None:
    """Refuse unknown, doubled, unaligned and ignored combinations."""
    names = recipe.loss_names
    for name in names:
        if name not in LOSS_NAMES:
            raise unknown("loss", name, LOSS_NAMES)
    if len(set(names)) < len(names):
        raise ValueError(f"losses {recipe.losses!r} name one twice: each counts once, with weight 1")
    if not set(names) & set(ALIGNING):
        raise ValueError(f"losses {recipe.losses!r} align nothing: add one of {', '.join(ALIGNING)}")
    usual = _usual(recipe.dataset, recipe.backbone, recipe.pretrained, recipe.preset)
    for name in _unread(names):
        if (value := getattr(recipe, name)) != usual[name][0]:
            raise ValueError(f"{name} {value!r} has no effect with losses {recipe.losses!r}: add {USED_BY[name][0]}")


def _unread(losses: Iterable[str]) -> list[str]:
    """The fields that none of these losses reads."""
    return [name for name, users in USED_BY.items() if not set(losses) & set(users)]
