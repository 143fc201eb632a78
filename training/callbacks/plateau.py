"""A factor on top of the learning-rate schedule that falls when validation stops improving."""

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch.optim.lr_scheduler import LambdaLR

from palimpsest.common.values import AtLeastOne, InsideOne, Natural, NotNegative

log = logging.getLogger(__name__)


@dataclass
class PlateauState:
    """The state of a `Plateau`, under the names that checkpoints use."""

    best: float = math.inf  # lowest val/nll so far
    fruitless: int = 0  # validations since then without improvement
    cooling: int = 0  # coming validations that do not count
    factor: float = 1.0  # product of all cuts


@dataclass(eq=False)
class Plateau(Callback):
    """Cuts of the learning rate by `factor` after `patience` validations in a row without improvement.

    val/nll improves if it falls below the best by more than `min_delta`. After a cut, `cooldown` validations do not
    count. The product of all cuts stays at or above `floor`.

    A cut changes the base rates of the schedule, so it holds for all later steps. (torch's ReduceLROnPlateau writes
    the rate itself, which the schedule overwrites one step later.) Every rank uses the value of rank 0.

    Raises:
        ValueError: validation does not run, or the schedule is not one of this project's.
    """

    patience: AtLeastOne = 5
    factor: InsideOne = 0.5
    cooldown: Natural = 1
    floor: InsideOne = 0.01
    min_delta: NotNegative = 0.0
    state: PlateauState = field(default_factory=PlateauState, init=False)

    def update(self, value: float) -> bool:
        """Record one validation; return True if it is time for a cut, which `state.factor` then includes."""
        state = self.state
        if value < state.best - self.min_delta:  # False for NaN
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

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
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

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or "val/nll" not in trainer.callback_metrics:
            return
        before = self.state.factor
        value = trainer.strategy.broadcast(float(trainer.callback_metrics["val/nll"]))
        if not self.update(value):
            return
        log.info(
            "step %d: val/nll was not below %.4f for %d validations; the learning rate is now %.3g times what the "
            "schedule says",
            trainer.global_step,
            self.state.best,
            self.patience,
            self.state.factor,
        )
        for config in trainer.lr_scheduler_configs:
            _scale(config.scheduler, self.state.factor / before)

    def state_dict(self) -> dict[str, object]:
        return asdict(self.state)

    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:
        self.state = PlateauState(**state_dict)


def _scale(scheduler: LambdaLR, ratio: float) -> None:
    """Multiply every rate of the schedule by `ratio`, including the rate of the coming step."""
    scheduler.base_lrs = [base * ratio for base in scheduler.base_lrs]
    groups = scheduler.optimizer.param_groups
    for group, base, factor in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        group["lr"] = base * factor(scheduler.last_epoch)
