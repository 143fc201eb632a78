"""A factor on top of the learning-rate schedule that falls when validation stops to improve."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import lightning
from torch.optim.lr_scheduler import LambdaLR

from palimpsest.common.values import AtLeastOne, InsideOne, Natural, NotNegative

log = logging.getLogger(__name__)


@dataclass
class PlateauState:
    """What has been seen: the lowest value, how many since were not lower, how many more are not counted, and the
    product of all cuts."""

    best: float = math.inf
    fruitless: int = 0
    cooling: int = 0
    factor: float = 1.0


class Plateau(lightning.Callback):
    """Multiplies the learning rate by `factor` after `patience` validations in a row whose val/nll is not lower than
    the best by more than `min_delta`; then `cooldown` validations are not counted. The product of all cuts stays at or
    above `floor`.

    The cut goes into the base rates of the schedule, which multiplies by it at every step to come (torch's own
    ReduceLROnPlateau writes the rate itself, which the schedule overwrites one step later). Both are saved in every
    checkpoint. Every rank sees the value of rank 0.

    Raises:
        ValueError: validation does not run; the schedule is not one of this project's.
    """

    def __init__(
        self,
        patience: AtLeastOne = 5,
        factor: InsideOne = 0.5,
        cooldown: Natural = 1,
        floor: InsideOne = 0.01,
        min_delta: NotNegative = 0.0,
    ) -> None:
        self.patience = patience
        self.factor = factor
        self.cooldown = cooldown
        self.floor = floor
        self.min_delta = min_delta
        self.state = PlateauState()

    def see(self, value: float) -> bool:
        """Take note of one validation; True where it is time for a cut, which then is part of `state.factor`."""
        state = self.state
        if value < state.best - self.min_delta:  # False for a value that is not a number
            state.best, state.fruitless = value, 0
            state.cooling = max(0, state.cooling - 1)
            return False
        if state.cooling:
            state.cooling -= 1
            return False
        state.fruitless += 1
        if state.fruitless < self.patience or state.factor <= self.floor:
            return False
        state.factor = max(state.factor * self.factor, self.floor)
        state.fruitless, state.cooling = 0, self.cooldown
        return True

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if not trainer.limit_val_batches:
            raise ValueError(
                "plateau=cut watches val/nll, and trainer.limit_val_batches=0 leaves none; use plateau=none"
            )
        for config in trainer.lr_scheduler_configs:
            if not isinstance(config.scheduler, LambdaLR):
                raise ValueError(
                    f"plateau=cut scales the base rates of a LambdaLR, and lr_scheduler is a "
                    f"{type(config.scheduler).__name__}; use one of configs/lr_scheduler/, or plateau=none"
                )

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.sanity_checking or "val/nll" not in trainer.callback_metrics:
            return
        before = self.state.factor
        value = trainer.strategy.broadcast(float(trainer.callback_metrics["val/nll"]))
        if not self.see(value):
            return
        log.info("step %d: val/nll was not below %.4f for %d validations; the learning rate is now %.3g times what the "
                 "schedule says", trainer.global_step, self.state.best, self.patience, self.state.factor)  # fmt: skip
        for config in trainer.lr_scheduler_configs:
            _scale(config.scheduler, self.state.factor / before)

    def state_dict(self) -> dict[str, object]:
        return asdict(self.state)

    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:
        self.state = PlateauState(**state_dict)


def _scale(scheduler: LambdaLR, ratio: float) -> None:
    """Every rate of the schedule, that of the coming step included, times `ratio`."""
    scheduler.base_lrs = [base * ratio for base in scheduler.base_lrs]
    groups = scheduler.optimizer.param_groups
    for group, base, factor in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        group["lr"] = base * factor(scheduler.last_epoch)
