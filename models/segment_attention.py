"""Attention of block diffusion where the blocks are segments, of any lengths, which differ from row to row: the same
predicate as in models/block_attention.py, on segment numbers that lie in a tensor.

What a row sees is known only with its batch, so SDPA is given a dense mask (flash-attn takes none, and leaves this to
SDPA), and flex a predicate on indices that reads the numbers; either is built once for all layers.
Shape suffixes: B batch, L length, Q queries, K keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from palimpsest.models.block_attention import QKV, flex_attend, visible


@dataclass(frozen=True)
class SegmentMasks:
    """What the two streams of a batch may see. noised: over the keys [clean ; noised]; clean: over the clean keys; each
    a tensor (B, 1, Q, K), or flex's own kind of mask."""

    noised: object
    clean: object

    def attend(self, noised: QKV, clean: QKV) -> tuple[Tensor, Tensor | None]:
        """What the noised queries and, if they are asked, the clean ones attend to: each (B, L, H, D)."""
        k, v = torch.cat([clean.k, noised.k], dim=1), torch.cat([clean.v, noised.v], dim=1)
        attended = _attend(noised.q, k, v, self.noised)
        return attended, None if clean.q is None else _attend(clean.q, clean.k, clean.v, self.clean)


def segment_masks(segment_BL: Tensor, key_mask_BL: Tensor | None, backend: str) -> SegmentMasks:
    """`segment_BL`: the segment that each token belongs to, in order from 0. `key_mask_BL` is False on padding."""
    build = _flex_mask if backend == "flex" else _dense_mask
    rows, length = segment_BL.shape

    def seen(b: Tensor, query: Tensor, key: Tensor, noised: Tensor) -> Tensor:
        """The keys are the clean ones, and behind them the noised ones."""
        place = key % length
        sees = visible(segment_BL[b, query], segment_BL[b, place], noised, key >= length)
        return sees if key_mask_BL is None else sees & key_mask_BL[b, place].bool()

    yes = torch.ones((), dtype=torch.bool, device=segment_BL.device)
    noised = build(lambda b, query, key: seen(b, query, key, yes), rows, length, 2 * length, segment_BL.device)
    clean = build(lambda b, query, key: seen(b, query, key, ~yes), rows, length, length, segment_BL.device)
    return SegmentMasks(noised, clean)


def _dense_mask(seen: Callable, rows: int, queries: int, keys: int, device: torch.device) -> Tensor:
    b, query, key = (torch.arange(number, device=device) for number in (rows, queries, keys))
    return seen(b[:, None, None], query[:, None], key)[:, None]


def _flex_mask(seen: Callable, rows: int, queries: int, keys: int, device: torch.device) -> object:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, query, key: seen(b, query, key), rows, None, queries, keys, device=device)


def _attend(q_BQHD: Tensor, k_BKHD: Tensor, v_BKHD: Tensor, mask: object) -> Tensor:
    if not isinstance(mask, Tensor):
        return flex_attend(q_BQHD, k_BKHD, v_BKHD, mask)
    q, k, v = (x.transpose(1, 2) for x in (q_BQHD, k_BKHD, v_BKHD))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
