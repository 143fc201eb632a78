"""Positions selected in a batch of rows, whose number the host knows.

A GPU runs behind the host. `x[mask]` makes the host wait, because the shape of the result depends on the mask.
`Positions` counts a mask once; everything that is selected with it afterwards has a known shape.

Shape suffixes: B batch, L length, R rows, N selected positions, M some of them, Q positions of the row that has most.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor


class Positions:
    """The True positions of a mask, in row-major order.

    Args:
        mask_BL: True at the positions.
        counts: number of positions in each row. None counts them, which waits for the device.

    Attributes:
        index_N: the positions in the flattened rows, (B * L,).
    """

    def __init__(self, mask_BL: Tensor, counts: list[int] | None = None) -> None:
        self.mask_BL = mask_BL
        self.counts = mask_BL.sum(-1).tolist() if counts is None else counts
        self.index_N = _true_places(mask_BL.flatten(), sum(self.counts))

    @classmethod
    def of_each(cls, *masks_BL: Tensor) -> list[Positions]:
        """Return the positions of several masks after one wait."""
        counts = torch.stack([mask_BL.sum(-1) for mask_BL in masks_BL]).tolist()
        return [cls(*pair) for pair in zip(masks_BL, counts, strict=True)]

    @classmethod
    def by_number(cls, number_BL: Tensor, how_many: int) -> Iterator[Positions]:
        """Return the positions with the numbers 0, ..., `how_many` - 1 one after another, after one wait."""
        beyond_BL = number_BL.where((number_BL >= 0) & (number_BL < how_many), how_many)
        counts_BS = beyond_BL.new_zeros(len(number_BL), how_many + 1)
        counts_BS.scatter_add_(1, beyond_BL, torch.ones_like(beyond_BL))
        counts = counts_BS.T[:how_many].tolist()
        return (cls(number_BL == number, of_rows) for number, of_rows in enumerate(counts))

    @classmethod
    def everywhere(cls, like_BL: Tensor) -> Positions:
        """Return all positions of `like_BL`."""
        batch, length = like_BL.shape
        return cls(torch.ones_like(like_BL, dtype=torch.bool), [length] * batch)

    def __len__(self) -> int:
        return len(self.index_N)

    @cached_property
    def row_N(self) -> Tensor:  # noqa: N802
        """The row of each position."""
        return self.index_N // self.mask_BL.shape[1]

    @cached_property
    def place_N(self) -> Tensor:  # noqa: N802
        """The place of each position in its row."""
        return self.index_N % self.mask_BL.shape[1]

    def take(self, x_BL: Tensor) -> Tensor:
        """Return the elements of `x_BL` (B, L, ...) at the positions, (N, ...)."""
        return x_BL.flatten(0, 1).index_select(0, self.index_N)

    def of_rows(self, value_B: Tensor) -> Tensor:
        """Return the value of each position's row, (N, ...)."""
        return value_B.index_select(0, self.row_N)

    def spread(self, values_N: Tensor, fill: float = 0.0) -> Tensor:
        """Return (B, L) with `values_N` at the positions and `fill` elsewhere; differentiable."""
        out = torch.full((self.mask_BL.numel(),), fill, dtype=values_N.dtype, device=values_N.device)
        return out.index_copy(0, self.index_N, values_N).view(self.mask_BL.shape)

    def write(self, x_BL: Tensor, values_N: Tensor | float) -> None:
        """Write `values_N` to the positions of `x_BL`, in place."""
        x_BL[self.row_N, self.place_N] = values_N

    def find(self, some: Positions) -> Tensor:
        """Return where the positions of `some` lie among these, (M,)."""
        if some is self:
            return torch.arange(len(self), device=self.index_N.device)
        return torch.searchsorted(self.index_N, some.index_N)

    def without(self, some: Positions) -> Positions:
        """Return these positions except those of `some`."""
        counts = [count - fewer for count, fewer in zip(self.counts, some.counts, strict=True)]
        return Positions(self.mask_BL & ~some.mask_BL, counts)

    def in_rows(self, start: int, stop: int) -> Positions:
        """Return the positions in the rows from `start` to `stop`, still as positions of all rows."""
        if (start, stop) == (0, len(self.counts)):
            return self
        mask_BL = torch.zeros_like(self.mask_BL)
        mask_BL[start:stop] = self.mask_BL[start:stop]
        return Positions(mask_BL, [count if start <= row < stop else 0 for row, count in enumerate(self.counts)])

    def compact(self) -> tuple[Tensor, Positions]:
        """Return the rows that have positions, (R,), and the positions within these rows, (R, L)."""
        counts = [count for count in self.counts if count]
        rows_R = _true_places(self.mask_BL.any(-1), len(counts))
        return rows_R, self if len(counts) == len(self.counts) else Positions(self.mask_BL[rows_R], counts)

    @cached_property
    def table_BQ(self) -> Tensor:  # noqa: N802
        """The places of each row, (B, Q); rows with fewer than Q are filled up with their last place."""
        batch, length = self.mask_BL.shape
        number_Q = torch.arange(1, self._width + 1, device=self.mask_BL.device)
        return torch.searchsorted(self._rank_BL, number_Q.expand(batch, -1).contiguous()).clamp(max=length - 1)

    def from_table(self, x_BQD: Tensor) -> Tensor:
        """Return the elements of `x_BQD`, computed at the places of `table_BQ`, (N, D)."""
        return x_BQD.flatten(0, 1).index_select(0, self.row_N * self._width + self.take(self._rank_BL) - 1)

    @property
    def _width(self) -> int:
        return max([1, *self.counts])

    @cached_property
    def _rank_BL(self) -> Tensor:  # noqa: N802
        return self.mask_BL.cumsum(-1)


def _true_places(mask_N: Tensor, number: int) -> Tensor:
    """Return the places of the True elements, whose `number` is known."""
    return torch.searchsorted(mask_N.cumsum(0), torch.arange(1, number + 1, device=mask_N.device))
