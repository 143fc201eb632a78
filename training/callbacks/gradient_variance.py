"""How noisy the gradient is: what the draws of times and masks add to it."""

from __future__ import annotations

import lightning
import torch
from torch import Tensor

from palimpsest.common.values import AtLeastOne


class GradientVariance(lightning.Callback):
    """Every `every_n_steps` optimizer steps, the gradients g1, g2 of one micro-batch of the first device under two
    independent draws of times and masks (and the same dropout): |g1 - g2|^2 / 2 is an unbiased estimate of the
    variance, summed over the weights, that those draws cause; g1 . g2 of the squared length of what they have in
    common. Two more passes forth and back each time.

    Logged with the interval in which they were measured: train/gradient_variance, and train/gradient_noise, that
    variance over that squared length.
    """

    def __init__(self, every_n_steps: AtLeastOne = 100) -> None:
        self.every_n_steps = every_n_steps
        self._measured, self._values = -1, dict[str, Tensor]()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if pl_module.device_mesh is not None:
            raise ValueError(
                "callbacks.gradient_variance and strategy=fsdp contradict each other: no device has the whole "
                "gradient; use strategy=ddp"
            )

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: dict, batch_idx: int
    ) -> None:
        """Measure before the step, whose own noise and dropout this leaves as they are."""
        step = trainer.global_step
        if step % self.every_n_steps or step == self._measured or not trainer.is_global_zero:
            return
        self._measured = step
        first, second = (self._gradient(trainer, pl_module, batch, draw) for draw in (1, 2))
        variance = sum((a - b).double().square().sum() for a, b in zip(first, second, strict=True)) / 2
        common = sum((a.double() * b.double()).sum() for a, b in zip(first, second, strict=True))
        self._values = {"train/gradient_variance": variance, "train/gradient_noise": variance / common.clamp(min=1e-30)}

    def interval_metrics(self) -> dict[str, float]:
        """Return the values that training/callbacks/metrics.py logs."""
        values, self._values = {name: float(value) for name, value in self._values.items()}, {}
        return values

    def _gradient(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: dict, draw: int
    ) -> list[Tensor]:
        torch.manual_seed(trainer.global_step)  # of dropout; each training step sets its own
        learned = [p for p in pl_module.backbone.parameters() if p.requires_grad]
        with trainer.precision_plugin.train_step_context():
            loss = pl_module.training_loss(batch, draw).mean()
        found = torch.autograd.grad(loss, learned, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(learned, found, strict=True)]
