"""Learning-rate schedules as configuration names them: each builder takes the optimizer and gives a scheduler that is
stepped once per optimizer step. `lr_scheduler=constant`, `constant_warmup` and `cosine_decay_warmup`, which have the
references' meaning, are those of transformers.

A schedule is a factor on the optimizer's own rates, and a function of the step alone, so that a resume goes on along
the same curve. Here the factor of the first step is 1 / num_warmup_steps, not 0, and that of the last is min_ratio.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup

from palimpsest.common.values import FREE, AboveZeroShare, AtLeastOne, Natural, Positive, Share, list_of, whole

_DECAYS: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1.0 - progress,
    "1-sqrt": lambda progress: 1.0 - math.sqrt(progress),
}


def constant(optimizer: Optimizer, num_warmup_steps: Natural) -> LambdaLR:
    """The full rate, after a linear warm-up."""
    return get_constant_schedule_with_warmup(optimizer, num_warmup_steps)


def cosine_to_zero(
    optimizer: Optimizer,
    num_warmup_steps: Natural,
    num_training_steps: Annotated[AtLeastOne, FREE],
    num_cycles: Positive = 0.5,
) -> LambdaLR:
    """A linear warm-up, then `num_cycles` of a cosine: half of one ends at nothing."""
    return get_cosine_schedule_with_warmup(optimizer, num_warmup_steps, num_training_steps, num_cycles)


def cosine(
    optimizer: Optimizer,
    num_training_steps: Annotated[AtLeastOne, FREE],
    num_warmup_steps: Natural,
    min_ratio: Share = 0.1,
) -> LambdaLR:
    """Linear warm-up, then half a cosine (Loshchilov & Hutter 2017, arXiv 1608.03983, eq. 5) down to `min_ratio`.

    Raises:
        ValueError: the warm-up leaves no step to decay in.
    """
    _check_warmup(num_warmup_steps, num_training_steps)
    decay_steps = num_training_steps - num_warmup_steps
    return LambdaLR(optimizer, partial(_stages, stages=((num_warmup_steps, decay_steps),), floor=min_ratio))


def wsd(
    optimizer: Optimizer,
    num_training_steps: Annotated[AtLeastOne, FREE],
    num_warmup_steps: Natural,
    decay_share: AboveZeroShare = 0.2,
    decay: Literal["1-sqrt", "linear", "cosine"] = "1-sqrt",
    min_ratio: Share = 0.1,
) -> LambdaLR:
    """Warm-up, stable, decay (Hägele et al. 2024, arXiv 2405.18392): the full rate until the last `decay_share` of the
    steps, in which it falls to `min_ratio`. Before the decay the curve does not hang on the number of steps, so that
    a training can be prolonged from there.

    Raises:
        ValueError: warm-up and decay do not fit into the steps.
    """
    _check_warmup(num_warmup_steps, num_training_steps)
    decay_steps = max(1, round(decay_share * num_training_steps))
    if num_warmup_steps + decay_steps > num_training_steps:
        raise ValueError(
            f"lr_scheduler.num_warmup_steps={num_warmup_steps} and the last {decay_steps} steps of decay "
            f"(lr_scheduler.decay_share={decay_share}) do not fit into trainer.max_steps={num_training_steps}; "
            "lower one of them"
        )
    return LambdaLR(
        optimizer,
        partial(_wsd, warmup=num_warmup_steps, begin=num_training_steps - decay_steps, end=num_training_steps,
                decay=decay, floor=min_ratio),
    )  # fmt: skip


def restarts(
    optimizer: Optimizer,
    num_training_steps: Annotated[AtLeastOne, FREE],
    num_warmup_steps: Natural,
    periods: Annotated[Sequence[int], list_of(whole(1), 1, "[10000,20000]")],
    num_rewarmup_steps: AtLeastOne,
    peak_decay: Share = 0.7,
    min_ratio: Share = 0.1,
) -> LambdaLR:
    """Cosine decays one after the other (Loshchilov & Hutter 2017, arXiv 1608.03983), but each after a short linear
    warm-up from where the rate stands, and up to a peak that is `peak_decay` times the one before: a rate that jumps to
    its full height at once costs the weights what they had learned.

    periods: steps of each decay with its warm-up; the last one is repeated until `num_training_steps`. min_ratio is
    relative to the optimizer's rate, so every decay ends at the same one; a period that the end cuts off does not.

    Raises:
        ValueError: a period has no room for its warm-up, or the second peak would be a low.
    """
    _check_warmup(num_warmup_steps, num_training_steps)
    if peak_decay <= min_ratio:
        raise ValueError(
            f"lr_scheduler.peak_decay={peak_decay} is not above lr_scheduler.min_ratio={min_ratio}, so that the second "
            "peak would be a low; raise it"
        )
    repeats = max(0, -(-(num_training_steps - sum(periods)) // periods[-1]))
    stages = []
    for place, period in enumerate([*periods, *[periods[-1]] * repeats]):
        key, warmup = ("num_rewarmup_steps", num_rewarmup_steps) if place else ("num_warmup_steps", num_warmup_steps)
        if period <= warmup:
            raise ValueError(
                f"lr_scheduler.periods={list(periods)}: a period of {period} steps leaves none after its warm-up "
                f"(lr_scheduler.{key}={warmup}); make it longer"
            )
        stages.append((warmup, period - warmup))
    return LambdaLR(optimizer, partial(_stages, stages=stages, floor=min_ratio, peak_decay=peak_decay))


def _stages(step: int, *, stages: Sequence[tuple[int, int]], floor: float, peak_decay: float = 1.0) -> float:
    """The factor of a step in stages of (steps of linear warm-up, steps of cosine decay). The first one warms up from
    0, the others from the floor."""
    peak = 1.0
    for number, (warmup, decay) in enumerate(stages):
        last = number == len(stages) - 1
        if step < warmup:
            low = floor if number else 0.0
            return low + (peak - low) * (step + 1) / warmup
        if step < warmup + decay or last:
            progress = min(1.0, (step - warmup + 1) / decay)
            return floor + (peak - floor) * _DECAYS["cosine"](progress)
        step -= warmup + decay
        peak = max(peak * peak_decay, floor)
    raise AssertionError("a schedule has at least one stage")


def _wsd(step: int, *, warmup: int, begin: int, end: int, decay: str, floor: float) -> float:
    if step < warmup:
        return (step + 1) / warmup
    if step < begin:
        return 1.0
    progress = min(1.0, (step - begin + 1) / (end - begin))
    return floor + (1.0 - floor) * _DECAYS[decay](progress)


def _check_warmup(num_warmup_steps: int, num_training_steps: int) -> None:
    if num_warmup_steps >= num_training_steps:
        raise ValueError(
            f"lr_scheduler.num_warmup_steps={num_warmup_steps} must be below trainer.max_steps={num_training_steps}, "
            "or the rate never comes to its decay; lower it"
        )
