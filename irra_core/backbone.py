"""A recipe, and an open_clip tag or a weights file → the model, its encoders filled with those weights."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from irra_core.model import IRRA
from irra_core.recipes import Recipe, check_patches
from irra_core.settings import default_device, find_file
from irra_core.transformer import CLIP

# The little CLIP of the synthetic recipe; its vocabulary and context are CLIP's.
SMALL_CLIP = {
    "embed_dim": 128,
    "quick_gelu": True,
    "vision_cfg": {"image_size": (96, 32), "layers": 3, "width": 128, "patch_size": 8, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 3},
}
GENERAL = Path(__file__).parent / "synthetic" / "general.safetensors"  # that CLIP, pretrained: `general`
CHECKSUM = "checksum"  # the entry of a safetensors file's metadata
PRECISIONS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # in which weights may be kept
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
# Entries of CLIP files that are no weights of the encoders.
_NOT_LEARNED = ("logit_scale", "logit_bias", "input_resolution", "context_length", "vocab_size", "attn_mask")


def build_model(recipe: Recipe, num_ids: int, device: str | torch.device | None = None) -> IRRA:
    """The model of a recipe: pretrained CLIP weights, new parts drawn from `recipe.seed` (on the CPU, then moved).

    With `pretrained_towers` image or text the other encoder keeps its random weights. What `frozen` and `adapter_rank`
    keep from learning has requires_grad False.

    `device` is by default the GPU if there is one. The global random state is left alone. Raises ValueError for a
    backbone, tag or file that does not fit, FileNotFoundError for weights that are not there.
    """
    config = dict(configuration(recipe.backbone))
    config["text_cfg"] = config["text_cfg"] | {"context_length": recipe.text_length}
    file = None if recipe.pretrained == "none" else _pretrained_file(recipe)
    with seeded(recipe.seed):
        model = IRRA(
            new_clip(config, (recipe.image_height, recipe.image_width), recipe.stride),
            num_ids if {"id", "cmpc"} & set(recipe.loss_names) else None,
            recipe.interaction if "mlm" in recipe.loss_names else None,
            recipe.interaction_depth,
            recipe.padding_attention,
            recipe.token_selection if "tse" in recipe.loss_names else None,
            recipe.temperature if recipe.learned_temperature else None,
        )
    if file is not None:
        load_clip_weights(model.clip, file, recipe.pretrained_towers)
    if recipe.frozen != "none" or recipe.adapter_rank:
        from irra_core.variants.adapters import limit_learning

        with seeded(recipe.seed):
            limit_learning(model.clip, recipe.frozen, recipe.adapter_rank)
    return model.to(device or default_device())


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from the seed within, and leave torch's global random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def configuration(backbone: str) -> Mapping[str, Any]:
    """open_clip's configuration of a backbone, or SMALL_CLIP. Raises ValueError for one that IRRA cannot use.

    IRRA takes CLIP's vision transformer with its class token and CLIP's text encoder with its tokeniser.
    """
    from irra_core.hub.configurations import open_clip_models, unsuited

    config = SMALL_CLIP if backbone == "small" else open_clip_models()[backbone]
    if reason := unsuited(config):
        raise ValueError(f"backbone {backbone!r} is not supported: {reason}; ViT-B-16-quickgelu is, for example")
    return config


def new_clip(config: Mapping[str, Any], image_size: tuple[int, int], stride: int) -> CLIP:
    """A CLIP with random weights for images of that height and width; patches overlap if stride < patch."""
    patch = config["vision_cfg"].get("patch_size", 16)
    check_patches(image_size, patch, stride)
    clip = CLIP(config, image_size)
    if stride != patch:
        visual, grid = clip.visual, patch_grid(image_size, patch, stride)
        dim = visual.positional_embedding.shape[1]
        visual.conv1.stride, visual.grid_size = (stride, stride), grid
        visual.positional_embedding = nn.Parameter(dim**-0.5 * torch.randn(math.prod(grid) + 1, dim))
    return clip


def give_constants(clip: CLIP) -> None:
    """Set what a CLIP holds beside its weights, the temperature, as in a new one."""
    clip.logit_scale = torch.full((), math.log(1 / 0.07), device=clip.text_projection.device)


def patch_grid(image_size: tuple[int, int], patch: int, stride: int) -> tuple[int, int]:
    """Rows and columns of the patches of an image."""
    return (image_size[0] - patch) // stride + 1, (image_size[1] - patch) // stride + 1


def resize_positions(
    embedding: Float[Tensor, "positions dim"], rows: int, cols: int, source: tuple[int, int] | None = None
) -> Float[Tensor, "resized dim"]:
    """Position embeddings, class token first, of a rows × cols grid: bilinear, no corner alignment, no antialias.

    `source` is the grid they come from; without it they are taken for that grid if as many, else for a square, or for
    people's photos: 3 or 2 times as high as wide. Source: released model, which resizes CLIP's 14×14 to 24×8.
    """
    count = len(embedding) - 1
    if source is None:
        grids = [(rows, cols), *((high * side, side) for high in (1, 3, 2) for side in [math.isqrt(count // high)])]
        source = next((grid for grid in grids if math.prod(grid) == count), grids[1])
    if math.prod(source) != count:
        raise ValueError(f"{count} patch positions are no {source[0]}×{source[1]} grid: they fit no {rows}×{cols} grid")
    if source == (rows, cols):
        return embedding
    grid = embedding[1:].T.reshape(1, -1, *source)
    grid = F.interpolate(grid, (rows, cols), mode="bilinear", align_corners=False, antialias=False)
    return torch.cat([embedding[:1], grid.flatten(2)[0].T])


def stretched(embedding: Float[Tensor, "positions width"], length: int) -> Float[Tensor, "length width"]:
    """Text position embeddings of another number of positions: linear, the ends not aligned, as the images'."""
    return F.interpolate(embedding.T[None], length, mode="linear", align_corners=False)[0].T.contiguous()


def _pretrained_file(recipe: Recipe) -> Path:
    """The weights file that `pretrained` stands for, downloaded by open_clip if it is a tag."""
    if recipe.pretrained == "general":
        return GENERAL
    if Path(recipe.pretrained).suffix in WEIGHT_SUFFIXES:
        if (file := find_file(recipe.pretrained)) is None:
            raise FileNotFoundError(f"pretrained {recipe.pretrained!r}: there is no such file in {Path.cwd()}")
        return file
    from irra_core.hub.tags import download

    return download(recipe.backbone, recipe.pretrained)


def read_weights(path: str | Path) -> tuple[dict, dict[str, str]]:
    """What a weights file holds, and its metadata (safetensors only). It cannot run code while it is read.

    Raises ValueError for a file that is damaged: cut short, or with other bytes than its checksum was made of.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights file {path} is not there")
    metadata: dict[str, str] = {}
    try:
        path.open("rb").close()  # without the permission, safetensors says that the file is absent
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
                metadata = file.metadata() or {}
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:  # such as no permission
        raise
    except Exception as error:  # a broken file makes torch raise almost anything
        said = str(error).splitlines() or [type(error).__name__]
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes) is not a weights file that can be read without running code: "
            f"{said[0]}. Copy it again, or, if it comes from a source you trust, convert it: "
            f"torch.save(torch.jit.load(path).state_dict(), 'converted.pt') for a TorchScript file such as ViT-B-16.pt"
        ) from error
    if not isinstance(tensors, Mapping):
        raise ValueError(f"{path} holds a {type(tensors).__name__}: expected is a state dict, tensors by name")
    if CHECKSUM in metadata and checksum(tensors, metadata) != metadata[CHECKSUM]:
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes) is damaged: its content has another checksum than when it was "
            "written. Copy it again; in a run folder, delete it, and the run is trained again"
        )
    return tensors, metadata


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """BLAKE2b, in hex, of named tensors and of what is said of them; files written elsewhere have none."""
    said = {name: text for name, text in metadata.items() if name != CHECKSUM}
    digest = hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def load_clip_weights(clip: CLIP, path: str | Path, towers: str = "both") -> None:
    """Fill the encoders (`towers`: both, image or text) from a file of CLIP weights, positions resized to their grid.

    The file holds a state dict, or has it under `state_dict` or `model`; names may begin with module., clip., text. or
    base_model., as in checkpoints of this library and of the released code. Raises ValueError naming each tensor that
    is missing, left over, misshapen or without finite numbers.
    """
    from irra_core.hub.field import origin

    content, metadata = read_weights(path)
    where = f"weights file {path}"
    tensors = _clip_tensors(content, where)
    clip.origin = origin(content, metadata, path)
    check_weights(tensors, where)
    if (name := "visual.positional_embedding") in tensors:
        positions = tensors[name]
        if positions.ndim != 2 or len(positions) < 2:
            raise ValueError(
                f"{where}: {name} is {tuple(positions.shape)}: accepted are the class token's position and those of 1 "
                "patch or more, in rows. Take a file of CLIP's vision transformer"
            )
        patch, recipe = clip.visual.conv1.kernel_size[0], metadata.get("recipe")
        source = None if recipe is None else _own_grid(recipe, patch, where)
        try:
            tensors[name] = resize_positions(positions.float(), *clip.visual.grid_size, source)
        except ValueError as error:
            raise ValueError(f"{where}: {name}: {error}") from error
    if (words := tensors.get("positional_embedding")) is not None and words.ndim == 2 and len(words):
        tensors["positional_embedding"] = stretched(words.float(), clip.context_length)
    own = learned(clip.state_dict())
    check_fit(own, tensors, where)
    keep = {"both": (), "image": (False,), "text": (True,)}[towers]
    fill(own, tensors | {name: value for name, value in own.items() if name.startswith("visual.") in keep}, where)


def _own_grid(recipe: str, patch: int, where: str) -> tuple[int, int]:
    """Rows and columns of the patches of a model of this library, from the recipe beside its weights."""
    try:
        made = json.loads(recipe)
        height, width, stride = (made[name] for name in ("image_height", "image_width", "stride"))
        if not all(type(value) is int for value in (height, width, stride)):
            raise ValueError("image_height, image_width and stride must be whole numbers")
        check_patches((height, width), patch, stride)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{where}: the recipe in its metadata does not say for which image its positions are "
            f"({type(error).__name__}: {error}): write the file again with save_checkpoint, or without that entry"
        ) from error
    return patch_grid((height, width), patch, stride)


def unwrapped(content: Mapping, where: str, *under: str) -> dict[str, Any]:
    """The state dict of a file, which may have it under one of these names, without the prefix of DataParallel."""
    for name in under:
        content = content[name] if isinstance(content.get(name), Mapping) else content
    for name in content:
        if not isinstance(name, str):
            raise ValueError(
                f"{where}: a tensor is named by {str(name)[:80]}, of type {type(name).__name__}: accepted are names in "
                "text, such as visual.proj. Write the state dict that torch makes"
            )
    return {name.removeprefix("module."): value for name, value in content.items()}


def check_weights(tensors: Mapping[str, Any], where: str, finite: bool = True) -> None:
    """Raise ValueError, naming each, for what are no tensors of floating-point numbers that lie in the file.

    Unless `finite` is False their numbers must be finite, in single precision too.
    """
    faults = ((name, _fault(value, finite)) for name, value in tensors.items())
    faults = [f"{name[:120]} is {fault}" for name, fault in faults if fault]
    if not faults:
        parts = [value.untyped_storage() for value in tensors.values()]
        held = sum({part.data_ptr(): part.nbytes() for part in parts}.values())
        claimed = sum(value.numel() * value.element_size() for value in tensors.values())
        if claimed > held:
            faults = [f"its tensors share {held:,} bytes and would take {claimed:,}"]
    if faults:
        raise ValueError(
            f"{where}: {_listed(faults)}. Accepted are dense tensors of finite numbers in "
            f"{', '.join(str(kind).removeprefix('torch.') for kind in PRECISIONS)}, each with its own memory: write "
            "the file again from a sound model's state_dict()"
        )


def _fault(value: object, finite: bool) -> str | None:
    """What keeps a value from being taken as a weight; None where nothing does."""
    if not isinstance(value, Tensor):
        return f"no tensor but of type {type(value).__name__}"
    if value.layout != torch.strided or value.is_nested:
        return f"a {'nested' if value.is_nested else str(value.layout).removeprefix('torch.')} tensor"
    if value.dtype not in PRECISIONS:
        return f"of {str(value.dtype).removeprefix('torch.')}"
    if value.is_meta:
        return "without numbers (device meta)"
    held = value.untyped_storage().nbytes() // value.element_size()
    if value.numel() > held:
        return f"{tuple(value.shape)} with memory for {held:,} numbers"
    single = value.detach().float()  # a finite sum says that all numbers are, in the fewest passes
    sound = not finite or bool(single.sum().isfinite()) or bool(single.isfinite().all())
    return None if sound else "not finite (NaN or infinite numbers)"


def _clip_tensors(content: Mapping, where: str) -> dict[str, Any]:
    """The two encoders' tensors of a weights file under open_clip's names."""
    content = unwrapped(content, where, "state_dict", "model")
    for prefix in ("clip.", "base_model."):
        inner = {name.removeprefix(prefix): value for name, value in content.items() if name.startswith(prefix)}
        content = inner or content
    return learned({name.removeprefix("text."): value for name, value in content.items()})


def learned(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict without what is no weight of IRRA: CLIP's learned temperature and a file's notes on its sizes."""
    return {name: value for name, value in state.items() if name.split(".")[-1] not in _NOT_LEARNED}


def fill(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy tensors into those of the same name. Raises ValueError naming each one missing, left over or misshapen."""
    check_fit(wanted, tensors, where)
    with torch.no_grad():
        for name, value in wanted.items():
            value.copy_(tensors[name])


def check_fit(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise ValueError naming each tensor missing, left over or misshapen."""
    complaints = [f"{name} is missing" for name in wanted if name not in tensors]
    complaints += [f"{name} is left over" for name in tensors if name not in wanted]
    complaints += [
        f"{name} is {tuple(tensors[name].shape)}, wanted {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    if complaints:
        raise ValueError(f"{where} does not fit the model: {_listed(complaints)}")


def _listed(complaints: list[str]) -> str:
    """The first twelve complaints, and how many more there are."""
    return "; ".join(complaints[:12]) + (f" and {len(complaints) - 12} more" if len(complaints) > 12 else "")
