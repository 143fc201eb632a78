"""Layers of the MMDiT: the block of both streams, the times, the latent stream's two ends.

Shape suffixes: B batch, L length, Q queried positions, D width of the text stream, K latent tokens, E width of the
latent stream, C conditioning width, H heads, W width of a head, S numbers of a latent token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palimpsest.models.attention import apply_rotary, attend
from palimpsest.models.layers import LayerNorm, RMSNorm, SigmaEmbedding, feed_forward, modulate, zero_linear
from palimpsest.models.transformer import Rotary, TransformerBlock, rows_at

# Sinusoids of models/layers.py tell times of 0 to 1000 apart; those of 0 to 1 all look alike to them.
TIME_SCALE = 1000.0


class HeadNorm(RMSNorm):
    """RMS norm of each head's W numbers, with a gain for each of them in each head: (..., H, W) -> the same."""

    def __init__(self, n_heads: int, width: int) -> None:
        super().__init__(n_heads * width)
        self.n_heads = n_heads

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            normed = F.rms_norm(wide, x.shape[-1:], eps=self.eps) * self.weight.unflatten(0, (self.n_heads, -1))
        return normed.to(x.dtype)


class LatentLayers(nn.Module):
    """What a block has for latent tokens. Queries, keys and values are as wide as the text's."""

    def __init__(self, dim: int, text_dim: int, cond_dim: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.n_heads, self.dropout = n_heads, dropout
        self.norm1 = LayerNorm(dim)
        self.attn_qkv = nn.Linear(dim, 3 * text_dim, bias=False)
        self.q_norm, self.k_norm = HeadNorm(n_heads, text_dim // n_heads), HeadNorm(n_heads, text_dim // n_heads)
        self.attn_out = nn.Linear(text_dim, dim, bias=False)
        self.norm2 = LayerNorm(dim)
        self.mlp = feed_forward(dim)
        self.adaLN_modulation = zero_linear(cond_dim, 6 * dim)

    def queries_keys_values(self, normed_BKE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, K, H, W) each."""
        q, k, v = self.attn_qkv(normed_BKE).unflatten(-1, (3, self.n_heads, -1)).unbind(dim=2)
        return self.q_norm(q), self.k_norm(k), v

    def project(self, attended: Tensor) -> Tensor:
        """What the heads (B, K, H, W) attended to, in the stream's width."""
        return F.dropout(self.attn_out(attended.flatten(-2)), self.dropout, self.training)

    def transform(self, x_BKE: Tensor) -> Tensor:
        """The MLP of normed `x_BKE`."""
        return F.dropout(self.mlp(x_BKE), self.dropout, self.training)


class JointBlock(TransformerBlock):
    """A block of the DiT, with layers for latents beside it and one attention over both. Every branch is gated into its
    stream by adaLN that starts at zero, so that a new block changes nothing.

    gated: the text's attention is that over the text alone, plus what the latents change in it times a gate for each
    head that starts at zero; its queries and keys are not normed (models/mmdit.py: `text_as_dit`).
    """

    def __init__(
        self, dim: int, latent_dim: int, cond_dim: int, n_heads: int, dropout: float, attn_backend: str, gated: bool
    ) -> None:
        super().__init__(dim, n_heads, dropout, attn_backend)
        self.gated = gated
        self.adaLN_modulation = zero_linear(cond_dim, 6 * dim)
        self.latent = LatentLayers(latent_dim, dim, cond_dim, n_heads, dropout)
        if gated:
            self.adaLN_gate = zero_linear(cond_dim, n_heads)
        else:
            self.q_norm, self.k_norm = HeadNorm(n_heads, dim // n_heads), HeadNorm(n_heads, dim // n_heads)

    def forward(
        self,
        x_BLD: Tensor,
        z_BKE: Tensor,
        c_BC: Tensor,
        e_BC: Tensor,
        rotary: Rotary,
        key_mask_BL: Tensor | None,
        at_BQ: Tensor | None = None,
        both: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Both streams one block on: text (B, L, D), or at the positions `at_BQ` only, (B, Q, D), and latents, None
        unless `both` are asked for."""
        shift_att, scale_att, gate_att, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c_BC).chunk(6, dim=-1)
        by_z = self.latent.adaLN_modulation(e_BC).chunk(6, dim=-1)
        text = self._text(modulate(self.norm1(x_BLD), shift_att, scale_att), rotary, at_BQ)
        latent = self.latent.queries_keys_values(modulate(self.latent.norm1(z_BKE), by_z[0], by_z[1]))
        attended, attended_z = self._attend(text, latent, key_mask_BL, both)
        if self.gated:
            alone = attend(*text, key_mask_BL, self.attn_backend)
            attended = alone + self.adaLN_gate(c_BC)[:, None, :, None] * (attended - alone)
        x_BQD = x_BLD if at_BQ is None else rows_at(x_BLD, at_BQ)
        x_BQD = x_BQD + gate_att[:, None] * self.project(attended)
        x_BQD = x_BQD + gate_mlp[:, None] * self.transform(modulate(self.norm2(x_BQD), shift_mlp, scale_mlp))
        if not both:
            return x_BQD, None
        z_BKE = z_BKE + by_z[2][:, None] * self.latent.project(attended_z)
        normed_BKE = modulate(self.latent.norm2(z_BKE), by_z[3], by_z[4])
        return x_BQD, z_BKE + by_z[5][:, None] * self.latent.transform(normed_BKE)

    def _text(self, normed_BLD: Tensor, rotary: Rotary, at_BQ: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The text's queries (B, Q, H, W), keys and values (B, L, H, W), turned by their places."""
        angles = rotary
        if at_BQ is None:
            q, k, v = self.attn_qkv(normed_BLD).unflatten(-1, (3, self.n_heads, -1)).unbind(dim=2)
        else:
            angles = tuple(table[at_BQ] for table in rotary)
            of_queries = self.attn_qkv.weight[: normed_BLD.shape[-1]]
            q = F.linear(rows_at(normed_BLD, at_BQ), of_queries).unflatten(-1, (self.n_heads, -1))
            k, v = self.keys_and_values(normed_BLD)
        if not self.gated:
            q, k = self.q_norm(q), self.k_norm(k)
        return apply_rotary(q, *angles), apply_rotary(k, *rotary), v

    def _attend(
        self, text: tuple[Tensor, ...], latent: tuple[Tensor, ...], key_mask_BL: Tensor | None, both: bool
    ) -> tuple[Tensor, Tensor | None]:
        """One softmax over the keys of both streams: what text sees (B, Q, H, W), what latents, (B, K, H, W)."""
        (q, k, v), (q_z, k_z, v_z) = text, latent
        mask = None if key_mask_BL is None else F.pad(key_mask_BL.bool(), (0, k_z.shape[1]), value=True)
        queries = torch.cat([q, q_z], dim=1) if both else q
        seen = attend(queries, torch.cat([k, k_z], dim=1), torch.cat([v, v_z], dim=1), mask, self.attn_backend)
        return (seen[:, : q.shape[1]], seen[:, q.shape[1] :]) if both else (seen, None)


class Times(nn.Module):
    """The times of both modalities, from 0 to 1, (B,) each -> one vector (B, C) of the two together."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.of_text, self.of_latent = SigmaEmbedding(dim), SigmaEmbedding(dim)
        self.mix = nn.Sequential(nn.SiLU(), nn.Linear(2 * dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, dim))
        self.to_text = zero_linear(dim, dim)

    def forward(self, text_t_B: Tensor, latent_t_B: Tensor) -> Tensor:
        text_BC, latent_BC = self.of_text(TIME_SCALE * text_t_B), self.of_latent(TIME_SCALE * latent_t_B)
        return self.mix(torch.cat([text_BC, latent_BC], dim=-1))


class LatentInput(nn.Module):
    """Latent tokens into their stream, (B, K, S) -> (B, K, E): an MLP of the normed numbers, and beside it a linear map
    of them as they are, because the norm of a noised latent says how much of it is signal. Of several tokens each has a
    vector of its own that says which it is: they are parts of one ordered latent. float32 under autocast."""

    def __init__(self, numbers: int, dim: int, tokens: int = 1) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(numbers)
        self.mlp = nn.Sequential(nn.Linear(numbers, 2 * dim), nn.GELU(approximate="tanh"), nn.Linear(2 * dim, dim))
        self.skip = nn.Linear(numbers, dim, bias=False)
        self.which_KE = nn.Parameter(0.02 * torch.randn(tokens, dim)) if tokens > 1 else None

    def forward(self, latent_BKS: Tensor) -> Tensor:
        with torch.autocast(latent_BKS.device.type, enabled=False):
            said_BKE = self.mlp(self.norm(latent_BKS)) + self.skip(latent_BKS)
            return said_BKE if self.which_KE is None else said_BKE + self.which_KE


class LatentOutput(nn.Module):
    """Latent tokens out of their stream, (B, K, E) -> (B, K, S), by an MLP that starts at zero; float32 under
    autocast."""

    def __init__(self, dim: int, numbers: int, cond_dim: int, dropout: float) -> None:
        super().__init__()
        self.norm_final = LayerNorm(dim)
        self.adaLN_modulation = zero_linear(cond_dim, 2 * dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 2 * dim), nn.GELU(approximate="tanh"), nn.Dropout(dropout), zero_linear(2 * dim, numbers)
        )

    def forward(self, z_BKE: Tensor, e_BC: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(e_BC).chunk(2, dim=-1)
        with torch.autocast(z_BKE.device.type, enabled=False):
            wide = self.norm_final(z_BKE)
            return self.mlp(modulate(wide, shift.to(wide.dtype), scale.to(wide.dtype)))
