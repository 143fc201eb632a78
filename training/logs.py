"""Loggers of a run that a full disk does not end."""

from __future__ import annotations

import errno
import logging
import os
import secrets
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Annotated

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from palimpsest.common.values import NAME, FilePath, Name, list_of

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
    """Weights & Biases; `settings` are further ones of WandbLogger. All starts of a training are one run there, and
    every training of a process has its own.

    id: of that run; None: what the environment says (WANDB_RUN_ID), else one that is drawn at the first start and kept
    in `save_dir`. goes_on: whether the training may go on with what lies there; if not, another id is drawn.
    Raises:
        ModuleNotFoundError: wandb is not installed.
    """
    first = rank_zero_only.rank == 0  # the only process that logs
    id = id or os.environ.get("WANDB_RUN_ID") or (_run_id(Path(save_dir), goes_on) if first else None)
    told = {"project": project, "notes": notes, "group": group, "job_type": job_type, "name": name, "tags": tags}
    logger = WandbLogger(save_dir=save_dir, id=id, offline=offline, **told, **settings)
    import wandb

    if wandb.run is not None:  # of the training before; Lightning would take it for this one
        wandb.finish()
    return logger


def _run_id(folder: Path, goes_on: bool) -> str:
    """The id that is kept in `folder`. A name alone would not do: two people who give the same command would log into
    the same run."""
    kept = folder / "wandb" / "run-id"
    known = kept.read_text().strip() if goes_on and kept.exists() else ""
    if not known:
        known = secrets.token_hex(4)
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_name(f".{kept.name}")
        partial.write_text(known)
        os.replace(partial, kept)
    return known


def _is_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        error = error.__cause__ or error.__context__
    return False
