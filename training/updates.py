"""Optimizer updates that are made only where the gradient is finite, decided without the host waiting for the device.

Leaving an update out has to leave everything as it was, bit for bit: weights, moments, the optimizer's own step count
(a zero gradient would not: weight decay and the decay of the moments go on). Two ways do:
  fused optimizers      are given `found_inf`, torch's own convention (that of GradScaler): the kernel reads it on the
                        device. Nobody waits.
  all others (Muon)     get no gradients; torch's optimizers pass over parameters without one. The host has to read the
                        verdict before the update, which on a CPU costs nothing and on a GPU one wait a step.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Later:
    """A scalar on a device, under way to the host: read a step later it is there, and reading waits for nothing."""

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
    """Clips gradients, keeps their norm, and withholds from the optimizer those that are not finite.

    All ranks decide alike and need no word about it: the norm is that of the gradient after its reduction over ranks
    (of sharded gradients: over their shards), the same number everywhere.
    """

    def __init__(self) -> None:
        self.norm: Tensor | None = None  # of the newest update's gradient before clipping, float32 on its device
        self._finite: Later | None = None
        self._withheld: dict[Tensor, Tensor] = {}

    def prepare(self, optimizer: torch.optim.Optimizer, max_norm: float | None) -> None:
        """To be called between backward pass and update, at every step."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        self.norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        finite = self.norm.isfinite()
        self._finite, self._withheld = Later(finite), {}
        if max_norm:
            # A gradient that is not finite stays as it is, for whoever wants to see where.
            nn.utils.clip_grads_with_norm_(parameters, max_norm, torch.where(finite, self.norm, 0.0))
        if all(group.get("fused") for group in optimizer.param_groups):
            optimizer.found_inf = (~finite).float()
        elif not self._finite.read():
            self._withheld = {p: p.grad for p in parameters}
            for p in parameters:
                p.grad = None

    def made(self) -> bool:
        """Whether the newest update was made; waits for the device unless it has reached the next step's update."""
        return self._finite is not None and bool(self._finite.read())

    def culprits(self, named: Iterable[tuple[str, nn.Parameter]]) -> list[str]:
        """Names of parameters whose newest gradient is not finite; waits for the device."""
        gradients: list[tuple[str, Tensor | None]] = [(name, self._withheld.get(p, p.grad)) for name, p in named]
        return [name for name, grad in gradients if grad is not None and not grad.isfinite().all()]

    @staticmethod
    def poison(loss: Tensor) -> None:
        """Make every gradient of `loss` nan where the loss itself is not finite, whatever its backward pass would say;
        that of a finite one is multiplied by one. So the reduction of the gradients tells every rank."""
        unity = loss.detach() * 0 + 1
        loss.register_hook(lambda grad: grad * unity)
