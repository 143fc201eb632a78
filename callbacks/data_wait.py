"""How much of the training time goes by waiting for data."""

from __future__ import annotations

import time

import lightning


class DataWait(lightning.Callback):
    """Logs `train/data_wait_share` every trainer.log_every_n_steps steps: of the seconds since the last time, without
    those of validations, the share in which the training process stood still for its next batch.

    On a GPU the host runs ahead of the device, so that a small share there need not cost anything. Needs a train loader
    that adds up its waiting in `waited`, as dataloader.py's do; with another it logs nothing. Reads two clocks per
    interval and nothing from the device.
    """

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._step = trainer.global_step
        self._begin(trainer)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if hasattr(self, "_began"):
            self._began += time.perf_counter() - self._paused

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: object, batch: object,
        batch_idx: int,
    ) -> None:  # fmt: skip
        step = trainer.global_step
        if step == self._step or step % trainer.log_every_n_steps:
            return
        seconds, waited = time.perf_counter() - self._began, _waited(trainer) - self._waited
        if hasattr(trainer.train_dataloader, "waited"):
            pl_module.log("train/data_wait_share", min(1.0, waited / seconds))
        self._step = step
        self._begin(trainer)

    def _begin(self, trainer: lightning.Trainer) -> None:
        self._began, self._waited = time.perf_counter(), _waited(trainer)


def _waited(trainer: lightning.Trainer) -> float:
    return getattr(trainer.train_dataloader, "waited", 0.0)
