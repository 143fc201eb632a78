"""A progress bar that says what one wants to know of a long run: step, loss, tokens per second, time left.

On a terminal it is a live rich bar; in a log file (SLURM) one plain line every `log_seconds`.
"""

from __future__ import annotations

import sys
import time
from functools import lru_cache
from typing import TextIO

import lightning
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from palimpsest.training.callbacks.metrics import TrainingMetrics


def terminal() -> Console:
    """Where progress is shown, on standard error: one console for all that is live, so that it stands one below the
    other."""
    return _console_on(getattr(sys.stderr, "rich_proxied_file", sys.stderr))  # a live display replaces sys.stderr


@lru_cache(maxsize=1)
def _console_on(stream: TextIO) -> Console:
    return Console(file=stream)


class Meter:
    """One line of progress: a live bar on a terminal, timed lines elsewhere."""

    def __init__(self, title: str, total: int, start: int = 0, log_seconds: float = 15.0, enabled: bool = True) -> None:
        self.title, self.total, self.start, self.done = title, total, start, start
        self.log_seconds, self.enabled = log_seconds, enabled and rank_zero_only.rank == 0
        self.began = self.last_line = time.monotonic()
        console = terminal()
        self._live = None
        if self.enabled and console.is_terminal:
            columns = (
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[facts]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            self._live = Progress(*columns, console=console, transient=False)
            self._task = self._live.add_task(title, total=total, completed=start, facts="")
            self._live.start()

    def update(self, done: int, facts: str = "") -> None:
        self.done = done
        if self._live:
            self._live.update(self._task, completed=done, facts=facts)
        elif self.enabled and time.monotonic() - self.last_line >= self.log_seconds:
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
    """Lightning's progress hooks on a `Meter`; what it says of a training is what `metrics` measured last."""

    def __init__(self, title: str = "train", log_seconds: float = 15.0, metrics: TrainingMetrics | None = None) -> None:
        super().__init__()
        self.title, self.log_seconds, self.metrics = title, log_seconds, metrics
        self._enabled, self._meter = True, None

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def _open(self, title: str, total: int, start: int = 0) -> None:
        self._meter = Meter(title, total, start, self.log_seconds, self._enabled and self.trainer.is_global_zero)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._open(self.title, trainer.max_steps, trainer.global_step)
        self._shown = time.monotonic()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # noqa: ANN001
        if time.monotonic() - self._shown >= 1.0:
            self._shown, latest = time.monotonic(), self.metrics.latest if self.metrics else {}
            loss = pl_module.objective.loss_name.replace("_", " ")
            facts = f"{loss} {latest['loss']:.3f}  {latest['train/tokens_per_s']:,.0f} tokens/s" if latest else ""
            self._meter.update(trainer.global_step, facts)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._meter.update(trainer.global_step)
        self._meter.close()

    def on_exception(self, trainer, pl_module, exception) -> None:  # noqa: ANN001
        if self._meter:
            self._meter.close()

    def on_test_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._open(self.title, int(trainer.num_test_batches[0]))

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:  # noqa: ANN001
        self._meter.update(batch_idx + 1)

    def on_test_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._meter.close()
