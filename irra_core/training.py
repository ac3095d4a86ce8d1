"""A recipe and a table → a trained run: optimiser, schedule, loop, resume, in one process or several."""

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from pandas import DataFrame
from torch import Tensor

from irra_core import runs
from irra_core.annotations import hold_out, photo_table
from irra_core.augmentation import on_device, resides
from irra_core.backbone import build_model
from irra_core.batches import ALONE, Batch, Batches, Team
from irra_core.checkpoints import load_weights, save_checkpoint, save_tensors
from irra_core.evaluation import Evaluation, evaluate, gain, known_ceiling, known_twins, scores
from irra_core.images import image_array, left_out
from irra_core.model import IRRA
from irra_core.objective import Objective, gradient_norm, step_precision
from irra_core.recipes import PLAIN, Recipe, check_processes
from irra_core.settings import default_device, progress_bar
from irra_core.text import tokenize

READ_LOSSES_EVERY = 20  # steps; reading a loss from a GPU waits for it


def train(
    recipe: Recipe,
    annotations: DataFrame,
    folder: str | Path,
    progress=None,
    processes: int = 1,
    wait: bool = False,
    data: str | None = None,
) -> Iterator[dict[str, Any]]:
    """Train a recipe in a run folder; yields one row of history per evaluation and then writes the test scores.

    An interrupted run in the folder is resumed from its last evaluation, on a CPU bit for bit as if it had never
    stopped (on a GPU: docs/determinism.md); a finished one only yields its history again. The run folder then holds
    recipe.json, history.csv, metrics.json, queries.csv, machine.json, the selected weights and, where open_annotations
    left photos out, unreadable.csv. The split named by `recipe.select_on` selects the weights; test is read once, at
    the end (`select_on="test"` reads it at every evaluation, as the released code). With several `processes` torchrun
    starts them on this machine, each on its own GPU if there are GPUs; they share the same batches, so the run differs
    by rounding only. `progress` is a tqdm-like class; `data` is the table's `runs.data_digest`, if known. Raises
    ValueError if the folder holds another run or the table cannot train, RuntimeError if another process trains in it
    (with `wait` its run is waited for and taken), FloatingPointError at a loss that is not finite (scale.failures).
    """
    check_processes(processes, recipe)
    folder = Path(folder)
    runs.begin(folder, recipe, data or runs.data_digest(annotations, recipe, progress))
    if wait and processes > 1 and not runs.finished(folder):
        with runs.locked(folder, wait, progress):  # until the process that trains here has ended
            pass
    if runs.finished(folder):
        with contextlib.suppress(OSError, RuntimeError), runs.locked(folder):  # read-only, or its process just ending
            runs.clear(folder)
        yield from pd.read_csv(folder / "history.csv").to_dict("records")
    elif processes == 1:
        yield from _trained(recipe, annotations, folder, progress, wait=wait)
    else:
        from irra_core.scale.distributed import launched, write_table

        write_table(folder, annotations)
        yield from launched("irra_core.training", folder, processes, progress)


def trained_run(recipe: Recipe, annotations: DataFrame, progress=None) -> Path:
    """The folder of a recipe's finished run: loaded, resumed or trained; waits if another process trains it."""
    data = runs.data_digest(annotations, recipe, progress)
    folder = runs.run_folder(recipe, data).path
    for _ in train(recipe, annotations, folder, progress, wait=True, data=data):
        pass
    return folder


def _trained(
    recipe: Recipe, annotations: DataFrame, folder: Path, progress=None, team: Team = ALONE, wait: bool = False
) -> Iterator[dict[str, Any]]:
    """`train` in this process, or this process's part of it; only the first of a team writes."""
    unreadable = left_out(annotations)
    with runs.locked(folder, wait, progress) if team.leads else contextlib.nullcontext():
        if wait and runs.finished(folder):  # by the process that was waited for
            yield from pd.read_csv(folder / "history.csv").to_dict("records")
            return
        if len(unreadable) and team.leads:
            runs.write_text(folder / runs.UNREADABLE, unreadable.to_csv(index=False, lineterminator="\n"))
        if recipe.select_on == "val":
            annotations = hold_out(annotations)
        photos = photo_table(annotations)
        pixels = image_array(list(photos.path), recipe.image_height, recipe.image_width).pixels
        run = _Run(recipe, annotations, pixels, folder, progress, team)
        yield from run.fit()
        run.finish({"unreadable_images": len(unreadable)} if len(unreadable) else {})


def learning_rate(epoch: int, recipe: Recipe) -> float:
    """The base learning rate in an epoch (from 0): linear warm-up from `warmup_factor`, then cosine to 0.

    Source: the paper's section 4.1; the released scheduler, stepped once an epoch.
    """
    warm, total = recipe.warmup_epochs, recipe.epochs
    if epoch < warm:
        share = epoch / warm
        return recipe.lr * (recipe.warmup_factor * (1 - share) + share)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * (epoch - warm) / max(total - warm, 1)))


def factor_and_decay(name: str, recipe: Recipe) -> tuple[float, float]:
    """One parameter's multiple of the learning rate, and its weight decay. Source: released solver/build.py."""
    from irra_core.variants.adapters import is_adapter
    from irra_core.variants.token_selection import HEAD_LR

    bias = name.endswith("bias")
    decay = 0.0 if bias or name == "log_scale" else recipe.weight_decay
    if name.startswith("selection."):
        return HEAD_LR / recipe.lr, decay
    if name.startswith(("mlm_head.", "classifier.")):
        return recipe.new_lr_factor, decay  # before the bias rule: their biases have ×5 too
    if bias:
        return recipe.bias_lr_factor, decay
    new = is_adapter(name) or name.startswith(("interaction.attention.", "interaction.blocks."))
    return recipe.new_lr_factor if new else 1.0, decay


def build_optimiser(model: torch.nn.Module, recipe: Recipe) -> torch.optim.Adam:
    """Adam over the few groups of parameters that share `factor` (see factor_and_decay) and weight decay.

    While its `found_inf` is 1, a step changes nothing.
    """
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(factor_and_decay(name, recipe), []).append(parameter)
    optimiser = torch.optim.Adam(
        [{"params": p, "lr": recipe.lr * f, "weight_decay": wd, "factor": f} for (f, wd), p in groups.items()],
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        eps=recipe.adam_eps,
        fused=True,
    )
    optimiser.found_inf = torch.zeros((), device=next(model.parameters()).device)
    return optimiser


def optimise(objective: Objective, optimiser: torch.optim.Adam, batch: Batch) -> Float[Tensor, " numbers"]:
    """Take one training step on a batch; returns the loss parts and the gradient's norm, still on the device.

    From the first step in which one of them is not finite, further updates are skipped.
    """
    objective.model.train()
    optimiser.zero_grad(set_to_none=True)
    parts = objective(batch)
    numbers = torch.cat([parts, gradient_norm(objective.model)[None]])
    broken = ((numbers * 0).sum() != 0).float()  # of a number that is not finite, NaN
    torch.maximum(optimiser.found_inf, broken, out=optimiser.found_inf)
    if numbers.device.type != "mps" or not optimiser.found_inf.item():  # torch's kernel for MPS ignored found_inf
        optimiser.step()
    return numbers


def named_parts(numbers: Float[Tensor, " numbers"], recipe: Recipe) -> dict[str, float]:
    """A step's loss parts and gradient norm by name."""
    return dict(zip((*recipe.loss_names, "gradient"), numbers.tolist(), strict=True))


class _Run:
    """The state of one training: model, optimiser, batches and progress."""

    def __init__(self, recipe: Recipe, annotations: DataFrame, pixels: Any, folder: Path, progress, team: Team = ALONE):
        from irra_core.scale.compiled import compile_blocks
        from irra_core.scale.machine import forget_peak
        from irra_core.scale.precision import half_weights
        from irra_core.scale.saving import Saver
        from irra_core.variants.shuffled import shuffled_captions

        forget_peak()  # of a run before this one in the same process
        self.recipe, self.annotations, self.pixels = recipe, annotations, pixels
        self.folder, self.progress, self.team = folder, progress, team
        self.device = default_device()
        train = annotations[annotations.split == "train"].reset_index(drop=True)
        table = shuffled_captions(train, recipe.shuffled_captions, recipe.seed)
        near = on_device(pixels, self.device) if resides(pixels, self.device) else pixels
        tokens = tokenize(table.caption.tolist(), length=recipe.text_length)
        self.batches = Batches(table, near, tokens, recipe, self.device)
        self.model = self.initial_model(recipe)
        self.precision = step_precision(recipe.precision, self.device)
        if self.precision == "fp16":
            half_weights(self.model)
        if recipe.compile:
            compile_blocks(self.model)
        self.optimiser = build_optimiser(self.model, recipe)
        self.unread: list[Tensor] = []  # the last steps' loss parts and gradient norms, still on the device
        self.step, self.history, self.seconds = 0, [], {"training": 0.0}
        self.best_step, self.best_score = 0, -math.inf  # of the evaluation whose weights are selected so far
        self.objective = Objective(self.model, recipe, self.precision, team)
        self.hard_pids = known_twins(annotations, recipe)
        self.total = min(recipe.epochs * self.batches.steps_per_epoch, recipe.max_steps or math.inf)
        self.every = recipe.evaluate_every or self.batches.steps_per_epoch
        self.saver = Saver(folder, recipe)
        self.resume()

    def initial_model(self, recipe: Recipe) -> IRRA:
        """The model before its first step."""
        return build_model(recipe, len(self.batches.classes))

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        return learning_rate(step // self.batches.steps_per_epoch, self.recipe)

    def fit(self) -> Iterator[dict[str, Any]]:
        """Take the remaining steps; yields a row per evaluation, while what a resume needs is written to the disk.

        If this process is killed before it is written, a resume takes the last steps again, on a CPU with the same
        result (on a GPU: docs/determinism.md).
        """
        sums, since, numbers = 0.0, self.step, {}
        shown = {"total": self.total, "initial": self.step, "unit": "step", "desc": f"training {self.recipe.losses}"}
        with self.saver, progress_bar(self.progress, **shown) as bar:
            while self.step < self.total:
                began = time.perf_counter()
                for group in self.optimiser.param_groups:
                    group["lr"] = self.learning_rate(self.step) * group["factor"]
                self.unread.append(optimise(self.objective, self.optimiser, self.batches.at(self.step, *self.team)))
                sums = sums + self.unread[-1][:-1]
                self.step += 1
                self.saver.check()
                evaluates = self.step % self.every == 0 or self.step == self.total
                if evaluates or self.step % READ_LOSSES_EVERY == 0:
                    self.check_finite()
                    numbers["loss"] = f"{sums.sum().item() / (self.step - since):.3f}"
                    bar.set_postfix(numbers, refresh=False)
                self.seconds["training"] += time.perf_counter() - began
                bar.update(1)
                if evaluates:
                    row = self.evaluation_row((sums / (self.step - since)).tolist())
                    numbers |= {name: f"{value:.1f}" for name, value in row.items() if name.endswith("_R1")}
                    bar.set_postfix(numbers, refresh=False)
                    sums, since = 0.0, self.step
                    self.save()
                    yield row

    def check_finite(self) -> None:
        """Raise FloatingPointError, naming step, parts and learning rate, if a loss or a gradient is not finite."""
        broken = (~torch.isfinite(torch.stack(self.unread))).any(1).nonzero().flatten().tolist()
        first = self.step - len(self.unread)
        unread, self.unread = self.unread, []
        if not broken:
            return
        step, parts = first + broken[0], named_parts(unread[broken[0]], self.recipe)
        lr = self.learning_rate(step)
        if self.team.leads:
            self.save_failed(step, parts, lr)
        self.team.wait()  # torchrun ends all processes when the first one ends
        raise FloatingPointError(
            f"a loss or its gradient is not finite at step {step + 1}: {parts}, lr {lr:g}. Lower lr or raise the "
            f"precision. {self.folder} keeps the state of the last evaluation, and for scale.failures.replay the "
            f"weights before the step ({runs.FAILED}) and its batch ({runs.FAILED_BATCH})"
        )

    def save_failed(self, step: int, parts: dict[str, float], lr: float) -> None:
        """Write what scale.failures needs: the weights, not updated since the step, and its batch."""
        taken = self.batches.at(step)
        batch = {name: value for name, value in vars(taken).items() if isinstance(value, Tensor)}
        batch["image_ids"] = self.batches.images[batch["rows"].cpu()]
        about = {"step": str(step + 1), "lr": str(lr), "elapsed": str(taken.elapsed)}
        about["parts"] = json.dumps({name: str(value) for name, value in parts.items()})
        save_checkpoint(self.model, self.recipe, self.folder / runs.FAILED, merge=False)
        save_tensors(batch, self.folder / runs.FAILED_BATCH, about)

    def evaluation_row(self, losses: list[float]) -> dict[str, Any]:
        """The row of history of an evaluation on the selecting split; notes whether it is the best so far."""
        recipe = self.recipe
        epoch = self.step / self.batches.steps_per_epoch
        row = {"epoch": round(epoch, 4), "step": self.step, "lr": self.learning_rate(self.step - 1)}
        row |= dict(zip(recipe.loss_names, losses)) | {"loss": sum(losses)}
        split = "test" if recipe.select_on == "test" else "val"
        if (self.annotations.split == split).any():
            found = scores(self.evaluated(self.model, split).text_to_image)
            row |= {f"{split}_{name}": value for name, (value, _, _) in found.items()}
        score = self.step if recipe.select_on == "last" else row[f"{split}_R1"]
        if score > self.best_score:
            self.best_step, self.best_score = self.step, score
        self.history.append(row)
        return row

    def evaluated(self, model: IRRA, split: str) -> Evaluation:
        """The scores of a model on one split of this run's data."""
        began, precision = time.perf_counter(), self.recipe.precision
        shared = {"pixels": self.pixels, "hard_pids": self.hard_pids, "precision": precision, "team": self.team}
        found = evaluate(model, self.annotations, split, progress=self.progress, **shared)
        self.seconds["evaluation"] = self.seconds.get("evaluation", 0.0) + time.perf_counter() - began
        return found

    def save(self) -> None:
        """Begin to write what a resume needs, and the weights if they are the best so far (see scale.saving)."""
        about = {"step": self.step, "best": [self.best_step, self.best_score]}
        if self.team.leads:
            self.saver.save(self.model, self.optimiser, about | {"history": self.history, "seconds": self.seconds})

    def resume(self) -> None:
        """Continue from the last evaluation, if there was one."""
        from irra_core.scale.saving import last_state, save_weights

        if (state := last_state(self.folder)) is None:
            return
        self.model.load_state_dict(state.weights)
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": state.moments})
        self.step, self.history, self.seconds = (state.about[name] for name in ("step", "history", "seconds"))
        self.best_step, self.best_score = state.about["best"]
        if state.selected and self.team.leads:
            save_weights(self.model, self.recipe, self.folder, self.step)

    def finish(self, counts: dict[str, int]) -> None:
        """Write metrics.json, which begins with `counts`, queries.csv and machine.json: test is read here, once."""
        from irra_core.scale.machine import run_machine
        from irra_core.variants.adapters import merge

        selected = {"on": self.recipe.select_on, "step": self.best_step} | self.model.clip.origin
        metrics: dict[str, Any] = {"selected": selected} | counts
        merge(self.model)
        if (self.annotations.split == "test").any():
            self.team.wait()  # until process 0 has written them
            load_weights(self.model, self.folder / runs.WEIGHTS)
            trained = self.evaluated(self.model, "test")
            metrics |= trained.metrics
            for name, model in self.starting_points():
                start = self.evaluated(model, "test").text_to_image
                metrics |= {name: scores(start), f"gain_over_{name}": gain(trained.text_to_image, start)}
            if (ceiling := known_ceiling(self.annotations, self.recipe)) is not None:
                metrics["ceiling_R1"] = ceiling
            if self.team.leads:
                columns = trained.text_to_image.drop(columns="caption")  # real captions may not be handed on
                runs.write_text(self.folder / "queries.csv", columns.to_csv(index=False, lineterminator="\n"))
        if not self.team.leads:
            return
        machine = run_machine(self.model, self.optimiser, self.seconds, self.step * self.recipe.batch_size)
        machine |= {"processes": self.team.processes, "precision": self.precision}
        runs.write_text(self.folder / "machine.json", json.dumps(machine, indent=2))
        runs.write_text(self.folder / "metrics.json", json.dumps(metrics, indent=2))
        runs.clear(self.folder)

    def starting_points(self) -> Iterator[tuple[str, IRRA]]:
        """The models to compare the trained one with: random weights, and the pretrained CLIP without fine-tuning.

        One at a time, so that the device need not hold both beside the trained one.
        """
        recipes = {"untrained": self.recipe.replace(**PLAIN), "pretrained": self.recipe}
        for name, recipe in recipes.items():
            if name == "untrained" or recipe.pretrained != "none":
                model = self.initial_model(recipe)
                model.selection = None  # a head of random weights is no part of either
                yield name, model


def main(arguments: list[str] | None = None) -> None:
    """The program of `torchrun … -m irra_core.training FOLDER`: trains, in each process, the run prepared in FOLDER."""
    from irra_core.scale.distributed import run_process

    run_process(_trained, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
