"""Output that neither a full disk nor a closed terminal ends a run by."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TextIO

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
