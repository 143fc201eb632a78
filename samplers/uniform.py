"""Ancestral sampling of processes whose noise is other tokens, on a grid of times (UDLM, 2412.10193, section 3.2).

An approximation: the positions of one step are drawn independently of each other. It tends to the model's distribution
as the steps become many more than the tokens.

Shape suffixes: B batch, L length, R rows evaluated, N positions drawn, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from denoisers import Denoiser
from process import Hybrid, Uniform
from randomness import KeyedNoise
from samplers.base import Asked, Step, TokenChoice, run, sampler, time_grid
from samplers.trace import Trace, Watcher


class Resample(Step):
    """Ask for p(x_s | x_t) at every open position; in the end for the most likely clean tokens."""

    def __init__(self, trace: Trace, noise: KeyedNoise, choice: TokenChoice, grid: Tensor, noise_removal: bool) -> None:
        self.trace, self.noise, self.choice, self.grid = trace, noise, choice, grid
        self.steps, self.num_steps = len(grid) - 1, len(grid) - 1 + noise_removal
        self.greedy = self.last = False

    def positions(self, number: int, trace: Trace) -> Asked | None:
        if number > self.num_steps:
            return None
        batch, length = trace.ids_BL.shape
        self.u_BL, self.greedy, self.last = self.noise.uniform(length), number > self.steps, number == self.num_steps
        s_B = None if self.greedy else self.grid[number].expand(batch)
        return Asked(trace.open_BL, self.grid[number - 1].expand(batch), s_B)

    def tokens(self, log_p_NV: Tensor, at_RL: Tensor, rows_R: Tensor) -> tuple[Tensor, Tensor]:
        drawn_N = log_p_NV.argmax(-1) if self.greedy else self.choice.draw(log_p_NV, self.u_BL[rows_R][at_RL])
        new_N = drawn_N != self.trace.ids_BL[rows_R][at_RL]
        if self.last:  # the noise that it began with and never left
            new_N |= self.trace.step_BL[rows_R][at_RL] == 0
        return drawn_N[new_N], new_N


@sampler(Uniform, Hybrid)
def sample(
    model: Denoiser,
    x_BL: Tensor,
    generator: KeyedNoise,
    *,
    steps: int,
    choice: TokenChoice = TokenChoice(),  # noqa: B008 - frozen
    noise_removal: bool = True,
    eps: float = 1e-5,
    watch: Watcher | None = None,
    **cond: Tensor,
) -> Trace:
    """Write the blank positions of `x_BL`; its other tokens are given and never change.

    Every blank starts as pure noise, and any of them may change at any step.

    Args:
        noise_removal: after the last step write the most likely token everywhere ("greedy tail", DUO, 2506.10892).
    """
    trace = Trace(x_BL, model.process, watch)
    trace.ids_BL = model.process.prior(trace.ids_BL, generator, trace.open_BL)
    step = Resample(trace, generator, choice, time_grid(steps, eps, x_BL.device), noise_removal)
    return run(step, model, trace, cond)
