"""Lengths of padded rows → which of their tokens are real, so that what padding needs not is not computed for it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Num
from torch import Tensor
from torch.autograd.function import once_differentiable

from irra_core.augmentation import moved


class Packing(NamedTuple):
    """Where the real tokens of rows [rows, length], padded behind, stand; packed, they lie one behind the other.

    Norms, linear maps and feed-forward layers take the tokens packed; attention takes them padded with zeros, which it
    masks. `places` are the packed tokens' places in rows · length; of each row, the packed ones begin at `starts` and
    are `lengths` many.
    """

    rows: int
    length: int
    places: Int[Tensor, " real"]
    starts: Int[Tensor, " rows"]
    lengths: Int[Tensor, " rows"]

    @classmethod
    def of(cls, lengths: Sequence[int], length: int, device: torch.device) -> "Packing":
        """That of rows of these lengths, padded to `length`; the host knows them, so that no GPU is asked."""
        each = np.asarray(lengths, dtype=np.int64)
        places = np.flatnonzero(np.arange(length) < each[:, None])
        parts = (torch.from_numpy(part) for part in (places, each.cumsum() - each, each))
        return cls(len(each), length, *(moved(part, device) for part in parts))

    def pack(self, padded: Num[Tensor, "rows length ..."]) -> Num[Tensor, "real ..."]:
        """The real tokens, row by row."""
        return _Take.apply(padded.flatten(0, 1), self.places)

    def pad(self, packed: Float[Tensor, "real ..."]) -> Float[Tensor, "rows length ..."]:
        """The tokens at their places in the rows, zeros in the padding."""
        return _Put.apply(packed, self.places, self.rows * self.length).unflatten(0, (self.rows, self.length))

    def pick(
        self, packed: Float[Tensor, "real dim"], at: Int[Tensor, "rows wanted"]
    ) -> Float[Tensor, "rows wanted dim"]:
        """The tokens at the given positions of each row; the row's last real one for positions in the padding."""
        found = self.starts[:, None] + at.minimum(self.lengths[:, None] - 1)
        return packed.index_select(0, found.flatten()).unflatten(0, at.shape)

    def twice(self) -> "Packing":
        """That of the same rows and as many more below them, each as long as its twin."""
        below = (self.rows * self.length, len(self.places), 0)
        parts = (torch.cat([part, part + add]) for part, add in zip(self[2:], below, strict=True))
        return Packing(2 * self.rows, self.length, *parts)

    def beside(self, count: int) -> "Packing":
        """That of rows with `count` more tokens each, all real; packed, these lie behind all of the present ones."""
        rows = torch.arange(self.rows, device=self.places.device)
        joined = self.length + count
        places = self.places + self.places // self.length * count
        others = rows[:, None] * joined + torch.arange(self.length, joined, device=rows.device)
        return self._replace(length=joined, places=torch.cat([places, others.flatten()]))


class _Take(torch.autograd.Function):
    """The named rows, each once: its gradient is put back at once, without adding."""

    @staticmethod
    def forward(ctx, tokens, places):
        ctx.save_for_backward(places)
        ctx.size = len(tokens)
        return tokens.index_select(0, places)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return _put(gradient, *ctx.saved_tensors, ctx.size), None


class _Put(torch.autograd.Function):
    """Rows at their places among zeros."""

    @staticmethod
    def forward(ctx, tokens, places, size):
        ctx.save_for_backward(places)
        return _put(tokens, places, size)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return gradient.index_select(0, *ctx.saved_tensors), None, None


def _put(tokens: Tensor, places: Tensor, size: int) -> Tensor:
    return tokens.new_zeros(size, *tokens.shape[1:]).index_copy_(0, places, tokens)
