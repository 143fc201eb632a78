"""Building blocks of the transformers: norms, rotary frequencies, time embedding, adaLN modulation, MLP.

Shape suffixes: B batch, L length, D width, C conditioning width, V vocabulary. Attribute names are the parameter names
of the reference checkpoints and must not change.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def at_least_float32(x: Tensor) -> Tensor:
    """Return `x` in float32, or in float64 if it has that precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class LayerNorm(nn.Module):
    """Layer norm with a scale and no bias, computed in float32 (at least) under any autocast."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(at_least_float32(x), x.shape[-1:]) * self.weight


class RMSNorm(nn.Module):
    """x / sqrt(mean x^2 + eps) with a scale (arXiv 1910.07467), computed in float32 (at least) under any autocast."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(at_least_float32(x), x.shape[-1:], eps=self.eps) * self.weight


class TokenEmbedding(nn.Module):
    """A table of token vectors (V, D), a bare parameter as in the reference checkpoints. Inputs are ids (B, L), or
    mixtures of tokens (B, L, V) as weights."""

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(vocab_size, dim))
        nn.init.kaiming_uniform_(self.embedding, a=math.sqrt(5))

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.is_floating_point():
            return tokens.to(self.embedding.dtype) @ self.embedding
        return F.embedding(tokens, self.embedding)


class RotaryFrequencies(nn.Module):
    """Inverse frequencies 10000^(-2i/D) of the rotary embedding, a buffer of the reference checkpoints."""

    def __init__(self, head_dim: int, base: float = 10_000.0) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / base ** (torch.arange(0, head_dim, 2).float() / head_dim))


def sinusoid_frequencies(number: int, max_period: float = 10_000.0) -> Tensor:
    """Return `number` frequencies from 1 down to almost 1 / max_period, evenly spaced in their logarithm."""
    return torch.exp(-math.log(max_period) * torch.arange(number).float() / number)


class SigmaEmbedding(nn.Module):
    """Sinusoidal features of the total noise sigma followed by an MLP: (B,) -> (B, C)."""

    def __init__(self, dim: int, num_features: int = 256, max_period: float = 10_000.0) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(num_features, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.register_buffer("frequencies", sinusoid_frequencies(num_features // 2, max_period), persistent=False)

    def forward(self, sigma_B: Tensor) -> Tensor:
        angle = sigma_B.float()[:, None] * self.frequencies
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))


def modulate(x_BLD: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    """Return x (1 + scale) + shift (adaLN; DiT, arXiv 2212.09748, section 3.2). Shift and scale may also be given per
    position, with as many dimensions as x."""
    return x_BLD * (1 + over_positions(scale_BD, x_BLD)) + over_positions(shift_BD, x_BLD)


def over_positions(value_BD: Tensor, x_BLD: Tensor) -> Tensor:
    """Return (B, 1, D), one value for all positions of a row; unchanged if every position of x has its own."""
    return value_BD if value_BD.ndim == x_BLD.ndim else value_BD[:, None]


def zero_linear(in_features: int, out_features: int) -> nn.Linear:
    """Return a linear layer initialised to zero, so that a new residual branch is the identity."""
    layer = nn.Linear(in_features, out_features)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def feed_forward(dim: int, ratio: int = 4) -> nn.Sequential:
    """Return Linear, GELU (tanh form), Linear."""
    return nn.Sequential(nn.Linear(dim, ratio * dim), nn.GELU(approximate="tanh"), nn.Linear(ratio * dim, dim))
