"""Who pulls: how much of the gradient each term of a joint loss makes."""

from __future__ import annotations

import logging

import lightning
import torch
from torch import Tensor

from palimpsest.common.values import AtLeastOne

log = logging.getLogger(__name__)


class GradientShares(lightning.Callback):
    """Every `every_n_steps` optimizer steps, the gradients of the two weighted terms of one micro-batch of the first
    device, those of its tokens (the text) and of its rows (the latents), by two backward passes of one forward pass,
    before the step, whose noise and dropout they have and which they leave as it is.

    Logged with the interval in which they were measured: train/grad_share_text and train/grad_share_latent, the norm of
    each as a share of the sum of both, and train/grad_cosine, that of the angle between them.
    """

    def __init__(self, every_n_steps: AtLeastOne = 100) -> None:
        self.every_n_steps = every_n_steps
        self._measured, self._values = -1, dict[str, Tensor]()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if pl_module.device_mesh is not None:
            log.warning("strategy=fsdp: no device has the whole gradient, so train/grad_share_* are not measured")

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: dict, batch_idx: int
    ) -> None:
        step = trainer.global_step
        due = step % self.every_n_steps == 0 and step != self._measured
        if not due or not trainer.is_global_zero or pl_module.device_mesh is not None:
            return
        self._measured = step
        torch.manual_seed(step)  # of dropout; each training step sets its own
        learned = [p for p in pl_module.backbone.parameters() if p.requires_grad]
        with trainer.precision_plugin.train_step_context():
            loss = pl_module.training_loss(batch)
        if loss.row_B is None:
            return
        text, latent = (
            torch.autograd.grad(term, learned, allow_unused=True, retain_graph=True)
            for term in (loss.nll_BL.sum(), loss.row_B.sum())
        )
        self._values = _shares(text, latent)

    def interval_metrics(self) -> dict[str, float]:
        """Return the values that training/callbacks/metrics.py logs."""
        values, self._values = {name: float(value) for name, value in self._values.items()}, {}
        return values


def _shares(text: tuple[Tensor | None, ...], latent: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
    def dot(first: tuple[Tensor | None, ...], second: tuple[Tensor | None, ...]) -> Tensor:
        there = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
        return sum((a.double() * b.double()).sum() for a, b in there)

    norm_text, norm_latent = dot(text, text).sqrt(), dot(latent, latent).sqrt()
    both = (norm_text + norm_latent).clamp(min=1e-30)
    return {
        "train/grad_share_text": norm_text / both,
        "train/grad_share_latent": norm_latent / both,
        "train/grad_cosine": dot(text, latent) / (norm_text * norm_latent).clamp(min=1e-30),
    }
