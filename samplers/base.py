"""What samplers share: the prediction they are given, the time grid, what they return.

Shape suffixes: B batch, L length, N selected positions, V vocabulary, S times of a grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Denoise(Protocol):
    """`Objective.denoise` with its backbone bound: log p(x_0 | x_t) at the N positions of `at_BL`, (N, V)."""

    def __call__(self, x_BL: Tensor, t_B: Tensor, at_BL: Tensor, **cond: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Generation:
    """ids_BL: the sampled tokens. step_BL: the sampler's step, from 1, that wrote each token; 0 where it was given.
    num_steps: how many steps there were. evaluations_B: network evaluations spent on each row."""

    ids_BL: Tensor
    step_BL: Tensor
    num_steps: int
    evaluations_B: Tensor


def time_grid(num_steps: int, eps: float, device: torch.device | None = None) -> Tensor:
    """num_steps + 1 times, evenly spaced from 1 down to eps, float64."""
    if num_steps < 1:
        raise ValueError(f"sampling.steps={num_steps} must be at least 1")
    return torch.linspace(1.0, eps, num_steps + 1, dtype=torch.float64, device=device)
