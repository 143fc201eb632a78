"""What happens around an update that is not made because its loss or gradient is not finite: counting, telling, and an
end before a run burns its budget. The update itself is left out by training/updates.py."""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

log = logging.getLogger(__name__)

_MOST_NAMES = 5


@dataclass
class _Step:
    """What one optimizer step has seen on this rank: its micro-batches and their losses, still on the device."""

    step: int
    batches: list[Mapping[str, Tensor]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)


class Guard(Callback):
    """Counts the updates that were left out, warns of them, and ends the training after `max_skipped_steps` in a row.

    A step counts as a step whether its update was made or not: the learning rate and the data go on. Nobody waits for
    the device: whether step s was skipped is asked just before the update of s + 1, when the answer has long arrived
    (on a CPU, and within a row of skipped steps, at once). All ranks come to the same verdict at the same step. With
    trainer.precision=16-mixed the updates that the loss scaler leaves out are counted too; it begins with a few.

    Args:
        max_skipped_steps: updates left out in a row that end the training.
        folder: of the run; the offending micro-batches are saved there, in nonfinite/.
        settings: the configuration, saved with them.

    Raises:
        FloatingPointError: the training has been ended.
    """

    def __init__(self, max_skipped_steps: int, folder: Path, settings: str = "") -> None:
        self.max_skipped_steps = max_skipped_steps
        self.folder = Path(folder)
        self.settings = settings
        self.skipped, self.in_a_row = 0, 0
        self._running, self._unjudged, self._updates, self._at_once = _Step(0), None, None, False

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        self._updates = pl_module.updates

    def state_dict(self) -> dict[str, int]:
        # A checkpoint waits for the device anyway; the step it is saved at may not have been judged yet.
        if self._unjudged is None or self._updates.made():
            return {"skipped": self.skipped, "in_a_row": 0 if self._unjudged else self.in_a_row}
        return {"skipped": self.skipped + 1, "in_a_row": self.in_a_row + 1}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]

    def interval_metrics(self) -> dict[str, float]:
        """For training/callbacks/metrics.py: updates left out since the run began."""
        return {"train/skipped_steps": self.skipped}

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Mapping,
                             batch_idx: int) -> None:  # fmt: skip
        self._running.batches.append(batch)

    def on_before_backward(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule,
                           loss: Tensor) -> None:  # fmt: skip
        self._updates.poison(loss)
        self._running.losses.append(loss.detach())

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:  # noqa: ANN001
        self._judge(trainer, pl_module)
        self._running.step = trainer.global_step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # noqa: ANN001
        if trainer.global_step == self._running.step:
            return  # an accumulated micro-batch: no update yet
        self._unjudged, self._running = self._running, _Step(trainer.global_step)
        if self.in_a_row or self._at_once:
            self._judge(trainer, pl_module, at_once=True)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._running, self._unjudged = _Step(trainer.global_step), None
        self._at_once = pl_module.device.type == "cpu"

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._judge(trainer, pl_module)

    def _judge(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, at_once: bool = False) -> None:
        """Count the newest update if it was left out and not looked at yet. `at_once`: its gradients still stand."""
        seen, self._unjudged = self._unjudged, None
        if seen is None:
            return
        if self._updates.made():
            self.in_a_row = 0
            return
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self.in_a_row >= self.max_skipped_steps:
            self._end(trainer, pl_module, seen, at_once)
        if trainer.is_global_zero and self.in_a_row == 1:
            log.warning("step %d: %s; the update was left out (%d so far)", seen.step, _what(seen, []), self.skipped)

    def _end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, seen: _Step,
             gradients_stand: bool) -> None:  # fmt: skip
        names = self._updates.culprits(pl_module.named_parameters()) if gradients_stand else []
        losses = [loss.item() for loss in seen.losses]
        path = self.folder / "nonfinite" / f"step={seen.step}-rank={trainer.global_rank}.pt"
        where = f"in {path}"
        if trainer.is_global_zero or not all(map(math.isfinite, losses)):
            batches = [{name: value.cpu() for name, value in batch.items()} for batch in seen.batches]
            found = {"step": seen.step, "losses": losses, "gradient_norm": self._updates.norm.item(),
                     "gradients": names, "batches": batches, "configuration": self.settings}  # fmt: skip
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.save(found, path)
            except (OSError, RuntimeError) as error:
                where = f"nowhere, because they could not be written ({error})"
        raise FloatingPointError(
            f"training ended at step {seen.step}: {self.in_a_row} updates in a row were left out, because "
            f"{_what(seen, names)}.\nThe weights are those from before; the step's micro-batches are {where}. Going on "
            "from an earlier checkpoint with a lower optim.lr, a longer lr_scheduler.num_warmup_steps or a lower "
            "trainer.gradient_clip_val usually helps; if the loss of these micro-batches is not finite with new "
            f"weights either, it is the data. training.max_skipped_steps={self.max_skipped_steps} sets how many to wait"
        )


def _what(seen: _Step, names: list[str]) -> str:
    """In words, what of the step was not finite on this rank."""
    losses = [loss.item() for loss in seen.losses]
    bad = [i for i, value in enumerate(losses) if not math.isfinite(value)]
    if bad:
        return f"the loss is {losses[bad[0]]} in micro-batch {bad[0] + 1} of {len(losses)}"
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    where = f" of {', '.join(names[:_MOST_NAMES])}{more}" if names else ""
    return f"the gradient{where or ' or its norm'} is not finite, though the loss is"


class SpikeWatch:
    """Tells a spike of the loss from its noise: a value above the median of the last `window` by more than `threshold`
    robust standard deviations (1.4826 times the median absolute deviation). Told once per spike, which lasts until a
    value is back below half of that."""

    def __init__(self, window: int = 50, threshold: float = 6.0, fewest: int = 10) -> None:
        self.threshold, self.fewest = threshold, fewest
        self._seen, self._inside = deque[float](maxlen=window), False

    def is_new(self, value: float) -> bool:
        """Whether a spike begins with this value."""
        before = list(self._seen)
        if math.isfinite(value):
            self._seen.append(value)
        if len(before) < self.fewest or not math.isfinite(value):
            return False
        middle = statistics.median(before)
        # Where the last values are all alike any change would be infinitely unlikely: a thousandth is not a spike.
        spread = max(1.4826 * statistics.median(abs(x - middle) for x in before), 1e-3 * abs(middle))
        began = value > middle + self.threshold * spread and not self._inside
        self._inside = began or (self._inside and value > middle + self.threshold / 2 * spread)
        return began
