"""Writing of checkpoint files: atomic, and without ending the training if the disk is full."""

import errno
import io
import logging
import os
import shutil
from collections.abc import Callable, Mapping

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch.utils._pytree import tree_leaves

from palimpsest.common.files import (
    PARTIAL,
    PathOrUrl,
    SealingStream,
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

_SPARE = 1 << 16  # bytes of a file besides its tensors and texts


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoint files that are complete or absent, read without executing their content.

    A checkpoint that cannot be written is skipped with an error message, because the earlier ones are intact. On a full
    disk, older checkpoints are removed first (training/callbacks/retention.py).

    Args:
        max_failures: failures in a row that end the training, so that days of it do not exist in memory only; None
            for no limit.
        on_written: called with the content of each complete checkpoint.

    Attributes:
        error: why the latest checkpoint was not written; None if it was.
    """

    def __init__(
        self, max_failures: int | None = None, on_written: Callable[[Mapping[str, object]], None] = lambda content: None
    ) -> None:
        self.max_failures = max_failures
        self.failures = 0
        self.error = None
        self._on_written = on_written

    def save_checkpoint(self, checkpoint: dict, path: str | os.PathLike, storage_options: object = None) -> None:
        where = path_or_url(path)
        try:
            self._write(checkpoint, where)
        except OSError as error:
            self.failed(where, error)
            return
        if self.failures:
            log.warning("checkpoints are written again: %s", where)
        self.failures, self.error = 0, None
        self._on_written(checkpoint)

    def _write(self, checkpoint: dict, where: PathOrUrl) -> None:
        while True:
            try:
                return write_checkpoint(checkpoint, where)
            except OSError as error:
                if is_remote(where) or error.errno not in FULL or not make_room(parent_folder(where)):
                    raise

    def failed(self, where: PathOrUrl, error: OSError) -> None:
        """Record that `where` could not be written; raise OSError after `max_failures` in a row."""
        self.failures += 1
        self.error = OSError(
            f"THE CHECKPOINT {where} COULD NOT BE WRITTEN ({error}). The earlier ones are intact. Free some space "
            "there, or end this run and repeat the command with another checkpointing.save_dir and "
            "checkpointing.resume_ckpt_path=<the last one written>"
        )
        if self.failures == self.max_failures:
            raise OSError(
                f"{self.error}\n{self.failures} in a row (checkpointing.max_failed_saves): the training ends here"
            ) from error
        limit = f" of {self.max_failures} that end the training" if self.max_failures else ""
        log.error("%s\nThe training continues; failure %d in a row%s", self.error, self.failures, limit)

    def load_checkpoint(
        self, path: str | os.PathLike, map_location: object = None, weights_only: bool | None = None
    ) -> dict:
        return read_contents(path_or_url(path))


def write_checkpoint(checkpoint: Mapping[str, object], where: PathOrUrl) -> None:
    """Write a sealed file (common/files.py) atomically, by one transaction at a URL and by a rename on a disk.

    On a disk, contents and names are synced before it returns.

    Raises:
        OSError: it could not be written; an earlier file is intact.
    """
    if is_remote(where):
        content = io.BytesIO()
        _seal(checkpoint, content)
        try:
            fs = filesystem(where)
            fs.makedirs(parent_folder(where), exist_ok=True)
            with fs.transaction, fs.open(where, "wb") as file:
                file.write(content.getbuffer())
        except Exception as error:  # every store has its own exceptions
            raise OSError(f"{type(error).__name__}: {error}") from error
        return
    where.parent.mkdir(parents=True, exist_ok=True)
    free, needed = shutil.disk_usage(where.parent).free, _size(checkpoint) + _SPARE
    if free < needed:
        raise OSError(errno.ENOSPC, f"{free / 1e6:,.1f} MB are free, and the file needs about {needed / 1e6:,.1f} MB")
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
    seal = SealingStream(file)
    torch.save(checkpoint, seal)
    seal.close()


def _size(content: object) -> int:
    """Return the bytes of the tensors and texts in nested containers, each storage once."""
    leaves = tree_leaves(content)
    storages = [leaf.untyped_storage() for leaf in leaves if isinstance(leaf, torch.Tensor)]
    tensors = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(tensors.values()) + sum(len(leaf) for leaf in leaves if isinstance(leaf, str | bytes))
