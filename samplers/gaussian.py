"""Latents out of noise: DDIM and ancestral steps of the Gaussian diffusion, given a text or given none.

Shape suffixes: B batch, L length, K latent tokens, D numbers of each, S times of a grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from palimpsest.common.randomness import KeyedNoise
from palimpsest.common.values import Count, NotNegative, Share
from palimpsest.denoisers import JointDenoiser
from palimpsest.gaussian_process import LatentPrediction, cosine_level


@dataclass(frozen=True)
class LatentSteps:
    """How latents are drawn. steps: from noise to data, evenly in t. eta: 0 is DDIM, which is deterministic given its
    noise, 1 ancestral, between them a part of the noise. guidance: w of v_u + w (v_c - v_u), where v_u is what the
    network says without the text; 1 is the model's own law, 0 the marginal.
    """

    steps: Count = 50
    eta: Share = 0.0
    guidance: NotNegative = 1.0


@dataclass(frozen=True)
class DrawnLatents:
    """latent_BKD: standardised, float32. evaluations_B: network evaluations spent on each row."""

    latent_BKD: Tensor
    evaluations_B: Tensor


def first_noise(generator: KeyedNoise, shape: tuple[int, int]) -> Tensor:
    """x_1 ~ N(0, I), float64 (B, K, D)."""
    return generator.normal(*shape)


def step(said: LatentPrediction, latent_BKD: Tensor, t_B: Tensor, s_B: Tensor, eta: float, noise: KeyedNoise) -> Tensor:
    """x_s of x_t, s < t, (B, K, D): alpha_s x_0 + sqrt(sigma_s^2 - w^2) eps + w times fresh noise, with
    w = eta sigma_s / sigma_t sqrt(1 - alpha_t^2 / alpha_s^2) (DDIM, arXiv 2010.02502, eqs. 12 and 16)."""
    now, then = cosine_level(t_B).like(latent_BKD), cosine_level(s_B).like(latent_BKD)
    fresh = eta * then.sigma / now.sigma * (1 - (now.alpha / then.alpha) ** 2).clamp(min=0).sqrt()
    kept = (then.sigma**2 - fresh**2).clamp(min=0).sqrt()
    out_BKD = then.alpha * said.x0_BKD + kept * said.eps_BKD
    return out_BKD + fresh * noise.normal(*latent_BKD.shape[1:]) if eta else out_BKD


def guided(told: LatentPrediction, untold: LatentPrediction, weight: float) -> LatentPrediction:
    """untold + weight (told - untold), for x_0, eps and v alike: each is the same affine function of the output."""
    pairs = ((told.x0_BKD, untold.x0_BKD), (told.eps_BKD, untold.eps_BKD), (told.v_BKD, untold.v_BKD))
    return LatentPrediction(*(u_BKD + weight * (c_BKD - u_BKD) for c_BKD, u_BKD in pairs))


@torch.no_grad()
def sample(
    model: JointDenoiser, x_BL: Tensor, generator: KeyedNoise, how: LatentSteps, *, hidden_BL: Tensor | None = None,
    **cond: Tensor,
) -> DrawnLatents:  # fmt: skip
    """Latents given the clean texts `x_BL`, at their time 0.

    Args:
        hidden_BL: the texts with every token masked that may be; at time 1 they are what the marginal is asked with.
            With how.guidance = 0 nothing else is looked at.
        cond: passed on to the model, row by row (B, ...).

    Raises:
        ValueError: a guidance other than 1 without `hidden_BL`.
    """
    if how.guidance != 1 and hidden_BL is None:
        raise ValueError(f"sampling.guidance={how.guidance} needs the texts with all their tokens masked")
    latent_BKD = first_noise(generator, model.latent_shape)
    grid_S = torch.linspace(1.0, 0.0, how.steps + 1, dtype=torch.float64, device=x_BL.device)
    clean_B, masked_B = (torch.full((len(x_BL),), t, dtype=torch.float64, device=x_BL.device) for t in (0.0, 1.0))
    for t, s in zip(grid_S[:-1], grid_S[1:], strict=True):
        t_B, s_B = t.expand(len(x_BL)), s.expand(len(x_BL))
        said = None if how.guidance == 0 else model.predict_latent(latent_BKD, t_B, x_BL, clean_B, **cond)
        if how.guidance != 1:
            untold = model.predict_latent(latent_BKD, t_B, hidden_BL, masked_B, **cond)
            said = untold if said is None else guided(said, untold, how.guidance)
        latent_BKD = step(said, latent_BKD, t_B, s_B, how.eta, generator)
    evaluations = how.steps * (1 if how.guidance in (0, 1) else 2)
    return DrawnLatents(latent_BKD.float(), torch.full((len(x_BL),), evaluations, device=x_BL.device))
