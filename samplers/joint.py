"""Texts and latents together, and texts steered by latents: both at once, and guidance against the marginal.

Shape suffixes: B batch, L length, N selected positions, V vocabulary, K latent tokens, D numbers of each, S times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from palimpsest.common.randomness import KeyedNoise
from palimpsest.denoisers import Denoiser, JointDenoiser, LatentGuided
from palimpsest.process import Absorbing, unmask_step
from palimpsest.samplers.base import TokenChoice, sampler, time_grid
from palimpsest.samplers.gaussian import first_noise, step
from palimpsest.samplers.trace import Trace, Watcher


def with_guidance(sampler: Callable[..., Trace], weight: float) -> Callable[..., Trace]:
    """`sampler`, drawing from the guided model."""
    if weight == 1:
        return sampler

    def sample_guided(model: Denoiser, x_BL: Tensor, generator: KeyedNoise, **cond: Tensor) -> Trace:
        return sampler(LatentGuided(model, weight), x_BL, generator, **cond)

    return sample_guided


@dataclass(frozen=True)
class JointGeneration:
    """A text and the latent that was drawn with it, standardised, float32 (B, K, D)."""

    text: Trace
    latent_BKD: Tensor


@sampler(Absorbing)
def sample(
    model: JointDenoiser, x_BL: Tensor, generator: KeyedNoise, *, steps: int, eta: float = 0.0,
    choice: TokenChoice = TokenChoice(),  # noqa: B008 - frozen
    noise_removal: bool = True,
    eps: float = 1e-5, watch: Watcher | None = None, **cond: Tensor,
) -> JointGeneration:  # fmt: skip
    """Fill the masked positions of `x_BL` and draw a latent, both times on one grid from 1 to 0: each of the `steps`
    evaluations of the network is ancestral for the text (samplers/ancestral.py) and DDIM, or with eta > 0 partly
    ancestral, for the latent (samplers/gaussian.py). With `noise_removal` one more writes what is still masked then.

    The text's numbers are the row's own, the latent's those of its part 1.
    """
    grid_S, latents = time_grid(steps, eps, x_BL.device), generator.part(1)
    trace = Trace(x_BL, model.process, watch)
    write_at_BL = unmask_step(generator.uniform(x_BL.shape[1]), model.schedule(grid_S).alpha)
    write_at_BL = write_at_BL.masked_fill(~trace.masked_BL, -1)
    u_BL = generator.uniform(x_BL.shape[1])
    latent_BKD = first_noise(latents, model.latent_shape)
    ends_S = torch.cat([grid_S[1:-1], grid_S.new_zeros(1)])
    for number in range(steps):
        now_BL, t_B, s_B = write_at_BL == number, *(g[number].expand(len(x_BL)) for g in (grid_S, ends_S))
        log_p_NV, said = model.denoise_both(trace.ids_BL, t_B, now_BL, latent_BKD, t_B, **cond)
        trace.write(now_BL, choice.draw(log_p_NV, u_BL[now_BL]), log_p_NV)
        trace.evaluations_B += 1
        trace.end_step()
        latent_BKD = step(said, latent_BKD, t_B, s_B, eta, latents)
    left_BL = trace.masked_BL & noise_removal
    if left_BL.any():
        latent = {"latent": latent_BKD, "latent_t": torch.zeros_like(latent_BKD[:, 0, 0])}
        log_p_NV = model.denoise(trace.ids_BL, grid_S[-1].expand(len(x_BL)), left_BL, **cond, **latent)
        trace.write(left_BL, log_p_NV.argmax(-1), log_p_NV)
        trace.evaluations_B += left_BL.any(-1)
        trace.end_step()
    return JointGeneration(trace, latent_BKD.float())
