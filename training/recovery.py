"""The checkpoint that a training resumes from: the latest that is intact."""

import errno
import logging
from functools import lru_cache

from palimpsest.common.files import PathOrUrl, basename, check_seal, exists, join_path, newest_first, rename
from palimpsest.models.checkpoints import load_inert
from palimpsest.training.callbacks.retention import BEST, LAST
from palimpsest.training.processes import first_process

log = logging.getLogger(__name__)

_CORRUPT = ".corrupt"


def newest_good(folder: PathOrUrl) -> PathOrUrl | None:
    """Return last.ckpt of `folder`, or if it is damaged the latest intact checkpoint; None if there is no last.ckpt.

    best.ckpt is the last choice. Damaged files are renamed to *.corrupt.

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
            return _substitute(path)
    if best_is_good:
        return _substitute(best)
    raise ValueError(
        f"no checkpoint in {folder} can be read: {LAST} and all others are damaged, and are kept as *{_CORRUPT}. "
        f"Restore one of them from a backup as {LAST}, or start over with checkpointing.resume_from_ckpt=false (or "
        "another checkpointing.save_dir)"
    )


@lru_cache  # one message per file
def _substitute(path: PathOrUrl) -> PathOrUrl:
    if first_process():
        log.error("%s WAS DAMAGED: %s is used in its place", LAST, path)
    return path


def _good(path: PathOrUrl) -> bool:
    """Return True if a file matches its seal, or can be read if it has none; otherwise set it aside."""
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
    """Rename a damaged file, in the first process; the others reach the same conclusion by themselves."""
    if not first_process():
        return
    number = 1
    while exists(aside := type(path)(f"{path}{_CORRUPT}{f'-{number}' if number > 1 else ''}")):
        number += 1
    try:
        rename(path, aside)
    except OSError as reason:
        log.error("%s\nIt could not be set aside (%s) and is skipped", error, reason)
        return
    log.error("%s\nIt was set aside as %s", error, aside)
