"""Sampling of latents: DDIM and ancestral steps of the Gaussian diffusion, conditional on a text or unconditional.

Shape suffixes: B batch, L length, K latent tokens, D numbers of each, S times of a grid.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from palimpsest.common.randomness import KeyedNoise
from palimpsest.common.values import Count, NotNegative, Share
from palimpsest.denoisers import JointDenoiser
from palimpsest.gaussian_process import LatentPrediction, cosine_level


@dataclass(frozen=True)
class LatentSteps:
    """Settings for sampling latents.

    Args:
        steps: number of steps from noise to data, evenly in t.
        eta: 0 for DDIM, which is deterministic given its noise; 1 for ancestral sampling; or a value between.
        guidance: w of v_u + w (v_c - v_u), where v_u is the unconditional prediction; 1 for the model's own
            distribution, 0 for the marginal.
    """

    steps: Count = 50
    eta: Share = 0.0
    guidance: NotNegative = 1.0

    @property
    def evaluations(self) -> int:
        """Network evaluations of each latent."""
        return self.steps * (1 if self.guidance in (0, 1) else 2)


def step(
    prediction: LatentPrediction, latent_BKD: Tensor, t_B: Tensor, s_B: Tensor, eta: float, noise: KeyedNoise
) -> Tensor:
    """Return x_s from x_t for s < t, (B, K, D) (DDIM, arXiv 2010.02502, eqs. 12 and 16).

    x_s = alpha_s x_0 + sqrt(sigma_s^2 - w^2) eps + w fresh, with w = eta sigma_s / sigma_t sqrt(1 - alpha_t^2 /
    alpha_s^2).
    """
    now, then = cosine_level(t_B).like(latent_BKD), cosine_level(s_B).like(latent_BKD)
    fresh = eta * then.sigma / now.sigma * (1 - (now.alpha / then.alpha) ** 2).clamp(min=0).sqrt()
    kept = (then.sigma**2 - fresh**2).clamp(min=0).sqrt()
    out_BKD = then.alpha * prediction.x0_BKD + kept * prediction.eps_BKD
    return out_BKD + fresh * noise.normal(*latent_BKD.shape[1:]) if eta else out_BKD


def guided(conditional: LatentPrediction, unconditional: LatentPrediction, weight: float) -> LatentPrediction:
    """Return unconditional + weight (conditional - unconditional) for x_0, eps and v, each affine in the output."""
    names = ("x0_BKD", "eps_BKD", "v_BKD")
    pairs = [(getattr(conditional, name), getattr(unconditional, name)) for name in names]
    return LatentPrediction(*(u_BKD + weight * (c_BKD - u_BKD) for c_BKD, u_BKD in pairs))


@torch.no_grad()
def sample(
    model: JointDenoiser,
    x_BL: Tensor,
    generator: KeyedNoise,
    how: LatentSteps,
    *,
    masked_BL: Tensor | None = None,
    **cond: Tensor,
) -> Tensor:
    """Draw standardised latents given the clean texts `x_BL`, float32 (B, K, D).

    Args:
        masked_BL: the texts with all their tokens masked, for the unconditional prediction.
        cond: passed on to the model, row by row (B, ...).

    Raises:
        ValueError: a guidance other than 1 without `masked_BL`.
    """
    if how.guidance != 1 and masked_BL is None:
        raise ValueError(f"sampling.guidance={how.guidance} needs the texts with all their tokens masked")
    latent_BKD = generator.normal(*model.latent_shape)  # x_1, float64
    grid_S = torch.linspace(1.0, 0.0, how.steps + 1, dtype=torch.float64, device=x_BL.device)
    zero_B, one_B = (torch.full((len(x_BL),), t, dtype=torch.float64, device=x_BL.device) for t in (0.0, 1.0))
    for t, s in zip(grid_S[:-1], grid_S[1:], strict=True):
        t_B, s_B = t.expand(len(x_BL)), s.expand(len(x_BL))
        if how.guidance != 0:
            prediction = model.predict_latent(latent_BKD, t_B, x_BL, zero_B, **cond)
        if how.guidance != 1:
            unconditional = model.predict_latent(latent_BKD, t_B, masked_BL, one_B, **cond)
            prediction = unconditional if how.guidance == 0 else guided(prediction, unconditional, how.guidance)
        latent_BKD = step(prediction, latent_BKD, t_B, s_B, how.eta, generator)
    return latent_BKD.float()
