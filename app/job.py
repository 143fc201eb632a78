"""Work that a page watches: on a thread of its own, showing how far it is, to be stopped at any time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from torch.nn.modules.module import register_module_forward_pre_hook

Result = TypeVar("Result")
MOST_CHARACTERS = 100_000  # of a text that is typed


def check_text(text: str) -> None:
    """Raise ValueError if a typed text is longer than the page takes."""
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"the text has {len(text):,} characters, and this page takes at most {MOST_CHARACTERS:,}")


class Stopped(Exception):
    """The work was stopped before it was done."""


class Job:
    """One piece of work. `show`, which is handed to it, hands a picture of it on and lets so many seconds pass."""

    def __init__(self) -> None:
        self._told, self._stopped, self._picture = threading.Event(), threading.Event(), None

    def stop(self) -> None:
        """Have the work end at its next picture, or before the next layer of a network."""
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
            future = pool.submit(self._work, work)
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

    def _work(self, work: Callable[[Callable[..., None]], Result]) -> Result:
        """`work(self.show)`, which ends in any layer of a network too: pictures may be minutes apart."""
        here = threading.get_ident()
        hook = register_module_forward_pre_hook(
            lambda module, inputs: self.show(None) if threading.get_ident() == here else None
        )
        try:
            return work(self.show)
        finally:
            hook.remove()


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
            if record.name.startswith("palimpsest."):
                heard.append(record.getMessage())

    ear = Ear(logging.WARNING)
    logging.getLogger().addHandler(ear)
    try:
        yield heard
    finally:
        logging.getLogger().removeHandler(ear)
