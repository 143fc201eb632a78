"""The forward processes as pure functions: the absorbing one ("mask") on tokens, the Gaussian one on latents.

Shape suffixes: B batch, L length, N selected positions, V vocabulary, K latent tokens, D numbers of each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def mask_tokens(x0_BL: Tensor, move_chance_B: Tensor, mask_id: int, maskable_BL: Tensor, u_BL: Tensor) -> Tensor:
    """x_t ~ q(x_t | x_0): each maskable token becomes `mask_id` with probability 1 - alpha(t), independently
    (MDLM, arXiv 2406.07524, eq. 5). `u_BL` are uniform numbers in [0, 1)."""
    return torch.where((u_BL < move_chance_B[:, None]) & maskable_BL, mask_id, x0_BL)


def unmask_chance(alpha_t: Tensor, alpha_s: Tensor) -> Tensor:
    """P(x_s is not masked | x_t is masked) = (alpha_s - alpha_t) / (1 - alpha_t) for s < t (MDLM, eq. 7)."""
    return (alpha_s - alpha_t) / (1 - alpha_t)


def log_posterior(log_p_x0_NV: Tensor, alpha_t_N: Tensor, alpha_s_N: Tensor, mask_id: int) -> Tensor:
    """log p(x_s | x_t = mask), (N, V) in the precision of alpha: the prediction times the chance of unmasking, the rest
    on `mask_id` (MDLM, eq. 7)."""
    chance_N = unmask_chance(alpha_t_N, alpha_s_N)
    out_NV = log_p_x0_NV + chance_N.log()[:, None]
    out_NV[:, mask_id] = torch.log1p(-chance_N)
    return out_NV


def unmask_step(u_BL: Tensor, alpha_S: Tensor) -> Tensor:
    """When the ancestral sampler unmasks each position, drawn for all steps at once: (B, L) in 0..S-1.

    alpha_S are alpha(t_0) < alpha(t_1) < ... of a grid of S times, from noise to data. A masked position stays masked
    from t_i to t_(i+1) with probability (1 - alpha_(i+1)) / (1 - alpha_i), whatever the tokens are; the product
    telescopes to P(masked at t_i) = (1 - alpha_i) / (1 - alpha_0), which inverts in one look-up. Step i goes from t_i
    to t_(i+1); S - 1 means never within the grid. Rows may have grids of their own, alpha (B, S). `u_BL` are uniform
    numbers in [0, 1).
    """
    survived_S = (1 - alpha_S.double()) / (1 - alpha_S[..., :1].double())
    unmasked_by_S = (1 - survived_S[..., 1:]).contiguous()
    return torch.searchsorted(unmasked_by_S, u_BL, right=True)


def draw_categorical(log_p_NV: Tensor, u_N: Tensor) -> Tensor:
    """One token id per row by inversion of the cumulative distribution, in float64; (N,).

    float32 Gumbel noise cannot reach probabilities below 2^-24 and so sharpens the distribution
    (Zheng et al., arXiv 2409.02908, section 4); one float64 number per row has no such floor.
    """
    cumulative_NV = log_p_NV.double().exp().cumsum(-1)
    total_N = cumulative_NV[:, -1]
    # Rounding may lift u * total to the total itself, beyond every token that has mass.
    threshold_N = torch.minimum(u_N.double() * total_N, torch.nextafter(total_N, torch.zeros_like(total_N)))
    return torch.searchsorted(cumulative_NV, threshold_N[:, None], right=True).squeeze(-1)


@dataclass(frozen=True)
class GaussianLevel:
    """x_t = alpha x_0 + sigma eps, with alpha^2 + sigma^2 = 1."""

    alpha: Tensor
    sigma: Tensor

    @property
    def snr(self) -> Tensor:
        """alpha^2 / sigma^2, of latents whose numbers have variance 1."""
        return (self.alpha / self.sigma) ** 2

    def like(self, x_BKD: Tensor) -> GaussianLevel:
        """Each row's level for all numbers of the row, (B, 1, 1) in the precision of `x_BKD`."""
        return GaussianLevel(*(value.to(x_BKD.dtype)[:, None, None] for value in (self.alpha, self.sigma)))


def cosine_level(t: Tensor) -> GaussianLevel:
    """The cosine schedule in continuous time, alpha = cos(pi t / 2) (Nichol & Dhariwal, arXiv 2102.09672, without the
    offset): a function of each row's own t, which starts clean and ends with no signal at all."""
    angle = math.pi / 2 * t.double()
    return GaussianLevel(angle.cos(), angle.sin())


def noise_latent(x0_BKD: Tensor, eps_BKD: Tensor, level: GaussianLevel) -> Tensor:
    """x_t of x_0 and the noise `eps_BKD`."""
    return level.alpha * x0_BKD + level.sigma * eps_BKD


def velocity(x0_BKD: Tensor, eps_BKD: Tensor, level: GaussianLevel) -> Tensor:
    """v = alpha eps - sigma x_0 (Salimans & Ho, arXiv 2202.00512, appendix D)."""
    return level.alpha * eps_BKD - level.sigma * x0_BKD


@dataclass(frozen=True)
class LatentPrediction:
    """What a network says of a noised latent, in all three forms, (B, K, D) each: the latent, the noise, and v."""

    x0_BKD: Tensor
    eps_BKD: Tensor
    v_BKD: Tensor


def read_prediction(kind: str, output_BKD: Tensor, xt_BKD: Tensor, level: GaussianLevel) -> LatentPrediction:
    """The prediction of a network whose output is `kind`, v, x0 or eps. x0 is the one of the three that loses its noise
    as t goes to 0 (from it eps and v divide by sigma), eps as t goes to 1 (division by alpha); v divides by neither."""
    alpha, sigma = level.alpha, level.sigma
    if kind == "v":
        return LatentPrediction(alpha * xt_BKD - sigma * output_BKD, sigma * xt_BKD + alpha * output_BKD, output_BKD)
    if kind == "x0":
        eps_BKD = (xt_BKD - alpha * output_BKD) / sigma
        return LatentPrediction(output_BKD, eps_BKD, velocity(output_BKD, eps_BKD, level))
    x0_BKD = (xt_BKD - sigma * output_BKD) / alpha
    return LatentPrediction(x0_BKD, output_BKD, velocity(x0_BKD, output_BKD, level))
