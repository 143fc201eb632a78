"""Handling of updates that are skipped because the loss or the gradient is not finite: count, warn, and end the run.

training/updates.py skips the update itself.
"""

import logging
import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

log = logging.getLogger(__name__)

_MAX_NAMES = 5


@dataclass
class _Step:
    """The micro-batches of one optimizer step on this rank, and their losses, still on the device."""

    step: int
    batches: list[Mapping[str, Tensor]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)


class Guard(Callback):
    """Counter of skipped updates, which ends the training after `max_skipped_steps` in a row.

    A step counts as a step even if its update was skipped: the learning rate and the data advance. Nothing waits for
    the device: whether step s was skipped is read just before the update of s + 1, when the answer has arrived. On a
    CPU, and within a row of skipped steps, it is read at once. All ranks decide alike at the same step. With
    trainer.precision=16-mixed, updates that the loss scaler skips count too; it starts with a few.

    Args:
        max_skipped_steps: skipped updates in a row that end the training.
        folder: the run's folder; the micro-batches of the last step are saved there, in nonfinite/.
        settings: the configuration, saved with them.

    Raises:
        FloatingPointError: the training has been ended.
    """

    def __init__(self, max_skipped_steps: int, folder: Path, settings: str = "") -> None:
        self.max_skipped_steps = max_skipped_steps
        self.folder = Path(folder)
        self.settings = settings
        self.skipped, self.in_a_row = 0, 0
        self._running, self._unchecked = _Step(0), None
        self._check_at_once = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._updates = pl_module.updates

    def state_dict(self) -> dict[str, int]:
        # A checkpoint waits for the device anyway; the step it is saved at may not have been checked yet.
        if self._unchecked is None or self._updates.made():
            return {"skipped": self.skipped, "in_a_row": 0 if self._unchecked else self.in_a_row}
        return {"skipped": self.skipped + 1, "in_a_row": self.in_a_row + 1}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]

    def interval_metrics(self) -> dict[str, float]:
        """Return the number of updates skipped since the run began, for training/callbacks/metrics.py."""
        return {"train/skipped_steps": self.skipped}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Mapping, *_: object) -> None:
        self._running.batches.append(batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._updates.poison(loss)
        self._running.losses.append(loss.detach())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        self._check(trainer, pl_module)
        self._running.step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        if trainer.global_step == self._running.step:
            return  # an accumulated micro-batch: no update yet
        self._unchecked, self._running = self._running, _Step(trainer.global_step)
        if self.in_a_row or self._check_at_once:
            self._check(trainer, pl_module, gradients_exist=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._running, self._unchecked = _Step(trainer.global_step), None
        self._check_at_once = pl_module.device.type == "cpu"

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check(trainer, pl_module)

    def _check(self, trainer: Trainer, pl_module: LightningModule, gradients_exist: bool = False) -> None:
        """Count the latest update if it was skipped and is not counted yet."""
        step, self._unchecked = self._unchecked, None
        if step is None:
            return
        if self._updates.made():
            self.in_a_row = 0
            return
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self.in_a_row >= self.max_skipped_steps:
            self._end(trainer, pl_module, step, gradients_exist)
        if trainer.is_global_zero and self.in_a_row == 1:
            log.warning("step %d: %s; the update was left out (%d so far)", step.step, _cause(step, []), self.skipped)

    def _end(self, trainer: Trainer, pl_module: LightningModule, step: _Step, gradients_exist: bool) -> None:
        names = self._updates.nonfinite_gradients(pl_module.named_parameters()) if gradients_exist else []
        losses = [loss.item() for loss in step.losses]
        path = self.folder / "nonfinite" / f"step={step.step}-rank={trainer.global_rank}.pt"
        where = f"in {path}"
        if trainer.is_global_zero or not all(map(math.isfinite, losses)):
            batches = [{name: value.cpu() for name, value in batch.items()} for batch in step.batches]
            found = {"step": step.step, "losses": losses, "gradient_norm": self._updates.norm.item(),
                     "gradients": names, "batches": batches, "configuration": self.settings}  # fmt: skip
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.save(found, path)
            except (OSError, RuntimeError) as error:
                where = f"nowhere, because they could not be written ({error})"
        raise FloatingPointError(
            f"training ended at step {step.step}: {self.in_a_row} updates in a row were left out, because "
            f"{_cause(step, names)}.\nThe weights are those from before; the step's micro-batches are {where}. "
            "Resuming from an earlier checkpoint with a lower optim.lr, a longer lr_scheduler.num_warmup_steps or a "
            "lower trainer.gradient_clip_val usually helps. If the loss of these micro-batches is not finite with new "
            f"weights either, the data are the cause. training.max_skipped_steps={self.max_skipped_steps} sets how "
            "many to wait"
        )


def _cause(step: _Step, names: list[str]) -> str:
    """Say what was not finite in a step on this rank."""
    losses = [loss.item() for loss in step.losses]
    bad = [i for i, value in enumerate(losses) if not math.isfinite(value)]
    if bad:
        return f"the loss is {losses[bad[0]]} in micro-batch {bad[0] + 1} of {len(losses)}"
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    where = f" of {', '.join(names[:_MAX_NAMES])}{more}" if names else ""
    return f"the gradient{where or ' or its norm'} is not finite, though the loss is"


class SpikeDetector:
    """Detector of spikes in the loss.

    A value is in a spike if it exceeds the median of the last `window` values by more than `threshold` robust standard
    deviations (1.4826 times the median absolute deviation). The spike lasts until a value is back below half of that.
    """

    def __init__(self, window: int = 50, threshold: float = 6.0, fewest: int = 10) -> None:
        self.threshold, self.fewest = threshold, fewest
        self._seen, self._inside = deque[float](maxlen=window), False

    def begins(self, value: float) -> bool:
        """Return True if a spike begins with this value."""
        before = list(self._seen)
        if math.isfinite(value):
            self._seen.append(value)
        if len(before) < self.fewest or not math.isfinite(value):
            return False
        middle = statistics.median(before)
        # If the last values are all equal, any change would be infinitely unlikely: a thousandth is not a spike.
        spread = max(1.4826 * statistics.median(abs(x - middle) for x in before), 1e-3 * abs(middle))
        began = value > middle + self.threshold * spread and not self._inside
        self._inside = began or (self._inside and value > middle + self.threshold / 2 * spread)
        return began
