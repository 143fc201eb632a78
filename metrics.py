"""Numbers with their errors: estimates, and the meter every likelihood is measured with.

Shape suffixes: B texts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric

_LARGEST_EXPONENT = 700  # exp of more is no float


@dataclass(frozen=True)
class Estimate:
    """A value with its standard error (nan where it can not be known, e.g. from a single text)."""

    value: float
    se: float

    def exp(self) -> Estimate:
        """exp of the value; the error by the delta method."""
        value = math.exp(self.value) if self.value < _LARGEST_EXPONENT else math.inf
        return Estimate(value, value * self.se)

    def scaled(self, factor: float) -> Estimate:
        return Estimate(self.value * factor, abs(factor) * self.se)

    def __str__(self) -> str:
        decimals = 4 if abs(self.value) < 10_000 else 0
        return f"{self.value:,.{decimals}f} ± {self.se:,.{decimals}f}"


class NLLMeter(Metric):
    """Nats per token over a data set: sum of nll / sum of tokens, with the standard error of that ratio over texts.

    The error (Cochran, Sampling Techniques, eq. 6.12) covers both the choice of texts and the Monte Carlo draws. All
    sums are float64 and add up over devices, so batch size and number of devices do not matter.

    over_devices: every process meters texts of its own, and all together ask for the estimate; else each has the whole.
    """

    full_state_update = False

    def __init__(self, over_devices: bool = False) -> None:
        super().__init__(sync_on_compute=over_devices)
        for name in ("texts", "nll", "tokens", "nll_sq", "tokens_sq", "cross"):
            self.add_state(name, default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, nll_B: Tensor, tokens_B: Tensor) -> None:
        nll_B, tokens_B = nll_B.double(), tokens_B.double()
        self.texts += len(nll_B)
        self.nll += nll_B.sum()
        self.tokens += tokens_B.sum()
        self.nll_sq += (nll_B**2).sum()
        self.tokens_sq += (tokens_B**2).sum()
        self.cross += (nll_B * tokens_B).sum()

    def estimate(self) -> Estimate:
        """Nats per token."""
        return Estimate(*self.compute().tolist())

    def compute(self) -> Tensor:
        """(value, standard error), float64.

        Raises:
            ValueError: nothing was measured.
        """
        n, total = float(self.texts), float(self.tokens)
        if total == 0:
            raise ValueError("no token was measured: the split is empty")
        ratio = float(self.nll) / total
        residual_sq = float(self.nll_sq) - 2 * ratio * float(self.cross) + ratio**2 * float(self.tokens_sq)
        se = math.sqrt(max(residual_sq, 0.0) * n / (n - 1)) / total if n > 1 else math.nan
        return torch.tensor([ratio, se], dtype=torch.float64)

    def set_dtype(self, dst_type: torch.dtype) -> NLLMeter:
        """The sums stay float64 whatever the model's precision."""
        return self
