"""Attention of block diffusion with segments: blocks of any length, which differ between rows.

The predicate is that of models/block_attention.py, on segment numbers in a tensor. The mask depends on the batch, so
SDPA gets a dense one (also for flash-attn, which takes none) and flex a predicate on indices. Both are built once for
all layers.
Shape suffixes: B batch, L length, Q queries, K keys.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from palimpsest.models.attention import sdpa
from palimpsest.models.block_attention import QKV, allow_recompilation, flex_attend, takes_flex, visible


@dataclass(frozen=True)
class SegmentMasks:
    """The masks of a batch: `noised` over the keys [clean ; noised], `clean` over the clean keys.

    Each is a tensor (B, 1, Q, K), or the mask type of flex.
    """

    noised: object
    clean: object

    def attend(self, noised: QKV, clean: QKV) -> tuple[Tensor, Tensor | None]:
        """Return the attention of the noised queries and of the clean ones (if any), each (B, L, H, D)."""
        k, v = torch.cat([clean.k, noised.k], dim=1), torch.cat([clean.v, noised.v], dim=1)
        attended = _attend(noised.q, k, v, self.noised)
        return attended, None if clean.q is None else _attend(clean.q, clean.k, clean.v, self.clean)


def segment_masks(segment_BL: Tensor, key_mask_BL: Tensor | None, backend: str, head_width: int) -> SegmentMasks:
    """Build the masks of a batch.

    Args:
        segment_BL: the segment of each token, in order from 0.
        key_mask_BL: False on padding.
    """
    build = _flex_mask if takes_flex(backend, segment_BL.device, head_width) else _dense_mask
    rows, length = segment_BL.shape

    def seen(b: Tensor, query: Tensor, key: Tensor, noised: Tensor) -> Tensor:
        """Return whether the query sees the key, one of [clean ; noised]."""
        position = key % length
        sees = visible(segment_BL[b, query], segment_BL[b, position], noised, key >= length)
        return sees if key_mask_BL is None else sees & key_mask_BL[b, position].bool()

    yes = torch.ones((), dtype=torch.bool, device=segment_BL.device)
    noised = build(lambda b, query, key: seen(b, query, key, yes), rows, length, 2 * length, segment_BL.device)
    clean = build(lambda b, query, key: seen(b, query, key, ~yes), rows, length, length, segment_BL.device)
    return SegmentMasks(noised, clean)


def _dense_mask(seen: Callable, rows: int, queries: int, keys: int, device: torch.device) -> Tensor:
    b, query, key = (torch.arange(number, device=device) for number in (rows, queries, keys))
    return seen(b[:, None, None], query[:, None], key)[:, None]


def _flex_mask(seen: Callable, rows: int, queries: int, keys: int, device: torch.device) -> object:
    from torch.nn.attention.flex_attention import create_block_mask

    allow_recompilation()
    return create_block_mask(lambda b, h, query, key: seen(b, query, key), rows, None, queries, keys, device=device)


def _attend(q_BQHD: Tensor, k_BKHD: Tensor, v_BKHD: Tensor, mask: object) -> Tensor:
    return (sdpa if isinstance(mask, Tensor) else flex_attend)(q_BQHD, k_BKHD, v_BKHD, mask)
