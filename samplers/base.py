"""What samplers share: the model they are given, how a token is chosen, the time grid, what they return.

Shape suffixes: B batch, L length, N selected positions, V vocabulary, S times of a grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from noise_schedule import NoiseSchedule
from process import Process, draw_categorical


class Model(Protocol):
    """An objective with its backbone bound (objectives.base.Model): all that a sampler may ask."""

    process: Process
    vocab_size: int
    schedule: NoiseSchedule
    independent_unmasking: bool  # when a mask goes is the schedule's choice, not the network's

    def denoise(self, x_BL: Tensor, t_B: Tensor, at_BL: Tensor, **cond: Tensor) -> Tensor:
        """log p(x_0 | x_t) at the N positions of `at_BL`, (N, V)."""

    def reverse(self, x_BL: Tensor, t_B: Tensor, s_B: Tensor, at_BL: Tensor, **cond: Tensor) -> Tensor:
        """log p(x_s | x_t) at the N masked positions of `at_BL`, (N, V)."""


@dataclass(frozen=True)
class Generation:
    """ids_BL: the sampled tokens. step_BL: the sampler's step, from 1, that wrote each token; 0 where it was given, and
    where a mask is left. confidence_BL: the model's probability of each token at the moment it was written, before
    temperature and cuts, float32; 1 where it was given, 0 where a mask is left. num_steps: how many steps there were.
    evaluations_B: network evaluations spent on each row. length_B: where each row's text ends, if the sampler decides
    that; behind it there may be masks."""

    ids_BL: Tensor
    step_BL: Tensor
    confidence_BL: Tensor
    num_steps: int
    evaluations_B: Tensor
    length_B: Tensor | None = None


@dataclass(frozen=True)
class Frame:
    """What is there after a step (0: before the first): the tokens, [MASK] among them, their confidence, and the
    network evaluations spent so far, as in `Generation`. These are the sampler's own tensors: to be looked at while the
    watcher is called, and not to be changed."""

    step: int
    ids_BL: Tensor
    confidence_BL: Tensor
    evaluations_B: Tensor


# Called by a sampler after each step of its that may have written something. Every sampler takes one as `watch`.
Watcher = Callable[[Frame], None]


def writes(*processes: type[Process]) -> Callable[[Callable], Callable]:
    """Declare of which forward processes a sampler writes texts, as its `processes`."""

    def declared(sample: Callable) -> Callable:
        sample.processes = processes
        return sample

    return declared


@dataclass(frozen=True)
class TokenChoice:
    """How a token is drawn from the model's distribution. The defaults draw from it as it is; all else is a heuristic
    that samples a sharper law.

    temperature: of the softmax, 0 for the most likely token. top_k: keep the k most likely tokens. nucleus_p: keep the
    fewest tokens whose probabilities sum to p or more (Holtzman et al., arXiv 1904.09751).
    """

    temperature: float = 1.0
    top_k: int | None = None
    nucleus_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"sampling.temperature={self.temperature} must be 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"sampling.top_k={self.top_k} must be at least 1, or null for no limit")
        if not 0 < self.nucleus_p <= 1:
            raise ValueError(f"sampling.nucleus_p={self.nucleus_p} must lie in (0, 1]")

    def draw(self, log_p_NV: Tensor, u_N: Tensor) -> Tensor:
        """One token id per row, (N,), from uniform numbers `u_N`."""
        if self.temperature == 0:
            return log_p_NV.argmax(-1)
        return draw_categorical(self.adjusted(log_p_NV), u_N)

    def adjusted(self, log_p_NV: Tensor) -> Tensor:
        """Logarithms, up to a constant per row, of the distribution that `draw` draws from."""
        log_p_NV = log_p_NV if self.temperature == 1 else (log_p_NV.double() / self.temperature).log_softmax(-1)
        if self.top_k is not None and self.top_k < log_p_NV.shape[-1]:
            weakest_N1 = log_p_NV.topk(self.top_k, dim=-1).values[:, -1:]
            log_p_NV = log_p_NV.masked_fill(log_p_NV < weakest_N1, -torch.inf)
        if self.nucleus_p < 1:
            ranked_NV, order_NV = log_p_NV.double().softmax(-1).sort(-1, descending=True)
            before_NV = ranked_NV.cumsum(-1) - ranked_NV
            outside_NV = torch.zeros_like(before_NV, dtype=torch.bool).scatter(1, order_NV, before_NV >= self.nucleus_p)
            log_p_NV = log_p_NV.masked_fill(outside_NV, -torch.inf)
        return log_p_NV


def time_grid(num_steps: int, eps: float, device: torch.device | None = None) -> Tensor:
    """num_steps + 1 times, evenly spaced from 1 down to eps, float64."""
    if num_steps < 1:
        raise ValueError(f"sampling.steps={num_steps} must be at least 1")
    return torch.linspace(1.0, eps, num_steps + 1, dtype=torch.float64, device=device)


# Positions whose whole vocabulary is looked at together hold at most this many float64 numbers.
_CHUNK_NUMBERS = 2**25


def row_chunks(rows_R: Tensor, positions_R: Tensor, vocab_size: int) -> Iterator[Tensor]:
    """`rows_R` in runs that have few enough positions to project at once, one row at least."""
    together, numbers = [], 0
    for row, count in zip(rows_R, (positions_R * vocab_size).tolist(), strict=True):
        if together and numbers + count > _CHUNK_NUMBERS:
            yield torch.stack(together)
            together, numbers = [], 0
        together.append(row)
        numbers += count
    if together:
        yield torch.stack(together)


def rows_of(cond: dict[str, Tensor], rows_R: Tensor) -> dict[str, Tensor]:
    """The conditions of some rows; what is no tensor holds for all."""
    return {name: value[rows_R] if isinstance(value, Tensor) else value for name, value in cond.items()}
