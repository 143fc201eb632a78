"""The Lightning trainer of a run, with what Palimpsest puts under it: how it saves, shows itself and ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import lightning
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy

from callbacks.best import LastCheckpoint, Patience
from callbacks.progress import TextProgressBar
from engine.logs import outlives_full_disks
from engine.record import RunRecord
from engine.storage import AtomicCheckpointIO


@dataclass(frozen=True)
class Run:
    """What one fit or evaluation is given.

    title: what its progress bar says. fitting: it trains. devices: processes per node. accumulate: micro-batches per
    optimizer step. precision: as Lightning names it. patience: validations without a better one that end it; None:
    none does. callbacks, loggers, strategy: as configured. record: what every checkpoint says of its run.
    max_failed_saves: checkpoints in a row that could not be written and end it; None: no number does.
    """

    title: str
    fitting: bool
    devices: int
    accumulate: int
    precision: str
    patience: int | None
    callbacks: Sequence[Callback]
    loggers: Sequence[Logger]
    strategy: Strategy | str
    record: Mapping[str, object] = field(default_factory=dict)
    max_failed_saves: int | None = None


def build_trainer(run: Run, settings: Mapping[str, object]) -> lightning.Trainer:
    """A trainer with the further arguments `settings` of lightning.Trainer.

    Raises:
        ValueError: there is a patience, and no callback keeps the best weights.
    """
    callbacks = list(run.callbacks)
    if run.patience is not None:
        if not any(getattr(callback, "monitor", None) == "val/nll" for callback in callbacks):
            raise ValueError(
                f"classify.patience={run.patience} needs the best weights, which callbacks=checkpoint_monitor keeps; "
                "add it, or set classify.patience=null"
            )
        callbacks.append(Patience(run.patience))
    callbacks.sort(key=lambda callback: isinstance(callback, LastCheckpoint))
    if not run.loggers:
        callbacks = [c for c in callbacks if not isinstance(c, LearningRateMonitor)]
    loggers = [outlives_full_disks(logger) for logger in run.loggers]
    return lightning.Trainer(
        **settings, devices=run.devices, accumulate_grad_batches=run.accumulate, precision=run.precision,
        callbacks=[TextProgressBar(run.title), RunRecord(run.record), *callbacks], logger=loggers or False,
        strategy=run.strategy, plugins=[AtomicCheckpointIO(run.max_failed_saves)], use_distributed_sampler=False,
        check_val_every_n_epoch=None, max_epochs=-1, enable_model_summary=False, enable_checkpointing=run.fitting,
        inference_mode=True,
    )  # fmt: skip
