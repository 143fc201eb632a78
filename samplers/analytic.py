"""Sampling by p(x_s | x_t) on a grid of times, for any masked-diffusion objective.

For SEDD this is the analytic (Tweedie) sampler (arXiv 2310.16834, theorem 4.1), for D3PM its reverse chain, for SUBS
plain ancestral sampling. It draws exactly from the distribution of the chain of these steps.

Shape suffixes: B batch, L length, R rows evaluated, N masked positions, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from palimpsest.common.positions import Positions
from palimpsest.common.values import Count
from palimpsest.process import Absorbing
from palimpsest.samplers.base import Request, sampler_of, time_grid
from palimpsest.samplers.ordered import AtEveryMask
from palimpsest.samplers.trace import Trace


@dataclass(kw_only=True)
class Analytic(AtEveryMask):
    """Draw from p(x_s | x_t) at every mask, which decides both whether it is unmasked and which token it becomes.

    Args:
        noise_removal: after the last step draw a token for every remaining mask, as SEDD's denoiser does.
    """

    steps: Count
    noise_removal: bool = True
    eps: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.grid = time_grid(self.steps, self.eps, self.trace.ids_BL.device)

    def positions(self, number: int, trace: Trace) -> Request | None:
        if number > self.steps + self.noise_removal:
            return None
        batch, length = trace.ids_BL.shape
        self.unmask_BL = self.noise.uniform(length)
        self.u_BL = self.noise.uniform(length)
        self.last = number > self.steps
        t = self.grid[number - 1]
        s = t / 2 if self.last else self.grid[number]  # the last draw unmasks every mask, whatever s is
        return Request(self.masked, t.expand(batch), s.expand(batch))

    def chosen(self, log_p_NV: Tensor, at: Positions) -> Tensor:
        mask_id = self.model.process.mask_id
        unmasked_N = at.take(self.unmask_BL) < -torch.expm1(log_p_NV[:, mask_id])
        log_p_NV[:, mask_id] = -torch.inf  # in place, so that tokens and confidence are conditional on unmasking
        log_p_NV.copy_(log_p_NV.log_softmax(-1))
        return at.spread(unmasked_N | self.last)


sample = sampler_of(Analytic, Absorbing)
