"""A local clone of the released code → its model, step, evaluation and loader, to be timed beside ours on any device.

Nothing of that code is kept here. Calling these functions runs the clone: give only one that you trust.
"""

import contextlib
import importlib
import importlib.util
import io
import sys
import tempfile
import types
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

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
PACKAGES = ("model", "solver", "utils", "datasets", "processor")  # top-level names that the clone takes
WORKERS = 8  # released options.py: processes of its loader, at most as many as there are cores here
TEST_BATCH = 512  # released options.py


class Code(NamedTuple):
    """The imported modules of a clone that are timed."""

    build: types.ModuleType
    solver: types.ModuleType
    metrics: types.ModuleType
    bases: types.ModuleType
    datasets: types.ModuleType


class _Table:
    """Stands in for prettytable's class: the released code writes its log with it, which nobody reads here."""

    def __init__(self, *columns: object):
        self.custom_format: dict[str, Callable] = {}

    def add_row(self, row: object) -> None:
        """Nothing is kept."""


STAND_INS = {"prettytable": {"PrettyTable": _Table}, "easydict": {"EasyDict": dict}, "yaml": {}}


def load_code(folder: str | Path) -> Code:
    """The released code in a local clone, imported; `sys.path` and `sys.modules` are left as they were.

    Packages that only its logs and settings need (prettytable, easydict, yaml) may be absent. Raises FileNotFoundError
    for a folder that is no clone, ImportError for a package that its computation needs.
    """
    folder = Path(folder).expanduser().resolve()
    missing = [name for name in MODULES if not (folder / f"{name.replace('.', '/')}.py").is_file()]
    if missing:
        raise FileNotFoundError(
            f"official {str(folder)!r} is no clone of the released code: {missing[0].replace('.', '/')}.py is not "
            "there. Clone that code and give its folder, or leave the parameter out"
        )
    with _import_from(folder):
        try:
            return Code(*(importlib.import_module(name) for name in MODULES))
        except ImportError as error:
            raise ImportError(
                f"the released code in {folder} cannot be imported ({error}): install what it asks for, or leave the "
                "parameter official out"
            ) from error


@contextlib.contextmanager
def _import_from(folder: Path) -> Iterator[None]:
    """Imports within find the clone first, and stand-ins for what only its logs need; nothing of it stays behind."""
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
    """Within, `.half()` of a tensor keeps single precision: what the released code needs where there is no GPU."""
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
    """The released model with the shapes and weights of ours, which has its interaction encoder, on the device."""
    state = {released_name(name): value.detach().cpu() for name, value in learned(model.state_dict()).items()}
    clip = {name.removeprefix("base_model."): v for name, v in state.items() if name.startswith("base_model.")}
    with tempfile.TemporaryDirectory() as folder, _quiet(), as_released(device):
        torch.save(clip, Path(folder) / "clip.pt")
        theirs = code.build.build_model(_options(recipe, str(Path(folder) / "clip.pt")), model.classifier.out_features)
    theirs.load_state_dict(state)
    return theirs.to(device)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within, what the released code prints, and what it is warned of, is not shown."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _options(recipe: Recipe, weights: str) -> Namespace:
    """What the released command line would say for this recipe."""
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
    """The released Adam over its one group a parameter."""
    with _quiet():
        return code.solver.build_optimizer(_options(recipe, ""), model)


def batch_of(batch: Batch) -> dict[str, Tensor]:
    """Our batch as the released loader hands it over: every caption padded to 77 tokens."""
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
    """What the released rank() makes of a similarity: R1, R5, R10, mAP and mINP in per cent."""
    hits, precision, inverse, _ = code.metrics.rank(similarity, query_pids, gallery_pids, max_rank=10, get_mAP=True)
    found = {"R1": hits[0], "R5": hits[4], "R10": hits[9], "mAP": precision, "mINP": inverse}
    return {name: float(value) for name, value in found.items()}


def evaluate(code: Code, model: nn.Module, annotations: DataFrame, recipe: Recipe) -> float:
    """R@1 in per cent of the test split as the released code evaluates it: decoded, encoded at 77 tokens, ranked."""
    queries = annotations[annotations.split == "test"]
    photos = queries.drop_duplicates("image_id")
    size = (recipe.image_height, recipe.image_width)
    transforms = code.datasets.build_transforms(img_size=size, is_train=False)
    images = code.bases.ImageDataset(photos.pid.tolist(), photos.path.tolist(), transforms)
    texts = code.bases.TextDataset(queries.pid.tolist(), queries.caption.tolist(), text_length=CONTEXT)
    loaders = [_loader(dataset, batch_size=TEST_BATCH) for dataset in (images, texts)]
    with as_released(next(model.parameters()).device):
        return float(code.metrics.Evaluator(*loaders).eval(model))


def train_loader(code: Code, annotations: DataFrame, recipe: Recipe) -> DataLoader:
    """The released loader of shuffled train pairs, augmented and masked in worker processes."""
    train = annotations[annotations.split == "train"]
    rows = list(zip(train.pid.tolist(), train.image_id.tolist(), train.path.tolist(), train.caption.tolist()))
    size = (recipe.image_height, recipe.image_width)
    transforms = code.datasets.build_transforms(img_size=size, aug=True, is_train=True)
    dataset = code.bases.ImageTextMLMDataset(rows, transforms, text_length=CONTEXT)
    return _loader(dataset, batch_size=recipe.batch_size, shuffle=True, collate_fn=code.datasets.collate)


def _loader(dataset, **given) -> DataLoader:
    """A loader with the released number of workers, or as many as there are cores; forked, as on Linux in its day."""
    workers = min(WORKERS, cores())
    return DataLoader(dataset, num_workers=workers, multiprocessing_context="fork", **given)
