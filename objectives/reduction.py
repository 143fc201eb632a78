"""The loss of an optimizer step: the mean over all scored tokens of its global batch, however that is cut into
micro-batches and shared out over devices.

Micro-batches hold different numbers of scored tokens (padding; masks, where these are the denominator), and a mean of
their means would weigh the tokens of a short one more. Every micro-batch has the same number of rows, though: so nats
per row are what is differentiated, and the gradient is scaled once, when the tokens of the whole step are known.

One scale serves a loss that also has a term for each row (the latent's, objectives/joint.py), because that term counts
as so many tokens, a fixed number of them: had it a denominator of its own, a micro-batch could not know, before the
step's last one, how the two are to be weighed, and the gradients of both are in one sum by then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from palimpsest.objectives.base import TokenLoss


class StepLoss:
    """Sums over the micro-batches of one optimizer step on this device: scored tokens, rows; float64."""

    def __init__(self) -> None:
        self.micro_batches, self._sums_2 = 0, None

    def add(self, loss: TokenLoss) -> Tensor:
        """What the micro-batch is to be differentiated by: its nats (and its rows' terms) per row."""
        rows = len(loss.nll_BL)
        tokens = loss.mask_BL.sum().double()
        sums_2 = torch.stack([tokens, torch.full_like(tokens, rows)])
        self._sums_2 = sums_2 if self._sums_2 is None else self._sums_2 + sums_2
        self.micro_batches += 1
        return loss.total() / rows

    def rows_per_token(self, total: Callable[[Tensor], Tensor]) -> Tensor:
        """Of the step on all devices; `total` sums a tensor over them. Without a scored token that of a single one."""
        tokens, rows = total(self._sums_2.clone()).unbind()
        return rows / tokens.clamp(min=1)


@torch.no_grad()
def scale_gradients(parameters: Iterable[Tensor], factor: Tensor) -> None:
    """Multiply every gradient there is by a scalar on its device; of shared-out gradients (DTensor) each device's own
    part, since they add up linearly."""
    grads = [p.grad for p in parameters if p.grad is not None]
    grads = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
    if grads:
        torch._foreach_mul_(grads, factor.to(grads[0].dtype))
