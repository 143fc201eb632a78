"""The Lightning trainer of a run, with Palimpsest's saving, logging and signal handling."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import lightning
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from palimpsest.common.files import PathOrUrl
from palimpsest.common.values import ALL_TEXTS, FREE, IF_SET, AtLeastOne, Name, Natural, NotNegative, Share, whole
from palimpsest.training.callbacks.batches import BatchArithmetic
from palimpsest.training.callbacks.best import LastCheckpoint, Patience
from palimpsest.training.callbacks.guard import Guard
from palimpsest.training.callbacks.metrics import TrainingMetrics
from palimpsest.training.callbacks.progress import TextProgressBar
from palimpsest.training.callbacks.run_state import RunState
from palimpsest.training.logs import tolerate_full_disk
from palimpsest.training.machine import Machine
from palimpsest.training.processes import strategy_for
from palimpsest.training.record import RunRecord
from palimpsest.training.signals import StopAtSignal, disable_lightning_signals
from palimpsest.training.storage import AtomicCheckpointIO


@dataclass(frozen=True)
class Arguments:
    """Arguments of lightning.Trainer that a user sets, with their types; `build_trainer` sets the others."""

    num_sanity_val_steps: Annotated[int, whole(-1)] = 0
    max_steps: Annotated[AtLeastOne, FREE] = 1_000_000
    log_every_n_steps: AtLeastOne = 10
    limit_train_batches: Annotated[float, ALL_TEXTS] = 1.0
    limit_val_batches: Natural | Share = 1.0
    limit_test_batches: Natural | Share = 1.0
    val_check_interval: AtLeastOne = 10_000
    fast_dev_run: bool | AtLeastOne = False
    gradient_clip_val: NotNegative | None = None
    gradient_clip_algorithm: Annotated[Literal["norm", "value"] | None, IF_SET] = None
    benchmark: bool | None = None
    deterministic: bool | Literal["warn"] | None = None
    detect_anomaly: bool | None = None
    min_steps: AtLeastOne | None = None
    profiler: Literal["simple", "advanced", "pytorch"] | None = None
    max_time: Name | None = None


@dataclass(frozen=True)
class Run:
    """One fit or evaluation."""

    title: str  # of its progress bar
    fitting: bool  # True for a training
    machine: Machine
    patience: int | None  # validations without improvement that end it; None for no limit
    max_skipped_steps: int  # updates in a row, skipped because they are not finite, that end it
    max_failed_saves: int | None  # failed checkpoints in a row that end it; None for no limit
    folder: Path
    checkpoints: PathOrUrl
    command: str
    settings: str  # the resolved configuration
    resumes: bool  # checkpointing.resume_from_ckpt
    callbacks: Sequence[Callback]
    loggers: Sequence[Logger]
    strategy: Strategy | str


def build_trainer(run: Run, settings: Mapping[str, object]) -> lightning.Trainer:
    """Return a trainer with the further arguments `settings` of lightning.Trainer.

    Raises:
        ValueError: patience is set but no callback keeps the best weights, or Lightning refuses a setting.
    """
    machine = run.machine
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
    metrics = TrainingMetrics()
    state = RunState(run.folder, run.title, metrics)
    if run.fitting:
        guard = Guard(run.max_skipped_steps, run.folder, run.settings)
        record = RunRecord({"command": run.command, "configuration": run.settings})
        callbacks = [
            guard,
            metrics,
            state,
            record,
            BatchArithmetic(),
            *callbacks,
            StopAtSignal(run.checkpoints, run.resumes),
        ]
    settings = {"accelerator": machine.device.type, "num_nodes": machine.num_nodes, **settings}
    if isinstance(settings.get("val_check_interval"), int):  # optimizer steps here, micro-batches in Lightning
        settings["val_check_interval"] *= machine.accumulate
    try:
        trainer = lightning.Trainer(
            **settings,
            devices=machine.devices,
            accumulate_grad_batches=machine.accumulate,
            strategy=strategy_for(run.strategy, machine.devices * machine.num_nodes, run.fitting),
            callbacks=[TextProgressBar(run.title, metrics), *callbacks],
            logger=[tolerate_full_disk(logger) for logger in run.loggers] or False,
            precision=machine.precision,
            plugins=[AtomicCheckpointIO(run.max_failed_saves, on_written=state.checkpoint_written)],
            use_distributed_sampler=False,
            check_val_every_n_epoch=None,
            max_epochs=-1,
            enable_model_summary=False,
            enable_checkpointing=run.fitting,
            inference_mode=True,
        )
    except (MisconfigurationException, TypeError) as error:
        typed = " ".join(f"trainer.{key}={value}" for key, value in settings.items())
        raise ValueError(f"lightning.Trainer refuses {typed}: {error}; change what it names") from error
    disable_lightning_signals(trainer)
    return trainer
