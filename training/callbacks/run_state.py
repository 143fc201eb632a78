"""run.json: what a training says of itself to whoever watches it from outside (scripts/monitor.py).

One JSON object, replaced as a whole: a reader sees the last one or the one before. Times are seconds since 1970.
  title       of the run, as its progress bar has it
  state       starting | training | validating | finished | stopped | failed
              stopped: ended in order before trainer.max_steps (a signal, Ctrl-C); the same command goes on from there
  error       first line of what ended a failed run
  pid, host   of the process of rank 0
  process_table, process_began    where that pid counts (hosts and containers may share a name), and when its process
              began as the kernel tells it, so that a pid that was given to another one is not taken for this one
  began, updated              of this start, of this file
  first_step, step, max_steps optimizer steps: at this start, now, at the end
  metrics     what training/callbacks/metrics.py logged last;  curve: [[step, loss], ...], the whole run in at most 64
  points validation  {step, val/nll};  checkpoint: {step, time} of the newest that was written
"""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

import lightning
from lightning.pytorch.callbacks import Callback, EarlyStopping

from palimpsest.training.callbacks.metrics import TrainingMetrics

FILE = "run.json"
_MOST_POINTS = 64


class RunState(Callback):
    """Keeps run.json in `folder` up to date, from rank 0, at most every `seconds`; changes of state are told at once.

    It never ends a training: a file that can not be written (a full disk) is tried again later.
    """

    def __init__(self, folder: Path, title: str, metrics: TrainingMetrics, seconds: float = 5.0) -> None:
        self.path, self.metrics, self.seconds = Path(folder) / FILE, metrics, seconds
        self.known = {"title": title, "state": "starting", "error": None, "pid": os.getpid(),
                      "host": socket.gethostname(), "process_table": process_table(),
                      "process_began": process_began(os.getpid()), "began": time.time(), "first_step": 0, "step": 0,
                      "max_steps": 0, "metrics": {}, "curve": [], "validation": None, "checkpoint": None}  # fmt: skip
        self._written, self._told = -math.inf, None

    def state_dict(self) -> dict[str, object]:
        return {"curve": self.known["curve"]}

    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:
        self.known["curve"] = state_dict["curve"]

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        self.known |= {"max_steps": trainer.max_steps, "world_size": trainer.world_size}
        self._write(trainer)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.known |= {"began": time.time(), "first_step": trainer.global_step, "state": "training"}
        self._write(trainer)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # noqa: ANN001
        latest = self.metrics.latest
        if latest and latest is not self._told:
            self._told = latest
            self.known["metrics"] = latest
            self.known["curve"] = thinned([*self.known["curve"], [trainer.global_step, latest["loss"]]])
        self._tick(trainer)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.known["state"] = "validating"
        self._write(trainer)

    def on_validation_batch_end(self, trainer, pl_module, *_: object) -> None:  # noqa: ANN001
        self._tick(trainer)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        nll = trainer.callback_metrics.get("val/nll")
        seen = None if nll is None else {"step": trainer.global_step, "val/nll": float(nll)}
        self.known |= {"state": "training", "validation": seen}
        self._write(trainer)

    def saved(self, checkpoint: Mapping[str, object]) -> None:
        """Take note of a checkpoint that has been written (training/storage.py calls this, on rank 0): before that it
        may still fail, and run.json would promise a file that is not there."""
        step = checkpoint["global_step"]
        self.known |= {"step": step, "checkpoint": {"step": step, "time": time.time()}}
        self._put()

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        # Of Lightning's ways to end early, patience is the one that leaves nothing to do.
        patient = any(isinstance(c, EarlyStopping) and c.stopped_epoch for c in trainer.callbacks)
        complete = trainer.global_step >= trainer.max_steps or patient
        self.known["state"] = "finished" if complete else "stopped"
        self._write(trainer)

    def on_exception(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule,
                     exception: BaseException) -> None:  # fmt: skip
        stopped = isinstance(exception, KeyboardInterrupt | SystemExit)
        first_line = next(iter(str(exception).splitlines()), "")
        self.known |= {"state": "stopped"} if stopped else {
            "state": "failed", "error": f"{type(exception).__name__}: {first_line}"}  # fmt: skip
        self._write(trainer)

    def _tick(self, trainer: lightning.Trainer) -> None:
        if time.monotonic() - self._written >= self.seconds:
            self._write(trainer)

    def _write(self, trainer: lightning.Trainer) -> None:
        if trainer.is_global_zero:
            self.known["step"] = trainer.global_step
            self._put()

    def _put(self) -> None:
        self._written, self.known["updated"] = time.monotonic(), time.time()
        partial = self.path.with_name(f".{FILE}.{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(_plain(self.known)))
            os.replace(partial, self.path)
        except OSError:  # told by what it does to checkpoints, which matter more
            partial.unlink(missing_ok=True)


def process_table() -> str | None:
    """What tells the processes among which this one has its number from all others: this start of the machine, and
    the container. None where there is no /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def process_began(pid: int) -> int | None:
    """When the process began, in ticks of the kernel's clock; None where there is no such process, or no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[19])  # starttime, the 22nd of proc(5), which counts from 1 and two of which are cut off


def thinned(curve: list[list[float]]) -> list[list[float]]:
    """At most 64 points: where there are more, every two neighbours become their mean at the later step."""
    if len(curve) <= _MOST_POINTS:
        return curve
    pairs = zip(curve[0::2], curve[1::2], strict=False)
    means = [[later[0], (earlier[1] + later[1]) / 2] for earlier, later in pairs]
    return means + curve[len(means) * 2 :]


def _plain(value: object) -> object:
    """JSON has no NaN: None stands for it."""
    if isinstance(value, dict):
        return {name: _plain(child) for name, child in value.items()}
    if isinstance(value, list):
        return [_plain(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
