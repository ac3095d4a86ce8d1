"""A local clone of the released code → its model, step, evaluation and loader, to be timed beside ours on any device.

This library contains none of that code. These functions run the clone's code: give only a clone that you trust.
"""

import contextlib
import importlib
import importlib.util
import io
import os
import sys
import tempfile
import types
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from pandas import DataFrame
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from irra_core.backbone import learned
from irra_core.batches import Batch
from irra_core.model import IRRA
from irra_core.recipes import Recipe
from irra_core.released.checkpoint import released_name
from irra_core.settings import cores
from irra_core.text import CONTEXT, VOCABULARY

MODULES = ("model.build", "solver.build", "utils.metrics", "datasets.bases", "datasets.build")
PACKAGES = ("model", "solver", "utils", "datasets", "processor")  # the clone's top-level packages
WORKERS = 8  # released options.py: processes of its loader; _loader starts at most one per core
TEST_BATCH = 512  # released options.py
# How workers start: Linux's default at its release; Windows has no fork, and macOS's libraries do not survive one.
START = "fork" if hasattr(os, "fork") and sys.platform != "darwin" else "spawn"


class Code(NamedTuple):
    """The imported modules of a clone that are timed."""

    build: types.ModuleType
    solver: types.ModuleType
    metrics: types.ModuleType
    bases: types.ModuleType
    datasets: types.ModuleType


class _Table:
    """Replaces prettytable's class, which the released code uses only for its log; the log is discarded."""

    def __init__(self, *columns: object):
        self.custom_format: dict[str, Callable] = {}

    def add_row(self, row: object) -> None:
        """Does nothing."""


STAND_INS = {"prettytable": {"PrettyTable": _Table}, "easydict": {"EasyDict": dict}, "yaml": {}}


def load_code(folder: str | Path) -> Code:
    """The imported modules of a local clone of the released code; `sys.path` and `sys.modules` are restored.

    Packages that only its logs and settings need (prettytable, easydict, yaml) may be absent. Raises FileNotFoundError
    for a folder that is no clone, ImportError if another package is missing.
    """
    folder = Path(folder).expanduser().resolve()
    missing = [name for name in MODULES if not (folder / f"{name.replace('.', '/')}.py").is_file()]
    if missing:
        raise FileNotFoundError(
            f"official {str(folder)!r} is no clone of the released code: {missing[0].replace('.', '/')}.py is "
            "missing. Clone that code and give its folder, or omit the parameter"
        )
    with _import_from(folder):
        try:
            return Code(*(importlib.import_module(name) for name in MODULES))
        except ImportError as error:
            raise ImportError(
                f"the released code in {folder} cannot be imported ({error}): install the missing package, or omit the "
                "parameter official"
            ) from error


@contextlib.contextmanager
def _import_from(folder: Path) -> Iterator[None]:
    """Context manager in which imports find the clone first, and stand-ins for packages that only its logs need.

    `sys.path` and `sys.modules` are restored at the end.
    """
    aside = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in PACKAGES}
    stood_in = []
    for name, content in STAND_INS.items():
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            sys.modules[name] = types.ModuleType(name)
            vars(sys.modules[name]).update(content)
            stood_in.append(name)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in list(sys.modules):
            if name.split(".")[0] in PACKAGES or name in stood_in:
                del sys.modules[name]
        sys.modules.update(aside)


@contextlib.contextmanager
def in_single_precision() -> Iterator[None]:
    """Context manager in which a tensor's `.half()` returns single precision, which the released code needs on CPUs."""
    half = torch.Tensor.half
    torch.Tensor.half = torch.Tensor.float
    try:
        yield
    finally:
        torch.Tensor.half = half


def as_released(device: torch.device) -> contextlib.AbstractContextManager:
    """The arithmetic of the released code on a device: its own fp16 on a GPU, single precision elsewhere."""
    return contextlib.nullcontext() if device.type == "cuda" else in_single_precision()


def build(code: Code, model: IRRA, recipe: Recipe, device: torch.device) -> nn.Module:
    """The released model with the shapes and weights of `model`, which has the cross encoder, on the device."""
    state = {released_name(name): value.detach().cpu() for name, value in learned(model.state_dict()).items()}
    clip = {name.removeprefix("base_model."): v for name, v in state.items() if name.startswith("base_model.")}
    with tempfile.TemporaryDirectory() as folder, _quiet(), as_released(device):
        torch.save(clip, Path(folder) / "clip.pt")
        theirs = code.build.build_model(_options(recipe, str(Path(folder) / "clip.pt")), model.classifier.out_features)
    theirs.load_state_dict(state)
    return theirs.to(device)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Context manager that hides what the released code prints, and its warnings."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _options(recipe: Recipe, weights: str) -> Namespace:
    """The recipe as options of the released command line."""
    return Namespace(
        pretrain_choice=weights,
        img_size=(recipe.image_height, recipe.image_width),
        stride_size=recipe.stride,
        temperature=recipe.temperature,
        loss_names=recipe.losses,
        cmt_depth=recipe.interaction_depth,
        vocab_size=VOCABULARY,
        id_loss_weight=1.0,
        mlm_loss_weight=1.0,
        optimizer="Adam",
        lr=recipe.lr,
        lr_factor=recipe.new_lr_factor,
        bias_lr_factor=recipe.bias_lr_factor,
        weight_decay=recipe.weight_decay,
        weight_decay_bias=0.0,
        alpha=recipe.adam_beta1,
        beta=recipe.adam_beta2,
    )


def build_optimiser(code: Code, model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The released Adam optimiser, which has one group per parameter."""
    with _quiet():
        return code.solver.build_optimizer(_options(recipe, ""), model)


def batch_of(batch: Batch) -> dict[str, Tensor]:
    """Our batch in the format of the released loader: every caption padded to 77 tokens."""
    padded = {
        name: F.pad(tokens, (0, CONTEXT - tokens.shape[1]))
        for name, tokens in (
            ("caption_ids", batch.tokens),
            ("mlm_ids", batch.masked_tokens),
            ("mlm_labels", batch.labels),
        )
    }
    return {"images": batch.images, "pids": batch.pids, "image_ids": batch.rows} | padded


def losses(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Float[Tensor, ""]]:
    """The released losses of one batch, by their released names."""
    with as_released(batch["pids"].device):
        return {name: value for name, value in model(batch).items() if "loss" in name}


def step(model: nn.Module, optimiser: torch.optim.Optimizer, batch: dict[str, Tensor]) -> None:
    """One training step in the order of the released loop, which reads the loss from the device at every step."""
    parts = losses(model, batch)
    total = sum(parts.values())
    total.item()
    optimiser.zero_grad()
    total.backward()
    optimiser.step()


def rank(
    code: Code,
    similarity: Float[Tensor, "queries gallery"],
    query_pids: Int[Tensor, " queries"],
    gallery_pids: Int[Tensor, " gallery"],
) -> dict[str, float]:
    """The metrics that the released rank() computes from a similarity: R1, R5, R10, mAP and mINP in per cent."""
    hits, precision, inverse, _ = code.metrics.rank(similarity, query_pids, gallery_pids, max_rank=10, get_mAP=True)
    metrics = {"R1": hits[0], "R5": hits[4], "R10": hits[9], "mAP": precision, "mINP": inverse}
    return {name: float(value) for name, value in metrics.items()}


def evaluate(code: Code, model: nn.Module, annotations: DataFrame, recipe: Recipe) -> float:
    """R@1 in per cent of the test split by the released evaluation: decoding, encoding at 77 tokens, ranking."""
    queries = annotations[annotations.split == "test"]
    photos = queries.drop_duplicates("image_id")
    images = _Built(code, _images, photos.pid.tolist(), photos.path.tolist(), (recipe.image_height, recipe.image_width))
    texts = _Built(code, _texts, queries.pid.tolist(), queries.caption.tolist())
    loaders = [_loader(dataset, batch_size=TEST_BATCH) for dataset in (images, texts)]
    with as_released(next(model.parameters()).device):
        return float(code.metrics.Evaluator(*loaders).eval(model))


def train_loader(code: Code, annotations: DataFrame, recipe: Recipe) -> DataLoader:
    """The released loader of shuffled train pairs, augmented and masked in worker processes."""
    train = annotations[annotations.split == "train"]
    rows = list(zip(train.pid.tolist(), train.image_id.tolist(), train.path.tolist(), train.caption.tolist()))
    pairs = _Built(code, _pairs, rows, (recipe.image_height, recipe.image_width))
    return _loader(pairs, batch_size=recipe.batch_size, shuffle=True, collate_fn=_Built(code, _collate))


def _loader(dataset: "_Built", **given) -> DataLoader:
    """A loader with the released number of workers, at most one per core, that start as START says."""
    return DataLoader(dataset, num_workers=min(WORKERS, cores()), multiprocessing_context=START, **given)


class _Built:
    """An object of a clone, `make(code, *given)`; a spawned worker gets the clone's folder and builds it for itself."""

    def __init__(self, code: Code, make: Callable, *given: Any):
        self.sent = (Path(code.build.__file__).parent.parent, make, *given)
        self.inner = make(code, *given)

    def __reduce__(self) -> tuple[Callable, tuple]:
        return _rebuilt, self.sent

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, place: int) -> Any:
        return self.inner[place]

    def __call__(self, batch: list) -> Any:
        """For the function that joins a batch."""
        return self.inner(batch)


def _rebuilt(folder: Path, make: Callable, *given: Any) -> _Built:
    return _Built(load_code(folder), make, *given)


def _images(code: Code, pids: list[int], paths: list[str], size: tuple[int, int]) -> Any:
    return code.bases.ImageDataset(pids, paths, code.datasets.build_transforms(img_size=size, is_train=False))


def _texts(code: Code, pids: list[int], captions: list[str]) -> Any:
    return code.bases.TextDataset(pids, captions, text_length=CONTEXT)


def _pairs(code: Code, rows: list[tuple], size: tuple[int, int]) -> Any:
    transforms = code.datasets.build_transforms(img_size=size, aug=True, is_train=True)
    return code.bases.ImageTextMLMDataset(rows, transforms, text_length=CONTEXT)


def _collate(code: Code) -> Callable:
    return code.datasets.collate
