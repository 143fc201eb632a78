"""Folders of trainings: where they are, which checkpoint to resume from, and whether a training is complete."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated

from palimpsest.common.files import Place, below, exists, is_remote, place
from palimpsest.common.values import FREE, AtLeastOne, FilePath, FolderName, Natural, PresentPath
from palimpsest.dataloader import TextData
from palimpsest.models.belonging import check_same
from palimpsest.models.checkpoints import Progress, read_progress
from palimpsest.training.processes import first_process, several_launched
from palimpsest.training.recovery import newest_good
from palimpsest.training.run_lock import training_lock


class Runs:
    """The folders of a configuration's trainings: one, or one per class below it.

    Args:
        identity: what the weights depend on (settings/identity.py).
        save_dir: a folder, or an address that the checkpoints lie at; None for one that is named by the identity.
        label: the class of `data.label`, if one is chosen.
        resume: go on from what lies there.
        resume_path_typed: the file to go on from.
        class_patience: validations without a better one that end the training of a class's model, or of one that
            `always_waits`.
    """

    def __init__(
        self,
        identity: Mapping[str, object],
        output_dir: PresentPath,
        data_name: FolderName,
        model_name: FolderName,
        label: Annotated[Natural, FREE] | None,
        save_dir: FilePath | None,
        resume: bool,
        resume_path_typed: FilePath | None,
        max_steps: Annotated[AtLeastOne, FREE],
        class_patience: AtLeastOne | None,
        always_waits: bool = False,
    ) -> None:
        self._identity = identity
        self._label = label
        self._max_steps = max_steps
        self._resume, self._typed = resume, resume_path_typed
        self._class_patience, self._always_waits = class_patience, always_waits
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        own = Path(output_dir) / data_name / f"{model_name}-{digest[:8]}"
        self.kept_in = place(save_dir or own)  # checkpoints; all else is written on this machine
        self._save_dir = own if is_remote(self.kept_in) else self.kept_in

    def folder(self, label: int | None = None) -> Path:
        """Return where a run and its results live: its own folder, or that of one class's model below it."""
        label = self._label if label is None else label
        return self._save_dir if label is None else self._save_dir / f"label={label}"

    def checkpoints(self, label: int | None = None) -> Place:
        """Return where the checkpoints of a run are: in its folder, or below the address checkpointing.save_dir."""
        below_it = self.folder(label).relative_to(self._save_dir).parts
        return below(self.kept_in, *below_it, "checkpoints")

    def alone(self, label: int | None = None) -> AbstractContextManager[None]:
        """Return a context in which no other process trains in the run's folder (training/run_lock.py). The first of
        several processes sees to it; where others were started beside it, it cannot let them wait."""
        if not first_process():
            return nullcontext()
        return training_lock(self.folder(label), wait=not several_launched())

    def patience(self, label: int | None = None) -> int | None:
        """Return how many validations without a better one end a training, whose best weights then are the model; None
        for one that runs up to trainer.max_steps and ends with its last weights."""
        ordinary = self.folder(label) == self._save_dir and not self._always_waits
        return None if ordinary else self._class_patience

    def resume_path(self, label: int | None = None) -> Place | None:
        """Return the checkpoint to go on from, if there is one and checkpointing.resume_from_ckpt allows it."""
        path = place(self._typed, "checkpointing.resume_ckpt_path") if self._typed else None
        if path and not exists(path):
            raise FileNotFoundError(f"checkpointing.resume_ckpt_path={self._typed}: there is no such file")
        return (path or newest_good(self.checkpoints(label))) if self._resume else None

    def finished(self, data: TextData, label: int | None = None) -> Place | None:
        """Return the weights of a training that is complete; None where there is something left to do.

        Raises:
            ValueError: the training in the folder has other settings or another tokenizer, or went on for longer.
        """
        if self._typed or not self._resume:
            return None
        last = newest_good(self.checkpoints(label))
        if last is None:
            return None
        progress = read_progress(last)
        ours = {
            **self._identity,
            "data.label": data.label,
            "tokenizer": data.vocabulary.fingerprint,
            "latents": data.latents and data.latents.fingerprint,
        }
        check_same(last, progress, ours)
        return self.model_path(label) if self._is_done(progress, label) else None

    def _is_done(self, progress: Progress, label: int | None) -> bool:
        patience = self.patience(label)
        stopped = patience is not None and progress.fruitless >= patience
        if not stopped and progress.step > self._max_steps:
            print(
                f"{self.folder(label)}: {progress.step} steps are there; {self._max_steps} were asked for "
                "(trainer.max_steps). Another checkpointing.save_dir= begins anew"
            )
        return stopped or progress.step >= self._max_steps

    def model_path(self, label: int | None = None) -> Place:
        """Return the checkpoint of the trained model: with a patience the best by validation, if one ran, else the
        last."""
        last = newest_good(self.checkpoints(label))
        best = read_progress(last).best if self.patience(label) is not None and last else None
        return best if best and exists(best) else last or below(self.checkpoints(label), "last.ckpt")
