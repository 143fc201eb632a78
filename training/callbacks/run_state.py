"""run.json: the state of a training, for readers outside it (scripts/monitor.py).

One JSON object, replaced atomically. Times are seconds since 1970.
  title       of the run, as in its progress bar
  state       starting | training | validating | finished | stopped | failed
              stopped: ended before trainer.max_steps by a signal or Ctrl-C; the same command resumes it
  error       first line of the error that ended a failed run
  pid, host   of the process of rank 0
  process_table, process_began    the boot and container in which that pid counts (hosts and containers may share a
              name), and the start time of its process, so that a reused pid is not taken for it
  began, updated              of this start, of this file
  first_step, step, max_steps optimizer steps: at this start, now, at the end
  metrics     the latest values of training/callbacks/metrics.py
  curve       [[step, loss], ...] of the whole run, at most 64 points
  validation  {step, val/nll}
  checkpoint  {step, time} of the latest that was written
"""

import json
import math
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from palimpsest.common.process_identity import process_status, process_table
from palimpsest.training.callbacks.best import Patience
from palimpsest.training.callbacks.metrics import TrainingMetrics

FILE = "run.json"
_MAX_POINTS = 64


class RunState(Callback):
    """Writer of run.json in `folder`, from rank 0: at most every `seconds`, and at once when the state changes.

    It never ends a training: a failed write (a full disk) is tried again later.
    """

    def __init__(self, folder: Path, title: str, metrics: TrainingMetrics, seconds: float = 5.0) -> None:
        self.path, self.metrics, self.seconds = Path(folder) / FILE, metrics, seconds
        _, began = process_status(os.getpid()) or (None, None)
        self.content = {"title": title, "state": "starting", "error": None, "pid": os.getpid(),
                        "host": socket.gethostname(), "process_table": process_table(), "process_began": began,
                        "began": time.time(), "first_step": 0, "step": 0, "max_steps": 0, "metrics": {}, "curve": [],
                        "validation": None, "checkpoint": None}  # fmt: skip
        self._written, self._recorded = -math.inf, None

    def state_dict(self) -> dict[str, object]:
        return {"curve": self.content["curve"]}

    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:
        self.content["curve"] = state_dict["curve"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._write(trainer, max_steps=trainer.max_steps, world_size=trainer.world_size)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, began=time.time(), first_step=trainer.global_step, state="training")

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        latest = self.metrics.latest
        if latest and latest is not self._recorded:
            self._recorded = latest
            self.content["metrics"] = latest
            self.content["curve"] = thinned([*self.content["curve"], [trainer.global_step, latest["loss"]]])
        self._write_if_due(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, state="validating")

    def on_validation_batch_end(self, trainer: Trainer, *_: object) -> None:
        self._write_if_due(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        nll = trainer.callback_metrics.get("val/nll")
        validation = None if nll is None else {"step": trainer.global_step, "val/nll": float(nll)}
        self._write(trainer, state="training", validation=validation)

    def checkpoint_written(self, checkpoint: Mapping[str, object]) -> None:
        """Record a checkpoint on rank 0 once its file is complete (training/storage.py calls this)."""
        step = checkpoint["global_step"]
        self.content |= {"step": step, "checkpoint": {"step": step, "time": time.time()}}
        self._replace_file()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Patience is the only early end after which nothing is left to do.
        patient = any(isinstance(c, Patience) and c.is_over for c in trainer.callbacks)
        complete = trainer.global_step >= trainer.max_steps or patient
        self._write(trainer, state="finished" if complete else "stopped")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt | SystemExit):
            self._write(trainer, state="stopped")
        else:
            first_line = next(iter(str(exception).splitlines()), "")
            self._write(trainer, state="failed", error=f"{type(exception).__name__}: {first_line}")

    def _write_if_due(self, trainer: Trainer) -> None:
        if time.monotonic() - self._written >= self.seconds:
            self._write(trainer)

    def _write(self, trainer: Trainer, **changes: object) -> None:
        self.content |= changes
        if trainer.is_global_zero:
            self.content["step"] = trainer.global_step
            self._replace_file()

    def _replace_file(self) -> None:
        self._written, self.content["updated"] = time.monotonic(), time.time()
        partial = self.path.with_name(f".{FILE}.{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            finite = json.loads(json.dumps(self.content), parse_constant=lambda name: None)  # JSON has no NaN
            partial.write_text(json.dumps(finite))
            os.replace(partial, self.path)
        except OSError:  # it shows up when checkpoints are written, which matter more
            partial.unlink(missing_ok=True)


def thinned(curve: list[list[float]]) -> list[list[float]]:
    """Return a curve of at most 64 points; a longer one has each pair of points averaged at the later step."""
    if len(curve) <= _MAX_POINTS:
        return curve
    pairs = zip(curve[0::2], curve[1::2], strict=False)
    means = [[later[0], (earlier[1] + later[1]) / 2] for earlier, later in pairs]
    return means + curve[len(means) * 2 :]
