"""A model ↔ safetensors on disk; the authors' released `.pth` → a model."""

import errno
import json
import os
import re
import secrets
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from math import isqrt
from pathlib import Path

import torch
from open_clip.transformer import QuickGELU
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from irra_core.backbone import (
    CHECKSUM,
    check_fit,
    check_weights,
    checksum,
    fill,
    give_constants,
    learned,
    new_clip,
    patch_grid,
    read_weights,
    unwrapped,
)
from irra_core.interaction import CrossEncoder
from irra_core.model import IRRA, build_model
from irra_core.recipes import Recipe, patch_size, read_recipe
from irra_core.variants.adapters import is_adapter, merged

FORMAT = "irra-core checkpoint 1"

# Our names → the released code's; what begins with none of these has the same name in both.
RELEASED_NAMES = {
    "clip.": "base_model.",
    "interaction.attention.": "cross_attn.",
    "interaction.blocks.": "cross_modal_transformer.resblocks.",
    "interaction.ln_text.": "ln_pre_t.",
    "interaction.ln_image.": "ln_pre_i.",
    "interaction.ln_post.": "ln_post.",
}
_INTERACTION = ("cross_attn.", "cross_modal_transformer.", "ln_pre_t.", "ln_pre_i.", "ln_post.", "mlm_head.")


def save_checkpoint(model: IRRA, recipe: Recipe, path: str | Path, merge: bool = True) -> None:
    """Write the model's weights and its recipe to a safetensors file, complete or not at all.

    Adapters are merged into the matrices that they change, so that a reader need not know of them; or kept apart.
    """
    num_ids = model.classifier.out_features if model.classifier is not None else 0
    state = merged(model) if merge else model.state_dict()
    save_tensors(state, path, {"format": FORMAT, "recipe": recipe.to_json(), "num_ids": str(num_ids)})


def load_checkpoint(path: str | Path, finite: bool = True) -> tuple[IRRA, Recipe]:
    """The model that `save_checkpoint` wrote, on the CPU, and its recipe; what was frozen, is.

    Raises ValueError for any other file, and for weights that are not finite numbers unless `finite` is False.
    """
    tensors, metadata = read_weights(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is no checkpoint of this library: read one of the released code's with load_official")
    try:
        recipe, num_ids = read_recipe(json.loads(metadata["recipe"])), int(metadata["num_ids"])
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} does not say what model it holds ({error}): read it with the version of this library that wrote it"
        ) from error
    tensors = learned(tensors)
    check_weights(tensors, str(path), finite)
    _check_sizes(tensors, recipe, num_ids, path)
    rank = recipe.adapter_rank if any(is_adapter(name) for name in tensors) else 0
    plain = recipe.replace(pretrained="none", pretrained_towers="both", adapter_rank=rank)
    return _filled(lambda: build_model(plain, num_ids), tensors, path), recipe


def _check_sizes(tensors: Mapping[str, Tensor], recipe: Recipe, num_ids: int, path: str | Path) -> None:
    """Raise ValueError where what a checkpoint says of its model is not what its tensors hold."""
    complaints = []
    classes, positions = (_rows(tensors, name) for name in ("classifier.weight", "clip.visual.positional_embedding"))
    if num_ids != classes:
        complaints.append(f"num_ids is {num_ids}, but its classifier.weight has {classes} rows")
    size = (recipe.image_height, recipe.image_width)
    rows, cols = patch_grid(size, patch_size(recipe.backbone), recipe.stride)
    if rows * cols + 1 != positions:
        complaints.append(
            f"image_height {size[0]}, image_width {size[1]} and stride {recipe.stride} make {rows * cols} patches, but "
            f"its clip.visual.positional_embedding has rows for {positions - 1}"
        )
    if "mlm" in recipe.loss_names and recipe.interaction_depth > len(tensors):
        complaints.append(
            f"interaction_depth is {recipe.interaction_depth}, but it holds {len(tensors)} tensors in all"
        )
    if complaints:
        raise ValueError(
            f"{path} holds another model than its metadata says: {'; '.join(complaints)}. Copy it again, or write it "
            "again with save_checkpoint"
        )


def _rows(tensors: Mapping[str, Tensor], name: str) -> int:
    """Length of a tensor's first axis; 0 where it is missing or has none."""
    return tensors[name].shape[0] if name in tensors and tensors[name].ndim else 0


def _filled(
    make: Callable[[], IRRA], tensors: Mapping[str, Tensor], path: str | Path, named: Callable[[str], str] = str
) -> IRRA:
    """The model that `make` draws, with a file's tensors for its weights, on the CPU.

    It is drawn without memory and compared first: a file that does not fit costs none, one that fits no drawing.
    """
    try:
        with torch.device("meta"):
            model = make()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    check_fit({named(name): value for name, value in learned(model.state_dict()).items()}, tensors, str(path))
    model.to_empty(device="cpu")
    give_constants(model.clip)
    fill({named(name): value for name, value in learned(model.state_dict()).items()}, tensors, str(path))
    return model


def open_checkpoint(
    path: str | Path, image_size: Sequence[int | None] = (None, None), stride: int | None = None
) -> tuple[IRRA, Recipe | None]:
    """The model of a checkpoint of either kind: ours with its recipe, or a released `.pth`, which has none.

    Image size and stride are for a released file alone (None: 384×128 and 16); ours knows its own.
    """
    if Path(path).suffix == ".safetensors":
        if stride is not None or any(image_size):
            raise ValueError(
                f"{path} knows its image size and stride: leave them out, they are for released .pth files"
            )
        return load_checkpoint(path)
    height, width = image_size
    return load_official(path, (height or 384, width or 128), stride or 16), None


def describe(model: IRRA, recipe: Recipe | None = None) -> dict[str, object]:
    """What a model is, in the words of the recipe; `trained on` where a recipe tells."""
    visual, mlm, text = model.clip.visual, model.interaction, model.clip.transformer
    return {
        "image height × width (pixels)": "×".join(map(str, model.image_size)),
        "patch and stride (pixels)": f"{visual.patch_size[0]} and {visual.conv1.stride[0]}",
        "image encoder": f"{len(visual.transformer.resblocks)} blocks of width {visual.conv1.out_channels}",
        "text encoder": f"{len(text.resblocks)} blocks of width {model.clip.text_projection.shape[0]}",
        "feature width": model.clip.text_projection.shape[1],
        "vocabulary": model.clip.vocab_size,
        "identities of the classifier": model.classifier.out_features if model.classifier is not None else "none",
        "interaction encoder": "none" if mlm is None else f"{type(mlm).__name__}, {len(mlm.blocks)} blocks",
        "words attend to padding": model.padding_attention,
        "parameters (millions)": round(sum(p.numel() for p in model.parameters()) / 1e6, 2),
        "trained on": recipe.dataset if recipe else "not recorded in the file",
    }


def load_weights(model: IRRA, path: str | Path) -> None:
    """Fill a model with the weights of its checkpoint. Raises ValueError naming each tensor that does not fit."""
    tensors = learned(unwrapped(read_weights(path)[0], str(path)))
    check_weights(tensors, str(path))
    fill(learned(model.state_dict()), tensors, str(path))


def save_tensors(
    tensors: Mapping[str, Tensor],
    path: str | Path,
    metadata: Mapping[str, str] | None = None,
    keep: str | Path | None = None,
) -> None:
    """Write named tensors to a safetensors file with their checksum, complete or not at all.

    The file that was there before gets the name `keep`, where one is given, once the new one is on the disk.
    """
    tensors, metadata = {name: value.detach().contiguous() for name, value in tensors.items()}, dict(metadata or {})
    metadata[CHECKSUM] = checksum(tensors, metadata)
    with replaced(path) as aside:
        save_file(tensors, aside, metadata)
        _sort_metadata(aside)
        if keep is not None and Path(path).exists():
            flush(aside)
            os.replace(path, keep)


def _sort_metadata(path: Path) -> None:
    """Give equal files equal bytes: safetensors writes the metadata in an order that every process draws anew."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        said = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        file.seek(8)
        file.write(said.ljust(size))  # the same letters in another order; the format pads with spaces


def load_official(path: str | Path, image_size: Sequence[int] = (384, 128), stride: int = 16) -> IRRA:
    """The model in a file of the released code, on the CPU in single precision; it attends to padding, as released.

    Widths, depths, heads (width / 64), patch, vocabulary and number of identities come from the tensors' shapes. The
    image size (height, width) and the stride in pixels are not in the file: they are checked against the number of
    positions. Other entries beside `model` and names that begin with module. are accepted; the classifier, or the
    interaction encoder with its head, may be absent as a whole. Raises ValueError naming each tensor that is missing,
    left over or misshapen, and for a size that does not fit, those that do.
    """
    tensors = _released_tensors(path)
    shape = _infer(tensors, path)
    image_size, patch = (image_size[0], image_size[1]), shape["patch size"]
    _check_positions(shape["image positions"] - 1, image_size, patch, stride, path)
    text = {"context_length": 77, "vocab_size": shape["vocabulary"], "width": shape["text width"]}
    config = {
        "embed_dim": shape["feature width"],
        "quick_gelu": True,
        "vision_cfg": {
            "width": shape["image width"],
            "patch_size": patch,
            "layers": _depth(tensors, "base_model.visual.", path),
        },
        "text_cfg": text | {"heads": shape["text width"] // 64, "layers": _depth(tensors, "base_model.", path)},
    }
    interaction = "cross" if any(name.startswith(_INTERACTION) for name in tensors) else None
    classes, depth = shape.get("number of identities"), _depth(tensors, "cross_modal_", path)
    return _filled(
        lambda: IRRA(new_clip(config, image_size, stride), classes, interaction, depth, padding_attention=True),
        tensors,
        path,
        released_name,
    )


def save_official(model: IRRA, path: str | Path) -> None:
    """Write a file that the released code loads: {"model": state dict} under its names, in the model's precision.

    The released code lets words attend to padding, whatever this model does. Raises ValueError for a model that the
    released code cannot hold: another interaction encoder, activation or width of heads.
    """
    blocks = [*model.clip.visual.transformer.resblocks, *model.clip.transformer.resblocks]
    if not isinstance(model.interaction, CrossEncoder | None):
        raise ValueError(f"the released code has no {type(model.interaction).__name__}: only interaction 'cross'")
    if not all(isinstance(block.mlp.gelu, QuickGELU) for block in blocks):
        raise ValueError("the released code computes QuickGELU, this model GELU: only -quickgelu backbones fit")
    if not all(block.attn.head_dim == 64 for block in blocks):
        raise ValueError("the released code takes heads of width 64, this model has others")
    state = {released_name(name): value for name, value in learned(merged(model)).items()}
    with replaced(path) as aside:
        torch.save({"model": state}, aside)


def released_name(name: str) -> str:
    """What the released code calls one of our parameters."""
    for ours, theirs in RELEASED_NAMES.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def _released_tensors(path: str | Path) -> dict[str, Tensor]:
    """The state dict of a file in the released format, without the prefix that DataParallel adds."""
    content, _ = read_weights(path)
    tensors = unwrapped(content, str(path), "model")
    if not any(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{path} is not in the released format: it holds no state dict under 'model'")
    if not any(name.startswith("base_model.") for name in tensors):
        raise ValueError(f"{path} is not in the released format: none of its tensors is under base_model.")
    check_weights(tensors, str(path))
    return tensors


def _infer(tensors: Mapping[str, Tensor], path: str | Path) -> dict[str, int]:
    """What the shapes say of the model. Raises ValueError where tensors are missing or contradict each other."""
    found = {}
    for quantity, sources in _EVIDENCE.items():
        claims = defaultdict(list)
        for name, axis in sources:
            if name in tensors and tensors[name].ndim > axis:
                claims[tensors[name].shape[axis]].append(f"{name} {tuple(tensors[name].shape)}")
        if len(claims) > 1:
            said = "; ".join(f"{value} by {', '.join(names)}" for value, names in claims.items())
            raise ValueError(f"{path}: its tensors contradict each other on the {quantity}: {said}")
        if claims:
            found[quantity] = next(iter(claims))
        elif quantity != "number of identities":
            raise ValueError(f"{path}: {', '.join(name for name, _ in sources)} is missing or misshapen")
    for quantity, value in found.items():
        least = 2 if quantity == "image positions" else 1  # the class token's, and a patch's
        if value < least:
            names = ", ".join(name for name, axis in _EVIDENCE[quantity] if name in tensors)
            raise ValueError(f"{path}: {quantity} {value} by {names}: accepted is {least} or more. Copy the file again")
    for quantity in ("feature width", "image width", "text width"):
        if found[quantity] % 64:
            raise ValueError(f"{path}: {quantity} {found[quantity]} is no multiple of 64, the width of a head")
    return found


# Which axes of which tensors say how large something is.
_EVIDENCE = {
    "feature width": [
        ("base_model.text_projection", 1),
        ("base_model.visual.proj", 1),
        ("classifier.weight", 1),
        *((f"{name}.weight", 0) for name in ("ln_pre_t", "ln_pre_i", "ln_post")),
    ],
    "image width": [
        ("base_model.visual.class_embedding", 0),
        ("base_model.visual.positional_embedding", 1),
        ("base_model.visual.conv1.weight", 0),
        ("base_model.visual.proj", 0),
        ("base_model.visual.ln_pre.weight", 0),
        ("base_model.visual.ln_post.weight", 0),
    ],
    "text width": [
        ("base_model.positional_embedding", 1),
        ("base_model.text_projection", 0),
        ("base_model.token_embedding.weight", 1),
        ("base_model.ln_final.weight", 0),
    ],
    "patch size": [("base_model.visual.conv1.weight", 2), ("base_model.visual.conv1.weight", 3)],
    "image positions": [("base_model.visual.positional_embedding", 0)],
    "vocabulary": [
        ("base_model.token_embedding.weight", 0),
        ("mlm_head.fc.weight", 0),
        ("mlm_head.fc.bias", 0),
    ],
    "number of identities": [("classifier.weight", 0), ("classifier.bias", 0)],
}


def _depth(tensors: Mapping[str, Tensor], tower: str, path: str | Path) -> int:
    """Number of transformer blocks under a prefix, at least 1 so that a missing block is named.

    Raises ValueError for a block's number that as many tensors as the file has cannot reach.
    """
    pattern = re.compile(re.escape(tower) + r"transformer\.resblocks\.(\d{1,18})\.")  # more digits: left over
    numbers = {int(match[1]): name for name in tensors if (match := pattern.match(name))}
    last = max(numbers, default=0)
    if last >= len(tensors):
        raise ValueError(
            f"{path}: {numbers[last]} is of block {last:,}, but the file holds {len(tensors):,} tensors: accepted are "
            "blocks numbered from 0 without gaps. Copy the file again"
        )
    return 1 + last


def _check_positions(positions: int, image_size: tuple[int, int], patch: int, stride: int, path: str | Path) -> None:
    """Raise ValueError with the sizes that fit unless the image has as many patches as the file has positions."""
    if stride < 1:
        raise ValueError(f"stride {stride}: accepted is from 1 to the patch size, here {patch} pixels")
    rows, cols = patch_grid(image_size, patch, stride)
    if rows * cols == positions and min(rows, cols) > 0:
        return
    fitting = []
    pairs = [(few, positions // few) for few in range(1, isqrt(positions) + 1) if positions % few == 0]
    grids = sorted({*pairs, *((many, few) for few, many in pairs)})
    for step in sorted({stride, patch, patch * 3 // 4} - {0}, key=lambda step: (step != stride, -step)):
        sizes = [((rows - 1) * step + patch, (cols - 1) * step + patch) for rows, cols in grids]
        sizes.sort(key=lambda size: abs(size[0] / size[1] - image_size[0] / image_size[1]))
        fitting.append(f"at stride {step} " + ", ".join(f"{height}×{width}" for height, width in sizes[:6]))
    raise ValueError(
        f"{path}: base_model.visual.positional_embedding has {positions} patches: image size "
        f"{image_size[0]}×{image_size[1]} at stride {stride} makes {rows}×{cols} = {rows * cols} patches. "
        f"What fits: {'; '.join(fitting)}"
    )


@contextmanager
def replaced(path: str | Path) -> Iterator[Path]:
    """A file beside `path` to write into; it becomes `path` when all is on the disk, and goes away when anything fails.

    Raises OSError, naming `path`, where the folder is full or cannot be written to.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")  # machines share process numbers
    try:
        yield aside
        flush(aside)
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        told = re.search(r"os error (\d+)", str(error))  # how safetensors passes on the disk's error
        number = int(told[1]) if told else getattr(error, "errno", None) or errno.EIO
        before = "what was there before is intact" if path.exists() else "nothing was there before"
        reason = getattr(error, "strerror", None) or str(error)
        remedy = f"make room or grant access in {path.parent}"
        raise OSError(number, f"{path} cannot be written ({reason}): {remedy}; {before}") from error
    finally:
        with suppress(OSError):  # of a read-only disk
            aside.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until a file's bytes are on the disk: a rename alone may get there before them."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
