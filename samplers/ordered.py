"""Sampling in an order that the network's own prediction decides: left to right, or the most certain position first.

It has its own distribution, not that of the diffusion model; estimators/ordered.py computes its exact likelihood (DUEL,
Turok et al., arXiv 2603.01367).

Shape suffixes: B batch, L length, N masked positions, V vocabulary.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from palimpsest.common.positions import Positions
from palimpsest.common.values import AtLeastOne
from palimpsest.denoisers import Denoiser
from palimpsest.process import Absorbing
from palimpsest.samplers.base import Request, Step, sampler_of
from palimpsest.samplers.trace import Trace

ORDERS = ("left_to_right", "confidence", "margin", "entropy")
_TIE = 2.0**-17  # above the rounding errors of float32, which differ from one batch to another


def preference(log_p_NV: Tensor, at: Positions, order: str) -> Tensor:
    """Return the preference for unmasking each position of `at` next, float64 (B, L), -inf elsewhere.

    It depends on the prediction only, never on the token that is written. confidence: the largest probability. margin:
    its distance to the second (Kim et al., arXiv 2502.06768). entropy: minus the entropy. They are rounded to multiples
    of 2^-17, so that equal predictions, such as those of a network that sees masks only, are a tie in every batch.
    """
    if order == "left_to_right":
        return at.spread(-at.place_N.double(), -torch.inf)
    p_NV = log_p_NV.double().exp()
    if order == "confidence":
        value_N = p_NV.max(-1).values
    elif order == "margin":
        first_N, second_N = p_NV.topk(2, dim=-1).values.unbind(-1)
        value_N = first_N - second_N
    else:
        value_N = (p_NV * log_p_NV.double().masked_fill(p_NV == 0, 0.0)).sum(-1)
    return at.spread((value_N / _TIE).round() * _TIE, -torch.inf)


def first_positions(preference_BL: Tensor, count_B: Tensor) -> Tensor:
    """Return True at the `count_B` preferred positions of each row, (B, L); ties go left."""
    ranks_BL = preference_BL.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return ranks_BL < count_B[:, None]


class AtEveryMask(Step):
    """Predict every masked position, then unmask those that `chosen` selects."""

    def __post_init__(self) -> None:
        self.masked, self.maskable_B = Positions(self.trace.open_BL), self.trace.open_BL.sum(-1)

    @abstractmethod
    def chosen(self, log_p_NV: Tensor, at: Positions) -> Tensor:
        """Return a mask of the positions to unmask, (B, L)."""

    def positions(self, number: int, trace: Trace) -> Request | None:
        if not len(self.masked):
            return None
        return Request(self.masked, time_of(self.model, self.masked.mask_BL.sum(-1), self.maskable_B))

    def tokens(self, log_p_NV: Tensor, at: Positions) -> tuple[Tensor, Positions]:
        now = Positions(self.chosen(log_p_NV, at))
        self.masked = self.masked.without(now)
        return self.choice.draw(log_p_NV[at.find(now)], now.take(self.u_BL)), now


@dataclass(kw_only=True)
class Ordered(AtEveryMask):
    """Unmask the `tokens_per_step` positions that come first in the order."""

    order: Literal["left_to_right", "confidence", "margin", "entropy"]
    tokens_per_step: AtLeastOne = 1

    def chosen(self, log_p_NV: Tensor, at: Positions) -> Tensor:
        count_B = at.mask_BL.sum(-1).clamp(max=self.tokens_per_step)
        return first_positions(preference(log_p_NV, at, self.order), count_B)


sample = sampler_of(Ordered, Absorbing)


def time_of(model: Denoiser, masked_B: Tensor, maskable_B: Tensor) -> Tensor:
    """Return the time at which this share of masks is expected, for time-conditioned networks, float64 (B,)."""
    share_B = masked_B.double() / maskable_B.clamp(min=1)
    return model.schedule.t_from_alpha(1 - share_B).clamp(0.0, 1.0)
