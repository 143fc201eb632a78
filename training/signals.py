"""Signals: a training finishes its optimizer step, saves and exits; everything else exits at once.

| signal | status | while training | otherwise |
|---|---|---|---|
| SIGTERM, SIGINT | 143, 130 | finish the optimizer step, write last.ckpt, exit | exit at once |
| SIGHUP | 129 | the same: the terminal was closed. Under nohup it stays ignored | exit at once |
| SIGUSR1 | 138 | the same; under SLURM the job is requeued | exit at once; requeued if this start has trained |
| SIGINT again | 130 | exit at once | exit at once |

SIGUSR2 is like SIGUSR1 if a handler for it exists (that of submitit), which is called after the save.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from types import FrameType

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.callbacks import Checkpoint

from palimpsest.common.files import PathOrUrl, join_path
from palimpsest.training.callbacks.best import save_last, validation_due
from palimpsest.training.callbacks.retention import LAST
from palimpsest.training.processes import first_process
from palimpsest.training.slurm import requeue

_STDERR = 2  # its descriptor
_REQUEUE = (signal.SIGUSR1, signal.SIGUSR2)


class Interrupted(SystemExit):
    """The early end of a command by a signal, with a shell's exit status for it: 128 + its number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)


class Phase(Enum):
    """The state of the process: nothing to save, a training that can save, or an exit after a save."""

    IDLE = "idle"
    TRAINING = "training"
    LEAVING = "leaving"


class Signals:
    """The signals of this process; its one instance is `SIGNALS`."""

    def __init__(self) -> None:
        self.received = 0  # number of the first signal
        self.phase = Phase.IDLE
        self.progress = False  # another start would get further, from the optimizer steps that this one has made
        self.launchers = []  # Lightning's, whose processes end with this one
        # Lightning launched this process: it must exit with status 0, or Lightning kills the first process, whose
        # status is the one that counts.
        self.launched = False
        self._process = os.getpid()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle signals within the context as the table above says; requeue an interrupted job at its end."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python delivers signals to the main thread only
            return
        self.__init__()
        numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
        if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # nohup ignores it
            numbers.append(signal.SIGHUP)
        if callable(signal.getsignal(signal.SIGUSR2)):
            numbers.append(signal.SIGUSR2)
        after = before = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield
        except Interrupted as stop:
            self.phase = Phase.LEAVING
            if stop.signal in _REQUEUE:
                self._requeue(stop.signal, before[stop.signal])
            # SLURM and torchrun may send more to a process that is ending already.
            after = {number: signal.SIG_DFL if number == signal.SIGINT else signal.SIG_IGN for number in before}
            stop.code = 0 if self.launched else stop.code
            raise
        finally:
            for number, handler in after.items():
                signal.signal(number, handler)

    def finished(self) -> None:
        """Ignore SIGUSR1 after all work is done, so that a late warning does not change the exit status."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            self._in_a_worker(number)
        elif number == signal.SIGINT and self.received:
            self._exit_now()
        elif self.phase is Phase.IDLE:
            self.received = self.received or number
            for launcher in self.launchers:
                launcher.kill(number)
            raise Interrupted(number)
        elif self.phase is Phase.TRAINING and not self.received:
            self.received = number
            again = "; once more exits at once" if number == signal.SIGINT else ""
            say(f"{signal.Signals(number).name}: the training stops after this optimizer step and saves{again}")

    def _in_a_worker(self, number: int) -> None:
        """Ignore a signal in a data loading process, except SIGTERM, by which the training ends its workers.

        SLURM and a terminal signal the whole group, but the training needs its workers to finish the step.
        """
        if number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _exit_now(self) -> None:
        for launcher in self.launchers:
            launcher.kill(signal.SIGKILL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)

    def _requeue(self, number: int, before: object) -> None:
        if callable(before):
            before(number, None)
        elif first_process():
            refused = "not requeued: this start made no optimizer step, or is not to be resumed"
            say(requeue() if self.progress else refused)


SIGNALS = Signals()


def say(text: str) -> None:
    """Write a line to stderr from the first process, directly, because the signal may have interrupted a print.

    It is dropped if it cannot be written (SIGHUP: the terminal is gone), because saving matters more.
    """
    if first_process():
        with suppress(OSError):
            os.write(_STDERR, f"\n{text}\n".encode())


def disable_lightning_signals(trainer: Trainer) -> None:
    """Switch off Lightning's own signal handling.

    It turns SIGTERM into a SystemExit without a status, so an interrupted training would end with 0. It stops between
    micro-batches without saving, its handler broadcasts from anywhere, and with several processes it reads a device
    tensor before every micro-batch. Its requeueing writes another file elsewhere.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
    if launcher := trainer.strategy.launcher:
        SIGNALS.launchers.append(launcher)
        own = isinstance(launcher.cluster_environment, LightningEnvironment)
        SIGNALS.launched = own and trainer.local_rank > 0


class StopAtSignal(Checkpoint):
    """Save of last.ckpt in `folder` and end of the command, after the optimizer step in which a signal arrived.

    All processes stop after the same step. It must come after the callbacks whose state it saves; it is a `Checkpoint`
    because Lightning moves those to the end. Several processes ask each other about once a second instead of every
    step, because asking waits for the device. A step with a validation ends after it (training/callbacks/best.py).
    """

    def __init__(self, folder: PathOrUrl, resumes: bool = True) -> None:
        self.folder = folder
        self.resumes = resumes
        self._stop = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step, self._between_steps = trainer.global_step, True
        self._asked_at = time.monotonic()
        self._asked_step = self._ask_step = self._step
        SIGNALS.phase = Phase.TRAINING

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        self._between_steps = trainer.global_step != self._step
        if not self._between_steps:
            return
        self._step, SIGNALS.progress = trainer.global_step, self.resumes
        if not validation_due(trainer, batch_idx):
            self._save_if_signalled(trainer, self._step >= self._ask_step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if SIGNALS.phase is Phase.TRAINING and self._between_steps:
            self._save_if_signalled(trainer, True)

    def on_train_batch_start(self, *_: object) -> None:
        self._exit_if_saved()  # not earlier: the loggers are still receiving the values of the last step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save_if_signalled(trainer, True)
        self._exit_if_saved()
        SIGNALS.phase = Phase.IDLE

    def on_exception(self, *_: object) -> None:
        if SIGNALS.phase is Phase.TRAINING:
            SIGNALS.phase = Phase.IDLE

    def _save_if_signalled(self, trainer: Trainer, ask: bool) -> None:
        if self._stop or not (number := self._received(trainer, ask)):
            return
        self._stop = number
        save_last(trainer, self.folder)
        name, step = signal.Signals(number).name, trainer.global_step
        how = "" if self.resumes else " without checkpointing.resume_from_ckpt=false"
        say(f"{name}: step {step} is saved in {join_path(self.folder, LAST)}; the same command{how} resumes there")

    def _received(self, trainer: Trainer, ask: bool) -> int:
        """Return the signal that any process received, 0 for none; the answer is the same in all processes."""
        if trainer.world_size == 1:
            return SIGNALS.received
        if not ask:
            return 0
        passed, steps = time.monotonic() - self._asked_at, self._step - self._asked_step
        mine = torch.tensor([SIGNALS.received, int(steps / max(passed, 1e-3))], device=trainer.strategy.root_device)
        number, steps_per_second = trainer.strategy.reduce(mine, reduce_op="max").tolist()
        self._asked_step, self._asked_at = self._step, time.monotonic()
        self._ask_step = self._step + max(1, steps_per_second)
        return number

    def _exit_if_saved(self) -> None:
        if self._stop:
            SIGNALS.phase = Phase.LEAVING
            raise Interrupted(self._stop)
