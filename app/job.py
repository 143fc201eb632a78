"""Background work of the app: on its own thread, with live views, and stoppable at any time."""

import logging
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from torch.nn.modules.module import register_module_forward_pre_hook

Result = TypeVar("Result")
Work = Callable[[Callable[..., None]], Result]  # work(show) -> result
MAX_CHARACTERS = 100_000  # of a text that is typed


def check_text(text: str) -> None:
    """Raise ValueError if a typed text is too long for the app."""
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"the text has {len(text):,} characters, and this page takes at most {MAX_CHARACTERS:,}")


class Stopped(Exception):
    """The end of work that was stopped before it was done."""


class Job:
    """One piece of work, which calls `show` with views of its progress."""

    def __init__(self) -> None:
        self._changed, self._stopped = threading.Event(), threading.Event()
        self._view = None

    def stop(self) -> None:
        """End the work at its next view, or before the next layer of a network."""
        self._stopped.set()

    def show(self, view: object, seconds: float = 0.0) -> None:
        """Replace the view, unless it is None, and wait; raise Stopped after `stop`."""
        if view is not None:
            self._view = view
            self._changed.set()
        if self._stopped.wait(seconds):
            raise Stopped

    def views(self, work: Work) -> Generator[object, None, Result]:
        """Run `work(show)` and yield each latest view; return its result and raise its errors.

        The work ends if the generator is closed.
        """
        with ThreadPoolExecutor(1, "job") as pool:
            future = pool.submit(self._run, work)
            future.add_done_callback(lambda _: self._changed.set())
            try:
                while not future.done():
                    self._changed.wait()
                    self._changed.clear()
                    view, self._view = self._view, None
                    if view is not None:
                        yield view
            finally:
                self.stop()
        return future.result()

    def _run(self, work: Work) -> Result:
        """Run the work so that it can also be stopped within a network, because views may be minutes apart."""
        thread = threading.get_ident()
        hook = register_module_forward_pre_hook(
            lambda module, inputs: self.show(None) if threading.get_ident() == thread else None
        )
        try:
            return work(self.show)
        finally:
            hook.remove()


class Jobs:
    """The running job of each browser window."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}

    def run(self, window: str, work: Work) -> Generator[object, None, Result]:
        """Return `Job.views` of a new job of `window`."""
        job = self._jobs[window] = Job()
        try:
            return (yield from job.views(work))
        finally:
            self._jobs.pop(window, None)

    def stop(self, window: str) -> None:
        """Stop the job of `window`, if there is one."""
        if job := self._jobs.get(window):
            job.stop()


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """Collect the warnings that the framework logs within the context."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.addFilter(lambda record: record.name.startswith("palimpsest."))
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    try:
        yield messages
    finally:
        logging.getLogger().removeHandler(handler)
