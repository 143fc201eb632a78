"""Loggers that survive a full disk, and the identity of a run at Weights & Biases."""

import errno
import logging
import os
import secrets
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Annotated

from lightning.pytorch.loggers import Logger, WandbLogger

from palimpsest.common.files import write_atomically
from palimpsest.common.values import NAME, FilePath, Name, list_of
from palimpsest.training.processes import first_process

log = logging.getLogger(__name__)

FULL = (errno.ENOSPC, errno.EDQUOT)


def tolerate_full_disk(logger: Logger) -> Logger:
    """Make a logger drop what it has no room for, with one error message; return it."""
    failed = False

    def tolerant(method: Callable) -> Callable:
        @wraps(method)
        def call(*args: object, **kwargs: object) -> object:
            nonlocal failed
            try:
                return method(*args, **kwargs)
            except (OSError, ValueError) as error:  # TensorBoard raises a ValueError with the OSError as its cause
                if not _is_full(error):
                    raise
                if not failed:
                    log.error("%s CANNOT LOG (%s): the training continues without it", type(logger).__name__, error)
                failed = True

        return call

    for name in ("log_metrics", "log_hyperparams", "save", "finalize"):
        setattr(logger, name, tolerant(getattr(logger, name)))
    return logger


def wandb_logger(
    save_dir: FilePath | None,
    id: Name | None = None,
    goes_on: bool = True,
    project: Name | None = None,
    notes: Name | None = None,
    group: Name | None = None,
    job_type: Name | None = None,
    name: Name | None = None,
    tags: Name | Annotated[Sequence[str], list_of(NAME, 0, "[first,second]")] | None = None,
    offline: bool = False,
    **settings: object,
) -> WandbLogger:
    """Return a logger for Weights & Biases in which all starts of a training are one run.

    Args:
        id: of that run; None for WANDB_RUN_ID, else for a random one, kept in `save_dir`.
        goes_on: the training may resume from `save_dir`; if not, a new id is drawn.
        settings: further arguments of WandbLogger.

    Raises:
        ModuleNotFoundError: wandb is not installed.
    """
    id = id or os.environ.get("WANDB_RUN_ID") or (_run_id(Path(save_dir), goes_on) if first_process() else None)
    described = {"project": project, "notes": notes, "group": group, "job_type": job_type, "name": name, "tags": tags}
    logger = WandbLogger(save_dir=save_dir, id=id, offline=offline, **described, **settings)
    import wandb

    if wandb.run is not None:  # of an earlier training in this process; Lightning would reuse it
        wandb.finish()
    return logger


def _run_id(folder: Path, goes_on: bool) -> str:
    """Return the id kept in `folder`, random so that two users of the same command do not share a run."""
    file = folder / "wandb" / "run-id"
    known = file.read_text().strip() if goes_on and file.exists() else ""
    if not known:
        known = secrets.token_hex(4)
        write_atomically(file, known.encode())
    return known


def _is_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        error = error.__cause__ or error.__context__
    return False
