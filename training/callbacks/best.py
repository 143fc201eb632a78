"""Callbacks that save the last and the best weights, and that end a training without improvement."""

import time
from collections.abc import Mapping
from typing import Annotated, Literal

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint

from palimpsest.common.files import PathOrUrl, basename, exists, join_path, link_or_copy, parent_folder, path_or_url
from palimpsest.common.values import AtLeastOne, Name, Natural, Positive, PresentPath, whole
from palimpsest.training.callbacks.retention import LAST, clear, keep, step_file


class LastCheckpoint(Checkpoint):
    """Regular saves, of which the last `keep_last` and every milestone are kept (training/callbacks/retention.py).

    It saves every `every_n_train_steps` and every `milestone_every` optimizer steps, and when `every_minutes` have
    passed since the last save; None switches a condition off. With several devices the time is checked at the steps
    that log. Nothing is saved between the micro-batches of a step.

    If a validation is due at the same step, the save waits for it. A file without its result would lose the best value
    and the count of patience, because a resume does not repeat the validation. So this callback must come after those
    whose state it saves.
    """

    def __init__(
        self,
        dirpath: PresentPath,
        every_n_train_steps: Natural | None = 500,
        every_minutes: Positive | None = 15,
        keep_last: AtLeastOne = 3,
        milestone_every: AtLeastOne | None = None,
    ) -> None:
        self.dirpath, self.keep_last = path_or_url(dirpath), keep_last
        self.every_n_train_steps, self.milestone_every = every_n_train_steps, milestone_every
        self.every_minutes = every_minutes
        self.saved: int | None = None  # the step of last.ckpt, if this process has written it
        self._step, self._waits = 0, False
        self._clock = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step, self._clock = trainer.global_step, time.monotonic()
        if not trainer.is_global_zero:
            return
        clear(self.dirpath, trainer.global_step, self.keep_last)
        resumed, last = trainer.ckpt_path and path_or_url(trainer.ckpt_path), join_path(self.dirpath, LAST)
        if resumed and parent_folder(resumed) == self.dirpath and not exists(last):  # last.ckpt was damaged
            link_or_copy(resumed, last)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        self._waits = validation_due(trainer, batch_idx)
        if not self._waits and self._due(trainer):
            self.save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._waits and self._due(trainer):
            self.save(trainer)
        self._waits = False

    def _due(self, trainer: Trainer) -> bool:
        step = trainer.global_step
        if trainer.fast_dev_run:
            return False
        if any(every and step % every == 0 for every in (self.every_n_train_steps, self.milestone_every)):
            return True
        if self.every_minutes is None or (trainer.world_size > 1 and step % trainer.log_every_n_steps):
            return False
        return trainer.strategy.broadcast(time.monotonic() - self._clock >= 60 * self.every_minutes)

    def save(self, trainer: Trainer) -> None:
        """Write the last checkpoint on all devices together, unless this step is saved already."""
        step = trainer.global_step
        if step == self.saved:
            return
        trainer.save_checkpoint(step_file(self.dirpath, step), weights_only=False)
        self._clock = time.monotonic()
        storage = trainer.strategy.checkpoint_io
        if trainer.is_global_zero and storage.error is None:
            try:
                keep(self.dirpath, step, self.keep_last, bool(self.milestone_every) and not step % self.milestone_every)
            except OSError as error:
                storage.failed(join_path(self.dirpath, LAST), error)
        if _written(trainer):
            self.saved = step


def validation_due(trainer: Trainer, batch_idx: int) -> bool:
    """Return True if Lightning validates after this micro-batch."""
    interval = trainer.val_check_batch if sum(trainer.num_val_batches) else None
    return bool(interval) and not (batch_idx + 1) % interval


def _written(trainer: Trainer) -> bool:
    """Return True on every device if the latest checkpoint was written."""
    return trainer.strategy.broadcast(trainer.strategy.checkpoint_io.error is None)


def save_last(trainer: Trainer, folder: PathOrUrl) -> None:
    """Save the current step as last.ckpt in `folder`, with or without a LastCheckpoint.

    Raises:
        OSError: it cannot be written; the earlier one is intact.
    """
    callback = next((callback for callback in trainer.callbacks if isinstance(callback, LastCheckpoint)), None)
    if callback:
        callback.save(trainer)
    else:
        trainer.save_checkpoint(join_path(folder, LAST), weights_only=False)
    if trainer.strategy.checkpoint_io.error is not None:
        raise trainer.strategy.checkpoint_io.error


class BestCheckpoint(ModelCheckpoint):
    """A ModelCheckpoint that keeps the best value when its folder is moved, or when a file cannot be written.

    Lightning's own forgets the value of a moved folder and then overwrites the best weights with worse ones.
    """

    def __init__(
        self,
        dirpath: PresentPath,
        monitor: Name,
        mode: Literal["min", "max"] = "min",
        save_top_k: Annotated[int, whole(-1)] = 1,
        save_last: bool | Literal["link"] | None = None,
        filename: Name | None = None,
        **settings: object,
    ) -> None:
        super().__init__(dirpath, filename, monitor, save_last=save_last, save_top_k=save_top_k, mode=mode, **settings)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        before = {**self.state_dict(), "best_k_models": dict(self.best_k_models)}
        super().on_validation_end(trainer, pl_module)
        if self.current_score is not before["current_score"] and not _written(trainer):
            for name in ("best_model_score", "best_model_path", "current_score", "best_k_models",
                         "kth_best_model_path", "kth_value"):  # fmt: skip
                setattr(self, name, before[name])

    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:
        def moved(path: str) -> str:
            return str(join_path(path_or_url(self.dirpath), basename(path_or_url(path)))) if path else path

        if not all(exists(path_or_url(moved(path))) for path in state_dict["best_k_models"]):
            return
        paths = {name: moved(state_dict[name]) for name in ("best_model_path", "kth_best_model_path")}
        values = {moved(path): value for path, value in state_dict["best_k_models"].items()}
        super().load_state_dict({**state_dict, **paths, "best_k_models": values, "dirpath": self.dirpath})


class Patience(EarlyStopping):
    """End of a training after `patience` validations in a row without a lower val/nll; NaN counts as not lower.

    Checkpoints keep the count, but not the patience itself.
    """

    def __init__(self, patience: int) -> None:
        super().__init__("val/nll", patience=patience, check_finite=False, check_on_train_epoch_end=False)

    @property
    def is_over(self) -> bool:
        return self.wait_count >= self.patience

    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:
        super().load_state_dict({**state_dict, "patience": self.patience})
