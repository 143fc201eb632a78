"""Division of texts into blocks: blocks of one size, or the segments of each text.

Shape suffixes: B batch, L length, R rows (B * num_blocks), S segments, k tokens of a block.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class BlockLayout(Protocol):
    """A map between texts, (B, L), and their blocks as rows of their own, (R, k), padded with zeros.

    Positions selected in blocks have the same order as in texts.

    Attributes:
        blocks: what networks read: tokens of each block, or the block number of each token, (B, L).
        num_blocks: blocks of a text.
    """

    blocks: int | Tensor
    num_blocks: int

    def split(self, x_BL: Tensor) -> Tensor: ...

    def merge(self, x_Rk: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class EqualBlocks:
    """Blocks of `blocks` tokens; the last one of a text may be shorter."""

    batch: int
    length: int
    blocks: int

    @property
    def num_blocks(self) -> int:
        return -(-self.length // self.blocks)

    def split(self, x_BL: Tensor) -> Tensor:
        width = min(self.blocks, self.length)
        return F.pad(x_BL, (0, self.num_blocks * width - self.length)).reshape(-1, width)

    def merge(self, x_Rk: Tensor) -> Tensor:
        return x_Rk.reshape(self.batch, -1)[:, : self.length]


@dataclass(frozen=True)
class SegmentBlocks:
    """Blocks of any lengths, which differ from text to text.

    Each block starts a row of `length` tokens, so the noise of a row does not depend on the length of its block.

    Args:
        ends_BS: end (exclusive) of each segment except the last.
        length: tokens of a text.
    """

    ends_BS: Tensor
    length: int

    @property
    def num_blocks(self) -> int:
        return self.ends_BS.shape[1] + 1

    @cached_property
    def blocks(self) -> Tensor:
        return (torch.arange(self.length, device=self.ends_BS.device) >= self.ends_BS[..., None]).sum(1)

    @cached_property
    def _start_BS(self) -> Tensor:
        return F.pad(self.ends_BS, (1, 0))

    def split(self, x_BL: Tensor) -> Tensor:
        index_BSL = self._start_BS[..., None] + torch.arange(self.length, device=x_BL.device)
        inside_BSL = index_BSL < F.pad(self.ends_BS, (0, 1), value=self.length)[..., None]
        rows_BSL = x_BL[:, None].expand_as(index_BSL).gather(2, index_BSL.clamp(max=self.length - 1))
        return rows_BSL.masked_fill(~inside_BSL, 0).flatten(0, 1)

    def merge(self, x_Rk: Tensor) -> Tensor:
        place_L = torch.arange(self.length, device=x_Rk.device)
        index_BL = self.blocks * self.length + place_L - self._start_BS.gather(1, self.blocks)
        return x_Rk.reshape(len(self.ends_BS), -1).gather(1, index_BL)
