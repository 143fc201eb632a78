"""Layers of the MMDiT: the block of both streams, the embedding of the times, input and output of the latent stream.

Shape suffixes: B batch, L length, Q queried positions, D width of the text stream, K latent tokens, E width of the
latent stream, C conditioning width, H heads, W width of a head, S numbers of a latent token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palimpsest.models.attention import apply_rotary, attend
from palimpsest.models.layers import (
    LayerNorm,
    RMSNorm,
    SigmaEmbedding,
    at_least_float32,
    feed_forward,
    modulate,
    zero_linear,
)
from palimpsest.models.transformer import Branches, Modulation, Rotary, TransformerBlock, rotary_at, take_positions

# The sinusoids of models/layers.py resolve times from 0 to 1000; times from 0 to 1 would all look alike.
TIME_SCALE = 1000.0


class HeadNorm(RMSNorm):
    """RMS norm of the W numbers of each head, with a gain per head and number: (..., H, W) -> the same."""

    def __init__(self, n_heads: int, width: int) -> None:
        super().__init__(n_heads * width)
        self.n_heads = n_heads

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            gain = self.weight.unflatten(0, (self.n_heads, -1))
            normed = F.rms_norm(at_least_float32(x), x.shape[-1:], eps=self.eps) * gain
        return normed.to(x.dtype)


class LatentLayers(Branches):
    """The layers of a block for latent tokens. Queries, keys and values are as wide as those of the text."""

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
        """Return normed queries, normed keys and values, (B, K, H, W) each."""
        q, k, v = self.attn_qkv(normed_BKE).unflatten(-1, (3, self.n_heads, -1)).unbind(dim=2)
        return self.q_norm(q), self.k_norm(k), v


class JointBlock(TransformerBlock):
    """A block of the DiT with further layers for latents and one attention over both streams. adaLN gates every branch
    into its stream, starting at zero, so that a new block changes nothing.

    Args:
        gated: the attention of the text is that over the text alone, plus the change due to the latents times a gate
            for each head that starts at zero; its queries and keys are not normed (`text_as_dit` in models/mmdit.py).
    """

    def __init__(
        self,
        dim: int,
        latent_dim: int,
        cond_dim: int,
        n_heads: int,
        dropout: float,
        attn_backend: str,
        gated: bool,
        num_classes: int,
    ) -> None:
        super().__init__(dim, n_heads, dropout, attn_backend)
        self.gated = gated
        self.adaLN_modulation = zero_linear(cond_dim + num_classes, 6 * dim)
        self.latent = LatentLayers(latent_dim, dim, cond_dim, n_heads, dropout)
        if gated:
            self.adaLN_gate = zero_linear(cond_dim + num_classes, n_heads)
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
        """Return the text, (B, L, D) or (B, Q, D) at the positions `at_BQ` only, and the latents, None
        unless `both`."""
        by = Modulation.of(self, c_BC)
        by_z = Modulation.of(self.latent, e_BC)
        text = self._text(by.before_attention(self, x_BLD), rotary, at_BQ)
        latent = self.latent.queries_keys_values(by_z.before_attention(self.latent, z_BKE))
        attended, attended_z = self._attend(text, latent, key_mask_BL, both)
        if self.gated:
            alone = attend(*text, key_mask_BL, self.attn_backend)
            attended = alone + self.adaLN_gate(c_BC)[:, None, :, None] * (attended - alone)
        x_BQD = by.after_attention(self, take_positions(x_BLD, at_BQ), attended)
        return x_BQD, by_z.after_attention(self.latent, z_BKE, attended_z) if both else None

    def _text(self, normed_BLD: Tensor, rotary: Rotary, at_BQ: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the rotated queries (B, Q, H, W), rotated keys and values (B, L, H, W) of the text."""
        q, k, v = self.queries_keys_values(normed_BLD, at_BQ)
        if not self.gated:
            q, k = self.q_norm(q), self.k_norm(k)
        return apply_rotary(q, *rotary_at(rotary, at_BQ)), apply_rotary(k, *rotary), v

    def _attend(
        self, text: tuple[Tensor, ...], latent: tuple[Tensor, ...], key_mask_BL: Tensor | None, both: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Apply one softmax over the keys of both streams; return the text's output (B, Q, H, W) and the latents', (B,
        K, H, W)."""
        (q, k, v), (q_z, k_z, v_z) = text, latent
        mask = None if key_mask_BL is None else F.pad(key_mask_BL.bool(), (0, k_z.shape[1]), value=True)
        queries = torch.cat([q, q_z], dim=1) if both else q
        seen = attend(queries, torch.cat([k, k_z], dim=1), torch.cat([v, v_z], dim=1), mask, self.attn_backend)
        return (seen[:, : q.shape[1]], seen[:, q.shape[1] :]) if both else (seen, None)


class Times(nn.Module):
    """The times of both modalities, from 0 to 1, (B,) each -> one vector (B, C)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.of_text, self.of_latent = SigmaEmbedding(dim), SigmaEmbedding(dim)
        self.mix = nn.Sequential(nn.SiLU(), nn.Linear(2 * dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, dim))
        self.to_text = zero_linear(dim, dim)

    def forward(self, text_t_B: Tensor, latent_t_B: Tensor) -> Tensor:
        text_BC, latent_BC = self.of_text(TIME_SCALE * text_t_B), self.of_latent(TIME_SCALE * latent_t_B)
        return self.mix(torch.cat([text_BC, latent_BC], dim=-1))


class LatentInput(nn.Module):
    """Latent tokens to the width of their stream, (B, K, S) -> (B, K, E), float32 under autocast: an MLP of the normed
    numbers, plus a linear map of the raw ones, because the norm of a noised latent shows its share of signal. With
    several tokens each has a learned vector that identifies it, as they are parts of one ordered latent."""

    def __init__(self, numbers: int, dim: int, tokens: int = 1) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(numbers)
        self.mlp = nn.Sequential(nn.Linear(numbers, 2 * dim), nn.GELU(approximate="tanh"), nn.Linear(2 * dim, dim))
        self.skip = nn.Linear(numbers, dim, bias=False)
        self.which_KE = nn.Parameter(0.02 * torch.randn(tokens, dim)) if tokens > 1 else None

    def forward(self, latent_BKS: Tensor) -> Tensor:
        with torch.autocast(latent_BKS.device.type, enabled=False):
            out_BKE = self.mlp(self.norm(latent_BKS)) + self.skip(latent_BKS)
            return out_BKE if self.which_KE is None else out_BKE + self.which_KE


class LatentOutput(nn.Module):
    """Stream to latent tokens, (B, K, E) -> (B, K, S), by an MLP that starts at zero; float32 under autocast."""

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
