"""Mask sampling: how a Monte Carlo draw of the bound chooses t and the masked positions, and how it is weighted.

The bound is an integral over t of an expectation over masks. Every class here draws (x_t, t, scale) such that the
expectation of scale * integrand(x_t, t) is that integral. The classes differ in variance and in cost.
Shape suffixes: B batch, L length, M mask counts.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from palimpsest.common.randomness import KeyedNoise
from palimpsest.common.values import IF_SET, BelowOne, Natural, Needs
from palimpsest.noise_schedule import NoiseSchedule
from palimpsest.process import Absorbing, Process

# Standard deviation of the bell, so that [0, 1] has 2.5 of them on each side of its middle.
_BELL_WIDTH = 0.2
_EARLIEST = 1e-6  # the smallest t at which mask rate and weight are exact to four digits under every schedule


@dataclass(frozen=True)
class Draw:
    """One Monte Carlo draw: the noised tokens, their times (float64), and the factor of the integrand (float64)."""

    xt_BL: Tensor
    t_B: Tensor
    scale_B: Tensor


class MaskSampler(ABC):
    """A way to draw masks; the mean over its draws estimates the bound.

    Attributes:
        label: its name in messages and results.
        passes: network evaluations, and so `Draw`s, of one call.
        discrete: t lies on the grid 1/T, ..., 1.
        covers_all_rates: all mask rates of the schedule are drawn.
        estimates_bound: the expectation is the bound; otherwise the draws are for training with another weight.
        changes_variables: the network is shown log(1 - alpha), by which t is drawn.
        always_masks: at least one token is masked, which needs an integrand that is 0 on clean texts.
        corrects_density: `Draw.scale_B` makes up for times that are not drawn evenly.
        prefers_rates: some mask rates count more than in the bound.
    """

    label: str
    passes = 1
    discrete = changes_variables = corrects_density = prefers_rates = False
    covers_all_rates = estimates_bound = always_masks = True

    @abstractmethod
    def __call__(
        self, schedule: NoiseSchedule, x0_BL: Tensor, scored_BL: Tensor, process: Process, noise: KeyedNoise
    ) -> list[Draw]:
        """Return one `Draw` for each network pass; only tokens at the True positions of `scored_BL` are noised."""


class Bernoulli(MaskSampler):
    """Draw t first, then mask each token with probability 1 - alpha(t), as the references do. Raises ValueError for two
    ways to draw t at once, and for one that does not fit T > 0.

    Args:
        antithetic_sampling: use the evenly spread times of the noise; otherwise independent times.
        sampling_eps: smallest t in training. Smaller t mask almost nothing and only add variance. Evaluation needs all
            mask rates, so 0.
        importance_sampling: draw log(1 - alpha) uniformly instead of t, so that every masked token has the same weight
            (VDM, arXiv 2107.00630, appendix I).
        change_of_variables: the same choice, for a network that is shown log(1 - alpha) (objectives/subs.py).
        T: > 0 for times of the grid 1/T, 2/T, ..., 1.
        resample: keep the share of masks of every row (block) within the rates of the schedule (BD3-LM, arXiv
            2503.09573, section 5.2). A training heuristic: the draws are not quite from the process of the bound.
        time_density: draw t from a normal distribution around 1/2, restricted to [0, 1] (bell-shaped time sampling,
            Hong et al., arXiv 2605.13026). "bell" keeps the weights of the bound, so that training minimises the bound
            with more weight on the middle; "bell_corrected" divides by the density, and the expectation is the bound.
            None draws t uniformly.
    """

    always_masks = False

    def __init__(
        self,
        antithetic_sampling: bool = True,
        sampling_eps: Annotated[BelowOne, Needs("T", (0,))] = 0.0,
        importance_sampling: bool = False,
        change_of_variables: bool = False,
        T: Natural = 0,  # noqa: N803 - the configuration key
        resample: Annotated[bool, IF_SET] = False,
        time_density: Annotated[Literal["bell", "bell_corrected"], IF_SET] | None = None,
    ) -> None:
        if importance_sampling and change_of_variables:
            raise ValueError(
                "training.importance_sampling=true and training.change_of_variables=true are two forms of the same "
                "change; keep one"
            )
        self.changes_variables = change_of_variables
        self.importance_sampling = importance_sampling or change_of_variables
        if self.importance_sampling and T:
            raise ValueError(
                f"training.importance_sampling or training.change_of_variables with T={T}: they draw t from a "
                "continuum, and T > 0 has a grid; set T=0 or switch them off"
            )
        if time_density and (self.importance_sampling or T):
            other = f"T={T}" if T else "training.importance_sampling or training.change_of_variables"
            raise ValueError(
                f"training.time_density={time_density} with {other}: each says how t is drawn; keep one of them"
            )
        self.antithetic_sampling = antithetic_sampling
        self.sampling_eps = sampling_eps
        self.T = T
        self.resample = resample
        self.time_density = time_density
        self.discrete = T > 0
        self.corrects_density = time_density == "bell_corrected"
        self.prefers_rates = time_density == "bell"
        self.covers_all_rates = not (resample or self.prefers_rates) and (self.discrete or sampling_eps == 0)
        times = "stratified t" if antithetic_sampling else "independent t"
        how = "importance-sampled" if self.importance_sampling else (time_density or "").replace("_", ", ")
        self.label = f"{times}, {how}" if how else times

    def __call__(
        self, schedule: NoiseSchedule, x0_BL: Tensor, scored_BL: Tensor, process: Process, noise: KeyedNoise
    ) -> list[Draw]:
        u_B = noise.time() if self.antithetic_sampling else noise.uniform()
        t_B, scale_B = self._times(schedule, u_B)
        level = schedule(t_B)
        if not self.resample:
            return [Draw(process.corrupt(x0_BL, level.alpha, noise, scored_BL), t_B, scale_B)]
        u_BL = noise.uniform(x0_BL.shape[1])
        limits = schedule(torch.tensor([0.0, 1.0], dtype=torch.float64)).move_chance
        count_B = _limited_count(noise.uniform(), level.move_chance, scored_BL, limits)
        masked_BL = _lowest(u_BL, scored_BL, count_B)
        return [Draw(process.mask(x0_BL, masked_BL), t_B, scale_B)]

    def _times(self, schedule: NoiseSchedule, u_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return times and the factors of the integrand there, from uniform numbers."""
        if self.importance_sampling:
            return self._log_uniform(schedule, u_B)
        if self.time_density:
            return self._bell(u_B)
        if self.T:
            return (torch.floor(u_B * self.T) + 1) / self.T, torch.ones_like(u_B)
        return ((1 - self.sampling_eps) * u_B + self.sampling_eps).clamp(min=_EARLIEST), torch.ones_like(u_B)

    def _bell(self, u_B: Tensor) -> tuple[Tensor, Tensor]:
        low, high = ((bound - 0.5) / _BELL_WIDTH for bound in (self.sampling_eps, 1.0))
        below, inside = _normal_cdf(low), _normal_cdf(high) - _normal_cdf(low)
        deviation_B = torch.special.ndtri(below + u_B * inside).clamp(low, high)
        t_B = (0.5 + _BELL_WIDTH * deviation_B).clamp(min=_EARLIEST)
        density_B = torch.exp(-0.5 * deviation_B**2) / (math.sqrt(2 * math.pi) * _BELL_WIDTH * inside)
        corrected_B = 1 / ((1 - self.sampling_eps) * density_B)
        return t_B, corrected_B if self.time_density == "bell_corrected" else torch.ones_like(u_B)

    def _log_uniform(self, schedule: NoiseSchedule, u_B: Tensor) -> tuple[Tensor, Tensor]:
        low, high = log_move_range(schedule, self.sampling_eps)
        t_B = schedule.t_from_alpha(-torch.expm1(low + u_B * (high - low)))
        # The density of t is elbo_weight / (high - low); a uniform one is 1 / (1 - sampling_eps).
        return t_B, (high - low) / ((1 - self.sampling_eps) * schedule(t_B).elbo_weight)


class TiltedNoise(MaskSampler):
    """Draw the amount of noise, 1 - alpha, small amounts more often, and then noise each token.

    For laws whose noise is other tokens. A wrong token among little noise is a great surprise: the second moment of
    GIDD's integrand grows as (1 - alpha)^(-3/2), and that of UDLM nearly as 1 / (1 - alpha), so evenly drawn times have
    an infinite variance, and an error that is estimated from them is too small. The square root of the former is the
    best density. Half of the draws keep even amounts, so no draw has more than twice its weight there.
    """

    label = "stratified noise, small amounts more often"
    always_masks = False

    def __call__(
        self, schedule: NoiseSchedule, x0_BL: Tensor, scored_BL: Tensor, process: Process, noise: KeyedNoise
    ) -> list[Draw]:
        least, most = schedule(torch.tensor([0.0, 1.0], dtype=torch.float64)).move_chance
        u_B = noise.time()
        share_B = torch.where(u_B < 0.5, 2 * u_B, (2 * u_B - 1) ** 4).clamp(_EARLIEST**2, 1 - _EARLIEST**2)
        density_B = 0.5 + 0.125 * share_B**-0.75
        t_B = schedule.t_from_alpha(1 - (least + (most - least) * share_B))
        level = schedule(t_B)
        xt_BL = process.corrupt(x0_BL, level.alpha, noise, scored_BL)
        return [Draw(xt_BL, t_B, (most - least) / (density_B * -level.dalpha))]


def _normal_cdf(deviation: float) -> float:
    return 0.5 * (1 + math.erf(deviation / math.sqrt(2)))


def _limited_count(u_B: Tensor, rate_B: Tensor, scored_BL: Tensor, limits_2: Tensor) -> Tensor:
    """Draw how many of the n scored positions of each row are masked, by inversion of `u_B`.

    The count is binomial with `rate_B`, conditioned on a share within the limits. If no count lies within them, it is
    the count nearest to the rate.
    """
    n_B, most = scored_BL.sum(-1), scored_BL.shape[1]
    k_M = torch.arange(most + 1, dtype=torch.float64, device=u_B.device)
    rest_BM, rate_B1 = (n_B[:, None] - k_M).clamp(min=0), rate_B.clamp(1e-12, 1 - 1e-12)[:, None]
    choose_BM = torch.lgamma(n_B[:, None] + 1.0) - torch.lgamma(k_M + 1) - torch.lgamma(rest_BM + 1)
    log_p_BM = choose_BM + k_M * rate_B1.log() + rest_BM * torch.log1p(-rate_B1)
    # Limits near 0 or 1 are ignored, because a block of few tokens may have no mask, or masks only.
    low, high = torch.where(limits_2[0] > 2e-3, limits_2[0], 0.0), torch.where(limits_2[1] < 1 - 2e-3, limits_2[1], 1.0)
    inside_BM = (k_M >= low * n_B[:, None] - 1e-9) & (k_M <= high * n_B[:, None] + 1e-9)
    nearest_B = torch.round(rate_B * n_B)
    inside_BM = torch.where(inside_BM.any(-1, keepdim=True), inside_BM, k_M == nearest_B[:, None])
    p_BM = log_p_BM.masked_fill(~inside_BM | (k_M > n_B[:, None]), -torch.inf).softmax(-1)
    return (p_BM.cumsum(-1) <= u_B[:, None]).sum(-1).clamp(max=most).minimum(n_B)


def log_move_range(schedule: NoiseSchedule, sampling_eps: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Return log(1 - alpha) at t = sampling_eps and at t = 1, float64 scalars on the CPU, where nothing waits."""
    ends = schedule(torch.tensor([sampling_eps, 1.0], dtype=torch.float64))
    return ends.move_chance.clamp(min=_EARLIEST**2).log().unbind()


class _Counts(MaskSampler):
    """The base of mask samplers that draw the number of masks of each row, and then shuffle the scored positions."""

    @abstractmethod
    def counts(self, u_B: Tensor, n_B: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """Return the numbers of masks k, 1 <= k <= n, and the weight of each masked token's cross-entropy, (B,) each.

        Args:
            u_B: uniform numbers.
            n_B: scored tokens of each row, at most `most`.
        """

    def __call__(
        self, schedule: NoiseSchedule, x0_BL: Tensor, scored_BL: Tensor, process: Absorbing, noise: KeyedNoise
    ) -> list[Draw]:
        u_BL = shuffle_keys(noise, scored_BL)
        k_B, factor_B = self.counts(noise.time(), scored_BL.sum(-1), x0_BL.shape[1])
        xt_BL = process.mask(x0_BL, _lowest(u_BL, scored_BL, k_B))
        return [weighted(schedule, xt_BL, order_statistic(u_BL, k_B), factor_B)]


class ExactCount(_Counts):
    """Mask exactly k of n tokens, k uniform in 1..n, with the integral over t done in closed form.

    Under any schedule from alpha = 1 to alpha = 0 a mask of k given positions has the weight
    int elbo_weight (1 - alpha)^k alpha^(n - k) dt = 1 / (k C(n, k)), so uniform k with factor n / k is unbiased and has
    no variance from t (RADD, arXiv 2406.03736; LLaDA, arXiv 2502.09992). Networks that see t get a draw of t given k:
    1 - alpha is Beta(k, n - k + 1), the distribution of the k-th of n sorted uniform numbers.

    Args:
        lowest_rate: the smallest share of masks; above 0 the mean is that of the integrand at the rates above it.
    """

    label = "exact mask counts"

    def __init__(self, lowest_rate: BelowOne = 0.0) -> None:
        self.lowest_rate = lowest_rate
        self.covers_all_rates = self.estimates_bound = lowest_rate == 0

    def counts(self, u_B: Tensor, n_B: Tensor, most: int) -> tuple[Tensor, Tensor]:
        least_B = torch.ceil(self.lowest_rate * n_B.double()).clamp(min=1)
        k_B = (least_B + torch.floor(u_B * (n_B - least_B + 1))).long()
        return k_B, n_B / k_B


class TiltedCount(_Counts):
    """Exact counts of masks, small ones more often, for the difference of two likelihoods of one text.

    With k of n tokens masked, n / k times their sum has a variance proportional to (n - k) / k (a sample drawn without
    replacement). Its square root is the best density of k / n, which is Beta(1/2, 3/2). Half of the draws keep uniform
    k, so no draw has more than twice its weight in `ExactCount`.
    """

    label = "exact mask counts, small ones more often"

    def counts(self, u_B: Tensor, n_B: Tensor, most: int) -> tuple[Tensor, Tensor]:
        n_B = n_B.clamp(min=1)
        place_L = torch.arange(1, most + 1, dtype=torch.float64, device=n_B.device)
        cdf_BL = _tilted_cdf((place_L / n_B[:, None]).clamp(max=1.0))
        k_B = (1 + (cdf_BL <= u_B[:, None]).sum(-1)).minimum(n_B)
        return k_B, 1 / (k_B * (_tilted_cdf(k_B / n_B) - _tilted_cdf((k_B - 1) / n_B)))


def _tilted_cdf(rate: Tensor) -> Tensor:
    """Return the distribution function of the even mixture of the uniform distribution and Beta(1/2, 3/2)."""
    rate = rate.double()
    return 0.5 * rate + (rate.sqrt().asin() + (rate * (1 - rate)).sqrt()) / torch.pi


class Complementary(MaskSampler):
    """Mask k tokens in one pass and the other n - k in a second one, so that their errors partly cancel.

    k is uniform in 1..n as in `ExactCount`, and so is n - k unless k = n. In that case the complement is empty, and the
    full mask counts for both passes.
    """

    passes = 2
    label = "exact mask counts in complementary pairs"

    def __call__(
        self, schedule: NoiseSchedule, x0_BL: Tensor, scored_BL: Tensor, process: Absorbing, noise: KeyedNoise
    ) -> list[Draw]:
        u_BL, n_B = shuffle_keys(noise, scored_BL), scored_BL.sum(-1)
        # The smaller count of the pair {k, n - k}, with 0 for k = n: uniform k on a circle of n, folded.
        few_B = torch.floor(noise.time() * 0.5 * n_B + 0.5).long()
        first_BL = _lowest(u_BL, scored_BL, few_B)
        pair = []
        for masked_BL, k_B in ((first_BL, few_B), (scored_BL & ~first_BL, n_B - few_B)):
            factor_B = torch.where(k_B > 0, n_B / k_B.clamp(min=1), 0.0) * torch.where(few_B > 0, 1.0, 2.0)
            xt_BL = process.mask(x0_BL, masked_BL)
            pair.append(weighted(schedule, xt_BL, order_statistic(u_BL, k_B), factor_B))
        return pair


def shuffle_keys(noise: KeyedNoise, scored_BL: Tensor) -> Tensor:
    """Return uniform numbers whose order shuffles the scored positions; +inf elsewhere."""
    return noise.uniform(scored_BL.shape[1]).masked_fill(~scored_BL, torch.inf)


def order_statistic(u_BL: Tensor, k_B: Tensor) -> Tensor:
    """Return the k-th smallest number of each row, (B,), or 1/2 (a harmless level) if there is none."""
    chosen_B = u_BL.sort(-1).values.gather(1, (k_B - 1).clamp(0, u_BL.shape[1] - 1)[:, None]).squeeze(1)
    return torch.where((k_B > 0) & chosen_B.isfinite(), chosen_B, 0.5)


def _lowest(u_BL: Tensor, scored_BL: Tensor, k_B: Tensor) -> Tensor:
    """Return True at the k scored positions of each row with the smallest numbers, (B, L)."""
    level_B = order_statistic(u_BL.masked_fill(~scored_BL, torch.inf), k_B)
    return (u_BL <= level_B[:, None]) & scored_BL & (k_B > 0)[:, None]


def weighted(schedule: NoiseSchedule, xt_BL: Tensor, move_chance_B: Tensor, factor_B: Tensor) -> Draw:
    """Return a draw whose masked tokens have the weight `factor_B`, whatever the integrand's weight at its t."""
    # At t = 0 alpha' may be 0, and a weight of 0 cannot be rescaled: stay off the end.
    t_B = schedule.t_from_alpha(1 - move_chance_B).clamp(_EARLIEST, 1.0)
    return Draw(xt_BL, t_B, factor_B / schedule(t_B).elbo_weight)
