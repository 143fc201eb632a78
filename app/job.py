"""Work that a page watches: on a thread of its own, showing how far it is, to be stopped at any time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Result = TypeVar("Result")
_OURS = ("contradictions", "dataloader", "diffusion", "main", "models", "samplers", "tasks", "text")


class Stopped(Exception):
    """The work was stopped before it was done."""


class Job:
    """One piece of work. `show`, which is handed to it, hands a picture of it on and lets so many seconds pass."""

    def __init__(self) -> None:
        self._told, self._stopped, self._picture = threading.Event(), threading.Event(), None

    def stop(self) -> None:
        """Have the work end at its next picture."""
        self._stopped.set()

    def show(self, picture: object, seconds: float = 0.0) -> None:
        """Replaces a picture that nobody has looked at yet; None leaves it. Raises Stopped."""
        if picture is not None:
            self._picture = picture
            self._told.set()
        if self._stopped.wait(seconds):
            raise Stopped

    def pictures(self, work: Callable[[Callable[..., None]], Result]) -> Generator[object, None, Result]:
        """Does `work(show)` and yields its newest picture whenever there is one; returns what it returns, raises what
        it raises. The work ends where nobody asks for pictures any more."""
        with ThreadPoolExecutor(1, "job") as pool:
            future = pool.submit(work, self.show)
            future.add_done_callback(lambda _: self._told.set())
            try:
                while not future.done():
                    self._told.wait()
                    self._told.clear()
                    picture, self._picture = self._picture, None
                    if picture is not None:
                        yield picture
            finally:
                self.stop()
        return future.result()


class Jobs:
    """The job of each window of a browser."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}

    def run(self, window: str, work: Callable[[Callable[..., None]], Result]) -> Generator[object, None, Result]:
        """`Job.pictures` of a new job of `window`."""
        job = self._jobs[window] = Job()
        try:
            return (yield from job.pictures(work))
        finally:
            self._jobs.pop(window, None)

    def stop(self, window: str) -> None:
        """Stop what runs for `window`, if anything does."""
        if job := self._jobs.get(window):
            job.stop()


@contextmanager
def warnings() -> Iterator[list[str]]:
    """What the framework warns of within the context."""
    heard: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.name.partition(".")[0] in _OURS:
                heard.append(record.getMessage())

    ear = Ear(logging.WARNING)
    logging.getLogger().addHandler(ear)
    try:
        yield heard
    finally:
        logging.getLogger().removeHandler(ear)
