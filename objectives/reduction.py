"""The loss of an optimizer step: the mean over all scored tokens of its global batch.

Micro-batches and devices have different numbers of scored tokens, and a mean of their means would give the tokens of a
short micro-batch more weight. All micro-batches have the same number of rows, so nats per row are differentiated, and
the gradient is scaled once, when the tokens of the whole step are known.

A term for each row (the latent's, objectives/joint.py) uses the same scale, because it counts as a fixed number of
tokens. With its own denominator its weight would be unknown until the last micro-batch, when the gradients of both
terms are already summed.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from palimpsest.objectives.base import TokenLoss


class StepLoss:
    """Sums over the micro-batches of one optimizer step on this device: scored tokens and rows, float64."""

    def __init__(self) -> None:
        self.micro_batches = 0
        self._sums_2: Tensor | float = 0.0

    def add(self, loss: TokenLoss) -> Tensor:
        """Count a micro-batch and return its loss per row, which is to be differentiated."""
        rows = len(loss.nll_BL)
        tokens = loss.mask_BL.sum().double()
        self._sums_2 = self._sums_2 + torch.stack([tokens, torch.full_like(tokens, rows)])
        self.micro_batches += 1
        return loss.total() / rows

    def rows_per_token(self, total: Callable[[Tensor], Tensor]) -> Tensor:
        """Return rows per scored token (at least one) of the step; `total` sums a tensor over all devices."""
        tokens, rows = total(self._sums_2.clone()).unbind()
        return rows / tokens.clamp(min=1)


@torch.no_grad()
def scale_gradients(parameters: Iterable[Tensor], factor: Tensor) -> None:
    """Multiply every gradient by a scalar on its device; for a DTensor, this device's shard."""
    grads = [p.grad for p in parameters if p.grad is not None]
    grads = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
    if grads:
        torch._foreach_mul_(grads, factor.to(grads[0].dtype))
