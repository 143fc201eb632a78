"""The entropy-bounded sampler: each step unmasks as many positions as are nearly certain together (EB-Sampler, Ben-Hamu
et al., arXiv 2505.24857).

A heuristic with a distribution of its own: the tokens of one step are drawn independently, and the order depends on the
prediction. gamma bounds the dependence that a step neglects.

Shape suffixes: B batch, L length, N masked positions, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from palimpsest.common.positions import Positions
from palimpsest.common.values import NotNegative
from palimpsest.process import Absorbing
from palimpsest.samplers.base import sampler_of
from palimpsest.samplers.ordered import AtEveryMask, first_positions, preference


def bounded(log_p_NV: Tensor, at: Positions, gamma: float) -> Tensor:
    """Return a mask of the longest prefix of `at`, by increasing entropy, that satisfies the bound, (B, L).

    The bound: the entropies sum to at most gamma nats, the largest left out. The prefix has at least one position.
    """
    preference_BL = preference(log_p_NV, at, "entropy")
    entropy_BL = (-preference_BL).clamp(min=0.0).sort(dim=-1).values
    # In this order the largest is the last, so the bound is on the sum of those before it.
    before_BL = torch.cat([torch.zeros_like(entropy_BL[:, :1]), entropy_BL[:, :-1].cumsum(-1)], dim=-1)
    return first_positions(preference_BL, torch.minimum((before_BL <= gamma).sum(-1), at.mask_BL.sum(-1)))


@dataclass(kw_only=True)
class EntropyBounded(AtEveryMask):
    """Unmask the positions with the least entropy, as many as `gamma` allows.

    Args:
        gamma: bound in nats. 0 unmasks one token per step, and all tokens with entropy 0.
    """

    gamma: NotNegative

    def chosen(self, log_p_NV: Tensor, at: Positions) -> Tensor:
        return bounded(log_p_NV, at, self.gamma)


sample = sampler_of(EntropyBounded, Absorbing)
