"""Identities of the train rows + seed → an epoch's order in which each batch has P identities with K captions each.

Source: the P × K batches of Hermans et al., "In Defense of the Triplet Loss for Person Re-Identification", 2017, which
the identity sampler of the released code follows. There an identity's left-over captions are dropped and the number
of batches depends on the draw; here an epoch has every caption at least once and always the same number of batches.
"""

from collections import deque

import numpy as np
import torch
from jaxtyping import Int
from torch import Generator, Tensor


def balanced_length(pids: Int[Tensor, " rows"], per_identity: int) -> int:
    """How many rows an epoch's order has: each identity's captions, filled up to a multiple of `per_identity`."""
    counts = torch.unique(pids, return_counts=True)[1]
    return int((-(-counts // per_identity) * per_identity).sum())


def balanced_order(
    pids: Int[Tensor, " rows"], per_identity: int, batch_size: int, generator: Generator
) -> Int[Tensor, " order"]:
    """The rows of an epoch; each `batch_size` of them are groups of `per_identity` rows of different identities.

    An identity's captions are shuffled and cut into groups; the last group is filled up with captions drawn again.
    Its groups are spread evenly over the epoch. An identity comes twice in a batch only where too few others are left:
    in an epoch's last batches, or if it has more groups than the epoch has batches. Depends on nothing but its
    arguments.
    """
    draw = np.random.default_rng(torch.randint(2**62, (1,), generator=generator).item())
    groups = []  # time within the epoch, identity, rows
    for pid, rows in _rows_of_each(pids.numpy()):
        rows = draw.permutation(rows)
        more = -len(rows) % per_identity
        filled = np.concatenate([rows, np.resize(draw.permutation(rows), more)]).reshape(-1, per_identity)
        times = (np.arange(len(filled)) + draw.random(len(filled))) / len(filled)
        groups += zip(times.tolist(), [pid] * len(filled), filled, strict=True)
    waiting = deque(sorted(groups, key=lambda group: group[:2]))
    order: list[np.ndarray] = []
    while waiting:
        order += _batch(waiting, batch_size // per_identity)
    return torch.from_numpy(np.concatenate(order))


def _rows_of_each(pids: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Each identity with its rows, in the order of the identities."""
    order = np.argsort(pids, kind="stable")
    found, starts = np.unique(pids[order], return_index=True)
    return list(zip(found.tolist(), np.split(order, starts[1:]), strict=True))


def _batch(waiting: deque, count: int) -> list[np.ndarray]:
    """The rows of the first `count` groups of different identities, taken from `waiting`; repeated ones if need be."""
    taken, again, seen = [], [], set()
    while waiting and len(taken) < count:
        group = waiting.popleft()
        (again if group[1] in seen else taken).append(group)
        seen.add(group[1])
    waiting.extendleft(reversed(again))
    while waiting and len(taken) < count:
        taken.append(waiting.popleft())
    return [rows for _, _, rows in taken]
