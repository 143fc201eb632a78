"""Ancestral sampling of masked diffusion on a grid of times (MDLM, arXiv 2406.07524, section 3.2 and algorithm 1).

An approximation: the tokens that one step writes are drawn independently of each other. It tends to the model's
distribution as the steps become many more than the tokens (docs/sampling.md). samplers/first_hitting.py draws exactly
from it, with one network evaluation for each token.

Positions first, tokens second: which positions a step unmasks does not depend on their tokens, so it is drawn before
the network runs. The network then projects those positions only, and rows with none need no evaluation at all.

Shape suffixes: B batch, L length, R rows evaluated, N positions drawn, S times of a grid.
"""

from __future__ import annotations

from torch import Tensor

from palimpsest.common.randomness import KeyedNoise
from palimpsest.common.values import Count
from palimpsest.denoisers import Denoiser
from palimpsest.process import Absorbing, unmask_step
from palimpsest.samplers import analytic
from palimpsest.samplers.base import Asked, Step, TokenChoice, run, sampler, time_grid
from palimpsest.samplers.trace import Trace, Watcher


class Ancestral(Step):
    """Unmask each position at a time of the grid, drawn before the network is evaluated.

    Args:
        alpha: of the times in `grid`, (S,), or (B, S) if each row has its own times.
        last: number of steps.
        idle: evaluate rows in which nothing is unmasked too.
    """

    def __init__(
        self,
        open_BL: Tensor,
        alpha: Tensor,
        grid: Tensor,
        noise: KeyedNoise,
        choice: TokenChoice,
        last: int,
        idle: bool,
    ) -> None:
        write_at_BL = unmask_step(noise.uniform(open_BL.shape[1]), alpha)
        self.write_at_BL = write_at_BL.masked_fill(~open_BL, -1)
        self.u_BL = noise.uniform(open_BL.shape[1])
        self.grid_BS = grid.expand(len(open_BL), -1)
        self.choice = choice
        self.last = last
        self.idle = idle

    def positions(self, number: int, trace: Trace) -> Asked | None:
        if number > self.last:
            return None
        self.greedy = number == self.grid_BS.shape[1]
        return Asked(self.write_at_BL == number - 1, self.grid_BS[:, number - 1], every_row=self.idle)

    def tokens(self, log_p_NV: Tensor, at_RL: Tensor, rows_R: Tensor) -> tuple[Tensor, None]:
        if self.greedy:
            return log_p_NV.argmax(-1), None
        return self.choice.draw(log_p_NV, self.u_BL[rows_R][at_RL]), None


@sampler(Absorbing)
def sample(
    model: Denoiser,
    x_BL: Tensor,
    generator: KeyedNoise,
    *,
    steps: Count,
    skip_idle: bool,
    choice: TokenChoice = TokenChoice(),  # noqa: B008 - frozen
    noise_removal: bool = True,
    eps: float = 1e-5,
    watch: Watcher | None = None,
    begin_B: Tensor | None = None,
    **cond: Tensor,
) -> Trace:
    """Fill the masked positions of `x_BL`; its other tokens are given and never change.

    Where the network itself decides when a mask goes (D3PM, SEDD) the steps are those of samplers/analytic.py.

    Args:
        skip_idle: evaluate only the rows that have a position to draw. Exact, also with time conditioning, since the
            network's answer for the other rows would not be used; False keeps every step's shapes alike.
        cond: passed on to the model, row by row (B, ...).
        begin_B: the time of each row, float64, where that is not 1: of a text that is masked in part only (editing).
        noise_removal: after the last step write the most likely token wherever a mask is left. Otherwise masks stay.
    """
    if not model.independent_unmasking and begin_B is not None:
        raise ValueError("texts that are masked in part are filled by a sampler whose steps are the schedule's alone")
    if not model.independent_unmasking:
        settings = {"steps": steps, "choice": choice, "noise_removal": noise_removal, "eps": eps}
        return analytic.sample(model, x_BL, generator, **settings, watch=watch, **cond)
    grid = time_grid(steps, eps, x_BL.device)  # (S,) for all rows, or (B, S)
    if begin_B is not None:  # from there in as many steps
        grid = eps + (grid - eps) * (begin_B[:, None].clamp(min=eps) - eps) / (1 - eps)
    trace, alpha = Trace(x_BL, model.process, watch), model.schedule(grid).alpha
    step = Ancestral(trace.open_BL, alpha, grid, generator, choice, steps + noise_removal, not skip_idle)
    return run(step, model, trace, cond)
