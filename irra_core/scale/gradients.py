"""A batch in pieces or on several processes → the same loss parts and gradients as the whole batch on one process."""

import warnings
from contextlib import nullcontext
from dataclasses import replace
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from irra_core.batches import PLACES, Batch, masked_places
from irra_core.losses import mlm_loss, total_loss
from irra_core.model import IRRA, Features
from irra_core.objective import Objective, loss_parts
from irra_core.recipes import Recipe
from irra_core.scale.precision import step_arithmetic


def parallel(objective: Objective) -> DistributedDataParallel:
    """The objective's losses as a module whose gradients are averaged over all processes."""
    names, recipe = objective.recipe.loss_names, objective.recipe
    unused = ("mlm" in names and recipe.interaction == "co") or ("cmpc" in names and "id" not in names)
    with warnings.catch_warnings():  # newer torch renames gradient_as_bucket_view; 2.10 has only this name
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            _Losses(objective),
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            find_unused_parameters=unused,  # co-attention's last image block and CMPC's bias never get a gradient
        )


class _Losses(nn.Module):
    """The losses as a module: DistributedDataParallel finds the weights that get a gradient through its output.

    It holds no reference to the objective: with a reference cycle, the reducer's threads would outlive the process
    group.
    """

    def __init__(self, objective: Objective):
        super().__init__()
        self.model, self.recipe = objective.model, objective.recipe
        self.precision, self.team = objective.precision, objective.team

    def forward(self, batch: Batch, *of_piece: Tensor | None):
        """`loss_parts` of a whole batch, or `piece_loss` of a piece with its further arguments."""
        if of_piece:
            return self.piece_loss(batch, *of_piece)
        return loss_parts(self.model, batch, self.recipe, self.precision, self.team)

    def piece_loss(
        self, piece: Batch, gradient: Float[Tensor, "piece both"], features: Float[Tensor, "all both"] | None
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """The scalar to differentiate for one piece, and the piece's share of the MLM loss.

        `gradient` is that of the whole batch's losses at the piece's features. If the whole batch's `features` are
        given, the classifier and a learned temperature get their gradients too.
        """
        with step_arithmetic(self.model, self.precision):
            output = self.model(*piece.inputs)
        total = (torch.cat([output.image, output.text], 1) * gradient).sum()
        mlm = total.new_zeros(())
        if output.word_logits is not None:
            mlm = mlm_loss(output.word_logits, output.word_labels, piece.word_count)
            total = total + mlm * self.team.processes  # DistributedDataParallel averages the gradients
        if features is not None and (self.model.classifier is not None or self.model.log_scale is not None):
            total = total + sum(_losses_of_features(self.model, self.recipe, features, piece).values())
        return total, mlm.detach()


def in_pieces(objective: Objective, batch: Batch, size: int) -> dict[str, Float[Tensor, ""]]:
    """The loss parts of the whole batch, with `size` pairs in memory at once; adds its gradient to every `.grad`.

    All features are computed without a graph, then the losses' gradient with respect to them. Each piece is computed
    again and backpropagates its part of that gradient. This costs one more forward pass.
    Source: GradCache (Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021).
    """
    pieces, team, losses = pieces_of(batch, size), objective.team, objective.parallel or _Losses(objective)
    features, parts, gradient = _feature_gradient(objective, batch, pieces)
    mlm = features.new_zeros(())
    for number, (piece, piece_gradient) in enumerate(zip(pieces, gradient.split(size), strict=True), 1):
        last = number == len(pieces)  # only then do the processes reduce their gradients
        with nullcontext() if last or team.processes == 1 else losses.no_sync():
            total, piece_mlm = losses(piece, piece_gradient, features if last else None)
            if total.requires_grad:
                total.backward()
        mlm += piece_mlm
    if "mlm" in objective.recipe.loss_names:
        parts["mlm"] = team.gathered(mlm[None], team.processes).sum()
    return {name: parts[name] for name in objective.recipe.loss_names}


def pieces_of(batch: Batch, size: int) -> list[Batch]:
    """The same pairs in pieces of at most so many; of a batch without pairs, itself."""
    cut = ("images", "tokens", "masked_tokens", "labels", "pids", "rows", "at", "words_each")
    whole = batch
    if batch.at is None or batch.words_each is None:
        known = dict(zip(PLACES, masked_places(batch.labels), strict=True))
        whole = replace(batch, **known, words_each=tuple((batch.labels != 0).sum(1).tolist()))
    ends, pieces = [0, *accumulate(whole.words_each)], []
    for start in range(0, max(len(batch.rows), 1), size):
        mine = {name: getattr(whole, name)[start : start + size] for name in cut}
        own = slice(ends[start], ends[min(start + size, len(batch.rows))])
        wanted = whole.wanted[own] - start * whole.at.shape[1]
        pieces.append(replace(batch, **mine, wanted=wanted, words=whole.words[own]))
    return pieces


def _feature_gradient(
    objective: Objective, batch: Batch, pieces: list[Batch]
) -> tuple[Float[Tensor, "all both"], dict[str, Float[Tensor, ""]], Float[Tensor, "mine both"]]:
    """The whole batch's features, its losses except MLM, and their gradient at this process's features."""
    model = objective.model
    with torch.no_grad(), step_arithmetic(model, objective.precision):
        halves = [(model.encode_image(piece.images), model.encode_text(piece.tokens)) for piece in pieces]
    mine = torch.cat([torch.cat(half, 1) for half in halves]).requires_grad_()
    features = objective.team.gathered(mine, len(batch.all_pids))
    parts = _losses_of_features(model, objective.recipe, features, batch)
    return features.detach(), parts, torch.autograd.grad(sum(parts.values()), mine)[0]


def _losses_of_features(
    model: IRRA, recipe: Recipe, features: Float[Tensor, "all both"], batch: Batch
) -> dict[str, Float[Tensor, ""]]:
    """The losses except MLM from global features; each row holds the image and the text feature side by side."""
    names = [name for name in recipe.loss_names if name != "mlm"]
    output = model.classified(Features(*features.chunk(2, 1)))
    return total_loss(output, batch.all_pids, recipe, names=names, elapsed=batch.elapsed)
