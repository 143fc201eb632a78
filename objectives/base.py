"""The narrow waist: what every training law offers, and what it may ask of a backbone.

Shape suffixes: B batch, L length, N selected positions, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from randomness import KeyedNoise

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class TokenLoss:
    """An unreduced loss.

    nll_BL: estimate, in nats, of each token's part of -log p(x); its sum over L estimates (bounds) -log p(row).
    mask_BL: True where a token is scored, False on padding and given tokens: the denominator.
    logs: further tensors worth recording, detached, (B,) each.
    """

    nll_BL: Tensor
    mask_BL: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)

    def mean(self) -> Tensor:
        """Nats per token over the batch: the one place where a loss is reduced."""
        return self.nll_BL.sum() / self.mask_BL.sum()


class Backbone(Protocol):
    """A network in two parts, so that the vocabulary is paid for only where it is needed."""

    head: torch.nn.Linear

    def encode(self, tokens_BL: Tensor, sigma_B: Tensor, attention_mask: Tensor | None = None) -> Tensor: ...


class Objective(Protocol):
    """A training law: it owns what the network's output means."""

    mask_id: int

    def loss(self, backbone: Backbone, batch: Batch, generator: KeyedNoise | None = None) -> TokenLoss: ...

    def denoise(
        self, backbone: Backbone, x_BL: Tensor, t_B: Tensor, at_BL: Tensor | None = None, **cond: Tensor
    ) -> Tensor: ...


def scored_mask(batch: Batch) -> Tensor:
    """True where a token is to be masked and scored (B, L): everywhere but on padding and on given tokens."""
    mask_BL = batch.get("attention_mask")
    scored_BL = torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask_BL is None else mask_BL.bool()
    return scored_BL & ~batch["given"] if "given" in batch else scored_BL


def fresh_noise(x_BL: Tensor) -> KeyedNoise:
    """Noise for a caller who brought none: seeded from torch's global generator, antithetic over the batch."""
    rows_B = torch.arange(len(x_BL), device=x_BL.device)
    seed = int(torch.randint(2**62, ()))
    jitter_B = KeyedNoise(seed, rows_B, draw=-1).uniform()
    return KeyedNoise(seed, rows_B, time_B=(rows_B + jitter_B) / len(x_BL))


def sample_times(noise: KeyedNoise, antithetic: bool, sampling_eps: float) -> Tensor:
    """t ~ U[sampling_eps, 1), float64 (B,). Times near 0 mask next to nothing and only add variance."""
    u_B = noise.time() if antithetic else noise.uniform()
    return (1 - sampling_eps) * u_B + sampling_eps
