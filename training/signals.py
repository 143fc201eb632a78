"""Signals: a training finishes its optimizer step, saves and leaves; everything else leaves at once.

| signal | status | while training | otherwise |
|---|---|---|---|
| SIGTERM, SIGINT | 143, 130 | finish the optimizer step, write last.ckpt, leave | leave at once |
| SIGHUP | 129 | the same: the terminal was closed. Under nohup it stays ignored | leave at once |
| SIGUSR1 | 138 | the same; under SLURM, back into the queue | the same, into the queue if this start has trained |
| SIGINT again | 130 | leave at once | leave at once |

SIGUSR2 is like SIGUSR1 where somebody (submitit) had a handler for it, who is then called once all is saved.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from enum import Enum
from types import FrameType

import lightning
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from palimpsest.common.files import PathOrUrl, join_path
from palimpsest.training.callbacks.best import save_last
from palimpsest.training.callbacks.retention import LAST
from palimpsest.training.slurm import requeue

_STDERR = 2  # its descriptor
_TO_THE_QUEUE = (signal.SIGUSR1, signal.SIGUSR2)


class Interrupted(SystemExit):
    """The command ends early because of a signal, with the exit status that a shell gives to it: 128 + its number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)


class Phase(Enum):
    """What a signal meets: nothing to save, a training that can save, or one that has saved and is on its way out."""

    IDLE = "idle"
    TRAINING = "training"
    LEAVING = "leaving"


class Signals:
    """What this process was told. One per process, as signals are: `SIGNALS`.

    received: the first signal's number, 0 before one came. phase: what a signal meets. progress: this start of the
    command has made optimizer steps, so that another start gets further. launchers: Lightning's, whose processes end
    with this one. launched: this is such a process; ending with another status than 0, it would have Lightning kill the
    first process, whose status is the one that counts.
    """

    def __init__(self) -> None:
        self.received, self.phase, self.progress = 0, Phase.IDLE, False
        self.launchers, self.launched, self._process = [], False, os.getpid()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within the context signals do what the table above says; at its end a job that was interrupted for the
        queue is put back there."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python gives signals to the main thread only
            return
        self.__init__()
        numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
        if (
            signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
        ):  # nohup ignores it, so that the command outlives its shell
            numbers.append(signal.SIGHUP)
        if callable(signal.getsignal(signal.SIGUSR2)):
            numbers.append(signal.SIGUSR2)
        before = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield
        except Interrupted as stop:
            self.phase = Phase.LEAVING
            if stop.signal in _TO_THE_QUEUE:
                self._to_the_queue(stop.signal, before[stop.signal])
            for number in before:  # what SLURM and torchrun send now finds a process that is ending already
                signal.signal(number, signal.SIG_DFL if number == signal.SIGINT else signal.SIG_IGN)
            stop.code = 0 if self.launched else stop.code
            raise
        except BaseException:
            _restore(before)
            raise
        _restore(before)

    def finished(self) -> None:
        """All that was asked for is done: a warning that time is nearly over must not end the process in its last
        second, with a status that says that something was left to do."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            self._in_a_worker(number)
        elif number == signal.SIGINT and self.received:
            self._leave_now()
        elif self.phase is Phase.IDLE:
            self.received = self.received or number
            for launcher in self.launchers:
                launcher.kill(number)
            raise Interrupted(number)
        elif self.phase is Phase.TRAINING and not self.received:
            self.received = number
            again = "; once more leaves at once" if number == signal.SIGINT else ""
            say(f"{signal.Signals(number).name}: the training stops after this optimizer step and saves{again}")

    def _in_a_worker(self, number: int) -> None:
        """A data loading process forked from this one: SLURM and a terminal signal the whole group, and the training
        still needs its workers for the step it finishes. It ends them itself, by SIGTERM at worst."""
        if number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _leave_now(self) -> None:
        for launcher in self.launchers:
            launcher.kill(signal.SIGKILL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)

    def _to_the_queue(self, number: int, before: object) -> None:
        if callable(before):
            before(number, None)
        elif rank_zero_only.rank == 0 and not self.progress:
            say("not put back into the queue: this start made no optimizer step, and another would make none either")
        elif rank_zero_only.rank == 0:
            say(requeue())


SIGNALS = Signals()


def _restore(before: Mapping[int, object]) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)


def say(text: str) -> None:
    """A line on stderr from the first process; written directly, as print may be what a signal interrupted. Where it
    can not be written (SIGHUP: the terminal is gone) it is left out: saving matters more."""
    if rank_zero_only.rank == 0:
        with suppress(OSError):
            os.write(_STDERR, f"\n{text}\n".encode())


def take_over(trainer: lightning.Trainer) -> None:
    """Keep Lightning's own signal handling out of `trainer`.

    It turns SIGTERM into a SystemExit without a status, so a training that was cut short ends with 0; it stops
    between micro-batches without saving; its handler broadcasts from wherever the process is; with several processes
    it reads a device tensor before every micro-batch; and its requeueing writes a file of its own elsewhere.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
    if launcher := trainer.strategy.launcher:
        SIGNALS.launchers.append(launcher)
        own = isinstance(launcher.cluster_environment, LightningEnvironment)
        SIGNALS.launched = own and trainer.local_rank > 0


class StopAtSignal(Checkpoint):
    """Saves last.ckpt in `folder` and ends the command after the optimizer step in which a signal came, on all
    processes after the same step. It has to stand behind the callbacks whose state it saves: a `Checkpoint`, because
    Lightning moves those to the end.

    With several processes they ask each other about once a second, and not every step: asking waits for the device.
    A step with a validation is over when that is (training/callbacks/best.py says why).
    """

    def __init__(self, folder: PathOrUrl) -> None:
        self.folder, self._stop = folder, 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._step, self._between_steps = trainer.global_step, True
        self._asked, self._asked_at, self._ask = self._step, time.monotonic(), self._step
        SIGNALS.phase = Phase.TRAINING

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: object, batch: object,
        batch_idx: int,
    ) -> None:  # fmt: skip
        self._between_steps = trainer.global_step != self._step
        if not self._between_steps:
            return
        self._step, SIGNALS.progress = trainer.global_step, True
        interval = trainer.val_check_batch if sum(trainer.num_val_batches) else None
        if not interval or (batch_idx + 1) % interval:
            self._save_if_told(trainer, self._step >= self._ask)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if SIGNALS.phase is Phase.TRAINING and self._between_steps:
            self._save_if_told(trainer, True)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: object, batch_idx: int
    ) -> None:
        self._leave_if_told()  # not earlier: what was logged at the last step is on its way to the loggers

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._save_if_told(trainer, True)
        self._leave_if_told()
        SIGNALS.phase = Phase.IDLE

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        if SIGNALS.phase is Phase.TRAINING:
            SIGNALS.phase = Phase.IDLE

    def _save_if_told(self, trainer: lightning.Trainer, ask: bool) -> None:
        if self._stop or not (number := self._told(trainer, ask)):
            return
        self._stop = number
        save_last(trainer, self.folder)
        name, step = signal.Signals(number).name, trainer.global_step
        say(f"{name}: step {step} is saved in {join_path(self.folder, LAST)}; the same command goes on from there")

    def _told(self, trainer: lightning.Trainer, ask: bool) -> int:
        """The signal that some process got, 0 for none: the same answer on all of them."""
        if trainer.world_size == 1:
            return SIGNALS.received
        if not ask:
            return 0
        passed, steps = time.monotonic() - self._asked_at, self._step - self._asked
        mine = torch.tensor([SIGNALS.received, int(steps / max(passed, 1e-3))], device=trainer.strategy.root_device)
        number, steps_per_second = trainer.strategy.reduce(mine, reduce_op="max").tolist()
        self._asked, self._asked_at = self._step, time.monotonic()
        self._ask = self._step + max(1, steps_per_second)
        return number

    def _leave_if_told(self) -> None:
        if self._stop:
            SIGNALS.phase = Phase.LEAVING
            raise Interrupted(self._stop)
