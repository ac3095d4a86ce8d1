"""A recipe and a table → a trained run: optimiser, schedule, loop, resume, one process or many."""

import argparse
import contextlib
import json
import math
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, UInt8
from pandas import DataFrame
from torch import Tensor
from tqdm import tqdm

from irra_core import runs
from irra_core.annotations import hold_out, photo_table
from irra_core.augmentation import on_device
from irra_core.backbone import read_weights
from irra_core.batches import ALONE, Batch, Batches, Team
from irra_core.checkpoints import load_checkpoint, load_weights, save_checkpoint, save_tensors
from irra_core.evaluation import Evaluation, evaluate, gain, scores
from irra_core.images import image_array
from irra_core.model import IRRA, build_model
from irra_core.objective import Objective, half_weights, step_precision
from irra_core.recipes import PLAIN, Recipe, check_processes
from irra_core.scale.distributed import joined, launched, tell, telling_errors
from irra_core.synthetic.people import is_rendered, synthetic_ceiling, twin_pids
from irra_core.text import tokenize
from irra_core.variants.adapters import is_adapter, merge

RESIDENT_SHARE = 1 / 8  # of a GPU's free memory that the image array may take; the rest is for the step
READ_LOSSES_EVERY = 20  # steps; on a GPU reading a loss waits for it, so the bar is not moved at every step


def train(
    recipe: Recipe, annotations: DataFrame, folder: str | Path, progress=None, processes: int = 1, wait: bool = False
) -> Iterator[dict[str, Any]]:
    """Train a recipe in a run folder; yields one row of history an evaluation, and ends with the test scores written.

    Resumes by itself: a folder with an interrupted run goes on at its last evaluation, bit for bit as if it had never
    stopped; a finished one only yields its history again. The run folder then holds recipe.json, history.csv,
    metrics.json, queries.csv, machine.json, the selected weights and, where open_annotations left photos out,
    unreadable.csv. The split named by `recipe.select_on` picks the
    weights; test is read once, at the end (`select_on="test"` reads it at every evaluation, as the released code).
    `progress` is a tqdm-like class. With several `processes` torchrun starts them on this machine, each on a GPU of its
    own where there are GPUs; they share out the same batches, so the run is the same but for rounding. Raises
    ValueError where the folder holds another run or the table cannot train, RuntimeError where another process trains
    in it (with `wait` its run is waited for and taken), FloatingPointError where a loss is no number (see `replay`).
    """
    check_processes(processes, recipe)
    folder = Path(folder)
    runs.begin(folder, recipe, runs.data_digest(annotations, recipe, progress))
    if runs.finished(folder):
        with contextlib.suppress(OSError, RuntimeError), runs.locked(folder):  # read-only, or at its very end: as it is
            runs.clear(folder)
        yield from _history(folder)
    elif processes == 1:
        yield from _trained(recipe, annotations, folder, progress, wait=wait)
    elif wait:
        with runs.locked(folder, wait, progress):  # until whoever trains here has ended
            pass
        yield from train(recipe, annotations, folder, progress, processes)
    else:
        runs.write_table(folder, annotations)
        yield from launched("irra_core.training", folder, processes, progress)


def _trained(
    recipe: Recipe, annotations: DataFrame, folder: Path, progress=None, team: Team = ALONE, wait: bool = False
) -> Iterator[dict[str, Any]]:
    """`train` in this process, or this process's part of it; the first of a team alone writes."""
    unreadable = annotations.attrs.get("unreadable", [])
    with runs.locked(folder, wait, progress) if team.leads else contextlib.nullcontext():
        if wait and runs.finished(folder):  # by the process that was waited for
            yield from _history(folder)
            return
        if unreadable and team.leads:
            runs.write_text(folder / runs.UNREADABLE, DataFrame(unreadable).to_csv(index=False))
        if recipe.select_on == "val":
            annotations = hold_out(annotations)
        photos = photo_table(annotations)
        pixels = image_array(list(photos.path), recipe.image_height, recipe.image_width).pixels
        run = _Run(recipe, annotations, pixels, folder, progress, team)
        yield from run.fit()
        run.finish({"unreadable_images": len(unreadable)} if unreadable else {})


def _history(folder: Path) -> list[dict[str, Any]]:
    """The rows of a finished run's history."""
    return pd.read_csv(folder / "history.csv").to_dict("records")


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
    """Learning rate and weight decay of one parameter; adapters are new weights. Source: released solver/build.py."""
    bias = name.endswith("bias")
    decay = 0.0 if bias else recipe.weight_decay
    if name.startswith(("mlm_head.", "classifier.")):
        return recipe.lr * recipe.new_lr_factor, decay  # before the bias rule: their biases have ×5 too
    if bias:
        return recipe.lr * recipe.bias_lr_factor, decay
    new = is_adapter(name) or name.startswith(("interaction.attention.", "interaction.blocks."))
    return recipe.lr * (recipe.new_lr_factor if new else 1.0), decay


def build_optimiser(model: torch.nn.Module, recipe: Recipe) -> torch.optim.Adam:
    """Adam over the few groups of parameters that share learning rate and weight decay.

    Each group keeps its `factor`, the multiple of the schedule's learning rate. While `found_inf` is 1, a step leaves
    all as it is.
    """
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(learning_rate_and_decay(name, recipe), []).append(parameter)
    optimiser = torch.optim.Adam(
        [{"params": p, "lr": lr, "weight_decay": wd, "factor": lr / recipe.lr} for (lr, wd), p in groups.items()],
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        eps=recipe.adam_eps,
        fused=True,
    )
    optimiser.found_inf = torch.zeros((), device=next(model.parameters()).device)
    return optimiser


def optimise(objective: Objective, optimiser: torch.optim.Adam, batch: Batch) -> Float[Tensor, " numbers"]:
    """One training step on a batch; the loss parts and the gradient's norm, not yet read from the device.

    From the first step on in which one of them is no number, the weights stand still.
    """
    objective.model.train()
    optimiser.zero_grad(set_to_none=True)
    parts = objective(batch)
    numbers = torch.cat([parts, gradient_norm(objective.model)[None]])
    broken = (~torch.isfinite(numbers).all()).float()
    optimiser.found_inf.copy_(torch.maximum(optimiser.found_inf, broken))
    optimiser.step()
    return numbers


def resides(pixels: UInt8[np.ndarray, "n 3 h w"], device: torch.device) -> bool:
    """True where the image array is kept on the GPU, so that no step copies photos: where it takes little of it."""
    return device.type == "cuda" and pixels.nbytes <= RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]


def prepare_run(recipe: Recipe, annotations: DataFrame, progress=None) -> Path:
    """The run folder of a recipe, ready for `torchrun … -m irra_core.training FOLDER` on one machine or many.

    The folder, and the photos under the paths of the table, must be where every machine sees them.
    """
    data = runs.data_digest(annotations, recipe, progress)
    folder = runs.run_folder(recipe, data).path
    runs.begin(folder, recipe, data)
    if not runs.finished(folder):
        runs.write_table(folder, annotations)
    return folder


def trained_run(recipe: Recipe, annotations: DataFrame, progress=None) -> Path:
    """The folder of the finished run of a recipe: loaded if it is there, resumed or trained if not.

    Where another process trains it, that is waited for.
    """
    folder = runs.run_folder(recipe, runs.data_digest(annotations, recipe, progress)).path
    for _ in train(recipe, annotations, folder, progress, wait=True):
        pass
    return folder


def replay(folder: str | Path) -> dict[str, float]:
    """Loss parts and gradient's norm of the step at which a run stopped because one was no number, computed again.

    `train` saved the weights before that step in failed.safetensors and its batch in failed-batch.safetensors.
    """
    model, recipe = load_checkpoint(Path(folder) / runs.FAILED, finite=False)
    tensors, _ = read_weights(Path(folder) / runs.FAILED_BATCH)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = Batch(**{name: tensor.to(device) for name, tensor in tensors.items() if name != "image_ids"})
    precision = step_precision(recipe.precision, device)
    model = (half_weights(model) if precision == "fp16" else model).to(device).train()
    parts = Objective(model, recipe, precision)(batch)
    return _named(torch.cat([parts, gradient_norm(model)[None]]), recipe)


def gradient_norm(model: torch.nn.Module) -> Float[Tensor, ""]:
    """The norm of all gradients together, summed in single precision: no number where one of theirs is none.

    Nor beyond 1e19, whose square is none.
    """
    gradients: dict[torch.dtype, list[Tensor]] = {}
    for parameter in model.parameters():
        if parameter.grad is not None:
            gradients.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    norms = [norm for alike in gradients.values() for norm in torch._foreach_norm(alike, 2, torch.float32)]
    return torch.linalg.vector_norm(torch.stack(norms))


def _named(numbers: Float[Tensor, " numbers"], recipe: Recipe) -> dict[str, float]:
    """The loss parts and the gradient's norm of a step by name."""
    return dict(zip((*recipe.loss_names, "gradient"), numbers.tolist(), strict=True))


def _general(progress) -> Path:
    """The small CLIP's pretrained weights, made first where they are not there."""
    from irra_core.synthetic.pretraining import pretrained_general

    return pretrained_general(progress)


class _Best(NamedTuple):
    """The evaluation whose weights are kept."""

    step: int
    score: float


class _Run:
    """The moving parts of one training: model, optimiser, batches, and how far it is."""

    def __init__(
        self, recipe: Recipe, annotations: DataFrame, pixels: np.ndarray, folder: Path, progress, team: Team = ALONE
    ):
        self.recipe, self.annotations, self.pixels = recipe, annotations, pixels
        self.folder, self.progress, self.team = folder, progress, team
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        table = annotations[annotations.split == "train"].reset_index(drop=True)
        near = on_device(pixels, self.device) if resides(pixels, self.device) else pixels
        self.batches = Batches(table, near, tokenize(table.caption.tolist()), recipe, self.device)
        self.general = _general(progress) if recipe.pretrained == "general" else None
        self.model = self.initial_model(recipe).to(self.device)
        self.precision = step_precision(recipe.precision, self.device)
        if self.precision == "fp16":
            half_weights(self.model)
        self.optimiser = build_optimiser(self.model, recipe)
        self.unread: list[Tensor] = []  # the loss parts of the last steps, not yet looked at
        self.step, self.history, self.best, self.seconds = 0, [], _Best(0, -math.inf), {"training": 0.0}
        self.objective = Objective(self.model, recipe, self.precision, team)
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
                    if self.team.leads:
                        self.save_state()
                    yield row
        finally:
            if bar:
                bar.close()

    def train_step(self) -> Tensor:
        """One step of the optimiser; the loss parts, not yet read from the device."""
        lr = learning_rate(self.step // self.batches.steps_per_epoch, self.recipe)
        for group in self.optimiser.param_groups:
            group["lr"] = lr * group["factor"]
        self.unread.append(optimise(self.objective, self.optimiser, self.batches.at(self.step, *self.team)))
        return self.unread[-1][:-1]

    def check_finite(self) -> None:
        """Raise FloatingPointError, naming step, parts and learning rate, once a loss or its gradient is no number."""
        broken = (~torch.isfinite(torch.stack(self.unread))).any(1).nonzero().flatten().tolist()
        first = self.step - len(self.unread)
        unread, self.unread = self.unread, []
        if not broken:
            return
        step, parts = first + broken[0], _named(unread[broken[0]], self.recipe)
        lr = learning_rate(step // self.batches.steps_per_epoch, self.recipe)
        if self.team.leads:
            self.save_failed(step, parts, lr)
        self.team.wait()  # torchrun ends all processes when the first one ends
        raise FloatingPointError(
            f"a loss or its gradient is not finite at step {step + 1}: {parts}, lr {lr:g}. Lower lr or raise the "
            f"precision. {self.folder} keeps the state of the last evaluation, and for training.replay the weights "
            f"before the step ({runs.FAILED}) and its batch ({runs.FAILED_BATCH})"
        )

    def save_failed(self, step: int, parts: dict[str, float], lr: float) -> None:
        """What `replay` needs: the weights, which have stood still since the step, and its batch."""
        batch = vars(self.batches.at(step))
        del batch["lengths"], batch["words_each"]  # no tensors, and the others tell them
        batch["image_ids"] = self.batches.images[batch["rows"].cpu()]
        said = {"step": str(step + 1), "lr": str(lr), "parts": json.dumps({n: str(v) for n, v in parts.items()})}
        save_checkpoint(self.model, self.recipe, self.folder / runs.FAILED, merge=False)
        save_tensors(batch, self.folder / runs.FAILED_BATCH, said)

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
            self.keep_weights()
        self.history.append(row)
        if self.team.leads:
            runs.write_text(self.folder / "history.csv", DataFrame(self.history).to_csv(index=False))
        return row

    def keep_weights(self) -> None:
        """These weights are the selected ones."""
        if self.team.leads:
            save_checkpoint(self.model, self.recipe, self.folder / runs.WEIGHTS)

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
            team=self.team,
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
        best, lost = _Best(*kept["best"]), None
        if best.step:
            try:
                read_weights(self.folder / runs.WEIGHTS)
            except (OSError, ValueError) as error:
                lost = str(error)
        if lost and best.step != kept["step"]:
            warnings.warn(f"{lost}. They were of step {best.step}: training begins again at step 0", stacklevel=2)
            return
        weights = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
        self.model.load_state_dict(weights)
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimiser."):
                _, index, moment = name.split(".")
                moments.setdefault(int(index), {})[moment] = tensor
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": moments})
        self.step, self.best, self.history = kept["step"], best, kept["history"]
        if lost:
            warnings.warn(f"{lost}. They are those of the kept state, and written again", stacklevel=2)
            self.keep_weights()
        self.seconds = kept["seconds"]

    def finish(self, counted: dict[str, int]) -> None:
        """Read test once: the selected weights beside the untrained model and the one before fine-tuning.

        What was `counted` before the training stands in metrics.json too.
        """
        recipe = self.recipe
        metrics: dict[str, Any] = {"selected": {"on": recipe.select_on, "step": self.best.step}} | counted
        merge(self.model)
        if (self.annotations.split == "test").any():
            self.team.wait()  # until process 0 has written them
            load_weights(self.model, self.folder / runs.WEIGHTS)
            trained = self.evaluated(self.model, "test")
            metrics |= trained.metrics
            for name, model in self.starting_points():
                start = self.evaluated(model.to(self.device), "test").text_to_image
                metrics[name] = scores(start)
                metrics[f"gain_over_{name}"] = gain(trained.text_to_image, start)
            if is_rendered(self.annotations, recipe):
                metrics["ceiling_R1"] = synthetic_ceiling(self.annotations)
            if self.team.leads:
                columns = trained.text_to_image.drop(columns="caption")  # real captions may not be handed on
                runs.write_text(self.folder / "queries.csv", columns.to_csv(index=False))
        if not self.team.leads:
            return
        runs.write_text(self.folder / "machine.json", json.dumps(self.machine(), indent=2))
        runs.write_text(self.folder / "metrics.json", json.dumps(metrics, indent=2))
        runs.clear(self.folder)

    def starting_points(self) -> Iterator[tuple[str, IRRA]]:
        """What the trained model is compared with: random weights, and the pretrained CLIP without fine-tuning.

        One at a time, so that the device need not hold both beside the trained one.
        """
        yield "untrained", self.initial_model(self.recipe.replace(**PLAIN))
        if self.recipe.pretrained != "none":
            yield "pretrained", self.initial_model(self.recipe)

    def machine(self) -> dict[str, Any]:
        """Versions, device, threads, parameters, seconds, peak memory and throughput of this run."""
        images = self.step * self.recipe.batch_size / max(self.seconds["training"], 1e-9)
        gpu = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None
        trained = sum(p.numel() for group in self.optimiser.param_groups for p in group["params"])
        counted = {"parameters": sum(p.numel() for p in self.model.parameters()), "trainable_parameters": trained}
        measured = {
            "processes": self.team.processes,
            "precision": self.precision,
            "seconds": self.seconds,
            "images_per_second": images,
        }
        peaks = {"peak_memory_bytes": runs.peak_memory(), "peak_gpu_memory_bytes": gpu}
        return runs.machine() | counted | measured | peaks


class _Told:
    """A bar, as far as training uses one, that says in lines what `launched` shows."""

    def __init__(self, total: int | None = None, initial: int = 0, desc: str | None = None, **other: Any):
        self.said = {"total": total, "initial": initial, "desc": desc, "n": initial, "postfix": {}}
        self.time = 0.0
        self.shown = "leave" not in other  # not the short bars of an evaluation

    def set_postfix(self, refresh: bool = True, **values: Any) -> None:
        self.said["postfix"] = values

    def update(self, n: int = 1) -> None:
        self.said["n"] += n
        if self.shown and (time.monotonic() - self.time > 0.2 or self.said["n"] == self.said["total"]):
            self.time = time.monotonic()
            tell("bar", self.said)

    def close(self) -> None:
        """The line is all there is to close."""


def main(arguments: list[str] | None = None) -> None:
    """What `torchrun … -m irra_core.training FOLDER` does in each process: trains the run that was prepared there."""
    parser = argparse.ArgumentParser(prog="torchrun … -m irra_core.training", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="a run folder, from irra_core.training.prepare_run")
    parser.add_argument("--tell", action="store_true", help="say everything in lines of JSON, for a program to read")
    given = parser.parse_args(arguments)
    if runs.finished(given.folder):
        return
    recipe, annotations = runs.load_run(given.folder)["recipe"], runs.read_table(given.folder)
    with joined() as team, telling_errors(given.tell and team.leads):
        check_processes(team.processes, recipe)
        progress = (_Told if given.tell else tqdm) if team.leads else None
        if team.leads:
            runs.begin(given.folder, recipe, runs.data_digest(annotations, recipe, progress))
        team.wait()
        for row in _trained(recipe, annotations, given.folder, progress, team):
            if given.tell and team.leads:
                tell("row", row)
        if team.leads and not given.tell:
            sys.stdout.write(runs.summary(given.folder) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
