"""Checkpoint files, written so that no interruption leaves half of one and no full disk ends a training."""

from __future__ import annotations

import errno
import io
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from palimpsest.common.files import (
    PARTIAL,
    PathOrUrl,
    Seal,
    filesystem,
    fsync_folder,
    is_remote,
    parent_folder,
    path_or_url,
)
from palimpsest.models.checkpoints import read_contents
from palimpsest.training.callbacks.retention import make_room
from palimpsest.training.logs import FULL

log = logging.getLogger(__name__)

_SPARE = 1 << 16  # bytes of a file beside its tensors and texts


class AtomicCheckpointIO(TorchCheckpointIO):
    """Whole files or none (`write_checkpoint`), read without running what is in them.

    One that cannot be written is skipped, loudly, because the earlier ones are intact and the training can go on:
    `error` says why the latest was not, and None that it was. `max_failures` of them in a row end the training (None:
    no number does), lest days of it exist in memory only. Where the disk is full, older ones of the last checkpoints
    make room first. `written` is called with the content of each that is whole and in its place.
    """

    def __init__(
        self, max_failures: int | None = None, written: Callable[[Mapping[str, object]], None] = lambda content: None
    ) -> None:
        self.max_failures = max_failures
        self.failures = 0
        self.error = None
        self._tell = written

    def save_checkpoint(self, checkpoint: dict, path: str | os.PathLike, storage_options: object = None) -> None:
        if storage_options is not None:
            raise TypeError("storage_options are not used: fsspec reads its own configuration")
        where = path_or_url(path)
        try:
            self._write(checkpoint, where)
        except OSError as error:
            self.failed(where, error)
            return
        if self.failures:
            log.warning("checkpoints are written again: %s", where)
        self.failures, self.error = 0, None
        self._tell(checkpoint)

    def _write(self, checkpoint: dict, where: PathOrUrl) -> None:
        while True:
            try:
                return write_checkpoint(checkpoint, where)
            except OSError as error:
                if is_remote(where) or error.errno not in FULL or not make_room(parent_folder(where)):
                    raise

    def failed(self, where: PathOrUrl, error: OSError) -> None:
        """Take note that `where` could not be written. Raises OSError when it is once too often."""
        self.failures += 1
        self.error = OSError(
            f"THE CHECKPOINT {where} COULD NOT BE WRITTEN ({error}). The earlier ones are intact. Free some space "
            "there, or end this run and give the same command with another checkpointing.save_dir and "
            "checkpointing.resume_ckpt_path=<the last one written>"
        )
        if self.failures == self.max_failures:
            raise OSError(
                f"{self.error}\n{self.failures} in a row (checkpointing.max_failed_saves): the training ends here"
            ) from error
        limit = f" of {self.max_failures} that end the training" if self.max_failures else ""
        log.error("%s\nThe training goes on; failure %d in a row%s", self.error, self.failures, limit)

    def load_checkpoint(
        self, path: str | os.PathLike, map_location: object = None, weights_only: bool | None = None
    ) -> dict:
        return read_contents(path_or_url(path))


def write_checkpoint(checkpoint: Mapping[str, object], where: PathOrUrl) -> None:
    """Write a sealed file (common/files.py) in one piece: at an address by an upload that counts only when it is
    complete, on a disk beside the target, which is then renamed. Contents, then names, are on the disk at return.

    Raises:
        OSError: it could not be written; what was there is whole.
    """
    if is_remote(where):
        content = io.BytesIO()
        _seal(checkpoint, content)
        try:
            fs = filesystem(where)
            fs.makedirs(parent_folder(where), exist_ok=True)
            with fs.transaction, fs.open(where, "wb") as file:
                file.write(content.getbuffer())
        except Exception as error:  # every store has exceptions of its own
            raise OSError(f"{type(error).__name__}: {error}") from error
        return
    where.parent.mkdir(parents=True, exist_ok=True)
    _check_space(where.parent, _size(checkpoint, set()) + _SPARE)
    partial = where.with_name(where.name + PARTIAL)
    try:
        with partial.open("wb") as file:
            _seal(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, where)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    fsync_folder(where.parent)


def _seal(checkpoint: Mapping[str, object], file: io.IOBase) -> None:
    seal = Seal(file)
    torch.save(checkpoint, seal)
    seal.close()


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{free / 1e6:,.1f} MB are free, and the file needs about {needed / 1e6:,.1f} MB")


def _size(content: object, counted: set[int]) -> int:
    """Bytes of the tensors and texts in nested containers, each storage once."""
    if isinstance(content, torch.Tensor):
        storage = content.untyped_storage()
        new = storage.data_ptr() not in counted
        counted.add(storage.data_ptr())
        return storage.nbytes() if new else 0
    if isinstance(content, str | bytes):
        return len(content)
    if isinstance(content, Mapping):
        content = content.values()
    elif not isinstance(content, list | tuple | set):
        return 0
    return sum(_size(part, counted) for part in content)
