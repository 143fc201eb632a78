"""Optimizer updates that are skipped if the gradient is not finite, without the host waiting for the device.

A skipped update must leave weights, moments and the optimizer's step count unchanged, bit for bit. A zero gradient
would not, because of weight decay and the decay of the moments. There are two ways:
  fused optimizers      receive `found_inf`, torch's convention (that of GradScaler), which the kernel reads on the
                        device. Nothing waits.
  all others (Muon)     receive no gradients, so they skip the parameters. The host must read the check before the
                        update, which costs nothing on a CPU and one wait per step on a GPU.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class DeferredCheck:
    """A scalar on its way from the device to the host; reading it one step later waits for nothing."""

    def __init__(self, value: Tensor) -> None:
        self._event = None
        if value.is_cuda:
            value = torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        self._value = value

    def read(self) -> float:
        if self._event is not None:
            self._event.synchronize()
        return self._value.item()


class Updates:
    """Clipping of gradients, and withholding of those that are not finite from the optimizer.

    All ranks decide alike without communication: the norm is that of the gradient after its reduction over ranks (of
    sharded gradients: over their shards), so it is the same number everywhere.
    """

    def __init__(self) -> None:
        self.norm: Tensor | None = None  # of the latest gradient before clipping, float32 on its device
        self._finite: DeferredCheck | None = None
        self._withheld: dict[Tensor, Tensor] = {}

    def prepare(self, optimizer: torch.optim.Optimizer, max_norm: float | None) -> None:
        """Check and clip the gradients; call it at every step between backward pass and update."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        self.norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        finite = self.norm.isfinite()
        self._finite, self._withheld = DeferredCheck(finite), {}
        if max_norm:
            # A gradient that is not finite stays as it is, so that it can be inspected.
            nn.utils.clip_grads_with_norm_(parameters, max_norm, torch.where(finite, self.norm, 0.0))
        if all(group.get("fused") for group in optimizer.param_groups):
            optimizer.found_inf = (~finite).float()
        elif not self._finite.read():
            self._withheld = {p: p.grad for p in parameters}
            for p in parameters:
                p.grad = None

    def made(self) -> bool:
        """Return True if the latest update was made; waits for the device unless it has reached the next update."""
        return self._finite is not None and bool(self._finite.read())

    def nonfinite_gradients(self, named: Iterable[tuple[str, nn.Parameter]]) -> list[str]:
        """Return the names of parameters whose latest gradient is not finite; waits for the device."""
        gradients = [(name, self._withheld.get(p, p.grad)) for name, p in named]
        return [name for name, grad in gradients if grad is not None and not grad.isfinite().all()]

    @staticmethod
    def poison(loss: Tensor) -> None:
        """Make every gradient of a loss that is not finite NaN, so that the reduction informs every rank.

        The gradient of a finite loss is multiplied by one.
        """
        unity = loss.detach() * 0 + 1
        loss.register_hook(lambda grad: grad * unity)
