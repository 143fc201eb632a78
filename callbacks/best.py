"""The best weights by validation: where they are kept, and when to stop waiting for better ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint


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
