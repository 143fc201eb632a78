"""What the transformers share: a block's two halves, the vocabulary head. How a half enters the residual stream, and
what it is modulated by, is each network's own law.

Shape suffixes: B batch, L length, D width, H heads. Attribute names are the parameter names of the reference
checkpoints and must not change.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palimpsest.models.attention import apply_rotary, attend
from palimpsest.models.layers import LayerNorm, feed_forward, zero_linear

Rotary = tuple[Tensor, Tensor]
# Stores new keys and values, gives back all that may be attended to.
Remember = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def queried(at_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Where the True positions of each row are, (B, Q) with Q the most of any row, and which of these are meant."""
    count_B = at_BL.sum(-1)
    at_BQ = at_BL.long().argsort(dim=-1, descending=True, stable=True)[:, : max(1, int(count_B.max()))]
    return at_BQ, torch.arange(at_BQ.shape[1], device=at_BQ.device) < count_B[:, None]


def rows_at(x_BLD: Tensor, at_BQ: Tensor) -> Tensor:
    """x at some positions of each row, (B, Q, D)."""
    return x_BLD.gather(1, at_BQ[..., None].expand(-1, -1, x_BLD.shape[-1]))


class TransformerBlock(nn.Module):
    """The layers of a block and its two halves, `attention` and `transform`, each dropped out and without residual."""

    def __init__(self, dim: int, n_heads: int, dropout: float, attn_backend: str, causal: bool = False) -> None:
        super().__init__()
        self.n_heads, self.dropout, self.attn_backend, self.causal = n_heads, dropout, attn_backend, causal
        self.norm1 = LayerNorm(dim)
        self.attn_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.attn_out = nn.Linear(dim, dim, bias=False)
        self.norm2 = LayerNorm(dim)
        self.mlp = feed_forward(dim)

    def attention_at(self, x_BLD: Tensor, rotary: Rotary, key_mask_BL: Tensor | None, at_BQ: Tensor) -> Tensor:
        """What `attention` gives at the positions `at_BQ` of each row, (B, Q, D), at the cost of their queries only."""
        dim = x_BLD.shape[-1]
        q = F.linear(rows_at(x_BLD, at_BQ), self.attn_qkv.weight[:dim]).unflatten(-1, (self.n_heads, -1))
        k, v = self.keys_and_values(x_BLD)
        q, k = apply_rotary(q, *(table[at_BQ] for table in rotary)), apply_rotary(k, *rotary)
        return self.project(attend(q, k, v, key_mask_BL, self.attn_backend))

    def keys_and_values(self, x_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (not rotated) and values of normed `x_BLD`, (B, L, H, D / H) each, without its queries."""
        kv = F.linear(x_BLD, self.attn_qkv.weight[x_BLD.shape[-1] :])
        return kv.unflatten(-1, (2, self.n_heads, -1)).unbind(dim=2)

    def project(self, attended: Tensor) -> Tensor:
        """What the heads (..., H, D / H) attended to, projected into the residual stream's width."""
        return self._drop(self.attn_out(attended.flatten(-2)))

    def attention(
        self, x_BLD: Tensor, rotary: Rotary, key_mask_BL: Tensor | None = None, remember: Remember | None = None
    ) -> Tensor:
        """Self-attention of normed `x_BLD`, over what `remember` adds to it as well."""
        q, k, v = self.attn_qkv(x_BLD).unflatten(-1, (3, self.n_heads, -1)).unbind(dim=2)
        q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
        if remember is not None:
            k, v = remember(k, v)
        return self.project(attend(q, k, v, key_mask_BL, self.attn_backend, self.causal))

    def transform(self, x_BLD: Tensor) -> Tensor:
        """The MLP of normed `x_BLD`."""
        return self._drop(self.mlp(x_BLD))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class Head(nn.Module):
    """Norm and vocabulary projection; the two halves are called apart (`normed`, then `linear`). With classes the
    projection has one more column for each (models/class_conditioning.py)."""

    def __init__(self, dim: int, vocab_size: int, num_classes: int = 0) -> None:
        super().__init__()
        self.norm_final = LayerNorm(dim)
        self.linear = zero_linear(dim + num_classes, vocab_size)

    def normed(self, x_BLD: Tensor) -> Tensor:
        return self.norm_final(x_BLD)
