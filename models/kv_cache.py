"""Caches of keys and values, so that sampling computes each token once.

Shape suffixes: B batch, R rows, L length, W tokens of the longest segment, K keys, H heads, D head width, N blocks.
"""

import torch
from torch import Tensor

MOST_AT_ONCE = 512  # clean tokens that one pass reads into a `BlockCache`


def one_token(embedding: Tensor, n_heads: int) -> Tensor:
    """Return an empty tensor like the keys of one token, (H, D), in a network with this embedding (V, H * D)."""
    kind = embedding.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else embedding.dtype
    return embedding.new_empty(n_heads, embedding.shape[1] // n_heads, dtype=dtype)


class CacheCapacity:
    """A cache with `length` of `capacity` positions filled, for batches of `batch_size` rows."""

    def __init__(self, batch_size: int, capacity: int) -> None:
        self.batch_size = batch_size
        self.capacity = capacity
        self.length = 0

    def check_capacity(self, tokens_BL: Tensor) -> None:
        """Check that new tokens fit. Raises ValueError if there are fewer free positions, or the batch size differs."""
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


class KVCache(CacheCapacity):
    """Keys (rotated) and values of all blocks, preallocated for `capacity` positions.

    A forward pass calls `append` once per block and then increases `length`. Without that it is a lookahead, which the
    next pass overwrites. For sampling, under `torch.no_grad()`.
    """

    def __init__(self, n_blocks: int, batch_size: int, capacity: int, token_HD: Tensor) -> None:
        super().__init__(batch_size, capacity)
        self.keys_NBLHD = token_HD.new_zeros(n_blocks, batch_size, capacity, *token_HD.shape)
        self.values_NBLHD = torch.zeros_like(self.keys_NBLHD)

    def append(self, block: int, k_BLHD: Tensor, v_BLHD: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values of a block, and return all of its keys and values."""
        end = self.length + k_BLHD.shape[1]
        self.keys_NBLHD[block, :, self.length : end] = k_BLHD
        self.values_NBLHD[block, :, self.length : end] = v_BLHD
        return self.keys_NBLHD[block, :, :end], self.values_NBLHD[block, :, :end]


class CleanCache:
    """The base of caches of clean tokens."""

    # Conditioning of the network and its adaLN output for every layer, once computed, if they are always the same.
    modulations: tuple[Tensor, list] | None = None


class BlockCache(CleanCache):
    """Keys (rotated) and values of the clean blocks of a text that is sampled block by block.

    `position` tokens came before; the keys and values of the last `window` of them are kept (None: of all). Rotary
    attention depends on distances only, so the kept keys need no new rotation when the oldest blocks are dropped. Rows
    whose text has ended are dropped with `keep`. For sampling, under `torch.no_grad()`.
    """

    def __init__(self, n_blocks: int, batch_size: int, length: int, window: int | None, token_HD: Tensor) -> None:
        self.window, self.position = window, 0
        self._filled = 0
        # Twice the window, so that old blocks are rarely dropped.
        self.capacity = length if window is None else min(length, 2 * window + MOST_AT_ONCE)
        self.keys_NBLHD = token_HD.new_zeros(n_blocks, batch_size, self.capacity, *token_HD.shape)
        self.values_NBLHD = torch.zeros_like(self.keys_NBLHD)

    def next_position(self, rows: Tensor | None = None) -> int:
        """Return the position of the next token, which is the same in all rows."""
        return self.position

    def key_mask(self, rows: Tensor | None = None) -> None:
        """Return None: every row sees all that is kept."""

    @property
    def num_seen(self) -> int:
        """Return the number of clean tokens that the next ones see."""
        return self._filled if self.window is None else min(self._filled, self.window)

    def append(self, block: int, k_RkHD: Tensor, v_RkHD: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the keys and values of a network block that new tokens of some rows see, their own last.

        Those of all rows are kept by `advance`, and overwritten if the next pass comes without it.
        """
        start, stop = self._filled - self.num_seen, self._filled + k_RkHD.shape[1]
        joined = []
        for kept_BLHD, new in ((self.keys_NBLHD[block], k_RkHD), (self.values_NBLHD[block], v_RkHD)):
            if stop <= self.capacity and (rows is None or len(rows) == len(kept_BLHD)):
                kept_BLHD[:, self._filled : stop] = new
                joined.append(kept_BLHD[:, start:stop])
            else:
                seen = kept_BLHD[:, start : self._filled]
                joined.append(torch.cat([(seen if rows is None else seen[rows]).to(new.dtype), new], dim=1))
        return tuple(joined)

    def make_room(self, new: int) -> None:
        """Drop tokens that no later token sees, if `new` tokens do not fit. Raises ValueError if they still
        do not fit."""
        if self._filled + new <= self.capacity:
            return
        kept = self.num_seen
        if kept + new > self.capacity:
            raise ValueError(f"the KV cache is full: {self.position} of {self.capacity} positions, {new} more came")
        for store in (self.keys_NBLHD, self.values_NBLHD):
            store[:, :, :kept] = store[:, :, self._filled - kept : self._filled].clone()
        self._filled = kept

    def advance(self, new: int) -> None:
        """Count `new` stored positions as filled."""
        self._filled, self.position = self._filled + new, self.position + new

    def keep(self, rows: list[int]) -> None:
        """Keep only these rows."""
        if len(rows) == self.keys_NBLHD.shape[1]:
            return
        self.keys_NBLHD, self.values_NBLHD = self.keys_NBLHD[:, rows], self.values_NBLHD[:, rows]


class SegmentCache(CleanCache):
    """Keys (rotated) and values of the clean segments of texts that are sampled segment by segment.

    Segment lengths differ between rows: each segment takes the space of the longest, and unused keys are hidden. For
    sampling, under `torch.no_grad()`.
    """

    def __init__(self, n_blocks: int, batch_size: int, token_HD: Tensor) -> None:
        self.keys_NBKHD = token_HD.new_zeros(n_blocks, batch_size, 0, *token_HD.shape)
        self.values_NBKHD = torch.zeros_like(self.keys_NBKHD)
        self.here_BK = token_HD.new_zeros(batch_size, 0, dtype=torch.bool)
        self._new: dict[int, tuple[Tensor, Tensor]] = {}

    def next_position(self, rows: Tensor | None = None) -> Tensor:
        """Return the position of the next token of each row, (R,)."""
        return self.key_mask(rows).sum(-1)

    def key_mask(self, rows: Tensor | None = None) -> Tensor:
        """Return True where a row has a token, (R, K)."""
        return self.here_BK if rows is None else self.here_BK[rows]

    @property
    def num_seen(self) -> int:
        """Return the number of keys that the next tokens may see."""
        return self.here_BK.shape[1]

    def append(self, block: int, k_RWHD: Tensor, v_RWHD: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the keys and values of a network block for some rows, the new ones last.

        `key_mask` tells which of the others are in use. Those of all rows are kept by `advance`, and forgotten if the
        next pass comes without it.
        """
        self._new[block] = k_RWHD, v_RWHD
        stores = self.keys_NBKHD[block], self.values_NBKHD[block]
        kept = (x_BKHD if rows is None else x_BKHD[rows] for x_BKHD in stores)
        return tuple(torch.cat([x.to(new.dtype), new], dim=1) for x, new in zip(kept, self._new[block], strict=True))

    def advance(self, here_BW: Tensor) -> None:
        """Add what was stored to the cache; `here_BW` is True on tokens."""
        news = (torch.stack(of_blocks) for of_blocks in zip(*(self._new[n] for n in sorted(self._new)), strict=True))
        pairs = zip((self.keys_NBKHD, self.values_NBKHD), news, strict=True)
        self.keys_NBKHD, self.values_NBKHD = (torch.cat([x, new.to(x.dtype)], dim=2) for x, new in pairs)
        self.here_BK, self._new = torch.cat([self.here_BK, here_BW], dim=1), {}
