"""The loss of an optimizer step: the mean over all scored tokens of its global batch, however that is cut into
micro-batches and shared out over devices.

Micro-batches hold different numbers of scored tokens (padding; masks, where these are the denominator), and a mean of
their means would weigh the tokens of a short one more. Every micro-batch has the same number of rows, though: so nats
per row are what is differentiated, and the gradient is scaled once, when the tokens of the whole step are known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from objectives.base import TokenLoss


class StepLoss:
    """Sums over the micro-batches of one optimizer step on this device: nats, scored tokens, rows; float64."""

    def __init__(self) -> None:
        self.micro_batches, self._sums_3 = 0, None

    def add(self, loss: TokenLoss) -> Tensor:
        """What the micro-batch is to be differentiated by: its nats per row."""
        nats, rows = loss.nll_BL.sum(), len(loss.nll_BL)
        found = (nats.detach().double(), loss.mask_BL.sum().double(), torch.full_like(nats, rows, dtype=torch.float64))
        sums_3 = torch.stack([part.detach() for part in found])
        self._sums_3 = sums_3 if self._sums_3 is None else self._sums_3 + sums_3
        self.micro_batches += 1
        return nats / rows

    def over(self, total: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(nats per token, rows per token, rows) of the step on all devices; `total` sums a tensor over them. Without a
        scored token both ratios are those of a single one."""
        nats, tokens, rows = total(self._sums_3.clone()).unbind()
        return nats / tokens.clamp(min=1), rows / tokens.clamp(min=1), rows


@torch.no_grad()
def scale_gradients(parameters: Iterable[Tensor], factor: Tensor) -> None:
    """Multiply every gradient there is by a scalar on its device; of shared-out gradients (DTensor) each device's own
    part, since they add up linearly."""
    grads = [p.grad for p in parameters if p.grad is not None]
    grads = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
    if grads:
        torch._foreach_mul_(grads, factor.to(grads[0].dtype))
