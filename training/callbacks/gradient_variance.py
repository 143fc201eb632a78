"""The noise of the gradient that the random times and masks cause."""

from abc import ABC, abstractmethod

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from palimpsest.common.values import AtLeastOne


class GradientProbe(Callback, ABC):
    """A measurement of the gradient, every `every_n_steps` optimizer steps on one micro-batch of the first device.

    It runs before the step and leaves the step's noise and dropout as they are. The values are logged at the end of
    the interval. A subclass implements `_measure`; an empty result keeps the earlier values.
    """

    def __init__(self, every_n_steps: AtLeastOne = 100) -> None:
        self.every_n_steps = every_n_steps
        self._measured, self._values = -1, dict[str, Tensor]()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: dict, batch_idx: int) -> None:
        step = trainer.global_step
        skipped = step % self.every_n_steps or step == self._measured
        if skipped or not trainer.is_global_zero or pl_module.device_mesh is not None:
            return
        self._measured = step
        self._values = self._measure(trainer, pl_module, batch) or self._values

    @abstractmethod
    def _measure(self, trainer: Trainer, pl_module: LightningModule, batch: dict) -> dict[str, Tensor]:
        """Return the values by the names under which they are logged."""

    def interval_metrics(self) -> dict[str, float]:
        """Return the values that training/callbacks/metrics.py logs."""
        values, self._values = {name: float(value) for name, value in self._values.items()}, {}
        return values


class GradientVariance(GradientProbe):
    """Variance of the gradient over the draws of times and masks; it costs two more forward and backward passes.

    g1, g2 are gradients of one micro-batch under two independent draws and the same dropout. |g1 - g2|^2 / 2 is an
    unbiased estimate of the variance, summed over the weights. g1 . g2 estimates the squared length of the mean.
    Logged are train/gradient_variance, and train/gradient_noise, which is their ratio.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.device_mesh is not None:
            raise ValueError(
                "callbacks.gradient_variance and strategy=fsdp contradict each other: no device has the whole "
                "gradient; use strategy=ddp"
            )

    def _measure(self, trainer: Trainer, pl_module: LightningModule, batch: dict) -> dict[str, Tensor]:
        first, second = (self._gradient(trainer, pl_module, batch, draw) for draw in (1, 2))
        variance = sum((a - b).double().square().sum() for a, b in zip(first, second, strict=True)) / 2
        common = sum((a.double() * b.double()).sum() for a, b in zip(first, second, strict=True))
        return {"train/gradient_variance": variance, "train/gradient_noise": variance / common.clamp(min=1e-30)}

    @staticmethod
    def _gradient(trainer: Trainer, pl_module: LightningModule, batch: dict, draw: int) -> tuple[Tensor, ...]:
        torch.manual_seed(trainer.global_step)  # of dropout; each training step sets its own
        learned = [p for p in pl_module.backbone.parameters() if p.requires_grad]
        with trainer.precision_plugin.train_step_context():
            loss = pl_module.training_loss(batch, draw).mean()
        return torch.autograd.grad(loss, learned, materialize_grads=True)
