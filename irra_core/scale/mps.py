"""Apple's GPU (MPS) and the CPU → whether both give one batch the same scores."""

import functools
import os
import warnings

import torch
from torch import Tensor
from torch.nn import functional as F

from irra_core.backbone import build_model
from irra_core.model import IRRA
from irra_core.recipes import recipe
from irra_core.text import tokenize

SAME = 1e-3  # largest accepted difference of a cosine; one of rounding is below 1e-5
CAPTIONS = ("a man in a red coat", "a woman with a blue bag and long black hair", "a child", "somebody in white shoes")


@functools.cache
def scores_as_cpu() -> bool:
    """True if MPS gives a batch of photos and captions the CPU's scores; else a warning says, once, what is used.

    False in a process of torchrun: its processes exchange tensors of CPUs or CUDA GPUs.
    """
    if "RANK" in os.environ:
        return False
    try:
        different = largest_difference(_small_model(), torch.device("mps"))
        problem = f"its scores differ from the CPU's by {different:.2g}"
    except (RuntimeError, NotImplementedError, TypeError) as error:  # an operation or a dtype that MPS lacks
        different, problem = float("inf"), str(error).splitlines()[0]
    if different <= SAME:
        return True
    warnings.warn(f"Apple's GPU (MPS) is not used, the CPU is: {problem}", stacklevel=2)
    return False


def _small_model() -> IRRA:
    """The small CLIP with its random numbers before training, on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_model(recipe("synthetic", _smoke=False, pretrained="none", losses="sdm"), 0, "cpu").eval()


def largest_difference(model: IRRA, device: torch.device) -> float:
    """The largest difference between a device's and the CPU's scores of a batch: infinite where one is not finite.

    The model is on the CPU, and again at the end.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(len(CAPTIONS), 3, *model.image_size, generator=generator)
    tokens = tokenize(list(CAPTIONS))
    expected, got = _scores(model, images, tokens), _scores(model.to(device), images.to(device), tokens.to(device))
    model.to("cpu")
    different = (expected - got.cpu()).abs().max().item()
    return different if different == different else float("inf")


@torch.inference_mode()
def _scores(model: IRRA, images: Tensor, tokens: Tensor) -> Tensor:
    """The cosine of every photo and caption."""
    image, text = (
        F.normalize(features.float(), dim=1) for features in (model.encode_image(images), model.encode_text(tokens))
    )
    return image @ text.T
