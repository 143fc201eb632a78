"""As many positions a step as are nearly sure together: the entropy-bounded sampler (EB-Sampler, Ben-Hamu et al.,
arXiv 2505.24857).

Not exactly the model's distribution: tokens of one step are drawn independently, and their order follows the
prediction. The dependence that a step neglects is at most what gamma allows.

Shape suffixes: L length, N masked positions, V vocabulary, R rows evaluated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from denoisers import Denoiser
from process import Absorbing
from randomness import KeyedNoise
from samplers.base import TokenChoice, sampler_of
from samplers.ordered import AtEveryMask, first_positions, preference
from samplers.trace import Trace


def bounded(log_p_NV: Tensor, at_RL: Tensor, gamma: float) -> Tensor:
    """True at the most positions of `at_RL`, by increasing entropy, whose entropies sum without the largest to gamma
    (nats) or less; at one at least, (R, L). Ties go left."""
    preference_RL = preference(log_p_NV, at_RL, "entropy")
    entropy_RL = (-preference_RL).clamp(min=0.0).sort(dim=-1).values
    # In this order the largest is the last, so what counts is the sum of those before it.
    before_RL = torch.cat([torch.zeros_like(entropy_RL[:, :1]), entropy_RL[:, :-1].cumsum(-1)], dim=-1)
    return first_positions(preference_RL, torch.minimum((before_RL <= gamma).sum(-1), at_RL.sum(-1)))


class EntropyBounded(AtEveryMask):
    """Write the masks of least entropy, as many as `gamma` allows.

    gamma: nats, 0 or more. 0 writes one token a step, and with it those whose entropy is 0.

    Raises:
        ValueError: a gamma below 0.
    """

    def __init__(
        self, model: Denoiser, trace: Trace, noise: KeyedNoise, *, gamma: float,
        choice: TokenChoice = TokenChoice(),  # noqa: B008 - frozen
    ) -> None:  # fmt: skip
        if not gamma >= 0:
            raise ValueError(f"sampling.gamma={gamma} must be 0 or more")
        super().__init__(model, trace, noise, choice)
        self.gamma = gamma

    def chosen(self, log_p_NV: Tensor, at_RL: Tensor) -> Tensor:
        return bounded(log_p_NV, at_RL, self.gamma)


sample = sampler_of(EntropyBounded, Absorbing)
