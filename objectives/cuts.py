"""How the texts of block diffusion are cut into blocks: stretches of one size, or segments of a text's own.

Shape suffixes: B batch, L length, R rows, S segments, k tokens of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Cut(Protocol):
    """(B, L) <-> (B * number, k): texts, and their blocks as rows of their own, filled up with zeros. Positions chosen
    in blocks have the same order as in texts."""

    blocks: int | Tensor  # as networks are told: tokens of each, or (B, L), the number of each token's block

    @property
    def number(self) -> int:
        """Blocks of a text."""

    def apart(self, x_BL: Tensor) -> Tensor: ...

    def together(self, x_Rk: Tensor) -> Tensor: ...

    def of_blocks(self, t_B: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Stretches:
    """Blocks of `blocks` tokens; the last one of a text may be shorter."""

    batch: int
    length: int
    blocks: int

    @property
    def number(self) -> int:
        return -(-self.length // self.blocks)

    def apart(self, x_BL: Tensor) -> Tensor:
        width = min(self.blocks, self.length)
        return F.pad(x_BL, (0, self.number * width - self.length)).reshape(-1, width)

    def together(self, x_Rk: Tensor) -> Tensor:
        return x_Rk.reshape(self.batch, -1)[:, : self.length]

    def of_blocks(self, t_B: Tensor) -> Tensor:
        return t_B.repeat_interleave(self.number)


@dataclass(frozen=True)
class Segments:
    """Blocks of any lengths, which differ from text to text. Each becomes a row of `length` tokens and begins with it,
    so that noise for rows of blocks is the same however long they are.

    ends_BS: the tokens before which each segment but the last ends.
    """

    ends_BS: Tensor
    length: int

    @property
    def number(self) -> int:
        return self.ends_BS.shape[1] + 1

    @cached_property
    def blocks(self) -> Tensor:
        place_L = torch.arange(self.length, device=self.ends_BS.device)
        return (place_L >= self.ends_BS[..., None]).sum(1)

    @cached_property
    def _start_BS(self) -> Tensor:
        return F.pad(self.ends_BS, (1, 0))

    @cached_property
    def _place_BSL(self) -> Tensor:
        """Where in its text each token of a row stands; beyond its segment for those that fill the row up."""
        return self._start_BS[..., None] + torch.arange(self.length, device=self.ends_BS.device)

    @cached_property
    def _here_BSL(self) -> Tensor:
        return self._place_BSL < F.pad(self.ends_BS, (0, 1), value=self.length)[..., None]

    def apart(self, x_BL: Tensor) -> Tensor:
        rows_BSL = x_BL[:, None].expand_as(self._place_BSL).gather(2, self._place_BSL.clamp(max=self.length - 1))
        return rows_BSL.masked_fill(~self._here_BSL, 0).flatten(0, 1)

    def together(self, x_Rk: Tensor) -> Tensor:
        place_L = torch.arange(self.length, device=x_Rk.device)
        index_BL = self.blocks * self.length + place_L - self._start_BS.gather(1, self.blocks)
        return x_Rk.reshape(len(self.ends_BS), -1).gather(1, index_BL)

    def of_blocks(self, t_B: Tensor) -> Tensor:
        return t_B.repeat_interleave(self.number)
