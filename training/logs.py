"""Logs of a run that neither a full disk nor a closed terminal ends."""

from __future__ import annotations

import errno
import logging
import os
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TextIO

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

log = logging.getLogger(__name__)

FULL = (errno.ENOSPC, errno.EDQUOT)
_NOBODY_READS = (errno.EIO, errno.EPIPE)  # a terminal that was closed; `| tee log` that went with it


class SafeStream:
    """A text stream whose failures end nothing: a run has a checkpoint to write, whoever still reads its output.

    What cannot be written (closed terminal or pipe, full disk) is left out. Characters that the stream's encoding lacks
    are shown as question marks. told: the stream that is told once that output is lost, unless its reader just left.
    """

    def __init__(self, stream: TextIO, told: TextIO | None = None) -> None:
        self._stream, self._told = stream, told

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._losing():
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding
                self._stream.write(text.encode(encoding, "replace").decode(encoding))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with self._losing():
            self._stream.flush()

    @contextmanager
    def _losing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: somebody closed it
            told, self._told = self._told, None
            if told is not None and getattr(error, "errno", None) not in _NOBODY_READS:
                print(f"the output cannot be written ({error}): the run goes on without it", file=told)


def guard_output() -> None:
    """Make sys.stdout and sys.stderr safe streams. Descriptors below 3 that are closed are opened on /dev/null first:
    else a file of the run would get such a number, and what other programs print would go into it."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    if not isinstance(sys.stderr, SafeStream):
        sys.stderr = SafeStream(sys.stderr or _nowhere())
    if not isinstance(sys.stdout, SafeStream):
        sys.stdout = SafeStream(sys.stdout or _nowhere(), told=sys.stderr)


def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")


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
    save_dir: str | os.PathLike, id: str | None = None, goes_on: bool = True, **settings: object
) -> WandbLogger:
    """Weights & Biases; `settings` are WandbLogger's. All starts of a training are one run there, and every training of
    a process has its own.

    id: of that run; None: what the environment says (WANDB_RUN_ID), else one that is drawn at the first start and kept
    in `save_dir`. goes_on: whether the training may go on with what lies there; if not, another id is drawn.
    Raises:
        ModuleNotFoundError: wandb is not installed.
    """
    first = rank_zero_only.rank == 0  # the only process that logs
    id = id or os.environ.get("WANDB_RUN_ID") or (_run_id(Path(save_dir), goes_on) if first else None)
    logger = WandbLogger(save_dir=save_dir, id=id, **settings)
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
