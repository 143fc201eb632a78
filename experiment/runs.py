"""Folders of trainings: their paths, the checkpoint to resume from, and whether a training is complete."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from palimpsest.common.files import PathOrUrl, exists, is_remote, join_path, path_or_url
from palimpsest.common.values import FREE, AtLeastOne, FilePath, FolderName, Natural, PresentPath
from palimpsest.data.stream import check_same_texts
from palimpsest.dataloader import TextData
from palimpsest.models.checkpoints import Progress, read_progress
from palimpsest.models.compatibility import RESUMED, check_same_settings, differing
from palimpsest.training.processes import first_process, several_launched
from palimpsest.training.recovery import newest_good
from palimpsest.training.run_lock import training_lock


@dataclass
class Runs:
    """The folders of a configuration's trainings: one, or one subfolder per class.

    Args:
        identity: the settings that the weights depend on (settings/identity.py).
        save_dir: a folder, or a URL for the checkpoints; None for a folder named by the identity.
        label: the class of `data.label`, if one is chosen.
        resume: resume from an existing checkpoint.
        resume_path_typed: the file to resume from.
        class_patience: validations without improvement that end the training of a class model.
        always_waits: apply `class_patience` to every training.
        fast_dev_run: a trial of a few batches, in a subfolder, so that no run takes it for its own; it never resumes.
    """

    identity: Mapping[str, object]
    output_dir: PresentPath
    data_name: FolderName
    model_name: FolderName
    label: Annotated[Natural, FREE] | None
    save_dir: FilePath | None
    resume: bool
    resume_path_typed: FilePath | None
    max_steps: Annotated[AtLeastOne, FREE]
    class_patience: AtLeastOne | None
    always_waits: bool = False
    fast_dev_run: bool | AtLeastOne = False

    def __post_init__(self) -> None:
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
        default = Path(self.output_dir) / self.data_name / f"{self.model_name}-{digest[:8]}"
        self.checkpoint_root = path_or_url(self.save_dir or default)
        if self.fast_dev_run:
            self.resume = False
            default /= "fast_dev_run"
            self.checkpoint_root = join_path(self.checkpoint_root, "fast_dev_run")
        self._root = default if is_remote(self.checkpoint_root) else self.checkpoint_root

    def folder(self, label: int | None = None) -> Path:
        """Return the folder of a run and its results, on this machine; with `label` that of a class model."""
        label = self.label if label is None else label
        return self._root if label is None else self._root / f"label={label}"

    def checkpoints(self, label: int | None = None) -> PathOrUrl:
        """Return the folder or URL of a run's checkpoints."""
        parts = self.folder(label).relative_to(self._root).parts
        return join_path(self.checkpoint_root, *parts, "checkpoints")

    def lock(self, label: int | None = None) -> AbstractContextManager[None]:
        """Return a context in which no other command trains in the run's folder (training/run_lock.py).

        The first process of a command takes the lock. It does not wait for it if others were launched with it.
        """
        if not first_process():
            return nullcontext()
        return training_lock(self.folder(label), wait=not several_launched())

    def patience(self, label: int | None = None) -> int | None:
        """Return the validations without improvement that end a training, whose best weights are then the model.

        None for a training that runs up to trainer.max_steps and ends with its last weights.
        """
        ordinary = self.folder(label) == self._root and not self.always_waits
        return None if ordinary else self.class_patience

    def resume_path(self, label: int | None = None) -> PathOrUrl | None:
        """Return the checkpoint to resume from, if there is one and checkpointing.resume_from_ckpt allows it.

        The run's own checkpoint comes before the typed one if the run was started from that: the same command goes on.
        """
        if not self.resume:
            return None
        own = self._own_checkpoint(label)
        if own is not None or not self.resume_path_typed:
            return own
        path = path_or_url(self.resume_path_typed, "checkpointing.resume_ckpt_path")
        if not exists(path):
            raise FileNotFoundError(f"checkpointing.resume_ckpt_path={self.resume_path_typed}: there is no such file")
        return path

    def _own_checkpoint(self, label: int | None) -> PathOrUrl | None:
        """Return the run's newest checkpoint, or None.

        If a file was typed, the checkpoint counts only if it was started from this file with the same settings. The
        typed file itself may have been removed since.
        """
        own = newest_good(self.checkpoints(label))
        if own is None or not self.resume_path_typed:
            return own
        progress = read_progress(own)
        known = progress.identity.get("configuration", {})
        started_from_it = progress.typed("checkpointing.resume_ckpt_path") == self.resume_path_typed
        return own if started_from_it and not differing(known, self.identity) else None

    def finished(self, data: TextData, label: int | None = None) -> PathOrUrl | None:
        """Return the weights of a complete training; None if it is unfinished.

        Raises:
            ValueError: the training in the folder has other settings, another tokenizer or other texts.
        """
        last = self._own_checkpoint(label) if self.resume else None
        if last is None:
            return None
        progress = read_progress(last)
        check_same_settings(last, progress, self._settings(data))
        if not self._is_done(progress, label):
            return None
        if progress.train_size:
            check_same_texts(progress.train_size, data.train_size)
        return self.model_path(label)

    def check_resumable(self, path: PathOrUrl, data: TextData) -> None:
        """Raise ValueError if the training at `path` had another tokenizer, network or optimizer."""
        check_same_settings(path, read_progress(path), self._settings(data), RESUMED)

    def _settings(self, data: TextData) -> dict[str, object]:
        latents = data.latents and data.latents.fingerprint
        tokenizer = data.vocabulary.fingerprint
        return {**self.identity, "data.label": data.label, "tokenizer": tokenizer, "latents": latents}

    def _is_done(self, progress: Progress, label: int | None) -> bool:
        patience = self.patience(label)
        stopped = patience is not None and progress.validations_without_improvement >= patience
        if not stopped and progress.step > self.max_steps:
            print(
                f"{self.folder(label)}: {progress.step} steps are complete; {self.max_steps} were requested "
                "(trainer.max_steps). Another checkpointing.save_dir= starts a new training"
            )
        return stopped or progress.step >= self.max_steps

    def model_path(self, label: int | None = None) -> PathOrUrl:
        """Return the checkpoint of the trained model: the best by validation if there is patience, else the last."""
        last = newest_good(self.checkpoints(label))
        best = read_progress(last).best if self.patience(label) is not None and last else None
        return best if best and exists(best) else last or join_path(self.checkpoints(label), "last.ckpt")
