"""A lock that allows one training at a time in a folder.

The lock is the kernel's (fcntl): it ends with its process, and forked processes do not inherit it. The file names its
holder, for the message to the others. Measurements, sampling and monitors do not need the lock.
"""

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
def training_lock(folder: Path, wait: bool, seconds: float = 1.0) -> Iterator[None]:
    """Hold the lock of `folder` within the context, unless the file system has no locks.

    Args:
        wait: until another process releases it, asking every `seconds`; if False, raise.

    Raises:
        ValueError: another process trains there, and `wait` is False.
    """
    path = folder / FILE
    descriptor = _locked(path)
    if isinstance(descriptor, str):
        problem = f"{folder} is being trained by another process ({descriptor})"
        remedy = f"(if that process no longer exists: delete {path})"
        if not wait:
            raise ValueError(f"{problem}: wait for it, end it, or choose another checkpointing.save_dir {remedy}")
        log.warning("%s: this command waits for its end and resumes from its checkpoint %s", problem, remedy)
    while isinstance(descriptor, str):
        time.sleep(seconds)
        descriptor = _locked(path)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _locked(path: Path) -> int | str | None:
    """Return the descriptor of the locked file, or the holder's name if it is taken, or None without locks."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:  # the first checkpoint will report a folder that cannot be written
        return None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(descriptor, 200).decode(errors="replace")
        os.close(descriptor)
        return (holder or "which has just started") if error.errno in _HELD else None
    with suppress(OSError):  # a full disk: the lock still holds
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return descriptor
