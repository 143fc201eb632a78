"""Attention behind one call: `attend(q, k, v, ...)`, whichever kernel runs it.

Shape suffixes: B batch, L length, H heads, D head width.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

BACKENDS = ("sdpa", "flash_attn")


def resolve_backend(name: str) -> str:
    """Return `name` if it can run here.

    Raises:
        ValueError: an unknown backend, or one whose package is not installed.
    """
    if name not in BACKENDS:
        raise ValueError(f"model.attn_backend={name} is unknown; choose one of: {', '.join(BACKENDS)}")
    if name == "flash_attn" and importlib.util.find_spec("flash_attn") is None:
        raise ValueError(
            "model.attn_backend=flash_attn needs the package flash-attn (a CUDA build); "
            "install it, or use model.attn_backend=sdpa, which runs everywhere"
        )
    return name


def attend(
    q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, key_mask_BL: Tensor | None, backend: str, causal: bool = False
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, of shape (B, L, H, D).

    `key_mask_BL` is True where a position may be attended to; None means everywhere. A key mask always runs
    on SDPA: the padded flash-attn kernels take none.
    """
    if backend == "flash_attn" and key_mask_BL is None:
        # Not an import statement: transformers would ask users of an exported model to install whatever those name.
        return importlib.import_module("flash_attn").flash_attn_func(q_BLHD, k_BLHD, v_BLHD, causal=causal)
    mask = None if key_mask_BL is None else key_mask_BL[:, None, None, :]
    out_BHLD = F.scaled_dot_product_attention(
        q_BLHD.transpose(1, 2), k_BLHD.transpose(1, 2), v_BLHD.transpose(1, 2), attn_mask=mask, is_causal=causal
    )
    return out_BHLD.transpose(1, 2)


def rotary_angles(inv_freq: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin of position * frequency, each (L, D/2), for positions 0..L-1 (RoFormer, arXiv 2104.09864, eq. 34)."""
    angle_LD = torch.outer(torch.arange(length, device=inv_freq.device, dtype=inv_freq.dtype), inv_freq)
    return angle_LD.cos(), angle_LD.sin()


def apply_rotary(x_BLHD: Tensor, cos_LD: Tensor, sin_LD: Tensor) -> Tensor:
    """Rotate the two halves of each head (GPT-NeoX layout, not interleaved)."""
    cos, sin = (table[None, :, None, :].to(x_BLHD.dtype) for table in (cos_LD, sin_LD))
    first, second = x_BLHD.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
