"""Attention of several blocks → how much each token counts for the class or end token; how many tokens are selected.

Source: ITSELF (Nguyen et al., WACV 2026), "Multi-layer attention for robust selection" and "Adaptive token scheduler":
    Â = norm((A without its lowest quarter + I) / 2),   R = Π Â over a middle and the last block,
    k(t) = ⌊N · 0.65 · (0.5 / 0.65)^t⌋,   t the share of the schedule that is done
The selected tokens then go through token_selection's head.

The paper leaves open, and the authors' code says: A is the mean over heads; the quarter is that of all entries of A,
the first of them never dropped; norm divides each row by its sum; the blocks are the 5th and the 12th of 12, the
later one on the left. Neither fixes the following, and these are choices of this library: in an encoder of n blocks
they are the ones after n // 3 and at the end; the schedule runs over all epochs of the recipe (the code: 1,450 steps);
after training k stays at 0.5 (the code: 0.4). Its head has width 4,096 and a second classification loss; here it is
that of token_selection, so that the two ways to select can be compared.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from irra_core.augmentation import full_precision

FIRST, LAST = 0.65, 0.5  # share of the tokens that is selected at the start and at the end of training
DROPPED = 0.25


def ratio_at(elapsed: float) -> float:
    """The share of the tokens that is selected when a share `elapsed` of the training is done."""
    return FIRST * (LAST / FIRST) ** min(max(elapsed, 0.0), 1.0)


def recorded(kind: str, encoder: nn.Module) -> dict[int, list[Tensor]]:
    """What an encoder is to record: the attention of its last block and, for `layers`, of a middle one."""
    depth = len(encoder.transformer.resblocks)
    return {number: [] for number in ([depth // 3] if kind == "layers" else []) + [depth - 1]}


def seen(kind: str, record: Mapping[int, list[Tensor]]) -> Float[Tensor, "b n n"]:
    """How much each token counts for each other one, of the attention that was recorded."""
    blocks = [attention.detach() for (attention,) in record.values()]
    return full_precision(blocks[-1]).mean(1) if kind == "last" else rollout(blocks[0], blocks[-1])


@torch.no_grad()
def rollout(middle: Float[Tensor, "b heads n n"], last: Float[Tensor, "b heads n n"]) -> Float[Tensor, "b n n"]:
    """The attention of two blocks, one after the other: row i is what token i has seen.

    A text's attention is causal: more than a quarter of its entries are zeros, so dropping the quarter changes nothing.
    """
    return _kept(last) @ _kept(middle)


def _kept(attention: Float[Tensor, "b heads n n"]) -> Float[Tensor, "b n n"]:
    """Â of one block."""
    mean = full_precision(attention).mean(1)
    flat = mean.flatten(1)
    ranks = flat.argsort(dim=1, stable=True).argsort(dim=1)  # without a scatter, whose order a GPU does not promise
    kept = flat.masked_fill(ranks < int(flat.shape[1] * DROPPED), 0.0)
    kept[:, 0] = flat[:, 0]
    half = (kept.view_as(mean) + torch.eye(mean.shape[1], dtype=mean.dtype, device=mean.device)) / 2
    return half / half.sum(2, keepdim=True)
