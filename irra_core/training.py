"""A recipe and a table → a trained run: optimiser, schedule, loop, resume."""

import json
import math
import shutil
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from pandas import DataFrame
from torch import Tensor

from irra_core import runs
from irra_core.annotations import hold_out, load_annotations, photo_table
from irra_core.backbone import read_weights
from irra_core.batches import Batch, Batches
from irra_core.checkpoints import load_checkpoint, load_weights, replaced, save_checkpoint, save_tensors
from irra_core.evaluation import Evaluation, autocast, evaluate, gain, scores
from irra_core.images import image_array
from irra_core.losses import total_loss
from irra_core.model import IRRA, build_model, general_weights
from irra_core.recipes import Recipe, pretraining
from irra_core.synthetic import is_rendered, make_synthetic, synthetic_ceiling, twin_pids
from irra_core.text import tokenize

READ_LOSSES_EVERY = 20  # steps; on a GPU reading a loss waits for it, so the bar is not moved at every step


def train(recipe: Recipe, annotations: DataFrame, folder: str | Path, progress=None) -> Iterator[dict[str, Any]]:
    """Train a recipe in a run folder; yields one row of history an evaluation, and ends with the test scores written.

    Resumes by itself: a folder with an interrupted run goes on at its last evaluation, bit for bit as if it had never
    stopped; a finished one only yields its history again. The run folder then holds recipe.json, history.csv,
    metrics.json, queries.csv, machine.json, the selected weights and, where open_annotations left photos out,
    unreadable.csv. The split named by `recipe.select_on` picks the
    weights; test is read once, at the end (`select_on="test"` reads it at every evaluation, as the released code).
    `progress` is a tqdm-like class. Raises ValueError where the folder holds another run or the table cannot train,
    RuntimeError where another process trains in it, FloatingPointError where a loss is no number (see `replay`).
    """
    folder, unreadable = Path(folder), annotations.attrs.get("unreadable", [])
    runs.begin(folder, recipe, runs.data_digest(annotations, recipe, progress))
    if runs.finished(folder):
        yield from pd.read_csv(folder / "history.csv").to_dict("records")
        return
    with runs.locked(folder):
        if unreadable:
            runs.write_text(folder / runs.UNREADABLE, DataFrame(unreadable).to_csv(index=False))
        if recipe.select_on == "val":
            annotations = hold_out(annotations)
        photos = photo_table(annotations)
        pixels = image_array(list(photos.path), recipe.image_height, recipe.image_width).pixels
        run = _Run(recipe, annotations, pixels, folder, progress)
        yield from run.fit()
        run.finish({"unreadable_images": len(unreadable)} if unreadable else {})


def learning_rate(epoch: int, recipe: Recipe) -> float:
    """The base learning rate in an epoch (from 0): linear warm-up from `warmup_factor`, then cosine to 0.

    Source: the paper's section 4.1; the released scheduler, stepped once an epoch.
    """
    warm, total = recipe.warmup_epochs, recipe.epochs
    if epoch < warm:
        share = epoch / warm
        return recipe.lr * (recipe.warmup_factor * (1 - share) + share)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * (epoch - warm) / max(total - warm, 1)))


def learning_rate_and_decay(name: str, recipe: Recipe) -> tuple[float, float]:
    """Learning rate and weight decay of one parameter. Source: released solver/build.py."""
    bias = name.endswith("bias")
    decay = 0.0 if bias else recipe.weight_decay
    if name.startswith(("mlm_head.", "classifier.")):
        return recipe.lr * recipe.new_lr_factor, decay  # before the bias rule: their biases have ×5 too
    if bias:
        return recipe.lr * recipe.bias_lr_factor, decay
    new = name.startswith(("interaction.attention.", "interaction.blocks."))
    return recipe.lr * (recipe.new_lr_factor if new else 1.0), decay


def build_optimiser(model: torch.nn.Module, recipe: Recipe) -> torch.optim.Adam:
    """Adam over the few groups of parameters that share learning rate and weight decay.

    Each group keeps its `factor`, the multiple of the schedule's learning rate.
    """
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(learning_rate_and_decay(name, recipe), []).append(parameter)
    return torch.optim.Adam(
        [{"params": p, "lr": lr, "weight_decay": wd, "factor": lr / recipe.lr} for (lr, wd), p in groups.items()],
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        eps=recipe.adam_eps,
        fused=True,
    )


def half_weights(model: torch.nn.Module) -> torch.nn.Module:
    """The released code's fp16: matrices of convolutions, attention, linear layers and projections are half.

    LayerNorms and embeddings stay fp32. In place.
    """
    for name, parameter in model.named_parameters():
        if not any(word in name for word in ("ln_", ".ln.", "embedding")):
            parameter.data = parameter.data.half()
    return model


def step_precision(precision: str, device: torch.device) -> str:
    """The arithmetic of a training step: `auto` is bf16 autocast on a GPU and on a CPU with bf16 instructions.

    Scores are computed in fp32 on every CPU, so that two machines rank alike. bf16 halves the small model's step.
    """
    if precision != "auto" or device.type == "cuda":
        return precision
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # older torch cannot say
    return "bf16" if able.get("avx512_bf16") or able.get("amx_bf16") else "fp32"


def trained_run(recipe: Recipe, annotations: DataFrame, progress=None) -> Path:
    """The folder of the finished run of a recipe: loaded if it is there, resumed or trained if not."""
    folder = runs.run_folder(recipe, runs.data_digest(annotations, recipe, progress)).path
    for _ in train(recipe, annotations, folder, progress):
        pass
    return folder


def pretrained_general(progress=None) -> Path:
    """The small CLIP's weights after InfoNCE on the domain `general`; rendered and trained once, then cached."""
    recipe = pretraining()
    weights = general_weights(recipe)
    if weights.exists():
        return weights
    with runs.locked(weights.parent, wait=True):  # another process may be making them
        if not weights.exists():
            folder = weights.with_suffix("")
            make_synthetic(folder, people=recipe.identities, domain="general", progress=progress)
            annotations = load_annotations("synthetic-general", folder).assign(split="train")
            for _ in train(recipe, annotations, folder / "run", progress):
                pass
            with replaced(weights) as aside:
                shutil.copyfile(folder / "run" / runs.WEIGHTS, aside)
    return weights


def replay(folder: str | Path) -> dict[str, float]:
    """The loss parts of the step at which a run stopped because one was no number, computed again.

    `train` saved the weights before that step in failed.safetensors and its batch in failed-batch.safetensors.
    """
    model, recipe = load_checkpoint(Path(folder) / runs.FAILED)
    tensors, _ = read_weights(Path(folder) / runs.FAILED_BATCH)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = Batch(**{name: tensor.to(device) for name, tensor in tensors.items() if name != "image_ids"})
    precision = step_precision(recipe.precision, device)
    model = (half_weights(model) if precision == "fp16" else model).to(device).train()
    parts = loss_parts(model, batch, recipe, precision)
    return {name: part.item() for name, part in parts.items()}


def loss_parts(model: IRRA, batch: Batch, recipe: Recipe, precision: str) -> dict[str, Float[Tensor, ""]]:
    """Every loss of the recipe on one batch, in the arithmetic of a training step."""
    with autocast(batch.pids.device, precision):
        features = model(batch.images, batch.tokens, batch.masked_tokens, batch.labels)
    weight = model.classifier.weight if model.classifier is not None else None
    return total_loss(features, batch.pids, recipe, classifier_weight=weight)


class _Best(NamedTuple):
    """The evaluation whose weights are kept."""

    step: int
    score: float


class _Run:
    """The moving parts of one training: model, optimiser, batches, and how far it is."""

    def __init__(self, recipe: Recipe, annotations: DataFrame, pixels: np.ndarray, folder: Path, progress):
        self.recipe, self.annotations, self.pixels = recipe, annotations, pixels
        self.folder, self.progress = folder, progress
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        table = annotations[annotations.split == "train"].reset_index(drop=True)
        self.batches = Batches(table, pixels, tokenize(list(table.caption)), recipe, self.device)
        self.general = pretrained_general(progress) if recipe.pretrained == "general" else None
        self.model = self.initial_model(recipe).to(self.device)
        self.precision = step_precision(recipe.precision, self.device)
        if self.precision == "fp16":
            half_weights(self.model)
        self.optimiser = build_optimiser(self.model, recipe)
        self.optimiser.found_inf = torch.zeros((), device=self.device)  # 1: Adam leaves the weights as they are
        self.unread: list[Tensor] = []  # the loss parts of the last steps, not yet looked at
        self.step, self.history, self.best, self.seconds = 0, [], _Best(0, -math.inf), {"training": 0.0}
        self.hard_pids = twin_pids(annotations, recipe)
        self.total = min(recipe.epochs * self.batches.steps_per_epoch, recipe.max_steps or math.inf)
        self.every = recipe.evaluate_every or self.batches.steps_per_epoch
        self.resume()

    def initial_model(self, recipe: Recipe) -> IRRA:
        """The model before its first step."""
        return build_model(recipe, len(self.batches.classes), weights=self.general)

    def fit(self) -> Iterator[dict[str, Any]]:
        """All steps that are left; a row at each evaluation, when everything that a resume needs is on the disk."""
        shown = {"total": self.total, "initial": self.step, "unit": "step", "desc": self.recipe.losses}
        bar = self.progress(**shown) if self.progress else None
        sums, since = None, self.step
        try:
            while self.step < self.total:
                began = time.perf_counter()
                parts = self.train_step()
                sums = parts if sums is None else sums + parts
                self.step += 1
                if self.step % READ_LOSSES_EVERY == 0 or self.step % self.every == 0 or self.step == self.total:
                    self.check_finite()
                    if bar:
                        bar.set_postfix(loss=f"{sums.sum().item() / (self.step - since):.3f}", refresh=False)
                self.seconds["training"] += time.perf_counter() - began
                if bar:
                    bar.update(1)
                if self.step % self.every == 0 or self.step == self.total:
                    row = self.evaluation_row((sums / (self.step - since)).tolist())
                    sums, since = None, self.step
                    self.save_state()
                    yield row
        finally:
            if bar:
                bar.close()

    def train_step(self) -> Tensor:
        """One step of the optimiser; the loss parts, not yet read from the device."""
        recipe, model = self.recipe, self.model
        lr = learning_rate(self.step // self.batches.steps_per_epoch, recipe)
        for group in self.optimiser.param_groups:
            group["lr"] = lr * group["factor"]
        batch = self.batches.at(self.step)
        model.train()
        stacked = torch.stack(list(loss_parts(model, batch, recipe, self.precision).values()))
        self.unread.append(stacked.detach())
        broken = (~torch.isfinite(self.unread[-1]).all()).float()
        self.optimiser.found_inf.copy_(torch.maximum(self.optimiser.found_inf, broken))  # once broken, no step counts
        self.optimiser.zero_grad(set_to_none=True)
        stacked.sum().backward()
        self.optimiser.step()
        return stacked.detach()

    def check_finite(self) -> None:
        """Raise FloatingPointError, naming step, parts and learning rate, once a loss is not a number.

        What `replay` needs is saved first: the weights, which have stood still since, and the batch.
        """
        broken = (~torch.isfinite(torch.stack(self.unread))).any(1).nonzero().flatten().tolist()
        first = self.step - len(self.unread)
        unread, self.unread = self.unread, []
        if not broken:
            return
        step, parts = first + broken[0], dict(zip(self.recipe.loss_names, unread[broken[0]].tolist()))
        lr = learning_rate(step // self.batches.steps_per_epoch, self.recipe)
        batch = vars(self.batches.at(step))
        batch["image_ids"] = self.batches.images[batch["rows"].cpu()]
        said = {"step": str(step + 1), "lr": str(lr), "parts": json.dumps({n: str(v) for n, v in parts.items()})}
        save_checkpoint(self.model, self.recipe, self.folder / runs.FAILED)
        save_tensors(batch, self.folder / runs.FAILED_BATCH, said)
        raise FloatingPointError(
            f"a loss is not finite at step {step + 1}: {parts}, lr {lr:g}. Lower lr or raise the precision. "
            f"{self.folder} keeps the state of the last evaluation, and for training.replay the weights before the "
            f"step ({runs.FAILED}) and its batch ({runs.FAILED_BATCH})"
        )

    def evaluation_row(self, losses: list[float]) -> dict[str, Any]:
        """Evaluate on the split that selects, keep the weights if they are the best so far; the row of history."""
        recipe = self.recipe
        epoch = self.step / self.batches.steps_per_epoch
        row = {"epoch": round(epoch, 4), "step": self.step}
        row["lr"] = learning_rate((self.step - 1) // self.batches.steps_per_epoch, recipe)
        row |= dict(zip(recipe.loss_names, losses)) | {"loss": sum(losses)}
        split = "test" if recipe.select_on == "test" else "val"
        if (self.annotations.split == split).any():
            found = self.evaluated(self.model, split)
            for name in ("R1", "R5", "R10", "mAP", "mINP"):
                row[f"{split}_{name}"] = scores(found.text_to_image)[name][0]
        score = self.step if recipe.select_on == "last" else row[f"{split}_R1"]
        if score > self.best.score:
            self.best = _Best(self.step, score)
            save_checkpoint(self.model, recipe, self.folder / runs.WEIGHTS)
        self.history.append(row)
        runs.write_text(self.folder / "history.csv", DataFrame(self.history).to_csv(index=False))
        return row

    def evaluated(self, model: IRRA, split: str) -> Evaluation:
        """The scores of a model on one split of this run's data."""
        began = time.perf_counter()
        found = evaluate(
            model,
            self.annotations,
            split,
            pixels=self.pixels,
            hard_pids=self.hard_pids,
            precision=self.recipe.precision,
        )
        self.seconds["evaluation"] = self.seconds.get("evaluation", 0.0) + time.perf_counter() - began
        return found

    def save_state(self) -> None:
        """Weights, the optimiser's moments and the history in one file, so that none can be older than the others."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for index, moments in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{name}": value for name, value in moments.items()}
        kept = {"step": self.step, "best": list(self.best), "history": self.history, "seconds": self.seconds}
        state, before = self.folder / runs.STATE, self.folder / runs.STATE_BEFORE
        save_tensors(tensors, state, {"run": json.dumps(kept)}, keep=before)

    def kept_state(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The last state that is whole, if there is one; a damaged one is warned of and the one before it is used."""
        damaged = []
        for name in (runs.STATE, runs.STATE_BEFORE):
            if not (self.folder / name).exists():
                continue
            try:
                tensors, metadata = read_weights(self.folder / name)
                kept = json.loads(metadata["run"])
            except (ValueError, KeyError) as error:
                damaged.append(str(error))
                continue
            if damaged:
                warnings.warn(f"{damaged[0]}. Going on from the state before it, of step {kept['step']}", stacklevel=2)
            return tensors, kept
        if damaged:
            warnings.warn(f"{'; '.join(damaged)}. No state is whole: training begins again at step 0", stacklevel=2)
        return None

    def resume(self) -> None:
        """Go on from the last evaluation, if there was one."""
        if (found := self.kept_state()) is None:
            return
        tensors, kept = found
        weights = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
        self.model.load_state_dict(weights)
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimiser."):
                _, index, moment = name.split(".")
                moments.setdefault(int(index), {})[moment] = tensor
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": moments})
        self.step, self.best, self.history = kept["step"], _Best(*kept["best"]), kept["history"]
        self.seconds = kept["seconds"]

    def finish(self, counted: dict[str, int]) -> None:
        """Read test once: the selected weights beside the untrained model and the one before fine-tuning.

        What was `counted` before the training stands in metrics.json too.
        """
        recipe = self.recipe
        metrics: dict[str, Any] = {"selected": {"on": recipe.select_on, "step": self.best.step}} | counted
        if (self.annotations.split == "test").any():
            load_weights(self.model, self.folder / runs.WEIGHTS)
            trained = self.evaluated(self.model, "test")
            metrics |= trained.metrics
            for name, model in self.starting_points().items():
                start = self.evaluated(model.to(self.device), "test").text_to_image
                metrics[name] = scores(start)
                metrics[f"gain_over_{name}"] = gain(trained.text_to_image, start)
            if is_rendered(self.annotations, recipe):
                metrics["ceiling_R1"] = synthetic_ceiling(self.annotations)
            columns = trained.text_to_image.drop(columns="caption")  # real captions may not be handed on
            runs.write_text(self.folder / "queries.csv", columns.to_csv(index=False))
        runs.write_text(self.folder / "machine.json", json.dumps(self.machine(), indent=2))
        runs.write_text(self.folder / "metrics.json", json.dumps(metrics, indent=2))
        for name in (runs.STATE, runs.STATE_BEFORE, runs.FAILED, runs.FAILED_BATCH):
            (self.folder / name).unlink(missing_ok=True)

    def starting_points(self) -> dict[str, IRRA]:
        """What the trained model is compared with: random weights, and the pretrained CLIP without fine-tuning."""
        found = {"untrained": self.initial_model(self.recipe.replace(pretrained="none", pretrained_towers="both"))}
        if self.recipe.pretrained != "none":
            found["pretrained"] = self.initial_model(self.recipe)
        return found

    def machine(self) -> dict[str, Any]:
        """Versions, device, threads, seconds, peak memory and throughput of this run."""
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        images = self.step * self.recipe.batch_size / max(self.seconds["training"], 1e-9)
        gpu = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None
        measured = {"precision": self.precision, "seconds": self.seconds, "images_per_second": images}
        return runs.machine() | measured | {"peak_memory_bytes": peak, "peak_gpu_memory_bytes": gpu}
