"""Which weights are kept: the last ones, the best by validation, and when to stop waiting for better ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import lightning
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint


class LastCheckpoint(ModelCheckpoint):
    """A ModelCheckpoint every some steps that waits for a validation due at the same step. Saved before it, the file
    would know nothing of its result, and a training resumed from there does not repeat it: the best value and the
    count of patience would be lost. It has to stand behind the callbacks whose state it saves."""

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: object, batch: object,
        batch_idx: int,
    ) -> None:  # fmt: skip
        interval = trainer.val_check_batch if sum(trainer.num_val_batches) else None
        if not interval or (batch_idx + 1) % interval:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        super().on_train_batch_end(trainer, pl_module, None, None, 0)


class BestCheckpoint(ModelCheckpoint):
    """A ModelCheckpoint that knows the best value so far also after its folder was moved or copied; Lightning's own
    forgets it there, and writes worse weights over the best."""

    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:
        def moved(path: str) -> str:
            return str(Path(self.dirpath) / Path(path).name) if path else path

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
