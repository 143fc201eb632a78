"""The first-hitting sampler (Zheng et al., arXiv 2409.02908): the continuous-time limit of ancestral
sampling, simulated event by event. It draws exactly from the model's distribution, without any time grid.

Each mask goes at a time of its own, at which 1 - alpha is uniform; almost surely no two go together. So the masks of a
row are filled one at a time, in the order of those times: as many network evaluations as masks, rows side by side.

Shape suffixes: B batch, L length, R rows evaluated, N positions drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from palimpsest.common.randomness import KeyedNoise
from palimpsest.denoisers import Denoiser
from palimpsest.process import Absorbing
from palimpsest.samplers.base import Asked, Step, TokenChoice, sampler_of
from palimpsest.samplers.trace import Trace

UNFIT = (
    "sampling.predictor=first_hitting draws all unmasking times before the network runs, which is right where the "
    "schedule alone decides them (subs, mlm, mmldlm and the blocks of bd3lm); use sampling.predictor=analytic"
)


class FirstHitting(Step):
    """Unmask the positions of each row one at a time, at times that are drawn in advance.

    Raises:
        ValueError: the network decides when a token is unmasked, so its time cannot be drawn in advance.
    """

    def __init__(
        self,
        model: Denoiser,
        trace: Trace,
        noise: KeyedNoise,
        *,
        choice: TokenChoice = TokenChoice(),  # noqa: B008
    ) -> None:
        if not model.independent_unmasking:
            raise ValueError(UNFIT)
        open_BL = trace.open_BL
        start = model.schedule(torch.ones((), dtype=torch.float64, device=open_BL.device)).move_chance
        self.level_BL = (noise.uniform(open_BL.shape[1]) * start).masked_fill(~open_BL, -1.0)
        self.u_BL = noise.uniform(open_BL.shape[1])
        self.count_B = open_BL.sum(-1)
        self.order_BL = self.level_BL.argsort(dim=-1, descending=True)
        self.model = model
        self.choice = choice
        self.num_steps = int(self.count_B.max())

    def positions(self, number: int, trace: Trace) -> Asked | None:
        if number > self.num_steps:
            return None
        place_B1 = self.order_BL[:, number - 1 : number]
        at_BL = torch.zeros_like(self.level_BL, dtype=torch.bool).scatter(1, place_B1, True)
        t_B = self.model.schedule.t_from_alpha(1 - self.level_BL.gather(1, place_B1).squeeze(1)).clamp(0.0, 1.0)
        return Asked(at_BL & (self.count_B >= number)[:, None], t_B)

    def tokens(self, log_p_NV: Tensor, at_RL: Tensor, rows_R: Tensor) -> tuple[Tensor, None]:
        return self.choice.draw(log_p_NV, self.u_BL[rows_R][at_RL]), None


sample = sampler_of(FirstHitting, Absorbing, independent=True)
