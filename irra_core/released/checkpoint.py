"""A file of the released code (`.pth`) ↔ a model of this library."""

import re
from collections.abc import Mapping, Sequence
from math import isqrt, prod
from pathlib import Path

import torch
from torch import Tensor

from irra_core.backbone import check_weights, learned, new_clip, patch_grid, read_weights, unwrapped
from irra_core.checkpoints import filled, replaced, weights_of
from irra_core.interaction import CrossEncoder
from irra_core.model import IRRA
from irra_core.text import CONTEXT
from irra_core.transformer import QuickGELU

# Our prefix → the released code's; a name with none of these prefixes is the same in both.
RELEASED_NAMES = {
    "clip.": "base_model.",
    "interaction.attention.": "cross_attn.",
    "interaction.blocks.": "cross_modal_transformer.resblocks.",
    "interaction.ln_text.": "ln_pre_t.",
    "interaction.ln_image.": "ln_pre_i.",
    "interaction.ln_post.": "ln_post.",
}
_INTERACTION = ("cross_attn.", "cross_modal_transformer.", "ln_pre_t.", "ln_pre_i.", "ln_post.", "mlm_head.")
# The tensors from which the model's sizes are read, and the name of each axis; the first tensor with a size defines it.
_SIZES = {
    "base_model.text_projection": ("text width", "feature width"),
    "base_model.positional_embedding": ("text length", "text width"),
    "base_model.token_embedding.weight": ("vocabulary", "text width"),
    "base_model.visual.conv1.weight": ("image width", "channels", "patch size", "patch size"),
    "base_model.visual.positional_embedding": ("image positions", "image width"),
    "classifier.weight": ("number of identities", "feature width"),
    "classifier.bias": ("number of identities",),
}
# Image sizes (height, width) of people and of CLIP's own training, pixels, the paper's first.
USUAL_SIZES = ((384, 128), (378, 126), (256, 128), (224, 224), (336, 336), (224, 112), (96, 32))
_HEAD_WIDTH = 64  # of every attention head in CLIP and in the released code


def load_official(
    path: str | Path,
    image_size: Sequence[int] | None = (384, 128),
    stride: int | None = 16,
    device: str | torch.device | None = None,
) -> IRRA:
    """The model in a file of the released code, in single precision; it attends to padding, as released.

    Widths, depths, heads (width / 64), patch, vocabulary and number of identities are read from the shapes of a few
    tensors. The image size (height, width) and the stride in pixels are not in the file: they are checked against the
    number of positions. If one is None, the first of `USUAL_SIZES`, or of strides of a whole and three quarters of a
    patch, that fits is taken. Other entries beside `model` and names that begin with module. are accepted; the
    classifier, or the interaction encoder with its head, may be absent as a whole. `device` is by default the GPU if
    there is one.
    Raises ValueError that names each tensor that is missing, left over or of the wrong shape; for an image size that
    does not fit, it lists sizes that fit.
    """
    tensors = _released_tensors(path)
    sizes = _sizes(tensors, path)
    patch, text_width, positions = sizes["patch size"], sizes["text width"], sizes["image positions"] - 1
    image_size = None if image_size is None else (image_size[0], image_size[1])
    if image_size is None or stride is None:
        image_size, stride = _fitting(positions, image_size, patch, stride)
    _check_positions(positions, image_size, patch, stride, path)
    vision = {"width": sizes["image width"], "patch_size": patch, "layers": _depth(tensors, "base_model.visual.", path)}
    text = {"context_length": sizes["text length"], "vocab_size": sizes["vocabulary"], "width": text_width}
    text |= {"heads": text_width // _HEAD_WIDTH, "layers": _depth(tensors, "base_model.", path)}
    config = {"embed_dim": sizes["feature width"], "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    interaction = "cross" if any(name.startswith(_INTERACTION) for name in tensors) else None
    classes, depth = sizes.get("number of identities"), _depth(tensors, "cross_modal_", path)

    def empty() -> IRRA:
        return IRRA(new_clip(config, image_size, stride), classes, interaction, depth, padding_attention=True)

    try:
        return filled(empty, tensors, path, released_name, device)
    except ValueError as error:
        read = ", ".join(f"{name} {tuple(tensors[name].shape)}" for name in _SIZES if name in tensors)
        raise ValueError(f"{error}. The model's sizes were read from {read}") from error


def save_official(model: IRRA, path: str | Path) -> None:
    """Write a file that the released code loads: {"model": state dict} under its names, in the model's precision.

    Its tensors are on the CPU. The released code always lets words attend to padding, even if this model does not.
    Raises ValueError for a model that the released code cannot represent: another interaction encoder, activation or
    width of heads, or token selection.
    """
    blocks = [*model.clip.visual.transformer.resblocks, *model.clip.transformer.resblocks]
    if not isinstance(model.interaction, CrossEncoder | None):
        raise ValueError(f"the released code has no {type(model.interaction).__name__}: only interaction 'cross'")
    if model.selection is not None:
        raise ValueError("the released code has no token selection: train without tse")
    if not all(isinstance(block.mlp.gelu, QuickGELU) for block in blocks):
        raise ValueError("the released code computes QuickGELU, this model GELU: only -quickgelu backbones fit")
    if not all(block.attn.head_dim == _HEAD_WIDTH for block in blocks):
        raise ValueError(f"the released code has heads of width {_HEAD_WIDTH}, this model has others")
    state = {released_name(name): value.cpu() for name, value in learned(weights_of(model)).items()}
    state.pop("log_scale", None)  # a learned temperature, which no score needs
    with replaced(path) as aside:
        torch.save({"model": state}, aside)


def released_name(name: str) -> str:
    """The released code's name of one of our parameters."""
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


def _sizes(tensors: Mapping[str, Tensor], path: str | Path) -> dict[str, int]:
    """The model's sizes by name, read from the tensors of `_SIZES`.

    Raises ValueError if one of these tensors is missing or empty, or has an impossible width. Contradictions are not
    checked here: loading the tensors into a model of these sizes reports each tensor that does not fit.
    """
    sizes: dict[str, int] = {}
    for name, axes in _SIZES.items():
        if name not in tensors and name.startswith("classifier."):
            continue
        if name not in tensors:
            raise ValueError(f"{path}: {name} is missing")
        shape = tuple(tensors[name].shape)
        if len(shape) != len(axes):
            raise ValueError(f"{path}: {name} is {shape}: expected are {len(axes)} axes, {' × '.join(axes)}")
        for what, size in zip(axes, shape):
            least = {"image positions": 2, "text length": CONTEXT}.get(what, 1)  # 2: class token and one patch
            if size < least:
                raise ValueError(
                    f"{path}: {what} {size} by {name} {shape}: accepted is {least} or more. Copy the file again"
                )
            if what.endswith("width") and size % _HEAD_WIDTH:
                raise ValueError(f"{path}: {what} {size} by {name} {shape} is no multiple of {_HEAD_WIDTH}")
            sizes.setdefault(what, size)
    return sizes


def _depth(tensors: Mapping[str, Tensor], tower: str, path: str | Path) -> int:
    """Number of transformer blocks under a prefix; at least 1, so that a missing block is reported by name.

    Raises ValueError for a block number that is not below the number of tensors in the file, before a model of that
    depth is built and takes memory.
    """
    pattern = re.compile(re.escape(tower) + r"transformer\.resblocks\.(\d{1,18})\.")  # longer numbers: left over
    numbers = {int(match[1]): name for name in tensors if (match := pattern.match(name))}
    last = max(numbers, default=0)
    if last >= len(tensors):
        raise ValueError(
            f"{path}: {numbers[last]} is of block {last:,}, but the file holds {len(tensors):,} tensors: accepted are "
            "blocks numbered from 0 without gaps. Copy the file again"
        )
    return 1 + last


def _fitting(
    positions: int, image_size: tuple[int, int] | None, patch: int, stride: int | None
) -> tuple[tuple[int, int], int]:
    """What is given of image size and stride, and what is None such that they make that many patches.

    Images of whole patches come first. Where nothing usual fits, the first of what is usual.
    """
    sizes = USUAL_SIZES if image_size is None else (image_size,)
    sizes = sorted(sizes, key=lambda size: any(side % patch for side in size))
    strides = (patch, max(patch * 3 // 4, 1)) if stride is None else (stride,)
    for step in strides:
        for size in sizes:
            if min(size) >= patch and step > 0 and prod(patch_grid(size, patch, step)) == positions:
                return size, step
    return sizes[0], strides[0]


def _check_positions(positions: int, image_size: tuple[int, int], patch: int, stride: int, path: str | Path) -> None:
    """Raise ValueError, listing sizes that fit, unless the image has as many patches as the file has positions."""
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
