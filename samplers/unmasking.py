"""Iterative unmasking within a budget of steps, optionally with remasking. What each setting samples:

- order=random, one token per step (at least as many steps as masks), remask=none: the model's distribution, exactly, if
  unmasking does not depend on the prediction (parameterization=subs, bd3lm) and the network is not shown the time.
- order=random, several tokens per step: an approximation, because the tokens of a step are drawn independently. It
  tends to the model's distribution as the steps become many.
- order=random, remask=remdm: the distribution of ReMDM's chain, exactly. With remask_eta=0 this is ancestral sampling
  on `steps` times with alpha = 1 - schedule, which tends to the model's distribution.
- everything else (an order by the prediction, a threshold, low-confidence remasking, any choice of tokens but the
  default) is a heuristic with its own, less diverse distribution, often with better texts for few evaluations.

Shape suffixes: B batch, L length, N positions predicted, V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from palimpsest.common.positions import Positions
from palimpsest.common.randomness import KeyedNoise
from palimpsest.common.values import AboveZeroShare, Count, Needs, Share
from palimpsest.process import Absorbing
from palimpsest.samplers import ordered
from palimpsest.samplers.base import Request, Step, sampler_of
from palimpsest.samplers.ordered import first_positions, preference, time_of
from palimpsest.samplers.trace import Trace

SCHEDULES = ("linear", "cosine", "exponential")
ORDERS = ("random", *ordered.ORDERS)
REMASKS = ("none", "low_confidence", "remdm")


def not_by_confidence(key: str, value: object, order: str) -> str:
    """Return the message for an order that contradicts a setting of the confidence."""
    return f"sampling.{key}={value} goes by confidence, and sampling.order={order} does not; leave one of them out"


@dataclass(frozen=True)
class Unmasking:
    """Settings for the number of positions that a step unmasks, their choice, and remasking.

    Args:
        schedule: the share of masks that remains after each step (`masked_share`).
        order: which positions are unmasked first: `random`, or one of samplers/ordered.py. `threshold` and
            remask=low_confidence go by confidence instead.
        threshold: unmask all positions at which the model's largest probability exceeds it, at least one, whatever the
            schedule; the last step unmasks the rest (Fast-dLLM, Wu et al., arXiv 2505.22618).
        remask: none. low_confidence: draw a token at every mask, keep the most probable ones, as many as the schedule
            or the threshold says, and remask the others (LLaDA, Nie et al., arXiv 2502.09992, algorithm 5; MaskGIT,
            Chang et al., arXiv 2202.04200). remdm: `remdm_probs`.
        remask_eta: maximum probability that remdm remasks a token at a step.

    Raises:
        ValueError: two settings that decide the same thing.
    """

    schedule: Literal["linear", "cosine", "exponential"] = "linear"
    order: Literal["left_to_right", "confidence", "margin", "entropy", "random"] = "random"
    threshold: AboveZeroShare | None = None
    remask: Literal["none", "low_confidence", "remdm"] = "none"
    remask_eta: Annotated[Share, Needs("remask", ("remdm",))] = 0.02

    def __post_init__(self) -> None:
        by_confidence = {"threshold": self.threshold is not None, "remask": self.remask == "low_confidence"}
        for key, chosen in by_confidence.items():
            if chosen and self.order in ("random", "left_to_right", "entropy"):
                raise ValueError(not_by_confidence(key, getattr(self, key), self.order))
        if self.threshold is not None and self.schedule != "linear":
            raise ValueError(
                f"sampling.threshold={self.threshold} says how many tokens a step writes, and so does "
                f"sampling.schedule={self.schedule}; leave one of them out"
            )
        if self.threshold is not None and self.remask == "remdm":
            raise ValueError(
                f"sampling.threshold={self.threshold} contradicts sampling.remask=remdm, whose probabilities "
                "decide how many tokens a step writes; leave one of them out"
            )

    @property
    def ignores_prediction(self) -> bool:
        """True if the positions are chosen without the prediction, which is then computed for them only."""
        fixed_order = self.order in ("random", "left_to_right")
        return fixed_order and self.threshold is None and self.remask != "low_confidence"

    def in_order(self, masked_BL: Tensor, u_BL: Tensor, count_B: Tensor) -> Tensor:
        """Return a mask of the `count_B` positions of each row that come first in an order without prediction."""
        key_BL = u_BL if self.order == "random" else torch.arange(u_BL.shape[1], device=u_BL.device)
        return first_positions(torch.where(masked_BL, -key_BL, -torch.inf), count_B)

    def chosen(self, log_p_NV: Tensor, drawn_N: Tensor | None, at: Positions, count_B: Tensor) -> Tensor:
        """Return a mask of `count_B` positions of each row of `at`, or more by the threshold, (B, L).

        `drawn_N` are the drawn tokens, if they decide.
        """
        if drawn_N is not None:
            p_N = log_p_NV.gather(-1, drawn_N[:, None]).squeeze(-1).double().exp()
            score_BL = at.spread(p_N, -torch.inf)
        else:
            score_BL = preference(log_p_NV, at, self.order if self.threshold is None else "confidence")
        if self.threshold is not None:
            count_B = torch.maximum(count_B, (score_BL > self.threshold).sum(-1))
        return first_positions(score_BL, count_B) & at.mask_BL


def masked_share(schedule: str, done: float | Tensor, count_B: Tensor) -> Tensor:
    """Return the share of the `count_B` masks of each row that remains after a fraction r of the steps, float64 (B,).

    linear: 1 - r. cosine: cos(pi r / 2) (MaskGIT). exponential: 1 - ((n + 1)^r - 1) / n for n masks, so that the number
    of unmasked tokens (plus one) grows by the same factor at every step. The last two begin slowly.
    """
    r_B = torch.as_tensor(done, dtype=torch.float64, device=count_B.device).expand(count_B.shape)
    if schedule == "linear":
        left_B = 1 - r_B
    elif schedule == "cosine":
        left_B = torch.cos(math.pi / 2 * r_B)
    else:
        n_B = count_B.double().clamp(min=1)
        left_B = 1 - ((n_B + 1) ** r_B - 1) / n_B
    return torch.where(r_B >= 1, 0.0, left_B)


def masks_left(schedule: str, step: int, steps: int, count_B: Tensor) -> Tensor:
    """Return how many of `count_B` masks remain after `step` of `steps`, int64 (B,).

    It is the schedule's share, rounded down, but every step unmasks at least one. A row of n masks takes min(n, steps)
    steps.
    """
    own_steps_B = count_B.clamp(min=1, max=steps)
    share_B = masked_share(schedule, (step / own_steps_B.double()).clamp(max=1.0), count_B)
    scheduled_B = (count_B * share_B + 1e-9).floor().long()
    return torch.minimum(scheduled_B, count_B - step).clamp(min=0)


def remdm_probs(alpha_t_B: Tensor, alpha_s_B: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """Return the probabilities of unmasking and of remasking a token from t to s < t, float64 (B,), by ReMDM's reverse
    posterior (Wang et al., arXiv 2503.00307, section 3).

    A token is remasked with probability sigma = min(eta, (1 - alpha_s) / alpha_t), the cap of ReMDM-cap (section 4.1),
    and unmasked with probability (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t). The share of masks at s is
    1 - alpha_s for any eta; eta = 0 is the posterior of MDLM.
    """
    most_B = (1 - alpha_s_B) / alpha_t_B.clamp(min=torch.finfo(torch.float64).tiny)
    sigma_B = most_B.clamp(max=eta)
    return (alpha_s_B - (1 - sigma_B) * alpha_t_B) / (1 - alpha_t_B), sigma_B


@dataclass(kw_only=True)
class Unmask(Step):
    """Unmask positions by a schedule, a threshold or the probabilities of ReMDM, and remask some.

    A time-conditioned network is evaluated at the time at which the current number of masks is expected. Rows that
    unmask nothing in a step are not evaluated.
    """

    steps: Count
    how: Unmasking = Unmasking()

    def __post_init__(self) -> None:
        # Numbers for any number of steps from one call, so that later ones do not depend on how many steps other rows
        # of the batch take.
        self.step_noise = KeyedNoise(0, (self.noise.uniform() * 2**53).long())
        self.masked, self.maskable_B = Positions(self.trace.open_BL), self.trace.open_BL.sum(-1)

    def positions(self, number: int, trace: Trace) -> Request | None:
        how, masked_BL = self.how, trace.masked_BL
        if number > self.steps or not len(self.masked):
            return None
        u_BL, self.u_BL = (self.step_noise.uniform(masked_BL.shape[1]) for _ in range(2))
        remasked_BL = None
        if how.remask == "remdm":
            done = ((number - 1) / self.steps, number / self.steps)
            alpha_t_B, alpha_s_B = (1 - masked_share(how.schedule, r, self.maskable_B) for r in done)
            unmask_B, remask_B = remdm_probs(alpha_t_B, alpha_s_B, how.remask_eta)
            t_B = self.model.schedule.t_from_alpha(alpha_t_B).clamp(0.0, 1.0)
            self.count_B = (masked_BL & (u_BL < unmask_B[:, None])).sum(-1)
            remasked_BL = (trace.step_BL > 0) & (u_BL < remask_B[:, None])
        else:
            t_B = time_of(self.model, masked_BL.sum(-1), self.maskable_B)
            self.count_B = _num_to_unmask(how, number, self.steps, masked_BL.sum(-1), self.maskable_B)
        at = self.masked
        if how.ignores_prediction:
            at = Positions(how.in_order(masked_BL, u_BL, self.count_B))
        elif how.remask == "remdm":
            at = Positions(masked_BL & (self.count_B > 0)[:, None])
        return Request(at, t_B, erase_BL=remasked_BL)

    def tokens(self, log_p_NV: Tensor, at: Positions) -> tuple[Tensor, Positions]:
        u_N = at.take(self.u_BL)
        drawn_N, now = None, at
        if self.how.ignores_prediction or self.how.remask == "low_confidence":
            drawn_N = self.choice.draw(log_p_NV, u_N)
        if not self.how.ignores_prediction:
            now = Positions(self.how.chosen(log_p_NV, drawn_N, at, self.count_B))
        if self.how.remask != "remdm":  # which may mask every position again
            self.masked = self.masked.without(now)
        here_M = at.find(now)
        return self.choice.draw(log_p_NV[here_M], u_N[here_M]) if drawn_N is None else drawn_N[here_M], now


def _num_to_unmask(how: Unmasking, step: int, steps: int, left_B: Tensor, maskable_B: Tensor) -> Tensor:
    """Return how many of the `left_B` masks a step unmasks, (B,); with a threshold, the minimum."""
    if how.threshold is None:
        return left_B - masks_left(how.schedule, step, steps, maskable_B)
    return left_B if step == steps else left_B.clamp(max=1)


sample = sampler_of(Unmask, Absorbing)
