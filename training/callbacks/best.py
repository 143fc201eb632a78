"""Which weights are kept: the last ones, the best by validation, and when to stop waiting for better ones."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Annotated, Literal

import lightning
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint

from palimpsest.common.files import PathOrUrl, basename, exists, join_path, link_or_copy, parent_folder, path_or_url
from palimpsest.common.values import AtLeastOne, Name, Natural, Positive, PresentPath, whole
from palimpsest.training.callbacks.retention import LAST, clear, keep, step_file


class LastCheckpoint(Checkpoint):
    """Saves every `every_n_train_steps` optimizer steps, every `milestone_every` of them, and when `every_minutes`
    have passed since it last did; keeps the last `keep_last` of these and every milestone
    (training/callbacks/retention.py).
    None: not for this reason. With several devices the clock is looked at when the losses are logged.

    It waits for a validation due at the same step. Saved before it, the file would know nothing of its result, and a
    training resumed from there does not repeat it: the best value and the count of patience would be lost. So it has
    to stand behind the callbacks whose state it saves. In the middle of a step's micro-batches it saves nothing.
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
        self.saved: int | None = None  # the step whose checkpoint is last.ckpt, if this training has written one
        self._seen, self._waits, self._clock = 0, False, time.monotonic()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._seen, self._clock = trainer.global_step, time.monotonic()
        if not trainer.is_global_zero:
            return
        clear(self.dirpath, trainer.global_step, self.keep_last)
        resumed, last = trainer.ckpt_path and path_or_url(trainer.ckpt_path), join_path(self.dirpath, LAST)
        if resumed and parent_folder(resumed) == self.dirpath and not exists(last):  # the last one was corrupt
            link_or_copy(resumed, last)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: object, batch: object,
        batch_idx: int,
    ) -> None:  # fmt: skip
        if trainer.global_step == self._seen:
            return
        self._seen = trainer.global_step
        interval = trainer.val_check_batch if sum(trainer.num_val_batches) else None
        self._waits = bool(interval) and not (batch_idx + 1) % interval
        if not self._waits and self._due(trainer):
            self.save(trainer)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self._waits and self._due(trainer):
            self.save(trainer)
        self._waits = False

    def _due(self, trainer: lightning.Trainer) -> bool:
        step = trainer.global_step
        if trainer.fast_dev_run:
            return False
        if any(every and step % every == 0 for every in (self.every_n_train_steps, self.milestone_every)):
            return True
        if self.every_minutes is None or (trainer.world_size > 1 and step % trainer.log_every_n_steps):
            return False
        return trainer.strategy.broadcast(time.monotonic() - self._clock >= 60 * self.every_minutes)

    def save(self, trainer: lightning.Trainer) -> bool:
        """Make what the training has reached its last checkpoint, on all devices together; whether it could be
        written. It does nothing where that is so already."""
        if trainer.global_step == self.saved:
            return True
        step = trainer.global_step
        trainer.save_checkpoint(step_file(self.dirpath, step), weights_only=False)
        self._clock = time.monotonic()
        storage = trainer.strategy.checkpoint_io
        if trainer.is_global_zero and storage.error is None:
            try:
                keep(self.dirpath, step, self.keep_last, bool(self.milestone_every) and not step % self.milestone_every)
            except OSError as error:
                storage.failed(join_path(self.dirpath, LAST), error)
        written = _written(trainer)
        self.saved = step if written else self.saved
        return written


def _written(trainer: lightning.Trainer) -> bool:
    """Whether the process that writes could write the latest checkpoint; the same answer on every device."""
    return trainer.strategy.broadcast(trainer.strategy.checkpoint_io.error is None)


def save_last(trainer: lightning.Trainer, folder: PathOrUrl) -> None:
    """Have in `folder` what the training has reached as last.ckpt, whatever callbacks there are.

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
    """A ModelCheckpoint that knows the best value so far also after its folder was moved or copied; Lightning's own
    forgets it there, and writes worse weights over the best. It holds no weights for the best that it could not write,
    or that are gone."""

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
        super().__init__(
            dirpath=dirpath,
            monitor=monitor,
            mode=mode,
            save_top_k=save_top_k,
            save_last=save_last,
            filename=filename,
            **settings,
        )

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
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
    """Ends a training after `patience` validations in a row without a lower val/nll (one that is not a number is
    none). Its count is saved in every checkpoint; the patience itself is what is set now."""

    def __init__(self, patience: int) -> None:
        super().__init__("val/nll", patience=patience, check_finite=False, check_on_train_epoch_end=False)

    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:
        super().load_state_dict({**state_dict, "patience": self.patience})
