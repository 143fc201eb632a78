"""The first-hitting sampler (Zheng et al., arXiv 2409.02908): ancestral sampling in the limit of continuous time.

It is exact and needs no grid of times. The time at which a token is unmasked has uniform 1 - alpha, and almost surely
no two are equal. So the masks of a row are filled one at a time in the order of these times, with as many network
evaluations as masks.

Shape suffixes: B batch, L length, R rows evaluated, N positions drawn.
"""

import torch

from palimpsest.process import Absorbing
from palimpsest.samplers.base import Planned, sampler_of

UNFIT = (
    "sampling.predictor=first_hitting draws all unmasking times before the network runs, which is right where the "
    "schedule alone decides them (subs, mlm, mmldlm and the blocks of bd3lm); use sampling.predictor=analytic"
)


class FirstHitting(Planned):
    """Unmask the positions of each row one at a time, at times that are drawn in advance.

    Raises:
        ValueError: the network decides when a token is unmasked, so its time cannot be drawn in advance.
    """

    def __post_init__(self) -> None:
        if not self.model.independent_unmasking:
            raise ValueError(UNFIT)
        open_BL, schedule = self.trace.open_BL, self.model.schedule
        start = schedule(torch.ones((), dtype=torch.float64, device=open_BL.device)).move_chance
        level_BL = (self.noise.uniform(open_BL.shape[1]) * start).masked_fill(~open_BL, -1.0)
        falling = level_BL.sort(dim=-1, descending=True)
        number_BL = falling.indices.argsort(dim=-1).masked_fill(~open_BL, -1)
        time_BL = schedule.t_from_alpha(1 - falling.values).clamp(0.0, 1.0)
        self.plan(number_BL, time_BL, int(open_BL.sum(-1).max()))


sample = sampler_of(FirstHitting, Absorbing, independent=True)
