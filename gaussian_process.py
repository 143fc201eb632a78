"""The Gaussian forward process of latents: noise levels, noised latents, and the three forms of a prediction.

Shape suffixes: B batch, K latent tokens, D numbers of each.
"""

import math
from dataclasses import dataclass
from typing import Self

from torch import Tensor


@dataclass(frozen=True)
class GaussianLevel:
    """The noise level of x_t = alpha x_0 + sigma eps, with alpha^2 + sigma^2 = 1."""

    alpha: Tensor
    sigma: Tensor

    def like(self, x_BKD: Tensor) -> Self:
        """Return the level as (B, 1, 1) in the precision of `x_BKD`."""
        return GaussianLevel(*(value.to(x_BKD.dtype)[:, None, None] for value in (self.alpha, self.sigma)))


def cosine_level(t: Tensor) -> GaussianLevel:
    """Return the level of the cosine schedule, alpha = cos(pi t / 2) (Nichol & Dhariwal, arXiv 2102.09672, without the
    offset)."""
    angle = math.pi / 2 * t.double()
    return GaussianLevel(angle.cos(), angle.sin())


def noise_latent(x0_BKD: Tensor, eps_BKD: Tensor, level: GaussianLevel) -> Tensor:
    """Return x_t from x_0 and the noise `eps_BKD`."""
    return level.alpha * x0_BKD + level.sigma * eps_BKD


def velocity(x0_BKD: Tensor, eps_BKD: Tensor, level: GaussianLevel) -> Tensor:
    """Return v = alpha eps - sigma x_0 (Salimans & Ho, arXiv 2202.00512, appendix D)."""
    return level.alpha * eps_BKD - level.sigma * x0_BKD


@dataclass(frozen=True)
class LatentPrediction:
    """A network's prediction for a noised latent as the clean latent, the noise, and the velocity v, (B, K, D) each."""

    x0_BKD: Tensor
    eps_BKD: Tensor
    v_BKD: Tensor


def read_prediction(kind: str, output_BKD: Tensor, xt_BKD: Tensor, level: GaussianLevel) -> LatentPrediction:
    """Return the prediction of a network whose output is `kind`: v, x0 or eps.

    From x0 the others divide by sigma, which vanishes at t = 0; from eps by alpha, which vanishes at t = 1.
    """
    alpha, sigma = level.alpha, level.sigma
    if kind == "v":
        return LatentPrediction(alpha * xt_BKD - sigma * output_BKD, sigma * xt_BKD + alpha * output_BKD, output_BKD)
    if kind == "x0":
        eps_BKD = (xt_BKD - alpha * output_BKD) / sigma
        return LatentPrediction(output_BKD, eps_BKD, velocity(output_BKD, eps_BKD, level))
    x0_BKD = (xt_BKD - sigma * output_BKD) / alpha
    return LatentPrediction(x0_BKD, output_BKD, velocity(x0_BKD, output_BKD, level))
