"""One training at a time in a folder: two would write the same checkpoints, logs and reports.

The lock is the kernel's (fcntl): it ends with its process however that ends, and processes forked from it do not have
it. The file says who holds it, for the message to the others. Measurements, samples and monitors do not ask for it.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

FILE = ".training.lock"
_HELD = (errno.EAGAIN, errno.EACCES)

log = logging.getLogger(__name__)


@contextmanager
def alone_in(folder: Path, wait: bool, seconds: float = 1.0) -> Iterator[None]:
    """Hold the lock of `folder` within the context. File systems without locks are used without one.

    wait: until another process lets go of it, asking every so many `seconds`; else raise.

    Raises:
        ValueError: another process trains there, and there is no waiting.
    """
    path = folder / FILE
    descriptor = _locked(path)
    if isinstance(descriptor, str):
        said = f"{folder} is being trained by another process ({descriptor})"
        remedy = f"(if no such process exists any more: delete {path})"
        if not wait:
            raise ValueError(f"{said}: wait for it, end it, or choose another checkpointing.save_dir {remedy}")
        log.warning("%s: this command waits for its end and then goes on from its checkpoint %s", said, remedy)
    while isinstance(descriptor, str):
        time.sleep(seconds)
        descriptor = _locked(path)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _locked(path: Path) -> int | str | None:
    """An open file whose lock this process now has, who else has it, or None where there are no locks."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:  # a folder that cannot be written is for the first checkpoint to complain of
        return None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(descriptor, 200).decode(errors="replace")
        os.close(descriptor)
        return (holder or "which has only begun") if error.errno in _HELD else None
    with suppress(OSError):  # a full disk: the lock holds all the same
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return descriptor
