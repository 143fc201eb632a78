"""Which mask rates to train on: those at which the loss of a block varies least (BD3-LM, Arriola et al.,
arXiv 2503.09573, section 5).

Shape suffixes: R blocks, C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from palimpsest.common.values import COPY, list_of, real

WHOLE = (1e-3, 1.0)  # mask rates of training that leave the schedule as it is


class ClipSearch:
    """The variance over blocks, times and masks of a block's loss in nats per token (weighed by 1 / t, as the bound
    weighs it), for t uniform in each candidate interval.

    One draw of t in (0, 1) for each block serves all candidates: those that fell into an interval are draws of it.

    Args:
        widths: of the candidate intervals; none switches the search off.
        delta: distance of their lower ends.
        fixed: measure the variances, and leave the interval as it is.
        num_batches: of a validation that are looked at, on every device.
    """

    def __init__(
        self,
        widths: Annotated[Sequence[float], list_of(real("(0, 1]"), 0, "[0.5,0.6,0.7]"), COPY] = (),
        delta: Annotated[float, real("[0.001, 1]"), COPY] = 0.05,
        fixed: Annotated[bool, COPY] = False,
        num_batches: int = 100,
    ) -> None:
        if fixed and not widths:
            raise ValueError(
                "training.fix_clipping=true measures the intervals of training.clip_search_widths=[], "
                "which are none; name some, e.g. [0.5,0.6,0.7]"
            )
        self.fixed, self.num_batches = fixed, num_batches
        starts = [index * delta for index in range(int(1 / delta + 1e-9) + 1)]
        found = [(a, min(a + w, 1.0)) for w in widths for a in starts if a + w <= 1 + 1e-9]
        self.candidates = [WHOLE, *found] if widths else []

    def sums(self, rate_R: Tensor, nats_R: Tensor) -> Tensor:
        """Number, sum and sum of squares of the losses in each candidate, float64 (C, 3): they add up over batches and
        devices."""
        ends_C2 = torch.tensor(self.candidates, dtype=torch.float64, device=rate_R.device)
        inside_CR = (rate_R >= ends_C2[:, :1]) & (rate_R <= ends_C2[:, 1:])
        return inside_CR.double() @ torch.stack([torch.ones_like(nats_R), nats_R, nats_R.square()], dim=1)

    def variances(self, sums_C3: Tensor) -> Tensor:
        """The variance in each candidate, (C,); infinite where fewer than two losses fell into one."""
        count_C, sum_C, square_C = sums_C3.unbind(-1)
        variance_C = (square_C - sum_C.square() / count_C.clamp(min=1)) / (count_C - 1).clamp(min=1)
        return torch.where(count_C > 1, variance_C.clamp(min=0), torch.inf)

    def best(self, sums_C3: Tensor) -> tuple[float, float]:
        """The interval of least variance; the first of equals."""
        return self.candidates[int(self.variances(sums_C3).argmin())]
