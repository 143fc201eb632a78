"""Ancestral sampling of masked diffusion on a grid of times (MDLM, arXiv 2406.07524, section 3.2 and algorithm 1).

An approximation: the tokens of one step are drawn independently of each other. It tends to the model's distribution as
the steps become many more than the tokens (docs/sampling.md). samplers/first_hitting.py draws exactly from it, with one
network evaluation for each token.

Which positions a step unmasks does not depend on the tokens, so it is drawn before the network runs. The network then
projects those positions only, and rows without any need no evaluation.

Shape suffixes: B batch, L length, R rows evaluated, N positions drawn, S times of a grid.
"""

from dataclasses import dataclass

from torch import Tensor

from palimpsest.common.positions import Positions
from palimpsest.common.values import Count
from palimpsest.process import Absorbing, unmask_step
from palimpsest.samplers import analytic
from palimpsest.samplers.base import Planned, Request, sampler_of, time_grid
from palimpsest.samplers.trace import Trace


@dataclass(kw_only=True)
class Ancestral(Planned):
    """Unmask each position at a time of a grid.

    If the network decides when a token is unmasked (D3PM, SEDD), the steps are those of samplers/analytic.py.

    Args:
        skip_idle: evaluate only rows with a position to draw. The result is the same, also with time conditioning;
            False keeps the shapes of all steps equal.
        noise_removal: after the last step write the most likely token at every remaining mask; otherwise masks stay.
        begin_B: start time of each row, float64, for partly masked texts (editing); None for 1.
    """

    steps: Count
    skip_idle: bool
    noise_removal: bool = True
    eps: float = 1e-5
    begin_B: Tensor | None = None

    def __post_init__(self) -> None:
        open_BL, eps = self.trace.open_BL, self.eps
        grid = time_grid(self.steps, eps, open_BL.device)  # (S,) for all rows, or (B, S)
        if self.begin_B is not None:  # the same number of steps from there
            grid = eps + (grid - eps) * (self.begin_B[:, None].clamp(min=eps) - eps) / (1 - eps)
        number_BL = unmask_step(self.noise.uniform(open_BL.shape[1]), self.model.schedule(grid).alpha)
        self.every_row = not self.skip_idle
        last = self.steps + self.noise_removal
        self.plan(number_BL.masked_fill(~open_BL, -1), grid.expand(len(open_BL), -1), last)

    def positions(self, number: int, trace: Trace) -> Request | None:
        self.greedy = number > self.steps
        return super().positions(number, trace)

    def tokens(self, log_p_NV: Tensor, at: Positions) -> tuple[Tensor, Positions]:
        return (log_p_NV.argmax(-1), at) if self.greedy else super().tokens(log_p_NV, at)


sample = sampler_of(Ancestral, Absorbing, otherwise=analytic.Analytic)
