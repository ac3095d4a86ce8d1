"""The rows of one process → the rows of all processes, with a gradient."""

import torch
import torch.distributed as dist
from torch import Tensor

from irra_core.batches import Team


class Gathered(torch.autograd.Function):
    """all_gather of parts whose numbers of rows may differ by one; backward: all_reduce, then this process's part."""

    @staticmethod
    def forward(ctx, rows: Tensor, team: Team, count: int) -> Tensor:
        ctx.team, ctx.count = team, count
        longest = -(-count // team.processes)
        padded = rows.new_zeros(longest, *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(team.processes)]
        dist.all_gather(parts, padded)
        slices = [Team(process, team.processes).part(count) for process in range(team.processes)]
        return torch.cat([part[: own.stop - own.start] for part, own in zip(parts, slices)])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient[ctx.team.part(ctx.count)], None, None
