"""Texts and latents together, and texts steered by latents: both at once, and guidance against the marginal.

Shape suffixes: B batch, L length, N selected positions, V vocabulary, K latent tokens, D numbers of each, S times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from noise_schedule import NoiseSchedule
from process import Absorbing, unmask_step
from randomness import KeyedNoise
from samplers.base import Generation, Model, TokenChoice, Watcher, time_grid, writes
from samplers.gaussian import first_noise, step
from samplers.page import Page


@dataclass(frozen=True)
class Guided:
    """A model whose text is pushed towards its latent: log p_u + weight (log p(x | latent) - log p_u), normalised,
    where p_u knows nothing of the latent (its time is 1). Weight 1 is the model itself, 0 the marginal."""

    model: Model
    weight: float
    independent_unmasking = True

    @property
    def process(self) -> Absorbing:
        return self.model.process

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    @property
    def schedule(self) -> NoiseSchedule:
        return self.model.schedule

    @property
    def passes(self) -> int:
        """Network evaluations of a prediction."""
        return 1 if self.weight in (0, 1) else 2

    def denoise(self, x_BL: Tensor, t_B: Tensor, at_BL: Tensor, **cond: Tensor) -> Tensor:
        """As of the model, (N, V), float64 where two predictions are mixed."""
        if self.weight == 1:
            return self.model.denoise(x_BL, t_B, at_BL, **cond)
        hidden = {**cond, "latent_t": torch.ones(len(x_BL), dtype=torch.float64, device=x_BL.device)}
        untold_NV = self.model.denoise(x_BL, t_B, at_BL, **hidden)
        if self.weight == 0:
            return untold_NV
        told_NV, untold_NV = self.model.denoise(x_BL, t_B, at_BL, **cond).double(), untold_NV.double()
        mixed_NV = untold_NV + self.weight * (told_NV - untold_NV)
        return mixed_NV.masked_fill(untold_NV.isneginf(), -torch.inf).log_softmax(-1)

    def reverse(self, x_BL: Tensor, t_B: Tensor, s_B: Tensor, at_BL: Tensor, **cond: Tensor) -> Tensor:
        """As of the model: the schedule decides when a mask goes, the guided prediction what it becomes."""
        alpha_t, alpha_s = (self.schedule(t).alpha[:, None].expand(at_BL.shape)[at_BL] for t in (t_B, s_B))
        log_p_NV = self.denoise(x_BL, t_B, at_BL, **cond).double()
        return self.process.posterior(x_BL[at_BL], log_p_NV, alpha_t, alpha_s)


def with_guidance(sampler: Callable[..., Generation], weight: float) -> Callable[..., Generation]:
    """`sampler`, drawing from the guided model."""
    if weight == 1:
        return sampler

    def sample_guided(model: Model, x_BL: Tensor, generator: KeyedNoise, **cond: Tensor) -> Generation:
        model = Guided(model, weight)
        out = sampler(model, x_BL, generator, **cond)
        return replace(out, evaluations_B=out.evaluations_B * model.passes)

    return sample_guided


@dataclass(frozen=True)
class JointGeneration:
    """A text and the latent that was drawn with it, standardised, float32 (B, K, D)."""

    text: Generation
    latent_BKD: Tensor


@writes(Absorbing)
@torch.no_grad()
def sample(
    model: Model, x_BL: Tensor, generator: KeyedNoise, *, steps: int, eta: float = 0.0,
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
    page = Page(x_BL, model.process, watch)
    write_at_BL = unmask_step(generator.uniform(x_BL.shape[1]), model.schedule(grid_S).alpha)
    write_at_BL = write_at_BL.masked_fill(~page.masked_BL, -1)
    u_BL = generator.uniform(x_BL.shape[1])
    latent_BKD = first_noise(latents, model.latent_shape)
    ends_S = torch.cat([grid_S[1:-1], grid_S.new_zeros(1)])
    for number in range(steps):
        now_BL, t_B, s_B = write_at_BL == number, *(g[number].expand(len(x_BL)) for g in (grid_S, ends_S))
        log_p_NV, said = model.denoise_both(page.ids_BL, t_B, now_BL, latent_BKD, t_B, **cond)
        page.write(number + 1, now_BL, choice.draw(log_p_NV, u_BL[now_BL]), log_p_NV)
        page.evaluations_B += 1
        page.end_step(number + 1)
        latent_BKD = step(said, latent_BKD, t_B, s_B, eta, latents)
    left_BL = page.masked_BL & noise_removal
    if left_BL.any():
        latent = {"latent": latent_BKD, "latent_t": torch.zeros_like(latent_BKD[:, 0, 0])}
        log_p_NV = model.denoise(page.ids_BL, grid_S[-1].expand(len(x_BL)), left_BL, **cond, **latent)
        page.write(steps + 1, left_BL, log_p_NV.argmax(-1), log_p_NV)
        page.evaluations_B += left_BL.any(-1)
        page.end_step(steps + 1)
    return JointGeneration(page.finished(steps + noise_removal), latent_BKD.float())
