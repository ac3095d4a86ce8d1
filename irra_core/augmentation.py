"""A `uint8` batch → an augmented, normalised batch, on the device."""

import functools
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from irra_core.images import UnreadableImages, decoded_array
from irra_core.recipes import Recipe

MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's training images, red, green, blue of 0..1
STD = (0.26862954, 0.26130258, 0.27577711)
ERASED_AREA = (0.02, 0.4)  # released code; share of the image
ERASED_RATIO = (0.3, 3.3)  # torchvision's default; height over width
ERASE_ATTEMPTS = 10  # torchvision's; a box that does not fit is drawn again
RESIDENT_SHARE = 1 / 8  # of a GPU's free memory that the image array may take; the rest is for the step


class Augmentation(NamedTuple):
    """What happens to each image of a batch; drawn for the whole batch, so that a process can take its part.

    `top` and `left` place the crop in the padded image; a row of `boxes` is the erased top, left, height and width in
    pixels, all zero where nothing is erased.
    """

    flip: Bool[Tensor, " n"]
    top: Int[Tensor, " n"]
    left: Int[Tensor, " n"]
    boxes: Int[Tensor, "n 4"]

    def part(self, rows: slice) -> "Augmentation":
        """The augmentation of some of the images."""
        return Augmentation(*(drawn[rows] for drawn in self))


def resides(pixels: UInt8[Any, "n 3 h w"], device: torch.device) -> bool:
    """True if an image array takes so little of a GPU's memory that it is kept there, and no step copies photos."""
    return device.type == "cuda" and pixels.nbytes <= RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]


def on_device(pixels: UInt8[Any, "n 3 h w"], device: torch.device) -> UInt8[Tensor, "n 3 h w"]:
    """A copy of an image array on a device, made piece by piece: the array may be larger than the free memory here."""
    near = torch.empty(pixels.shape, dtype=torch.uint8, device=device)
    for start in range(0, len(pixels), 1024):
        near[start : start + 1024] = torch.from_numpy(np.array(pixels[start : start + 1024]))
    return near


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on that device. Neither side waits for a copy to a GPU: it is made from pinned memory."""
    gpu = device.type == "cuda"
    if gpu and tensor.device.type == "cpu":
        tensor = tensor.contiguous().pin_memory()  # of a strided tensor the copy would go through unpinned memory
    return tensor.to(device, non_blocking=gpu)


def moved_together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The tensors on that device, sent to a GPU in one copy; those of the largest numbers must come first."""
    if device.type != "cuda":
        return [moved(tensor, device) for tensor in tensors]
    parts = [tensor.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8) for tensor in tensors]
    sent = moved(torch.cat(parts), device).split([len(part) for part in parts])
    return [part.view(tensor.dtype).view(tensor.shape) for part, tensor in zip(sent, tensors, strict=True)]


def full_precision(values: Tensor) -> Tensor:
    """The values in float32 where autocast or half-precision weights made them less; other types as they are."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def normalise(pixels: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """The pixels as CLIP wants them: 0..1, less MEAN, over STD, in float32, on their device."""
    mean, scale, _ = _constants(pixels.device)
    return pixels.sub(mean).mul_(scale)


@functools.cache
def _constants(device: torch.device) -> tuple[Float[Tensor, "3 1 1"], ...]:
    """255 MEAN, 1 / (255 STD) and MEAN, kept on the device so that no step waits for them."""
    with torch.inference_mode(False):
        mean, std = (torch.tensor(numbers, dtype=torch.float64)[:, None, None] * 255 for numbers in (MEAN, STD))
        return tuple(numbers.float().to(device) for numbers in (mean, 1 / std, mean.float() / 255))


def load_images(paths: Iterable[str | Path], recipe: Recipe) -> Float[Tensor, "n 3 h w"]:
    """The images at `paths` in the recipe's size, normalised, without augmentation and without the cache.

    Raises UnreadableImages, naming every file.
    """
    files = [os.fspath(path) for path in paths]
    pixels, unreadable = decoded_array(files, recipe.image_height, recipe.image_width)
    if unreadable:
        raise UnreadableImages(unreadable)
    return normalise(torch.from_numpy(pixels))


def draw_augmentation(n: int, recipe: Recipe, generator: torch.Generator) -> Augmentation:
    """Random mirroring, crop and erased box for n images, as torchvision's transforms in the released code draw them.

    RandomHorizontalFlip, Pad and RandomCrop, RandomErasing with area ERASED_AREA and ratio ERASED_RATIO.
    """
    flip = torch.rand(n, generator=generator) < recipe.flip_probability
    top, left = torch.randint(0, 2 * recipe.crop_padding + 1, (2, n), generator=generator)
    return Augmentation(flip, top, left, _draw_boxes(n, recipe, generator))


def _draw_boxes(n: int, recipe: Recipe, generator: torch.Generator) -> Int[Tensor, "n 4"]:
    """Erased boxes: the first of ERASE_ATTEMPTS that is smaller than the image, none where none is."""
    height, width = recipe.image_height, recipe.image_width
    area, ratio, y, x = torch.rand(4, n, ERASE_ATTEMPTS, generator=generator, dtype=torch.float64)
    low, high = ERASED_AREA
    area = height * width * (low + (high - low) * area)
    low, high = (math.log(bound) for bound in ERASED_RATIO)
    ratio = torch.exp(low + (high - low) * ratio)
    tall, wide = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
    fits = (tall < height) & (wide < width)
    boxes = torch.stack([(y * (height - tall + 1)).long(), (x * (width - wide + 1)).long(), tall, wide], dim=2)
    first = boxes[torch.arange(n), fits.int().argmax(1)]
    erased = (torch.rand(n, generator=generator) < recipe.erase_probability) & fits.any(1)
    return first * erased[:, None]


def augment(pixels: UInt8[Tensor, "b 3 h w"], augmentation: Augmentation, recipe: Recipe) -> Float[Tensor, "b 3 h w"]:
    """The batch mirrored, padded with black, cropped, normalised and erased to MEAN, in this order, on its device.

    The value of erased pixels is MEAN after normalisation, as in the released code, so not the mean colour.
    """
    return rearranged(pixels, *moved_together(coordinates(augmentation, recipe), pixels.device), recipe)


def coordinates(
    augmentation: Augmentation, recipe: Recipe
) -> tuple[Int[Tensor, "b h 1"], Int[Tensor, "b 1 w"], Bool[Tensor, "b h 1"], Bool[Tensor, "b 1 w"]]:
    """Where each row and column of pixels comes from in the padded image, flat, and which rows and columns are erased.

    Of a pixel's place the two numbers are added; it is erased if its row and its column are.
    """
    flip, top, left, boxes = augmentation
    rows, columns = torch.arange(recipe.image_height), torch.arange(recipe.image_width)
    across = recipe.image_width + 2 * recipe.crop_padding
    x = left[:, None] + columns
    x = torch.where(flip[:, None], across - 1 - x, x)  # the padding is symmetric, so mirroring commutes with it
    y = (top[:, None] + rows) * across
    above, before, tall, wide = boxes[:, :, None].unbind(1)
    erased_rows = (rows >= above) & (rows < above + tall)
    erased_columns = (columns >= before) & (columns < before + wide)
    return y[:, :, None], x[:, None], erased_rows[:, :, None], erased_columns[:, None]


def rearranged(
    pixels: UInt8[Tensor, "b 3 h w"],
    rows: Int[Tensor, "b h 1"],
    columns: Int[Tensor, "b 1 w"],
    erased_rows: Bool[Tensor, "b h 1"],
    erased_columns: Bool[Tensor, "b 1 w"],
    recipe: Recipe,
) -> Float[Tensor, "b 3 h w"]:
    """The batch augmented at these coordinates, which are on its device."""
    source = (rows + columns).flatten(1)[:, None].expand(-1, 3, -1)
    padded = F.pad(pixels, [recipe.crop_padding] * 4).flatten(2)
    images = normalise(padded.gather(2, source).view(pixels.shape))
    return torch.where((erased_rows & erased_columns)[:, None], _constants(pixels.device)[2], images)
