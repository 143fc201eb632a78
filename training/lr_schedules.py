"""Learning-rate schedules: each builder takes the optimizer and returns a scheduler, stepped once per optimizer step.

A schedule is a factor on the optimizer's own rates. It is a function of the step alone, so a resume continues the same
curve. `constant` and `cosine_to_zero` are those of transformers. In the others the factor of the first step is
1 / num_warmup_steps, not 0, and that of the last is min_ratio.
"""

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
    """Return the full rate after a linear warm-up."""
    return get_constant_schedule_with_warmup(optimizer, num_warmup_steps)


def cosine_to_zero(
    optimizer: Optimizer,
    num_warmup_steps: Natural,
    num_training_steps: Annotated[AtLeastOne, FREE],
    num_cycles: Positive = 0.5,
) -> LambdaLR:
    """Return a linear warm-up, then `num_cycles` of a cosine; half a cycle ends at 0."""
    return get_cosine_schedule_with_warmup(optimizer, num_warmup_steps, num_training_steps, num_cycles)


def cosine(
    optimizer: Optimizer,
    num_training_steps: Annotated[AtLeastOne, FREE],
    num_warmup_steps: Natural,
    min_ratio: Share = 0.1,
) -> LambdaLR:
    """Return a warm-up, then half a cosine down to `min_ratio` (Loshchilov & Hutter 2017, arXiv 1608.03983, eq. 5).

    Raises:
        ValueError: the warm-up leaves no step for the decay.
    """
    _check_warmup(num_warmup_steps, num_training_steps)
    stage = (num_warmup_steps, 0, num_training_steps - num_warmup_steps)
    return LambdaLR(optimizer, partial(_stages, stages=[stage], floor=min_ratio))


def wsd(
    optimizer: Optimizer,
    num_training_steps: Annotated[AtLeastOne, FREE],
    num_warmup_steps: Natural,
    decay_share: AboveZeroShare = 0.2,
    decay: Literal["1-sqrt", "linear", "cosine"] = "1-sqrt",
    min_ratio: Share = 0.1,
) -> LambdaLR:
    """Return a warm-up, the full rate, and a decay to `min_ratio` (WSD, Hägele et al. 2024, arXiv 2405.18392).

    The decay takes the last `decay_share` of the steps. Before it the curve does not depend on the number of steps, so
    a training can be extended from there.

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
    stage = (num_warmup_steps, num_training_steps - num_warmup_steps - decay_steps, decay_steps)
    return LambdaLR(optimizer, partial(_stages, stages=[stage], floor=min_ratio, shape=decay))


def restarts(
    optimizer: Optimizer,
    num_training_steps: Annotated[AtLeastOne, FREE],
    num_warmup_steps: Natural,
    periods: Annotated[Sequence[int], list_of(whole(1), 1, "[10000,20000]")],
    num_rewarmup_steps: AtLeastOne,
    peak_decay: Share = 0.7,
    min_ratio: Share = 0.1,
) -> LambdaLR:
    """Return a sequence of cosine decays with falling peaks (after Loshchilov & Hutter 2017, arXiv 1608.03983).

    Each decay follows a short linear warm-up from the current rate, because a sudden jump to the peak undoes learning.

    Args:
        periods: steps of each decay with its warm-up; the last one is repeated until `num_training_steps`.
        peak_decay: ratio of a peak to the one before.
        min_ratio: the rate at the end of each decay, relative to the optimizer's; the last period may be cut short.

    Raises:
        ValueError: a period has no room for its warm-up, or the second peak would not be above `min_ratio`.
    """
    _check_warmup(num_warmup_steps, num_training_steps)
    if peak_decay <= min_ratio:
        raise ValueError(
            f"lr_scheduler.peak_decay={peak_decay} must be above lr_scheduler.min_ratio={min_ratio}, or the second "
            "peak would be a low; raise it"
        )
    repeats = max(0, -(-(num_training_steps - sum(periods)) // periods[-1]))
    stages = []
    for number, period in enumerate([*periods, *[periods[-1]] * repeats]):
        key, warmup = ("num_rewarmup_steps", num_rewarmup_steps) if number else ("num_warmup_steps", num_warmup_steps)
        if period <= warmup:
            raise ValueError(
                f"lr_scheduler.periods={list(periods)}: a period of {period} steps leaves none after its warm-up "
                f"(lr_scheduler.{key}={warmup}); make it longer"
            )
        stages.append((warmup, 0, period - warmup))
    return LambdaLR(optimizer, partial(_stages, stages=stages, floor=min_ratio, peak_decay=peak_decay))


def _stages(
    step: int, *, stages: Sequence[tuple[int, int, int]], floor: float, shape: str = "cosine", peak_decay: float = 1.0
) -> float:
    """Return the factor of a step in stages of (steps of linear warm-up, steps at the peak, steps of decay).

    The first stage warms up from 0, the others from the floor.
    """
    peak = 1.0
    for number, (warmup, full, decay) in enumerate(stages):
        if step < warmup:
            low = floor if number else 0.0
            return low + (peak - low) * (step + 1) / warmup
        step -= warmup + full
        if step < 0:
            return peak
        if step < decay or number == len(stages) - 1:
            return floor + (peak - floor) * _DECAYS[shape](min(1.0, (step + 1) / decay))
        step -= decay
        peak = max(peak * peak_decay, floor)
    raise AssertionError("a schedule has at least one stage")


def _check_warmup(num_warmup_steps: int, num_training_steps: int) -> None:
    if num_warmup_steps >= num_training_steps:
        raise ValueError(
            f"lr_scheduler.num_warmup_steps={num_warmup_steps} must be below trainer.max_steps={num_training_steps}, "
            "or the rate never decays; lower it"
        )
