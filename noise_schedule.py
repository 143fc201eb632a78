"""Noise schedules: t -> NoiseLevel. t = 0 is clean, t = 1 is all masked, alpha(t) = P(token kept).

Each schedule has alpha, its derivative and its inverse; sigma, dsigma and move chance of the references follow from
these. Values agree with kuleshov-group/mdlm `noise_schedule.py`.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from palimpsest.common.values import BelowOne, Positive, Share


@dataclass(frozen=True)
class NoiseLevel:
    """alpha = P(token kept) and dalpha = d alpha / dt at given times, in their shape."""

    alpha: Tensor
    dalpha: Tensor

    @property
    def sigma(self) -> Tensor:
        """Total noise, -log alpha, which time-conditioned networks read."""
        return -torch.log(self.alpha)

    @property
    def move_chance(self) -> Tensor:
        """P(token masked) = 1 - alpha."""
        return 1 - self.alpha

    @property
    def elbo_weight(self) -> Tensor:
        """-alpha' / (1 - alpha), the weight of a masked token in the continuous-time NELBO (MDLM, arXiv 2406.07524,
        eq. 11)."""
        return -self.dalpha / (1 - self.alpha)


class NoiseSchedule(ABC):
    """A decreasing alpha(t) on [0, 1]."""

    @abstractmethod
    def __call__(self, t: Tensor) -> NoiseLevel:
        """Return alpha and its derivative at t."""

    @abstractmethod
    def t_from_alpha(self, alpha: Tensor) -> Tensor:
        """Return the t of alpha. An alpha out of range gives a t outside [0, 1], or an end of it."""

    @property
    def unclipped(self) -> "NoiseSchedule":
        """The schedule without the limits of `Clipped`."""
        return self

    @property
    def full_range(self) -> "NoiseSchedule":
        """The unclipped schedule rescaled to alpha = 1 at t = 0 and alpha = 0 at t = 1, for evaluation and sampling."""
        return FullRange(self.unclipped)


class _WithEps(NoiseSchedule):
    """A schedule that ends at alpha = eps."""

    def __init__(self, eps: BelowOne = 1e-3) -> None:
        self.eps = eps


class LogLinear(_WithEps):
    """alpha = 1 - (1 - eps) t, the schedule of MDLM, whose sigma is the logarithm of a linear function."""

    def __call__(self, t: Tensor) -> NoiseLevel:
        return NoiseLevel(1 - (1 - self.eps) * t, torch.full_like(t, -(1 - self.eps)))

    def t_from_alpha(self, alpha: Tensor) -> Tensor:
        return (1 - alpha) / (1 - self.eps)


class Cosine(_WithEps):
    """alpha = eps + (1 - eps) cos(pi t / 2)."""

    def __call__(self, t: Tensor) -> NoiseLevel:
        angle = math.pi / 2 * t
        return NoiseLevel(self.eps + (1 - self.eps) * angle.cos(), -(1 - self.eps) * (math.pi / 2) * angle.sin())

    def t_from_alpha(self, alpha: Tensor) -> Tensor:
        return torch.acos(((alpha - self.eps) / (1 - self.eps)).clamp(0.0, 1.0)) / (math.pi / 2)


class CosineSquared(_WithEps):
    """alpha = eps + (1 - eps) cos^2(pi t / 2)."""

    def __call__(self, t: Tensor) -> NoiseLevel:
        angle = math.pi / 2 * t
        return NoiseLevel(
            self.eps + (1 - self.eps) * angle.cos() ** 2, -(1 - self.eps) * (math.pi / 2) * (2 * angle).sin()
        )

    def t_from_alpha(self, alpha: Tensor) -> Tensor:
        return torch.acos(((alpha - self.eps) / (1 - self.eps)).clamp(0.0, 1.0).sqrt()) / (math.pi / 2)


class _BySigma(NoiseSchedule):
    """A schedule of the total noise sigma, from sigma_min to sigma_max."""

    def __init__(self, sigma_min: Positive, sigma_max: Positive) -> None:
        if sigma_min >= sigma_max:
            raise ValueError(f"noise.sigma_min={sigma_min} must be below noise.sigma_max={sigma_max}")
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max


class Linear(_BySigma):
    """sigma = sigma_min + t (sigma_max - sigma_min)."""

    def __call__(self, t: Tensor) -> NoiseLevel:
        rate = self.sigma_max - self.sigma_min
        alpha = torch.exp(-(self.sigma_min + t * rate))
        return NoiseLevel(alpha, -rate * alpha)

    def t_from_alpha(self, alpha: Tensor) -> Tensor:
        return (-torch.log(alpha) - self.sigma_min) / (self.sigma_max - self.sigma_min)


class Geometric(_BySigma):
    """sigma = sigma_min^(1 - t) sigma_max^t (SEDD, arXiv 2310.16834, section 5.1)."""

    def __call__(self, t: Tensor) -> NoiseLevel:
        sigma = self.sigma_min ** (1 - t) * self.sigma_max**t
        alpha = torch.exp(-sigma)
        return NoiseLevel(alpha, -alpha * sigma * math.log(self.sigma_max / self.sigma_min))

    def t_from_alpha(self, alpha: Tensor) -> Tensor:
        ratio = math.log(self.sigma_max / self.sigma_min)
        return torch.log(-torch.log(alpha) / self.sigma_min) / ratio


class Clipped(NoiseSchedule):
    """The part of `base` with mask rates in a range, for training only (BD3-LM, arXiv 2503.09573, section 5)."""

    def __init__(self, base: NoiseSchedule, sampling_eps_min: Share, sampling_eps_max: Share) -> None:
        if not 0.0 <= sampling_eps_min < sampling_eps_max <= 1.0:
            raise ValueError(
                f"noise.sampling_eps_min={sampling_eps_min} and noise.sampling_eps_max={sampling_eps_max} must satisfy "
                "0 <= min < max <= 1"
            )
        self.base = base
        ends = 1 - torch.tensor([sampling_eps_min, sampling_eps_max], dtype=torch.float64)
        first, last = base.t_from_alpha(ends).clamp(0.0, 1.0).tolist()
        self._first = first
        self._span = last - first

    def __call__(self, t: Tensor) -> NoiseLevel:
        level = self.base(self._first + self._span * t)
        return NoiseLevel(level.alpha, self._span * level.dalpha)

    def t_from_alpha(self, alpha: Tensor) -> Tensor:
        return (self.base.t_from_alpha(alpha) - self._first) / self._span

    @property
    def unclipped(self) -> NoiseSchedule:
        return self.base.unclipped


class FullRange(NoiseSchedule):
    """The schedule `base` with alpha rescaled to 1 at t = 0 and 0 at t = 1."""

    def __init__(self, base: NoiseSchedule) -> None:
        self.base = base
        first, last = base(torch.tensor([0.0, 1.0], dtype=torch.float64)).alpha.tolist()
        self._last = last
        self._range = first - last

    def __call__(self, t: Tensor) -> NoiseLevel:
        level = self.base(t)
        # Rounding may lead beyond the ends.
        return NoiseLevel(((level.alpha - self._last) / self._range).clamp(0.0, 1.0), level.dalpha / self._range)

    def t_from_alpha(self, alpha: Tensor) -> Tensor:
        return self.base.t_from_alpha(self._last + self._range * alpha)

    @property
    def full_range(self) -> NoiseSchedule:
        return self
