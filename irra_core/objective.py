"""A batch → the loss parts and every weight's gradient: in one piece or several, in one process or many."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor

from irra_core.batches import ALONE, Batch, Team
from irra_core.losses import total_loss
from irra_core.model import IRRA, Features
from irra_core.recipes import Recipe


def computes_bf16(device: torch.device) -> bool:
    """True where the device has instructions for bf16; emulated bf16 is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    asked = device.type == "cpu" and hasattr(torch.cpu, "get_capabilities")  # older torch cannot say; MPS: not measured
    able = torch.cpu.get_capabilities() if asked else {}
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


@contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """The arithmetic in which scores are computed for a recipe's `precision`; `auto`: bf16 on a GPU that has it.

    With fp16 the weights are half too (see scale.precision) and nothing scales the loss, as released.
    """
    from irra_core.scale.cpu import accelerated
    from irra_core.scale.precision import fused_attention

    if precision == "auto" and device.type == "cuda" and computes_bf16(device):
        precision = "bf16"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    with torch.autocast(device.type, dtype) if dtype else nullcontext(), accelerated(device), fused_attention(device):
        yield


def step_precision(precision: str, device: torch.device) -> str:
    """The arithmetic of a training step: `auto` is bf16 autocast on a GPU or CPU with bf16 instructions, else fp32.

    Scores are computed in fp32 on every CPU, so that two machines rank alike. bf16 halves the small model's step.
    Warns where the recipe asks for bf16 and the device only emulates it.
    """
    able = computes_bf16(device)
    if precision == "bf16" and not able:
        warnings.warn(
            "precision bf16: this device has no instructions for it and imitates them, on a CPU a hundred times as "
            "slowly; take precision auto or fp32",
            stacklevel=2,
        )
    return precision if precision != "auto" else "bf16" if able else "fp32"


def loss_parts(
    model: IRRA, batch: Batch, recipe: Recipe, precision: str, team: Team = ALONE
) -> dict[str, Float[Tensor, ""]]:
    """Every loss of the recipe on one batch, in the arithmetic of a training step; equal in all processes.

    The contrastive losses and ID see the features of the whole batch, gathered from all processes; MLM is summed over
    the processes and divided by all masked words.
    """
    from irra_core.scale.precision import step_arithmetic

    with step_arithmetic(model, precision):
        features = model(*batch.inputs)
    if team.processes > 1:
        both = team.gathered(torch.cat([features.image, features.text], 1), len(batch.all_pids))
        image, text = both.chunk(2, 1)
        found = Features(image, text, word_logits=features.word_logits, word_labels=features.word_labels)
        features = model.classified(found)
    parts = total_loss(features, batch.all_pids, recipe, batch.word_count, elapsed=batch.elapsed)
    if "mlm" in parts and team.processes > 1:
        parts["mlm"] = team.gathered(parts["mlm"][None], team.processes).sum()
    return parts


class Objective:
    """What one training step differentiates. Called with a batch, it adds each weight's gradient to its `.grad`.

    With `recipe.micro_batch` a process has only that many pairs in memory at once; the gradient is still that of the
    whole batch (see scale.gradients).
    """

    def __init__(self, model: IRRA, recipe: Recipe, precision: str, team: Team = ALONE):
        self.model, self.recipe, self.precision, self.team = model, recipe, precision, team
        self.parallel = None
        if team.processes > 1:
            from irra_core.scale.gradients import parallel

            self.parallel = parallel(self)

    def __call__(self, batch: Batch) -> Float[Tensor, " losses"]:
        """The loss parts, in the recipe's order, without a graph."""
        size = self.recipe.micro_batch
        pairs = -(-len(batch.all_pids) // self.team.processes)  # rounded up: the same in each process
        if size is not None and pairs > size:
            from irra_core.scale.gradients import in_pieces

            return torch.stack(list(in_pieces(self, batch, size).values())).detach()
        parts = self.parallel(batch) if self.parallel else loss_parts(self.model, batch, self.recipe, self.precision)
        losses = torch.stack(list(parts.values()))
        losses.sum().backward()
        return losses.detach()


def gradient_norm(model: torch.nn.Module) -> Float[Tensor, ""]:
    """The norm of all gradients together, summed in single precision: not finite if any entry is not.

    Also non-finite above 1e19, where the square overflows.
    """
    gradients: dict[torch.dtype, list[Tensor]] = {}
    for parameter in model.parameters():
        if parameter.grad is not None:
            gradients.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    norms = [norm for alike in gradients.values() for norm in torch._foreach_norm(alike, 2, torch.float32)]
    return torch.linalg.vector_norm(torch.stack(norms))
