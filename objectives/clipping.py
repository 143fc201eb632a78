"""Search for the mask rates to train on: those with the least variance of a block's loss (BD3-LM, Arriola et al.,
arXiv 2503.09573, section 5).

Shape suffixes: R blocks, C candidates.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from palimpsest.common.values import COPY, list_of, real

WHOLE = (1e-3, 1.0)  # the default mask rates of training, with which the schedule is not clipped


class ClipSearch:
    """The variance of a block's loss for t uniform in each candidate interval.

    The loss is in nats per token with the bound's weight 1 / t; the variance is over blocks, times and masks. One draw
    of t in (0, 1) per block serves all candidates that contain its mask rate.

    Args:
        widths: widths of the candidate intervals; an empty list switches the search off.
        delta: distance between their lower ends.
        fixed: measure the variances, but keep the interval.
        num_batches: number of validation batches to use, on every device.
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
        self.fixed = fixed
        self.num_batches = num_batches
        starts = [index * delta for index in range(int(1 / delta + 1e-9) + 1)]
        found = [(a, min(a + w, 1.0)) for w in widths for a in starts if a + w <= 1 + 1e-9]
        self.candidates = [WHOLE, *found] if widths else []

    def sums(self, rate_R: Tensor, nats_R: Tensor) -> Tensor:
        """Return number, sum and sum of squares of the losses in each candidate, float64 (C, 3), to add up."""
        ends_C2 = torch.tensor(self.candidates, dtype=torch.float64, device=rate_R.device)
        inside_CR = (rate_R >= ends_C2[:, :1]) & (rate_R <= ends_C2[:, 1:])
        return inside_CR.double() @ torch.stack([torch.ones_like(nats_R), nats_R, nats_R.square()], dim=1)

    def variances(self, sums_C3: Tensor) -> Tensor:
        """Return the variance in each candidate, (C,); infinite for candidates with fewer than two losses."""
        count_C, sum_C, square_C = sums_C3.unbind(-1)
        variance_C = (square_C - sum_C.square() / count_C.clamp(min=1)) / (count_C - 1).clamp(min=1)
        return torch.where(count_C > 1, variance_C.clamp(min=0), torch.inf)

    def best(self, sums_C3: Tensor) -> tuple[float, float]:
        """Return the interval of least variance; the first of equals."""
        return self.candidates[int(self.variances(sums_C3).argmin())]
