"""Attention behind one call, `attend(q, k, v, ...)`, for all kernels.

Shape suffixes: B batch, L length, Q queries, K keys, H heads, D head width.
"""

import importlib
import importlib.util
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_FLASH_DTYPES = (torch.float16, torch.bfloat16)  # what flash-attn computes in


def resolve_backend(name: str) -> str:
    """Return `name` if that backend is installed. Raises ValueError if its package is missing."""
    if name == "flash_attn" and importlib.util.find_spec("flash_attn") is None:
        raise ValueError(
            "model.attn_backend=flash_attn needs the package flash-attn (a CUDA build); "
            "install it, or use model.attn_backend=sdpa, which runs everywhere"
        )
    return name


def takes_flash(backend: str, q_BQHD: Tensor) -> bool:
    """Return whether flash-attn is asked for and computes in the queries' precision; in sampling that is float32."""
    return backend == "flash_attn" and q_BQHD.dtype in _FLASH_DTYPES


def head_width(hidden_size: int, n_heads: int) -> int:
    """Return the number of dimensions of an attention head. Raises ValueError if `hidden_size` does not divide into
    heads of an even width."""
    if hidden_size % (2 * n_heads):
        raise ValueError(
            f"model.hidden_size={hidden_size} must be a multiple of 2 * model.n_heads={2 * n_heads}: "
            "rotary attention pairs the dimensions of each head"
        )
    return hidden_size // n_heads


class SeenKeys(NamedTuple):
    """The keys that queries may attend to.

    Attributes:
        mask: True for those keys, (B, K), or (B, Q, K) by query.
        starts: the same for kernels that take no mask, if Q = K: where the runs of positions that attend to each other
            begin in the flattened rows, and the end of the last run, int32 (S + 1,). Padding is a run of its own.
    """

    mask: Tensor
    starts: Tensor | None = None


def seen_keys(key_mask_BL: Tensor | None, document_BL: Tensor | None, backend: str) -> SeenKeys | None:
    """Return the keys that are seen, None for all.

    Args:
        key_mask_BL: False on padding, which is on the right; None without padding.
        document_BL: the document of each token, which sees those of its own only; None if it sees all.
        backend: with flash_attn the runs are found too. With documents the device is waited for.
    """
    if key_mask_BL is None and document_BL is None:
        return None
    mask = key_mask_BL
    if document_BL is not None:
        mask = document_BL[:, :, None] == document_BL[:, None]
        mask = mask if key_mask_BL is None else mask & key_mask_BL[:, None].bool()
    return SeenKeys(mask, _run_starts(key_mask_BL, document_BL) if backend == "flash_attn" else None)


def _run_starts(key_mask_BL: Tensor | None, document_BL: Tensor | None) -> Tensor:
    if document_BL is None:
        rows, length = key_mask_BL.shape
        row_B = length * torch.arange(rows, device=key_mask_BL.device)
        start_S = torch.stack([row_B, row_B + key_mask_BL.sum(-1)], dim=1).flatten()
        return F.pad(start_S, (0, 1), value=rows * length).int()
    run_BL = document_BL if key_mask_BL is None else document_BL.masked_fill(~key_mask_BL.bool(), -1)
    begins_BL = torch.ones_like(run_BL, dtype=torch.bool)
    begins_BL[:, 1:] = run_BL[:, 1:] != run_BL[:, :-1]
    return F.pad(begins_BL.flatten().nonzero()[:, 0], (0, 1), value=run_BL.numel()).int()


def attend(
    q_BQHD: Tensor,
    k_BKHD: Tensor,
    v_BKHD: Tensor,
    key_mask: Tensor | None,
    backend: str,
    causal: bool = False,
    starts: Tensor | None = None,
) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v, (B, Q, H, D).

    Args:
        key_mask: True where a position may be attended to, (B, K), or (B, Q, K) by query; None for everywhere.
        backend: auto, sdpa, flash_attn or flex. Auto and flex mean SDPA here; flex pays where a mask has empty tiles
            (models/block_attention.py). flash_attn takes no mask, so with one but without `starts` SDPA is used, and
            in float32 too.
        causal: the queries are the last Q of the K positions, and each attends to the keys up to its own.
        starts: those of `SeenKeys`, with the same meaning as `key_mask` wherever a query is not padding.
    """
    if takes_flash(backend, q_BQHD) and (key_mask is None or starts is not None):
        # Not an import statement: transformers asks users of an exported model to install every imported package.
        kernels = importlib.import_module("flash_attn")
        if starts is None:
            return kernels.flash_attn_func(q_BQHD, k_BKHD, v_BKHD, causal=causal)
        rows, length = q_BQHD.shape[:2]
        q, k, v = (x.flatten(0, 1) for x in (q_BQHD, k_BKHD, v_BKHD))
        out = kernels.flash_attn_varlen_func(q, k, v, starts, starts, length, length, causal=causal)
        return out.unflatten(0, (rows, length))
    queries, keys = q_BQHD.shape[1], k_BKHD.shape[1]
    mask = None
    if key_mask is not None:
        mask = key_mask[:, None] if key_mask.ndim == 3 else key_mask[:, None, None]
    # SDPA's causal flag aligns the first query with the first key and excludes a mask; a single query sees all keys.
    plain_causal = causal and queries == keys and mask is None
    if causal and not plain_causal and queries > 1:
        earlier_QK = torch.ones(queries, keys, dtype=torch.bool, device=q_BQHD.device).tril(keys - queries)
        mask = earlier_QK if mask is None else mask & earlier_QK
    return sdpa(q_BQHD, k_BKHD, v_BKHD, mask, plain_causal)


def sdpa(q_BQHD: Tensor, k_BKHD: Tensor, v_BKHD: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
    """Run torch's scaled dot-product attention on tensors with the length before the heads, (B, Q, H, D)."""
    q, k, v = (x.transpose(1, 2) for x in (q_BQHD, k_BKHD, v_BKHD))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal).transpose(1, 2)


def rotary_angles(inv_freq: Tensor, length: int, start: int | Tensor = 0) -> tuple[Tensor, Tensor]:
    """Return cos and sin of position * frequency for `length` positions (RoFormer, arXiv 2104.09864, eq. 34): (L, D/2),
    or (B, L, D/2) if `start` is (B,), the first position of each row."""
    position_L = torch.arange(length, device=inv_freq.device)
    position = position_L + (start[:, None] if isinstance(start, Tensor) else start)
    angle = position.to(inv_freq.dtype)[..., None] * inv_freq
    return angle.cos(), angle.sin()


def apply_rotary(x_BLHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of each head (GPT-NeoX layout, not interleaved) by tables (L, D/2) or (B, L, D/2)."""
    cos, sin = (table.unsqueeze(-2).to(x_BLHD.dtype) for table in (cos, sin))
    first, second = x_BLHD.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
