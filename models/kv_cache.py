"""Keys and values of the positions a causal network has seen, so that each token is computed once.

Shape suffixes: B batch, L length, H heads, D head width, N blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Room:
    """What every cache counts: `length` of `capacity` positions are filled, in batches of `batch_size` rows."""

    batch_size: int
    capacity: int
    length: int

    def check_room(self, tokens_BL: Tensor) -> None:
        """Refuse tokens that do not fit.

        Raises:
            ValueError: more positions than are left, or another batch size.
        """
        assert not torch.is_grad_enabled(), "no gradient flows through a KV cache: use it under torch.no_grad()"
        batch_size, new = tokens_BL.shape
        if self.length + new > self.capacity:
            raise ValueError(
                f"the KV cache is full: it has room for {self.capacity} positions, {self.length} are filled, "
                f"{new} more came; make one of at least {self.length + new} with new_cache(batch_size, length)"
            )
        if batch_size != self.batch_size:
            raise ValueError(
                f"the KV cache was made for batches of {self.batch_size} rows, this one has {batch_size}; "
                "make another with new_cache(batch_size, length)"
            )


class KVCache(Room):
    """Keys (rotated, at their positions) and values of all blocks, preallocated for `capacity` positions.

    `length` positions are filled. A forward pass calls `append` once per block and then `advance`; appending without
    advancing is a look ahead, which the next pass overwrites. For sampling, under `torch.no_grad()`.
    """

    def __init__(
        self, n_blocks: int, batch_size: int, capacity: int, n_heads: int, head_dim: int,
        device: torch.device, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        shape = (n_blocks, batch_size, capacity, n_heads, head_dim)
        self.keys_NBLHD = torch.zeros(shape, device=device, dtype=dtype)
        self.values_NBLHD = torch.zeros(shape, device=device, dtype=dtype)
        self.batch_size, self.capacity, self.length = batch_size, capacity, 0

    def append(self, block: int, k_BLHD: Tensor, v_BLHD: Tensor) -> tuple[Tensor, Tensor]:
        """Store a block's new keys and values behind the filled positions; all of them, the new ones included."""
        end = self.length + k_BLHD.shape[1]
        self.keys_NBLHD[block, :, self.length : end] = k_BLHD
        self.values_NBLHD[block, :, self.length : end] = v_BLHD
        return self.keys_NBLHD[block, :, :end], self.values_NBLHD[block, :, :end]

    def advance(self, new: int) -> None:
        """Count `new` appended positions as filled."""
        self.length += new
