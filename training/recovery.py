"""Which checkpoint a training goes on from: the last one that still is what was written."""

from __future__ import annotations

import errno
import logging
from functools import lru_cache

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from palimpsest.common.files import PathOrUrl, basename, check_seal, exists, join_path, newest_first, rename
from palimpsest.models.checkpoints import load_inert
from palimpsest.training.callbacks.retention import BEST, LAST

log = logging.getLogger(__name__)

_CORRUPT = ".corrupt"


def newest_good(folder: PathOrUrl) -> PathOrUrl | None:
    """last.ckpt of `folder`, or, where that is damaged, the latest written of the others that is not, best.ckpt after
    all others; None where there is no last.ckpt. What is damaged, best.ckpt too, is set aside as *.corrupt.

    Raises:
        ValueError: there were checkpoints, and all are damaged.
    """
    last, best = join_path(folder, LAST), join_path(folder, BEST)
    if not exists(last) and not any(basename(path).startswith(f"{LAST}{_CORRUPT}") for path in newest_first(folder)):
        return None
    best_is_good = exists(best) and _good(best)
    if _good(last):
        return last
    for path in newest_first(folder, ".ckpt"):
        if path not in (last, best) and _good(path):
            return _instead(path)
    if best_is_good:
        return _instead(best)
    raise ValueError(
        f"no checkpoint in {folder} can be read: {LAST} and all others are damaged, and lie there as *{_CORRUPT}. "
        f"Restore one of them from a backup as {LAST}, or begin anew with checkpointing.resume_from_ckpt=false (or "
        "another checkpointing.save_dir)"
    )


@lru_cache  # it is said once
def _instead(path: PathOrUrl) -> PathOrUrl:
    if rank_zero_only.rank == 0:
        log.error("%s WAS DAMAGED: %s is used in its place", LAST, path)
    return path


def _good(path: PathOrUrl) -> bool:
    """Whether it is what was written, or, without a seal, can be read; if not, it is set aside."""
    try:
        if not check_seal(path):
            load_inert(path, weights=False)
    except FileNotFoundError:
        return False
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EIO:
            raise
        _set_aside(path, error)
        return False
    return True


def _set_aside(path: PathOrUrl, error: Exception) -> None:
    """Rename it, on the one process that writes. The others come to the same verdict by themselves."""
    if rank_zero_only.rank != 0:
        return
    number = 1
    while exists(aside := type(path)(f"{path}{_CORRUPT}{f'-{number}' if number > 1 else ''}")):
        number += 1
    try:
        rename(path, aside)
    except OSError as reason:
        log.error("%s\nIt could not be set aside (%s) and is passed over", error, reason)
        return
    log.error("%s\nIt was set aside as %s", error, aside)
