"""Attention behind one call: `attend(q, k, v, ...)`, whichever kernel runs it.

Shape suffixes: B batch, L length, Q queries, K keys, H heads, D head width.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor


def resolve_backend(name: str) -> str:
    """Return `name` if it can run here.

    Raises:
        ValueError: its package is not installed.
    """
    if name == "flash_attn" and importlib.util.find_spec("flash_attn") is None:
        raise ValueError(
            "model.attn_backend=flash_attn needs the package flash-attn (a CUDA build); "
            "install it, or use model.attn_backend=sdpa, which runs everywhere"
        )
    return name


def head_width(hidden_size: int, n_heads: int) -> int:
    """Dimensions of one attention head.

    Raises:
        ValueError: the heads do not share `hidden_size` evenly, or their dimensions do not pair up.
    """
    if hidden_size % (2 * n_heads):
        raise ValueError(
            f"model.hidden_size={hidden_size} must be a multiple of 2 * model.n_heads={2 * n_heads}: "
            "rotary attention pairs the dimensions of each head"
        )
    return hidden_size // n_heads


def attend(
    q_BQHD: Tensor, k_BKHD: Tensor, v_BKHD: Tensor, key_mask_BK: Tensor | None, backend: str, causal: bool = False
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, of shape (B, Q, H, D).

    `key_mask_BK` is True where a position may be attended to; None means everywhere. A key mask always runs
    on SDPA: the padded flash-attn kernels take none. So does flex, which earns its keep where a mask has empty tiles
    (models/block_attention.py). `causal`: the queries are the last Q of the K positions, and
    each sees the keys up to its own.
    """
    if backend == "flash_attn" and key_mask_BK is None:
        # Not an import statement: transformers would ask users of an exported model to install whatever those name.
        return importlib.import_module("flash_attn").flash_attn_func(q_BQHD, k_BKHD, v_BKHD, causal=causal)
    queries, keys = q_BQHD.shape[1], k_BKHD.shape[1]
    mask = None if key_mask_BK is None else key_mask_BK[:, None, None, :]
    # SDPA's own causal flag counts the queries from the first key and goes with no mask; a single query sees all keys.
    plain_causal = causal and queries == keys and mask is None
    if causal and not plain_causal and queries > 1:
        earlier_QK = torch.ones(queries, keys, dtype=torch.bool, device=q_BQHD.device).tril(keys - queries)
        mask = earlier_QK if mask is None else mask & earlier_QK
    out_BHQD = F.scaled_dot_product_attention(
        q_BQHD.transpose(1, 2), k_BKHD.transpose(1, 2), v_BKHD.transpose(1, 2), attn_mask=mask, is_causal=plain_causal
    )
    return out_BHQD.transpose(1, 2)


def rotary_angles(inv_freq: Tensor, length: int, start: int | Tensor = 0) -> tuple[Tensor, Tensor]:
    """cos and sin of position * frequency, each (L, D/2), for the `length` positions from `start` on
    (RoFormer, arXiv 2104.09864, eq. 34); (B, L, D/2) where each row starts at a place of its own, (B,)."""
    position_L = torch.arange(length, device=inv_freq.device)
    position = position_L + (start[:, None] if isinstance(start, Tensor) else start)
    angle = position.to(inv_freq.dtype)[..., None] * inv_freq
    return angle.cos(), angle.sin()


def apply_rotary(x_BLHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of each head (GPT-NeoX layout, not interleaved). The tables are (L, D/2), or (B, L, D/2)
    where every row has positions of its own."""
    cos, sin = (table.unsqueeze(-2).to(x_BLHD.dtype) for table in (cos, sin))
    first, second = x_BLHD.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
