"""A progress bar with step, loss, tokens per second and time left.

On a terminal it is a live rich bar; in a log file (SLURM) it is one plain line every 15 seconds.
"""

import sys
import time
from functools import lru_cache
from typing import TextIO

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from palimpsest.training.callbacks.metrics import TrainingMetrics
from palimpsest.training.processes import first_process

_LOG_SECONDS = 15.0  # between lines in a log file


def terminal() -> Console:
    """Return the console on standard error that all live displays share, so that they stack."""
    return _console_on(getattr(sys.stderr, "rich_proxied_file", sys.stderr))  # a live display replaces sys.stderr


@lru_cache(maxsize=1)
def _console_on(stream: TextIO) -> Console:
    return Console(file=stream)


class Meter:
    """One line of progress: a live bar on a terminal, timed lines elsewhere."""

    def __init__(self, title: str, total: int, start: int = 0, enabled: bool = True) -> None:
        self.title, self.total = title, total
        self.start = self.done = start
        self.enabled = enabled and first_process()
        self.began = self.last_line = time.monotonic()
        console = terminal()
        self._live = None
        if self.enabled and console.is_terminal:
            steps = ("[bold]{task.description}", BarColumn(), MofNCompleteColumn(), "{task.fields[facts]}")
            times = (TimeElapsedColumn(), "left", TimeRemainingColumn())
            self._live = Progress(*steps, *times, console=console)
            self._task = self._live.add_task(title, total=total, completed=start, facts="")
            self._live.start()

    def update(self, done: int, facts: str = "") -> None:
        self.done = done
        if self._live:
            self._live.update(self._task, completed=done, facts=facts)
        elif self.enabled and time.monotonic() - self.last_line >= _LOG_SECONDS:
            self.last_line = time.monotonic()
            print(f"{self.title} {done}/{self.total}  {facts}  {self._time_left()} left", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    def _time_left(self) -> str:
        passed, steps = time.monotonic() - self.began, self.done - self.start
        seconds = int(passed / steps * (self.total - self.done)) if steps else 0
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


class TextProgressBar(ProgressBar):
    """Lightning's progress hooks on a `Meter`, which shows the latest values of `metrics`."""

    def __init__(self, title: str, metrics: TrainingMetrics) -> None:
        super().__init__()
        self.title, self.metrics = title, metrics
        self._enabled, self._meter = True, None

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def _open(self, total: int, start: int = 0) -> None:
        self._meter = Meter(self.title, total, start, self._enabled and self.trainer.is_global_zero)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._open(trainer.max_steps, trainer.global_step)
        self._shown = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        if time.monotonic() - self._shown >= 1.0:
            self._shown = time.monotonic()
            latest = self.metrics.latest
            loss = pl_module.objective.loss_name.replace("_", " ")
            facts = f"{loss} {latest['loss']:.3f}  {latest['train/tokens_per_s']:,.0f} tokens/s" if latest else ""
            self._meter.update(trainer.global_step, facts)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._meter.update(trainer.global_step)
        self._meter.close()

    def on_exception(self, *_: object) -> None:
        if self._meter:
            self._meter.close()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._open(int(trainer.num_test_batches[0]))

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int, *_: object
    ) -> None:
        self._meter.update(batch_idx + 1)

    def on_test_end(self, *_: object) -> None:
        self._meter.close()
