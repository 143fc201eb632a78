"""Output streams whose failure (a full disk, a closed terminal) does not end a run."""

import errno
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TextIO

_READER_LEFT = (errno.EIO, errno.EPIPE)  # a closed terminal, or a closed pipe such as `| tee log`


class SafeStream:
    """A text stream that drops output instead of failing, because a run must still write its checkpoint.

    Characters that the encoding lacks become question marks. Lost output is reported once on `report_to`, unless the
    reader has just left.
    """

    def __init__(self, stream: TextIO, report_to: TextIO | None = None) -> None:
        self._stream, self._report_to = stream, report_to

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
        except (OSError, ValueError) as error:  # ValueError: the stream was closed
            report_to, self._report_to = self._report_to, None
            if report_to is not None and getattr(error, "errno", None) not in _READER_LEFT:
                print(f"the output cannot be written ({error}): the run goes on without it", file=report_to)


def guard_output() -> None:
    """Make sys.stdout and sys.stderr safe streams.

    Closed descriptors below 3 are opened on /dev/null first. Otherwise a file of the run would get such a number and
    receive what other programs print.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    if not isinstance(sys.stderr, SafeStream):
        sys.stderr = SafeStream(sys.stderr or _null_stream())
    if not isinstance(sys.stdout, SafeStream):
        sys.stdout = SafeStream(sys.stdout or _null_stream(), report_to=sys.stderr)


def _null_stream() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")
