"""Selected tokens → one feature: the head of token selection, with batch norm over all processes.

For the selected tokens t of width d: feature = max over t of FC(t) + MLP(t), FC: d → 2d, MLP: d → d → 2d with batch
norm and ReLU between (in the paper 512 → 1024 and 512 → 512 → 1024). Parameters at d = 512: 1.31 M.
Source: RDE (Qin et al., CVPR 2024), "Token Selection Embedding"; numbers as in the authors' code.

Not as there: batch norm counts real tokens only, not the padding that stands for missing words there, so that the
length of a batch changes nothing; the weights of a second, unused batch norm and linear layer are left out.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from irra_core.augmentation import full_precision
from irra_core.batches import ALONE, Team
from irra_core.transformer import pick


def selected(
    tokens: Float[Tensor, "b n d"], scores: Float[Tensor, "b n"], count: int
) -> tuple[Float[Tensor, "b k d"], Bool[Tensor, "b k"]]:
    """The `count` tokens with the highest scores, l2-normalised; True for scores from 0, and for the highest."""
    best, at = scores.topk(max(1, min(count, tokens.shape[1])), dim=1)
    first = torch.arange(best.shape[1], device=best.device) == 0
    return F.normalize(full_precision(pick(tokens, at)), dim=2), (best >= 0) | first


class SelectionHead(nn.Module):
    """The maximum over the real tokens of FC(token) + MLP(token), in full precision."""

    def __init__(self, dim: int):
        super().__init__()
        self.direct, self.hidden, self.out = nn.Linear(dim, 2 * dim), nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.norm = BatchNorm(dim)

    def forward(self, tokens: Float[Tensor, "b k d"], real: Bool[Tensor, "b k"]) -> Float[Tensor, "b e"]:
        with torch.autocast(tokens.device.type, enabled=False):
            hidden = F.relu(self.norm(_linear(self.hidden, tokens), real))
            states = _linear(self.direct, tokens) + _linear(self.out, hidden)
            return states.masked_fill(~real[..., None], -torch.inf).amax(1)


def _linear(layer: nn.Linear, states: Float[Tensor, "b k d"]) -> Float[Tensor, "b k e"]:
    """The layer's result in full precision, also where its weights are half (see half_weights)."""
    return full_precision(layer(states.to(layer.weight.dtype)))


class BatchNorm(nn.Module):
    """Each channel less its mean, over its deviation, in the real tokens of the whole batch; then scaled and shifted.

    Outside of training the running mean and variance are taken. Momentum and epsilon are torch's. torch's own module
    needs a GPU to count over processes, and cannot leave padding out.
    """

    def __init__(self, width: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))

    def forward(self, states: Float[Tensor, "b k d"], real: Bool[Tensor, "b k"]) -> Float[Tensor, "b k d"]:
        mean, variance = self.mean, self.variance
        if self.training:
            share = real[..., None].to(states.dtype)
            count = over_processes(share.sum()[None])
            mean = over_processes((states * share).sum((0, 1))) / count
            variance = over_processes(((states - mean).square() * share).sum((0, 1))) / count
            with torch.no_grad():
                self.mean.lerp_(mean, 0.1)
                self.variance.lerp_(variance * count / (count - 1).clamp(min=1), 0.1)
        return (states - mean) * (variance + 1e-5).rsqrt() * self.weight + self.bias


def over_processes(sums: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """The sum over all processes, with its gradient."""
    team = Team(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else ALONE
    return team.gathered(sums[None], team.processes).sum(0)
