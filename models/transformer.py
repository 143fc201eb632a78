"""Parts shared by the transformers: attention and MLP of a block, and the vocabulary head.

Shape suffixes: B batch, L length, Q queried positions, D width, H heads. Attribute names are the parameter names of the
reference checkpoints and must not change.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch.nn.functional as F
from torch import Tensor, nn

from palimpsest.models.attention import SeenKeys, apply_rotary, attend
from palimpsest.models.layers import LayerNorm, feed_forward, modulate, over_positions, zero_linear

Rotary = tuple[Tensor, Tensor]
# Appends new keys and values to a cache and returns all that may be attended to.
CacheAppend = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def take_positions(x_BLD: Tensor, at_BQ: Tensor | None) -> Tensor:
    """Return x at some positions of each row, (B, Q, D); all of it for `at_BQ` None."""
    return x_BLD if at_BQ is None else x_BLD.gather(1, at_BQ[..., None].expand(-1, -1, x_BLD.shape[-1]))


def rotary_at(rotary: Rotary, at_BQ: Tensor | None) -> Rotary:
    """Return the rotary tables at some positions of each row, (B, Q, D / 2); the whole tables for `at_BQ` None."""
    return rotary if at_BQ is None else (rotary[0][at_BQ], rotary[1][at_BQ])


@dataclass(frozen=True)
class Modulation:
    """The adaLN output for a layer, each (1, D) for all positions, (B, D) by row, (B, L, D) or (N, D) by position."""

    shift_att: Tensor
    scale_att: Tensor
    gate_att: Tensor
    shift_mlp: Tensor
    scale_mlp: Tensor
    gate_mlp: Tensor

    @classmethod
    def of(cls, layer: nn.Module, c: Tensor) -> Self:
        """Return the adaLN output of `layer` for its conditioning, (..., C)."""
        return cls(*layer.adaLN_modulation(c).chunk(6, dim=-1))

    def before_attention(self, layer: nn.Module, x_BLD: Tensor) -> Tensor:
        """Return the input of the attention of `layer`."""
        return modulate(layer.norm1(x_BLD), self.shift_att, self.scale_att)

    def after_attention(self, layer: nn.Module, x: Tensor, attended: Tensor) -> Tensor:
        """Apply the two residual steps of `layer`, to whole rows (B, L, D) or selected positions (N, D)."""
        x = x + over_positions(self.gate_att, x) * layer.project(attended)
        normed = modulate(layer.norm2(x), self.shift_mlp, self.scale_mlp)
        return x + over_positions(self.gate_mlp, x) * layer.transform(normed)


class Branches(nn.Module):
    """The ends of the two residual branches of a block, with its `attn_out`, `mlp` and `dropout`."""

    def project(self, attended: Tensor) -> Tensor:
        """Project the attention output (..., H, D / H) to the width of the residual stream."""
        return self._drop(self.attn_out(attended.flatten(-2)))

    def transform(self, x_BLD: Tensor) -> Tensor:
        """Apply the MLP to normed `x_BLD`."""
        return self._drop(self.mlp(x_BLD))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.training else x


class TransformerBlock(Branches):
    """The layers of a block. `attention` and `transform` apply dropout and leave the residual to the caller."""

    forward_methods: tuple[str, ...] = ()  # methods that run the block, besides `forward`

    def __init__(self, dim: int, n_heads: int, dropout: float, attn_backend: str, causal: bool = False) -> None:
        super().__init__()
        self.n_heads, self.dropout = n_heads, dropout
        self.attn_backend, self.causal = attn_backend, causal
        self.norm1 = LayerNorm(dim)
        self.attn_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.attn_out = nn.Linear(dim, dim, bias=False)
        self.norm2 = LayerNorm(dim)
        self.mlp = feed_forward(dim)

    def queries_keys_values(self, x_BLD: Tensor, at_BQ: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (at `at_BQ` only), keys and values of normed `x_BLD`, not rotated, (B, L, H, D / H) each."""
        if at_BQ is None:
            return self.attn_qkv(x_BLD).unflatten(-1, (3, self.n_heads, -1)).unbind(dim=2)
        of_queries = self.attn_qkv.weight[: x_BLD.shape[-1]]
        q = F.linear(take_positions(x_BLD, at_BQ), of_queries).unflatten(-1, (self.n_heads, -1))
        return q, *self.keys_and_values(x_BLD)

    def rotated(self, x_BLD: Tensor, rotary: Rotary, at_BQ: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the same with queries and keys rotated by their positions."""
        if at_BQ is not None:
            q, k, v = self.queries_keys_values(x_BLD, at_BQ)
            return apply_rotary(q, *rotary_at(rotary, at_BQ)), apply_rotary(k, *rotary), v
        heads = self.attn_qkv(x_BLD).unflatten(-1, (3 * self.n_heads, -1))
        qk, v = heads.split((2 * self.n_heads, self.n_heads), dim=2)
        return *apply_rotary(qk, *rotary).chunk(2, dim=2), v

    def keys_and_values(self, x_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys (not rotated) and values of normed `x_BLD`, (B, L, H, D / H) each."""
        kv = F.linear(x_BLD, self.attn_qkv.weight[x_BLD.shape[-1] :])
        return kv.unflatten(-1, (2, self.n_heads, -1)).unbind(dim=2)

    def attention(
        self,
        x_BLD: Tensor,
        rotary: Rotary,
        seen: SeenKeys | None = None,
        at_BQ: Tensor | None = None,
        append: CacheAppend | None = None,
    ) -> Tensor:
        """Return the attention of normed `x_BLD` to itself and the cached tokens, (B, Q, H, D / H), not yet projected.

        `seen` are keys of `x_BLD`, by the queries of all its positions.
        """
        q, k, v = self.rotated(x_BLD, rotary, at_BQ)
        if append is not None:
            k, v = append(k, v)
        key_mask, starts = seen or (None, None)
        if key_mask is not None and key_mask.ndim == 3:
            key_mask = take_positions(key_mask, at_BQ)
        return attend(q, k, v, key_mask, self.attn_backend, self.causal, starts if at_BQ is None else None)


class Head(nn.Module):
    """Norm and vocabulary projection, called separately: `normed`, then `linear`. With classes the projection has one
    more column for each (models/class_conditioning.py)."""

    def __init__(self, dim: int, vocab_size: int, num_classes: int = 0) -> None:
        super().__init__()
        self.norm_final = LayerNorm(dim)
        self.linear = zero_linear(dim + num_classes, vocab_size)

    def normed(self, x_BLD: Tensor) -> Tensor:
        return self.norm_final(x_BLD)
