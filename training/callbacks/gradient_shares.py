"""The share of the gradient that each term of a joint loss contributes."""

import logging

import torch
from lightning import LightningModule, Trainer
from torch import Tensor

from palimpsest.training.callbacks.gradient_variance import GradientProbe

log = logging.getLogger(__name__)


class GradientShares(GradientProbe):
    """Gradients of the text term and of the latent term of the loss, from two backward passes of one forward pass.

    Logged are train/grad_share_text and train/grad_share_latent, each norm as a share of the sum of both, and
    train/grad_cosine, the cosine of the angle between the two gradients.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.device_mesh is not None:
            log.warning("strategy=fsdp: no device has the whole gradient, so train/grad_share_* are not measured")

    def _measure(self, trainer: Trainer, pl_module: LightningModule, batch: dict) -> dict[str, Tensor]:
        torch.manual_seed(trainer.global_step)  # of dropout; each training step sets its own
        learned = [p for p in pl_module.backbone.parameters() if p.requires_grad]
        with trainer.precision_plugin.train_step_context():
            loss = pl_module.training_loss(batch)
        if loss.row_B is None:
            return {}
        text, latent = (
            torch.autograd.grad(term.sum(), learned, materialize_grads=True, retain_graph=True)
            for term in (loss.nll_BL, loss.row_B)
        )
        norm_text, norm_latent = _dot(text, text).sqrt(), _dot(latent, latent).sqrt()
        both = (norm_text + norm_latent).clamp(min=1e-30)
        return {
            "train/grad_share_text": norm_text / both,
            "train/grad_share_latent": norm_latent / both,
            "train/grad_cosine": _dot(text, latent) / (norm_text * norm_latent).clamp(min=1e-30),
        }


def _dot(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> Tensor:
    return sum((a.double() * b.double()).sum() for a, b in zip(first, second, strict=True))
