"""Where a Monte Carlo draw of the bound looks: how t and the masked positions are chosen, and what each choice weighs.

The bound is an integral over t of an expectation over masks. Every class here gives (x_t, t, scale) such that the
expectation of scale * integrand(x_t, t) is that integral; they differ in variance and in cost.
Shape suffixes: B batch, L length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Protocol

import torch
from torch import Tensor

from palimpsest.common.randomness import KeyedNoise
from palimpsest.common.values import IF_SET, BelowOne, Natural
from palimpsest.noise_schedule import NoiseSchedule
from palimpsest.process import Absorbing, Process

_EARLIEST = 1e-6  # t whose mask rate and weight are still exact to four digits under every schedule


@dataclass(frozen=True)
class Noised:
    """xt_BL: tokens of which some are masked. t_B: their time, float64. scale_B: factor of the integrand, float64."""

    xt_BL: Tensor
    t_B: Tensor
    scale_B: Tensor


class Noising(Protocol):
    """Draws what one evaluation of the loss looks at: `passes` network passes, whose mean is the estimate."""

    label: str
    passes: int
    discrete: bool  # gives times of the grid 1/T, ..., 1
    all_rates: bool  # covers every share of masks, if the schedule does
    of_the_bound: bool  # the mean of its draws is the bound; else it is for training by another weight only
    changes_variables: bool  # the network is to be shown what t is drawn by
    counts: bool  # draws a number of masks, never 0: for integrands that are 0 on clean texts

    def __call__(
        self, schedule: NoiseSchedule, x0_BL: Tensor, scored_BL: Tensor, process: Process, noise: KeyedNoise
    ) -> list[Noised]: ...


class Bernoulli:
    """t first, then each token masked with probability 1 - alpha(t): the reference's way.

    Args:
        antithetic_sampling: take the evenly spread times that the noise brings, else independent ones.
        sampling_eps: smallest t of a training; smaller ones mask next to nothing and only add variance. Measuring
            needs all mask rates, so 0.
        importance_sampling: draw log(1 - alpha) evenly instead of t, so that every masked token weighs the same
            (VDM, arXiv 2107.00630, appendix I).
        change_of_variables: the same choice, made because the network is shown log(1 - alpha) (objectives/subs.py).
        T: > 0 for times of the grid 1/T, 2/T, ..., 1.
        resample: give every row (block) a share of masks within the rates that the schedule runs through (BD3-LM,
            arXiv 2503.09573, section 5.2): their number follows its law given that. A heuristic of training: what it
            draws from is not quite the process that the bound is of.
    """

    passes = 1
    of_the_bound = True
    counts = False

    def __init__(
        self,
        antithetic_sampling: bool = True,
        sampling_eps: BelowOne = 0.0,
        importance_sampling: bool = False,
        change_of_variables: bool = False,
        T: Natural = 0,  # noqa: N803 - the key as users type it
        resample: Annotated[bool, IF_SET] = False,
    ) -> None:
        if importance_sampling and change_of_variables:
            raise ValueError(
                "training.importance_sampling=true and training.change_of_variables=true are two forms of the same "
                "change; keep one"
            )
        self.changes_variables = change_of_variables
        importance_sampling = importance_sampling or change_of_variables
        if importance_sampling and T:
            raise ValueError(
                f"training.importance_sampling or training.change_of_variables with T={T}: they choose t from a "
                "continuum, and T > 0 has a grid; set T=0 or switch them off"
            )
        self.antithetic_sampling, self.sampling_eps = antithetic_sampling, sampling_eps
        self.importance_sampling, self.T, self.resample = importance_sampling, T, resample
        spread = "stratified t" if antithetic_sampling else "independent t"
        self.label = f"{spread}, importance-sampled" if importance_sampling else spread

    @property
    def discrete(self) -> bool:
        return self.T > 0

    @property
    def all_rates(self) -> bool:
        return not self.resample and (self.discrete or self.sampling_eps == 0)

    def __call__(
        self, schedule: NoiseSchedule, x0_BL: Tensor, scored_BL: Tensor, process: Process, noise: KeyedNoise
    ) -> list[Noised]:
        u_B = noise.time() if self.antithetic_sampling else noise.uniform()
        t_B, scale_B = self._log_uniform(schedule, u_B) if self.importance_sampling else self._uniform(u_B)
        level = schedule(t_B)
        if self.resample:
            u_BL = noise.uniform(x0_BL.shape[1])
            limits = schedule(torch.tensor([0.0, 1.0], dtype=torch.float64, device=t_B.device)).move_chance
            count_B = _limited_count(noise.uniform(), level.move_chance, scored_BL, limits)
            level_B = order_statistic(u_BL.masked_fill(~scored_BL, torch.inf), count_B)
            masked_BL = (u_BL <= level_B[:, None]) & scored_BL & (count_B > 0)[:, None]
            return [Noised(process.mask(x0_BL, masked_BL), t_B, scale_B)]
        return [Noised(process.corrupt(x0_BL, level.alpha, noise, scored_BL), t_B, scale_B)]

    def _uniform(self, u_B: Tensor) -> tuple[Tensor, Tensor]:
        if self.T:
            return (torch.floor(u_B * self.T) + 1) / self.T, torch.ones_like(u_B)
        return ((1 - self.sampling_eps) * u_B + self.sampling_eps).clamp(min=_EARLIEST), torch.ones_like(u_B)

    def _log_uniform(self, schedule: NoiseSchedule, u_B: Tensor) -> tuple[Tensor, Tensor]:
        low, high = log_move_range(schedule, u_B, self.sampling_eps)
        t_B = schedule.t_from_alpha(-torch.expm1(low + u_B * (high - low)))
        # density of t is elbo_weight / (high - low); that of `_uniform` is 1 / (1 - sampling_eps)
        return t_B, (high - low) / ((1 - self.sampling_eps) * schedule(t_B).elbo_weight)


def _limited_count(u_B: Tensor, rate_B: Tensor, scored_BL: Tensor, limits_2: Tensor) -> Tensor:
    """How many of the n scored positions of each row are masked: binomial with `rate_B`, given that their share lies
    within the limits, or, where no number does, as near to the rate as can be; by inversion of `u_B`."""
    n_B, most = scored_BL.sum(-1), scored_BL.shape[1]
    k_M = torch.arange(most + 1, dtype=torch.float64, device=u_B.device)
    rest_BM, rate_B1 = (n_B[:, None] - k_M).clamp(min=0), rate_B.clamp(1e-12, 1 - 1e-12)[:, None]
    choose_BM = torch.lgamma(n_B[:, None] + 1.0) - torch.lgamma(k_M + 1) - torch.lgamma(rest_BM + 1)
    log_p_BM = choose_BM + k_M * rate_B1.log() + rest_BM * torch.log1p(-rate_B1)
    # A limit at (almost) nothing or everything is none: a block of few tokens may have no mask, or nothing else.
    low, high = torch.where(limits_2[0] > 2e-3, limits_2[0], 0.0), torch.where(limits_2[1] < 1 - 2e-3, limits_2[1], 1.0)
    inside_BM = (k_M >= low * n_B[:, None] - 1e-9) & (k_M <= high * n_B[:, None] + 1e-9)
    nearest_B = torch.round(rate_B * n_B)
    inside_BM = torch.where(inside_BM.any(-1, keepdim=True), inside_BM, k_M == nearest_B[:, None])
    p_BM = log_p_BM.masked_fill(~inside_BM | (k_M > n_B[:, None]), -torch.inf).softmax(-1)
    return (p_BM.cumsum(-1) <= u_B[:, None]).sum(-1).clamp(max=most).minimum(n_B)


def log_move_range(schedule: NoiseSchedule, like: Tensor, sampling_eps: float = 1e-3) -> tuple[Tensor, Tensor]:
    """log(1 - alpha) at t = sampling_eps and at t = 1, float64 scalars on the device of `like`."""
    ends = schedule(torch.tensor([sampling_eps, 1.0], dtype=torch.float64, device=like.device))
    return ends.move_chance.clamp(min=_EARLIEST**2).log().unbind()


class ExactCount:
    """Exactly k of n tokens masked, k uniform in 1..n: the integral over t done by hand.

    Under any schedule from alpha = 1 to alpha = 0 a mask of k given positions carries the weight
    int elbo_weight (1 - alpha)^k alpha^(n - k) dt = 1 / (k C(n, k)), so uniform k with factor n / k is unbiased and
    free of the noise of t (RADD, arXiv 2406.03736; LLaDA, arXiv 2502.09992). Networks that see t get
    it from its law given k: 1 - alpha is Beta(k, n - k + 1), which is that of the k-th of n sorted uniforms.
    """

    passes = 1
    discrete = False
    changes_variables = False
    all_rates = True
    of_the_bound = True
    counts = True
    label = "exact mask counts"

    def __call__(
        self, schedule: NoiseSchedule, x0_BL: Tensor, scored_BL: Tensor, process: Absorbing, noise: KeyedNoise
    ) -> list[Noised]:
        u_BL, n_B = shuffled(noise, scored_BL), scored_BL.sum(-1)
        k_B = 1 + torch.floor(noise.time() * n_B).long()
        return [_with_masks(schedule, x0_BL, scored_BL, process, u_BL, k_B, n_B / k_B)]


class TiltedCount:
    """As `ExactCount`, but small k drawn more often: for the difference of two likelihoods of one text.

    Of n tokens of which k are masked, n / k times their sum has a variance in proportion to (n - k) / k (a sample drawn
    without replacement), so its square root is the best density of k / n, and that is Beta(1/2, 3/2). Half of the draws
    keep uniform k, so that no draw weighs more than twice what it does there.
    """

    passes = 1
    discrete = False
    changes_variables = False
    all_rates = True
    of_the_bound = True
    counts = True
    label = "exact mask counts, small ones more often"

    def __call__(
        self, schedule: NoiseSchedule, x0_BL: Tensor, scored_BL: Tensor, process: Absorbing, noise: KeyedNoise
    ) -> list[Noised]:
        u_BL, n_B = shuffled(noise, scored_BL), scored_BL.sum(-1)
        place_L = torch.arange(1, x0_BL.shape[1] + 1, dtype=torch.float64, device=x0_BL.device)
        reached_BL = _tilted_cdf((place_L / n_B.clamp(min=1)[:, None]).clamp(max=1.0))
        k_B = (1 + (reached_BL <= noise.time()[:, None]).sum(-1)).minimum(n_B.clamp(min=1))
        chance_B = _tilted_cdf(k_B / n_B.clamp(min=1)) - _tilted_cdf((k_B - 1) / n_B.clamp(min=1))
        return [_with_masks(schedule, x0_BL, scored_BL, process, u_BL, k_B, 1 / (k_B * chance_B))]


def _tilted_cdf(rate: Tensor) -> Tensor:
    """Distribution function of the even mixture of the uniform law and Beta(1/2, 3/2)."""
    rate = rate.double()
    return 0.5 * rate + (rate.sqrt().asin() + (rate * (1 - rate)).sqrt()) / torch.pi


class Complementary:
    """A mask of k tokens and its complement of n - k: two passes in which every token is masked exactly once, so that
    what one mask overstates the other understates.

    k is uniform in 1..n as in `ExactCount`, and so is n - k if k = n is set apart: then the complement is empty and the
    full mask counts for both.
    """

    passes = 2
    discrete = False
    changes_variables = False
    all_rates = True
    of_the_bound = True
    counts = True
    label = "exact mask counts in complementary pairs"

    def __call__(
        self, schedule: NoiseSchedule, x0_BL: Tensor, scored_BL: Tensor, process: Absorbing, noise: KeyedNoise
    ) -> list[Noised]:
        u_BL, n_B = shuffled(noise, scored_BL), scored_BL.sum(-1)
        # The pair {k, n - k} by its smaller member, 0 standing for k = n: uniform k on a circle of n, folded.
        few_B = torch.floor(noise.time() * 0.5 * n_B + 0.5).long()
        first_BL = (u_BL <= order_statistic(u_BL, few_B)[:, None]) & scored_BL & (few_B > 0)[:, None]
        pair = []
        for masked_BL, k_B in ((first_BL, few_B), (scored_BL & ~first_BL, n_B - few_B)):
            factor_B = torch.where(k_B > 0, n_B / k_B.clamp(min=1), 0.0) * torch.where(few_B > 0, 1.0, 2.0)
            xt_BL = process.mask(x0_BL, masked_BL)
            pair.append(weighted(schedule, xt_BL, order_statistic(u_BL, k_B), factor_B))
        return pair


def shuffled(noise: KeyedNoise, scored_BL: Tensor) -> Tensor:
    """Uniform numbers whose order shuffles the scored positions; +inf elsewhere."""
    return noise.uniform(scored_BL.shape[1]).masked_fill(~scored_BL, torch.inf)


def order_statistic(u_BL: Tensor, k_B: Tensor) -> Tensor:
    """The k-th smallest of each row, (B,); 1/2, a harmless level, where there is none."""
    chosen_B = u_BL.sort(-1).values.gather(1, (k_B - 1).clamp(0, u_BL.shape[1] - 1)[:, None]).squeeze(1)
    return torch.where((k_B > 0) & chosen_B.isfinite(), chosen_B, 0.5)


def _with_masks(
    schedule: NoiseSchedule,
    x0_BL: Tensor,
    scored_BL: Tensor,
    process: Absorbing,
    u_BL: Tensor,
    k_B: Tensor,
    factor_B: Tensor,
) -> Noised:
    """The k scored positions with the smallest numbers masked, each to weigh `factor_B`."""
    level_B = order_statistic(u_BL, k_B)
    xt_BL = process.mask(x0_BL, (u_BL <= level_B[:, None]) & scored_BL)
    return weighted(schedule, xt_BL, level_B, factor_B)


def weighted(schedule: NoiseSchedule, xt_BL: Tensor, move_chance_B: Tensor, factor_B: Tensor) -> Noised:
    """A draw whose masked tokens weigh `factor_B`, whatever weight the integrand gives them at its t."""
    # An integrand without a weight of its own (at t = 0 alpha' may be 0) cannot be rescaled: stay off the end.
    t_B = schedule.t_from_alpha(1 - move_chance_B).clamp(_EARLIEST, 1.0)
    return Noised(xt_BL, t_B, factor_B / schedule(t_B).elbo_weight)
