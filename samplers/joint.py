"""Joint sampling of texts and latents, and guidance of texts towards a latent.

Shape suffixes: B batch, L length, N selected positions, V vocabulary, K latent tokens, D numbers of each, S times.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from palimpsest.common.positions import Positions
from palimpsest.common.randomness import KeyedNoise
from palimpsest.denoisers import JointDenoiser, LatentGuided
from palimpsest.process import Absorbing, unmask_step
from palimpsest.samplers.base import TokenChoice, sampler, time_grid, with_model
from palimpsest.samplers.gaussian import step
from palimpsest.samplers.trace import Trace, Watcher


def with_guidance(sampler: Callable[..., Trace], weight: float) -> Callable[..., Trace]:
    """Return `sampler` with guidance of `weight` towards the latent."""
    return sampler if weight == 1 else with_model(sampler, lambda model: LatentGuided(model, weight))


@sampler(Absorbing)
def sample(
    model: JointDenoiser,
    x_BL: Tensor,
    generator: KeyedNoise,
    *,
    steps: int,
    eta: float = 0.0,
    choice: TokenChoice = TokenChoice(),  # noqa: B008 - frozen
    noise_removal: bool = True,
    eps: float = 1e-5,
    watch: Watcher | None = None,
    **cond: Tensor,
) -> tuple[Trace, Tensor]:
    """Fill the masked positions of `x_BL` and draw a latent, both on one grid of times from 1 to 0.

    Each of the `steps` evaluations is an ancestral step of the text (samplers/ancestral.py) and a DDIM step of the
    latent, partly ancestral if eta > 0 (samplers/gaussian.py). `noise_removal` adds one that writes the most likely
    tokens at the remaining masks. The text uses the row's own random numbers, the latent those of its part 1.

    Returns:
        the texts, and the latents that were drawn with them, standardised, float32 (B, K, D).
    """
    grid_S, latent_noise = time_grid(steps, eps, x_BL.device), generator.part(1)
    trace = Trace(x_BL, model.process, watch)
    number_BL = unmask_step(generator.uniform(x_BL.shape[1]), model.schedule(grid_S).alpha)
    *plan, rest = Positions.by_number(number_BL.masked_fill(~trace.open_BL, -1), steps + 1)
    u_BL = generator.uniform(x_BL.shape[1])
    latent_BKD = latent_noise.normal(*model.latent_shape)  # x_1, float64
    ends_S = torch.cat([grid_S[1:-1], grid_S.new_zeros(1)])
    for number, now in enumerate(plan):
        t_B, s_B = grid_S[number].expand(len(x_BL)), ends_S[number].expand(len(x_BL))
        log_p_NV, prediction = model.denoise_both(trace.ids_BL, t_B, now, latent_BKD, t_B, **cond)
        ids_N = choice.draw(log_p_NV, now.take(u_BL))
        trace.write(now, ids_N, log_p_NV.gather(1, ids_N[:, None])[:, 0])
        trace.evaluations_B += 1
        trace.end_step()
        latent_BKD = step(prediction, latent_BKD, t_B, s_B, eta, latent_noise)
    if noise_removal and len(rest):
        latent = {"latent": latent_BKD, "latent_t": torch.zeros_like(latent_BKD[:, 0, 0])}
        log_p_NV = model.denoise(trace.ids_BL, grid_S[-1].expand(len(x_BL)), rest, **cond, **latent)
        log_p_N, ids_N = log_p_NV.max(-1)
        trace.write(rest, ids_N, log_p_N)
        trace.evaluations_B += rest.mask_BL.any(-1)
        trace.end_step()
    return trace, latent_BKD.float()
