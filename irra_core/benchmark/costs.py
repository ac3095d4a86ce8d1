"""Finished runs or a recipe → what they cost: milliseconds per photo and sentence, the three interaction encoders."""

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pandas import DataFrame

from irra_core import runs
from irra_core.backbone import build_model, configuration, patch_grid
from irra_core.batches import Batches
from irra_core.benchmark.workloads import interleave
from irra_core.checkpoints import load_checkpoint
from irra_core.interaction import build_interaction
from irra_core.model import IRRA
from irra_core.objective import Objective, step_precision
from irra_core.recipes import Recipe
from irra_core.settings import default_device, progress_bar
from irra_core.text import VOCABULARY, tokenize
from irra_core.training import build_optimiser, optimise


def inference_ms(finished: DataFrame, batch_size: int = 32, repeats: int = 20) -> dict[str, float]:
    """Variant → milliseconds to encode one photo and one sentence, in batches on this machine; finished variants only.

    finished: what `studies.run_all` gave. The median over the repeats, in which the variants take turns.
    """
    firsts = finished[finished.status.isin(["finished", "committed"])].drop_duplicates("variant")
    models = {row.variant: _model(Path(row.path) / runs.WEIGHTS, row.recipe).eval() for row in firsts.itertuples()}
    tokens = torch.randint(1, VOCABULARY - 2, (batch_size, 32), generator=torch.Generator().manual_seed(0))
    tokens[:, -1] = VOCABULARY - 1

    def encode(model) -> Callable[[], Any]:
        device = next(model.parameters()).device
        images, words = torch.zeros(batch_size, 3, *model.image_size, device=device), tokens.to(device)
        return lambda: (model.encode_image(images), model.encode_text(words))

    seconds = _medians({name: encode(model) for name, model in models.items()}, repeats)
    return {name: 1000 * value / batch_size for name, value in seconds.items()}


def _model(weights: Path, made: Recipe) -> IRRA:
    """A run's model, or where its weights are not there one of the same size: the time does not depend on them."""
    return load_checkpoint(weights)[0] if weights.is_file() else build_model(made, 2)


def step_seconds(
    recipes: Mapping[str, Recipe], annotations: DataFrame, repeats: int = 5, progress: Callable | None = None
) -> dict[str, float]:
    """Variant → median seconds of a training step on this machine, measured alone: the variants take turns.

    All take one step on the same captions of `annotations` per turn, after one turn that does not count. The photos are
    noise, which costs the same. A recipe that is computed in fp16 is left out without a GPU.
    """
    device, calls = default_device(), {}
    train = annotations[annotations.split == "train"]
    for name, made in recipes.items():
        if made.precision == "fp16" and device.type == "cpu":
            continue
        rows = train.sample(made.batch_size, replace=made.batch_size > len(train), random_state=0)
        rows = rows.assign(image_id=range(len(rows))).reset_index(drop=True)
        shape = (len(rows), 3, made.image_height, made.image_width)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(device)
        batch = Batches(rows, pixels, tokenize(rows.caption.tolist()), made, device).at(0)
        model = build_model(made, train.pid.nunique(), device=device).train()
        objective = Objective(model, made, step_precision(made.precision, device))
        optimiser = build_optimiser(model, made)
        calls[name] = lambda o=objective, a=optimiser, b=batch: optimise(o, a, b)
    with progress_bar(progress, total=(repeats + 1) * len(calls), unit="step", desc="timing steps") as bar:
        calls = {name: lambda call=call: (call(), bar.update(1)) for name, call in calls.items()}
        seconds = interleave(calls, repeats, device)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _medians(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each call without gradients; the calls take turns."""
    with torch.inference_mode():
        seconds = interleave(calls, repeats, default_device())
    return {name: statistics.median(values) for name, values in seconds.items()}


def interaction_costs(
    made: Recipe, width: int | None = None, batch_size: int = 8, words: int = 77, repeats: int = 5
) -> DataFrame:
    """The three interaction encoders side by side: parameters, and the median time of a forward pass on one batch.

    Columns `interaction, parameters, forward_ms, times`, the last against `cross`. The batch has random tokens: as many
    words as given and the recipe's image tokens; `width` is the backbone's unless given, the depth the recipe's.
    """
    config = configuration(made.backbone)
    width = width or config["embed_dim"]
    grid = patch_grid((made.image_height, made.image_width), config["vision_cfg"]["patch_size"], made.stride)
    generator = torch.Generator().manual_seed(made.seed)
    device = default_device()
    sizes = (words, grid[0] * grid[1] + 1)
    text, image = (torch.randn(batch_size, size, width, generator=generator).to(device) for size in sizes)
    encoders = {
        kind: build_interaction(kind, width, made.interaction_depth).eval().to(device)
        for kind in ("cross", "co", "merged")
    }
    calls = {kind: (lambda encoder=encoder: encoder(text, image)) for kind, encoder in encoders.items()}
    seconds = _medians(calls, repeats)
    rows = [
        (kind, sum(p.numel() for p in encoder.parameters()), 1000 * seconds[kind], seconds[kind] / seconds["cross"])
        for kind, encoder in encoders.items()
    ]
    return DataFrame(rows, columns=["interaction", "parameters", "forward_ms", "times"])
