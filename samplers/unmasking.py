"""Iterative unmasking: a text out of masks in at most so many steps, each of which writes the positions that it is
surest of, or others, and may take some back. What these decoders draw:

- order=random, a token a step (at least as many steps as masks), remask=none: **the model's law**, exactly, where
  masks go independently of the prediction (parameterization=subs, bd3lm) and the network is not shown the time.
- order=random, several tokens a step: an approximation, for tokens of one step are drawn independently; with more
  steps it tends to the model's law.
- order=random, remask=remdm: the law of ReMDM's own chain, exactly; with remask_eta=0 that is ancestral sampling on
  `steps` times with alpha = 1 - schedule, which tends to the model's law.
- all else is **a heuristic**: an order that looks at the prediction, a threshold, low-confidence remasking; any choice
  of tokens but the default. Often better texts at little cost, of a law that is not the model's and less diverse.

Shape suffixes: B batch, L length, R rows evaluated, N positions asked for, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from palimpsest.common.randomness import KeyedNoise
from palimpsest.common.values import AboveZeroShare, Count, Share
from palimpsest.denoisers import Denoiser
from palimpsest.process import Absorbing
from palimpsest.samplers import ordered
from palimpsest.samplers.base import Asked, Step, TokenChoice, sampler_of
from palimpsest.samplers.ordered import at_positions, first_positions, preference, time_of
from palimpsest.samplers.trace import Trace

SCHEDULES = ("linear", "cosine", "exponential")
ORDERS = ("random", *ordered.ORDERS)
REMASKS = ("none", "low_confidence", "remdm")


def not_by_confidence(key: str, value: object, order: str) -> str:
    """Return the message for an order that contradicts a setting of the confidence."""
    return f"sampling.{key}={value} goes by confidence, and sampling.order={order} does not; leave one of them out"


@dataclass(frozen=True)
class Unmasking:
    """How many positions a step writes, which, and what it takes back.

    schedule: the share of masks that is left, by `masked_share`.
    order: which positions go first; `random`, or one of samplers/ordered.py. Not read by the next two, which go by
        confidence.
    threshold: write, whatever the schedule, all positions at which the model's probability exceeds it, one at least;
        what is left at the last step goes then (Fast-dLLM, Wu et al., arXiv 2505.22618).
    remask: none; low_confidence: draw a token for every mask, keep those that the model gave most probability, so
        many as the schedule (or the threshold) says, and mask the others again (LLaDA, Nie et al., arXiv 2502.09992,
        algorithm 5; MaskGIT, Chang et al., arXiv 2202.04200); remdm: `remdm_chances`.
    remask_eta: most chance that remdm masks a written token again at a step.

    Raises:
        ValueError: two settings that decide the same thing.
    """

    schedule: Literal["linear", "cosine", "exponential"] = "linear"
    order: Literal["left_to_right", "confidence", "margin", "entropy", "random"] = "random"
    threshold: AboveZeroShare | None = None
    remask: Literal["none", "low_confidence", "remdm"] = "none"
    remask_eta: Share = 0.02

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
                f"sampling.threshold={self.threshold} contradicts sampling.remask=remdm, whose chances say how many "
                "tokens a step writes; leave one of them out"
            )

    @property
    def blind(self) -> bool:
        """Whether the positions are chosen without the prediction, so that it is needed there only."""
        by_itself = self.order in ("random", "left_to_right")
        return by_itself and self.threshold is None and self.remask != "low_confidence"

    def in_order(self, masked_RL: Tensor, u_RL: Tensor, count_R: Tensor) -> Tensor:
        """Where `count_R` tokens of each row are written in an order that is blind, (R, L)."""
        early_RL = torch.where(masked_RL, -u_RL, -torch.inf)
        return first_positions(early_RL if self.order == "random" else preference(u_RL, masked_RL, self.order), count_R)

    def chosen(self, log_p_NV: Tensor, drawn_N: Tensor | None, masked_RL: Tensor, count_R: Tensor) -> Tensor:
        """Where `count_R` tokens of each row, or more by the threshold, are written, by the prediction at all masks,
        (R, L). drawn_N: the tokens that remask=low_confidence has drawn there."""
        if drawn_N is not None:
            p_N = log_p_NV.gather(-1, drawn_N[:, None]).squeeze(-1).double().exp()
            sure_RL = at_positions(p_N, masked_RL)
        else:
            sure_RL = preference(log_p_NV, masked_RL, self.order if self.threshold is None else "confidence")
        if self.threshold is not None:
            count_R = torch.maximum(count_R, (sure_RL > self.threshold).sum(-1))
        return first_positions(sure_RL, count_R)


def masked_share(schedule: str, done: float | Tensor, count_B: Tensor) -> Tensor:
    """The share of the `count_B` masks of each row that is left when the share `done` of the steps is, float64 (B,).

    linear: 1 - r. cosine: cos(pi r / 2) (MaskGIT). exponential: 1 - ((n + 1)^r - 1) / n for n masks, so that the number
    written (plus one) grows by the same factor at every step. The last two begin slowly. All: 1 at r = 0, 0 at r = 1.
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
    """How many of `count_B` masks are left after `step` of `steps`, int64 (B,): the schedule's share rounded down, but
    every step writes one at least. So a row of n masks takes min(n, steps) steps."""
    own_B = count_B.clamp(min=1, max=steps)
    share_B = masked_share(schedule, (step / own_B.double()).clamp(max=1.0), count_B)
    scheduled_B = (count_B * share_B + 1e-9).floor().long()
    return torch.minimum(scheduled_B, count_B - step).clamp(min=0)


@dataclass(frozen=True)
class Chances:
    """Of one step, float64 (B,): that a mask is written, that a written token is masked again."""

    write_B: Tensor
    erase_B: Tensor


def remdm_chances(alpha_t_B: Tensor, alpha_s_B: Tensor, eta: float) -> Chances:
    """The reverse posterior of ReMDM (Wang et al., arXiv 2503.00307, section 3) from t to s < t: a written token is
    masked with chance sigma, a mask written with chance (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t), where sigma =
    min(eta, (1 - alpha_s) / alpha_t), the cap of ReMDM-cap (section 4.1). The share of masks at s stays 1 - alpha_s
    whatever eta; with eta = 0 this is the posterior of MDLM."""
    most_B = (1 - alpha_s_B) / alpha_t_B.clamp(min=torch.finfo(torch.float64).tiny)
    sigma_B = most_B.clamp(max=eta)
    return Chances((alpha_s_B - (1 - sigma_B) * alpha_t_B) / (1 - alpha_t_B), sigma_B)


class Unmask(Step):
    """Unmask as many positions as the schedule, a threshold or ReMDM's probabilities say, and remask some.

    A time-conditioned network is evaluated at the time at which the current number of masks is expected. Rows that
    unmask nothing in a step are not evaluated.
    """

    def __init__(
        self,
        model: Denoiser,
        trace: Trace,
        noise: KeyedNoise,
        *,
        steps: Count,
        how: Unmasking = Unmasking(),  # noqa: B008 - frozen
        choice: TokenChoice = TokenChoice(),  # noqa: B008 - frozen
    ) -> None:
        self.model = model
        self.how = how
        self.choice = choice
        self.noise = _stream(noise)
        self.maskable_B = trace.open_BL.sum(-1)
        self.steps = steps

    def positions(self, number: int, trace: Trace) -> Asked | None:
        how, masked_BL = self.how, trace.masked_BL
        if number > self.steps or not bool((self.maskable_B if how.remask == "remdm" else masked_BL).any()):
            return None
        where_BL, self.token_BL = self.noise.uniform(masked_BL.shape[1]), self.noise.uniform(masked_BL.shape[1])
        erased_BL = None
        if how.remask == "remdm":
            alpha_t_B, alpha_s_B = (_alpha(how, n, self.steps, self.maskable_B) for n in (number - 1, number))
            chances = remdm_chances(alpha_t_B, alpha_s_B, how.remask_eta)
            t_B = self.model.schedule.t_from_alpha(alpha_t_B).clamp(0.0, 1.0)
            self.count_B = (masked_BL & (where_BL < chances.write_B[:, None])).sum(-1)
            erased_BL = (trace.step_BL > 0) & (where_BL < chances.erase_B[:, None])
        else:
            t_B = time_of(self.model, masked_BL.sum(-1), self.maskable_B)
            self.count_B = _wanted(how, number, self.steps, masked_BL.sum(-1), self.maskable_B)
        if how.blind:
            return Asked(how.in_order(masked_BL, where_BL, self.count_B), t_B, erase_BL=erased_BL)
        return Asked(masked_BL & (self.count_B > 0)[:, None], t_B, erase_BL=erased_BL)

    def tokens(self, log_p_NV: Tensor, at_RL: Tensor, rows_R: Tensor) -> tuple[Tensor, Tensor | None]:
        u_N = self.token_BL[rows_R][at_RL]
        if self.how.blind:
            return self.choice.draw(log_p_NV, u_N), None
        drawn_N = self.choice.draw(log_p_NV, u_N) if self.how.remask == "low_confidence" else None
        now_N = self.how.chosen(log_p_NV, drawn_N, at_RL, self.count_B[rows_R])[at_RL]
        return self.choice.draw(log_p_NV[now_N], u_N[now_N]) if drawn_N is None else drawn_N[now_N], now_N


def _wanted(how: Unmasking, step: int, steps: int, left_B: Tensor, maskable_B: Tensor) -> Tensor:
    """How many of the `left_B` masks this step writes, (B,); with a threshold at least so many."""
    if how.threshold is None:
        return left_B - masks_left(how.schedule, step, steps, maskable_B)
    return left_B if step == steps else left_B.clamp(max=1)


def _alpha(how: Unmasking, step: int, steps: int, maskable_B: Tensor) -> Tensor:
    """The share of a row that is written after so many steps, as the schedule has it, float64 (B,)."""
    return 1 - masked_share(how.schedule, step / steps, maskable_B)


def _stream(generator: KeyedNoise) -> KeyedNoise:
    """Noise for any number of steps out of one call, so that what `generator` gives next does not depend on how many
    steps the other rows of the batch took."""
    return KeyedNoise(0, (generator.uniform() * 2**53).long())


sample = sampler_of(Unmask, Absorbing)
