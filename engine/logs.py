"""Logs of a run that a full disk does not end."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from functools import wraps

from lightning.pytorch.loggers import Logger

log = logging.getLogger(__name__)

FULL = (errno.ENOSPC, errno.EDQUOT)


def outlives_full_disks(logger: Logger) -> Logger:
    """The same logger; what it has no room for is left out, and that is said once."""
    told: list[str] = []

    def forgiving(method: Callable) -> Callable:
        @wraps(method)
        def call(*args: object, **kwargs: object) -> object:
            try:
                return method(*args, **kwargs)
            except (OSError, ValueError) as error:  # TensorBoard's says something else, and this is its cause
                if not _is_full(error):
                    raise
                if not told:
                    log.error("%s CAN NOT LOG (%s): the training goes on without", type(logger).__name__, error)
                told.append(str(error))

        return call

    for name in ("log_metrics", "log_hyperparams", "save", "finalize"):
        setattr(logger, name, forgiving(getattr(logger, name)))
    return logger


def _is_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        error = error.__cause__ or error.__context__
    return False
