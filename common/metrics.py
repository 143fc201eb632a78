"""Estimates with standard errors, the independent units that errors are computed over, and the validation metric.

Shape suffixes: B rows of a batch, M rows (texts), K trials of a text, P passes over a text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

_LARGEST_EXPONENT = 700  # exp of a larger number overflows
Z95 = 1.959964  # standard errors of a 95 % interval


@dataclass(frozen=True)
class Estimate:
    """A value with its standard error, which is nan if it is unknown, e.g. for a single text."""

    value: float
    se: float

    def exp(self) -> Estimate:
        """Return exp of the value, with the error by the delta method."""
        value = math.inf if self.value >= _LARGEST_EXPONENT else math.exp(self.value)  # nan stays nan
        return Estimate(value, value * self.se)

    def scaled(self, factor: float) -> Estimate:
        return Estimate(self.value * factor, abs(factor) * self.se)

    def __str__(self) -> str:
        decimals = 4 if abs(self.value) < 10_000 else 0
        return f"{self.value:,.{decimals}f} ± {self.se:,.{decimals}f}"


UNIT_COLUMNS = ("first_document", "last_document", "text_id")  # columns that name a row's units, if they are known


@dataclass(frozen=True)
class Units:
    """The independent units, named by a plural noun, that M rows belong to: row m contains parts of units first_M[m]
    to last_M[m]. Rows depend on each other only if they share a unit."""

    name: str
    first_M: np.ndarray
    last_M: np.ndarray

    @classmethod
    def of(cls, columns: Mapping[str, ArrayLike]) -> Units:
        """Return the units of rows, given the columns of their data set or batch.

        Units are documents if at least two are known; else the texts that rows are cut from; else runs of about sqrt(M)
        consecutive rows.
        """
        if "first_document" in columns:
            first_M, last_M = (np.asarray(columns[name]) for name in ("first_document", "last_document"))
            if len(np.unique(np.concatenate([first_M, last_M]))) > 1:
                return cls("documents", first_M, last_M)
        if "text_id" in columns:
            return cls.each(columns["text_id"])
        place_M = np.argsort(np.argsort(np.asarray(columns["sample_id"])))
        run_M = place_M // max(1, round(math.sqrt(len(place_M))))
        return cls("runs of rows", run_M, run_M)

    @classmethod
    def each(cls, text_M: ArrayLike) -> Units:
        """Return one unit per text for standard errors: rows with the same number in `text_M` belong to one text."""
        return cls("texts", np.asarray(text_M), np.asarray(text_M))

    def __len__(self) -> int:
        """Return the number of units."""
        if (self.first_M == self.last_M).all():
            return len(np.unique(self.first_M))
        spans = zip(self.first_M, self.last_M, strict=True)
        return len(np.unique(np.concatenate([np.arange(first, last + 1) for first, last in spans])))

    def __getitem__(self, index_M: np.ndarray) -> Units:
        """Return the units of some rows."""
        return Units(self.name, self.first_M[index_M], self.last_M[index_M])

    def __str__(self) -> str:
        return f"{len(self):,} {self.name}"

    def variance(self, influence_M: np.ndarray) -> float:
        """Return the variance of an estimate to which row m contributes the deviation influence_M[m].

        Deviations sum to zero. The result is nan if all rows depend on one another. Products of all pairs of rows that
        share a unit are summed, as in a cluster-robust variance (Liang & Zeger, Biometrika 73, 1986), also where a row
        contains parts of several units. Because deviations are from the sample mean, the sum is divided by one minus
        its share of all pairs, which gives n / (n - 1) for independent rows. If the sum is not positive, which happens
        by chance with few documents, the variance for independent rows is returned.
        """
        order_M = np.lexsort((self.last_M, self.first_M))
        value_M, first_M, last_M = (column[order_M] for column in (influence_M, self.first_M, self.last_M))
        low_M, high_M = np.searchsorted(last_M, first_M, "left"), np.searchsorted(first_M, last_M, "right")
        before = np.concatenate([[0.0], np.cumsum(value_M)])
        share, n = (high_M - low_M).sum() / max(len(value_M), 1) ** 2, len(value_M)
        if n < 2 or share == 1:
            return math.nan
        found = float(value_M @ (before[high_M] - before[low_M])) / (1 - share)
        return found if found > 0 else float(value_M @ value_M) * n / (n - 1)


def ratio(part_M: ArrayLike, whole_M: ArrayLike, units: Units | None = None) -> Estimate:
    """Return the sum of the parts over the sum of the wholes, such as nats over tokens, with its standard error.

    The error is that of a ratio by linearisation (Cochran, Sampling Techniques, eq. 6.12), over the units (None: each
    row is one). It covers the choice of texts, and the Monte Carlo draws as far as they differ between units.

    Raises:
        ValueError: nothing was measured.
    """
    part_M, whole_M = np.asarray(part_M, dtype=np.float64), np.asarray(whole_M, dtype=np.float64)
    total = whole_M.sum()
    if total == 0:
        raise ValueError("no token was measured: the split is empty")
    value = float(part_M.sum() / total)
    units = Units.each(np.arange(len(part_M))) if units is None else units
    return Estimate(value, math.sqrt(units.variance((part_M - value * whole_M) / total)))


def ratios_by_rate(
    rate_MP: np.ndarray, part_MP: np.ndarray, whole_MP: np.ndarray, units: Units | None = None, num_bins: int = 10
) -> tuple[np.ndarray, list[Estimate]]:
    """Return the mean rate and the ratio of part to whole in each non-empty bin of a rate in [0, 1].

    The P passes of a text are summed first, because they are not independent.
    """
    bin_MP = np.minimum(np.nan_to_num(rate_MP) * num_bins, num_bins - 1).astype(int)
    rates, found = [], []
    for index in range(num_bins):
        here_MP = (bin_MP == index) & (whole_MP > 0)
        here_M = here_MP.any(axis=1)
        if here_M.any():
            part_M, whole_M = ((column_MP * here_MP).sum(axis=1)[here_M] for column_MP in (part_MP, whole_MP))
            rates.append(rate_MP[here_MP].mean())
            found.append(ratio(part_M, whole_M, None if units is None else units[here_M]))
    return np.array(rates), found


def mean(value_M: ArrayLike, units: Units | None = None) -> Estimate:
    """Return the mean with its standard error over the units (None: each value is one); nan for no values."""
    return ratio(value_M, np.ones(len(value_M)), units) if len(value_M) else Estimate(math.nan, math.nan)


@dataclass(frozen=True)
class Interval:
    """The ends of a 95 % interval."""

    low: float
    high: float


def wilson_interval(successes: float, trials: float) -> Interval:
    """Return the 95 % score interval of a proportion (Wilson 1927); nan without trials.

    For dependent trials, give the effective number of independent ones, which need not be whole.
    """
    if trials == 0:
        return Interval(math.nan, math.nan)
    share, unit = successes / trials, Z95**2 / trials
    middle, half = share + unit / 2, math.sqrt(unit * (share * (1 - share) + unit / 4))
    return Interval(max(0.0, (middle - half) / (1 + unit)), min(1.0, (middle + half) / (1 + unit)))


@dataclass(frozen=True)
class Share:
    """A share of `texts` texts with its standard error and Wilson's 95 % interval. `chance`: what a random guess
    reaches, or nan."""

    value: float
    se: float
    low: float
    high: float
    texts: int
    chance: float = math.nan


def share(hit_MK: np.ndarray, chance: float = math.nan) -> Share:
    """Return the share of hits of M texts with K trials each, (M,) or (M, K).

    Hits are numbers in [0, 1]; they are fractional where ties were shared. The trials of a text are dependent, so the
    interval is that of the number of independent trials with the same standard error.

    Raises:
        ValueError: there are no hits to count.
    """
    if not hit_MK.size:
        raise ValueError("there are no predictions to count")
    texts, value = len(hit_MK), float(hit_MK.mean())
    hit_MK = hit_MK.reshape(texts, -1)
    se = math.sqrt(value * (1 - value) / texts)  # as if all trials of a text agreed
    independent = texts
    if texts > 1 and hit_MK.shape[1] > 1:
        se = min(se, float(hit_MK.mean(1).std(ddof=1) / math.sqrt(texts)))
        independent = min(value * (1 - value) / se**2, hit_MK.size) if se else texts
    interval = wilson_interval(value * independent, independent)
    return Share(value, se, interval.low, interval.high, texts, chance)


class NLLMeter(Metric):
    """Metric of nats per token over a data set, with the error of `ratio` over its units.

    All rows are kept (five numbers each), so the result does not depend on batch size, order or number of devices. Set
    `over_devices` if each process measures different texts; otherwise each has all of them.
    """

    full_state_update = False

    def __init__(self, over_devices: bool = False) -> None:
        super().__init__(sync_on_compute=over_devices)
        self.add_state("rows", default=[], dist_reduce_fx="cat")
        self.units: tuple[str, ...] = ()

    def reset(self) -> None:
        """Forget all rows. An empty tensor is kept, so that a process without rows can take part in the exchange."""
        super().reset()
        self.rows = [torch.zeros(0, 5, dtype=torch.float64, device=self.device)]

    def update(self, nll_B: Tensor, tokens_B: Tensor, batch: Mapping[str, Tensor]) -> None:
        """Add rows. `batch` names their units (`Units.of`)."""
        found = ("first_document", "last_document") if "first_document" in batch else ("text_id",) * 2
        self.units = found if found[0] in batch else ("sample_id",) * 2
        columns = (nll_B, tokens_B, batch["sample_id"], *(batch[name] for name in self.units))
        self.rows.append(torch.stack([column.double() for column in columns], dim=1))

    def estimate(self) -> Estimate:
        """Return nats per token."""
        return Estimate(*self.compute().tolist())

    def compute(self) -> Tensor:
        """Return the value and its standard error as float64.

        Raises:
            ValueError: nothing was measured.
        """
        nll_M, tokens_M, *columns = dim_zero_cat(self.rows).T.cpu().numpy() if len(self.rows) else np.zeros((5, 0))
        units = Units.of(dict(zip(("sample_id", *self.units), columns, strict=False)))
        found = ratio(nll_M, tokens_M, units)
        return torch.tensor([found.value, found.se], dtype=torch.float64)

    def set_dtype(self, dst_type: torch.dtype) -> NLLMeter:
        """Keep the sums in float64 whatever the model's precision."""
        return self
