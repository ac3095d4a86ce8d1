"""A batch → the loss parts and every weight's gradient: in one piece or several, in one process or many."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from irra_core.batches import ALONE, Batch, Team
from irra_core.losses import mlm_loss, total_loss
from irra_core.model import IRRA, Features
from irra_core.recipes import Recipe


def computes_bf16(device: torch.device) -> bool:
    """True where the device has instructions for bf16: what only imitates them is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # older torch cannot say
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


@contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """The arithmetic that a recipe's `precision` asks for here (`auto`: bf16 on a GPU that has it, else fp32).

    With fp16 the weights are half too (see half_weights) and nothing scales the loss, as released. Training
    steps also take bf16 on a CPU that computes it (see step_precision); scores are fp32 there.
    """
    if precision == "auto" and device.type == "cuda" and computes_bf16(device):
        precision = "bf16"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    with torch.autocast(device.type, dtype) if dtype else nullcontext():
        yield


def step_precision(precision: str, device: torch.device) -> str:
    """The arithmetic of a training step: `auto` is bf16 autocast on a GPU or CPU with bf16 instructions, else fp32.

    Scores are computed in fp32 on every CPU, so that two machines rank alike. bf16 halves the small model's step; warns
    where it is asked for and only imitated.
    """
    able = computes_bf16(device)
    if precision == "bf16" and not able:
        warnings.warn(
            "precision bf16: this device has no instructions for it and imitates them, on a CPU a hundred times as "
            "slowly; take precision auto or fp32",
            stacklevel=2,
        )
    return precision if precision != "auto" else "bf16" if able else "fp32"


def half_weights(model: torch.nn.Module) -> torch.nn.Module:
    """The released code's fp16: matrices of convolutions, attention, linear layers and projections are half.

    LayerNorms and embeddings stay fp32. In place.
    """
    for name, parameter in model.named_parameters():
        if not any(word in name for word in ("ln_", ".ln.", "embedding")):
            parameter.data = parameter.data.half()
    return model


def loss_parts(
    model: IRRA, batch: Batch, recipe: Recipe, precision: str, team: Team = ALONE
) -> dict[str, Float[Tensor, ""]]:
    """Every loss of the recipe on one batch, in the arithmetic of a training step; every process gets the same values.

    The contrastive losses and ID see the features of the whole batch, gathered from all processes; MLM is summed over
    the processes and divided by all masked words.
    """
    with autocast(batch.pids.device, precision):
        features = model(*batch.inputs)
    if team.processes > 1:
        both = team.gathered(torch.cat([features.image, features.text], 1), len(batch.all_pids))
        image, text = both.chunk(2, 1)
        found = Features(image, text, word_logits=features.word_logits, word_labels=features.word_labels)
        features = model.classified(found)
    parts = total_loss(features, batch.all_pids, recipe, _class_weight(model), batch.word_count)
    if "mlm" in parts:
        parts["mlm"] = team.gathered(parts["mlm"][None], team.processes).sum()
    return parts


def _class_weight(model: IRRA) -> Float[Tensor, "ids dim"] | None:
    return None if model.classifier is None else model.classifier.weight


class Objective:
    """What one step of training differentiates. Called with a batch, it leaves each weight's gradient in `.grad`.

    With `recipe.micro_batch` only so many pairs of this process are in memory at once, and the gradient is still that
    of the whole batch: features are computed first without a graph, the losses' gradient with respect to them is kept,
    and each piece is computed again and pulled by it. That costs one more forward pass.
    Source: GradCache (Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021).
    """

    def __init__(self, model: IRRA, recipe: Recipe, precision: str, team: Team = ALONE):
        self.model, self.recipe, self.precision, self.team = model, recipe, precision, team
        self.losses = _Losses(model, recipe, precision, team)
        if team.processes > 1:
            with warnings.catch_warnings():  # newer torch has another name for the option, 2.10 only this one
                warnings.simplefilter("ignore", FutureWarning)
                self.losses = DistributedDataParallel(
                    self.losses,
                    broadcast_buffers=False,
                    gradient_as_bucket_view=True,
                    find_unused_parameters=_leaves_some_out(recipe),
                )

    def __call__(self, batch: Batch) -> Float[Tensor, " losses"]:
        """The loss parts, in the recipe's order, without a graph; gradients are added to what `.grad` holds."""
        most = -(-len(batch.all_pids) // self.team.processes)  # pairs of one process: the same number in each
        if self.recipe.micro_batch is None or most <= self.recipe.micro_batch:
            parts = self.losses(batch)
            parts.sum().backward()
            return parts.detach()
        return self._in_pieces(batch, self.recipe.micro_batch)

    def _in_pieces(self, batch: Batch, size: int) -> Float[Tensor, " losses"]:
        """The same parts and gradients, `size` pairs at a time."""
        pieces = batch.split(size)
        features, parts, pulls = self._pulled(batch, pieces)
        words = features.new_zeros(())
        for place, (piece, pull) in enumerate(zip(pieces, pulls.split(size), strict=True), 1):
            last = place == len(pieces)  # only then do the processes add up what they have
            with nullcontext() if last or self.team.processes == 1 else self.losses.no_sync():
                total, spoken = self.losses(piece, pull, features if last else None)
                if total.requires_grad:
                    total.backward()
            words += spoken
        if "mlm" in self.recipe.loss_names:
            parts["mlm"] = self.team.gathered(words[None], self.team.processes).sum()
        return torch.stack([parts[name] for name in self.recipe.loss_names]).detach()

    def _pulled(
        self, batch: Batch, pieces: list[Batch]
    ) -> tuple[Float[Tensor, "all both"], dict[str, Float[Tensor, ""]], Float[Tensor, "mine both"]]:
        """The whole batch's features, its losses but MLM, and their gradient at this process's features."""
        model = self.model
        with torch.no_grad(), autocast(batch.pids.device, self.precision):
            halves = [(model.encode_image(piece.images), model.encode_text(piece.tokens)) for piece in pieces]
        mine = torch.cat([torch.cat(half, 1) for half in halves]).requires_grad_()
        features = self.team.gathered(mine, len(batch.all_pids))
        names = [name for name in self.recipe.loss_names if name != "mlm"]
        parts = _losses_of_features(model, features, batch, self.recipe, names)
        return features.detach(), parts, torch.autograd.grad(sum(parts.values()), mine)[0]


class _Losses(nn.Module):
    """The losses as a module: DistributedDataParallel has to see in its output which weights get a gradient."""

    def __init__(self, model: IRRA, recipe: Recipe, precision: str, team: Team):
        super().__init__()
        self.model, self.recipe, self.precision, self.team = model, recipe, precision, team

    def forward(self, batch: Batch, pull: Tensor | None = None, features: Tensor | None = None):
        """The loss parts of a batch; of a piece, what is to be differentiated and its share of the MLM loss.

        `pull` is the gradient that the whole batch's losses have at the piece's features. With the whole batch's
        `features` the classifier gets its own gradient, too.
        """
        if pull is None:
            return torch.stack(list(loss_parts(self.model, batch, self.recipe, self.precision, self.team).values()))
        with autocast(batch.pids.device, self.precision):
            found = self.model(*batch.inputs)
        total = (torch.cat([found.image, found.text], 1) * pull).sum()
        words = total.new_zeros(())
        if found.word_logits is not None:
            words = mlm_loss(found.word_logits, found.word_labels, batch.word_count)
            total = total + words * self.team.processes  # whose gradients are averaged
        names = [name for name in self.recipe.loss_names if name in ("id", "cmpc")]
        if features is not None and names:
            total = total + sum(_losses_of_features(self.model, features, batch, self.recipe, names).values())
        return total, words.detach()


def _losses_of_features(
    model: IRRA, features: Float[Tensor, "all both"], batch: Batch, recipe: Recipe, names: list[str]
) -> dict[str, Float[Tensor, ""]]:
    """Those of the recipe's losses that global features decide; image and text stand side by side in a row."""
    found = model.classified(Features(*features.chunk(2, 1)))
    return total_loss(found, batch.all_pids, recipe, _class_weight(model), names=names)


def _leaves_some_out(recipe: Recipe) -> bool:
    """True where some weight never gets a gradient: co-attention's last image stream, CMPC's unused bias."""
    names = recipe.loss_names
    return ("mlm" in names and recipe.interaction == "co") or ("cmpc" in names and "id" not in names)
