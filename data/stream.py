"""The stream of training samples: how many rows a device takes at once, which positions, and what stands there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from palimpsest.data.order import draws_at, rows_at

_MOST_CHOICES = 12  # divisors that a message lists; of more, those next to what was typed


def batch_arithmetic(
    global_batch_size: int,
    batch_size: int | None,
    devices: int,
    num_nodes: int = 1,
    max_batch_size: int | None = None,
    accumulate: int | None = None,
    ramp: Sequence[Sequence[int]] | None = None,
) -> tuple[int, int]:
    """(rows per device and micro-batch, micro-batches per optimizer step); their product over all devices is
    global.

    batch_size None: what `accumulate` leaves, without it the largest that divides a device's share, at most
    `max_batch_size` where that is given. ramp: as `BatchPlan.of` takes it; its smaller steps have as many
    micro-batches, of fewer rows.
    Raises ValueError naming the settings that do not divide, and the nearest that do.
    """
    plan = BatchPlan.of(global_batch_size, ramp)
    world = devices * num_nodes
    names = f"trainer.devices={devices} x trainer.num_nodes={num_nodes}"
    if global_batch_size % world:
        raise ValueError(
            f"loader.global_batch_size={global_batch_size} is not a multiple of the {world} devices "
            f"({names}); give {_multiples(global_batch_size, world)}"
        )
    share = global_batch_size // world
    rows = f"the {share} rows of each device and step (loader.global_batch_size={global_batch_size} over {names})"
    if batch_size is None and accumulate is not None:
        if share % accumulate:
            raise ValueError(
                f"trainer.accumulate_grad_batches={accumulate} does not divide {rows}; give one of "
                f"{_divisors(share, accumulate)}, or leave it out"
            )
        batch_size = share // accumulate
    elif batch_size is None:
        largest = min(share, max_batch_size or share)
        batch_size = next(size for size in range(largest, 0, -1) if share % size == 0)
    if share % batch_size:
        raise ValueError(
            f"loader.batch_size={batch_size} does not divide {rows}; give one of {_divisors(share, batch_size)}"
        )
    if accumulate not in (None, share // batch_size):
        raise ValueError(
            f"trainer.accumulate_grad_batches={accumulate} with loader.batch_size={batch_size} contradicts "
            f"loader.global_batch_size={global_batch_size} over {names}, which makes it {share // batch_size}; leave "
            f"one of them out, or set loader.global_batch_size={accumulate * batch_size * world}"
        )
    _check_stages(plan, world * (share // batch_size), f"{names} x {share // batch_size} micro-batches")
    return batch_size, share // batch_size


def _multiples(number: int, of: int) -> str:
    """The multiples next to a number that is none."""
    return f"{of * max(1, number // of)} or {of * (number // of + 1)}"


def _divisors(number: int, near: int) -> str:
    """The divisors of `number`, or where they are many those next to `near`."""
    found = [size for size in range(1, number + 1) if number % size == 0]
    if len(found) > _MOST_CHOICES:
        found = [max(size for size in found if size <= near)] + [size for size in found if size > near][:1]
    return ", ".join(str(size) for size in found)


def _check_stages(plan: BatchPlan, parts: int, names: str) -> None:
    for stage in plan.stages:
        if stage.size % parts:
            raise ValueError(
                f"loader.batch_ramp: the {stage.size} samples from step {stage.step} on do not divide into the {parts} "
                f"micro-batches of a step ({names}); give {_multiples(stage.size, parts)}, or a larger "
                "loader.batch_size, which makes fewer micro-batches"
            )


@dataclass(frozen=True)
class Stage:
    """From optimizer step `step` on, a step takes `size` samples; `position` is the first of them in the stream."""

    step: int
    size: int
    position: int


@dataclass(frozen=True)
class BatchPlan:
    """How many samples each optimizer step takes from the stream, over all devices and micro-batches: a function of
    the step alone, and so is where it begins. The stages are in order, the first from step 0, the last without end."""

    stages: tuple[Stage, ...]

    @classmethod
    def of(cls, global_batch_size: int, ramp: Sequence[Sequence[int]] | None = None) -> BatchPlan:
        """From loader.global_batch_size and loader.batch_ramp, [[step, samples], ...], the last of which is global.

        Raises:
            ValueError: the stages are no ramp from step 0 up to the global batch.
        """
        if ramp is None:
            return cls((Stage(0, global_batch_size, 0),))
        steps, sizes = zip(*ramp, strict=True)
        if steps[0] != 0 or list(steps) != sorted(set(steps)) or min(sizes) < 1:
            raise ValueError(
                f"loader.batch_ramp={ramp}: the first step must be 0, each later one larger than that before it, and a "
                "step takes at least 1 sample"
            )
        if list(sizes) != sorted(sizes):
            grown = [[step, min(max(sizes[: i + 1]), global_batch_size)] for i, step in enumerate(steps)]
            grown[-1][1] = global_batch_size
            raise ValueError(
                f"loader.batch_ramp={ramp} shrinks, and a ramp only grows, up to loader.global_batch_size="
                f"{global_batch_size}; put its sizes in order, such as {str(grown).replace(' ', '')}"
            )
        if sizes[-1] != global_batch_size:
            raise ValueError(
                f"loader.batch_ramp={ramp} ends with {sizes[-1]} samples per step, but loader.global_batch_size="
                f"{global_batch_size}; make them equal"
            )
        stages = [Stage(0, sizes[0], 0)]
        for step, size in ramp[1:]:
            before = stages[-1]
            stages.append(Stage(step, size, before.position + (step - before.step) * before.size))
        return cls(tuple(stages))

    def check_reached(self, steps: int, key: str = "trainer.max_steps") -> None:
        """Raises ValueError where a training of so many steps, which `key` says, ends before the last stage begins: the
        global batch that was asked for would never be taken."""
        begins, size = self.stages[-1].step, self.stages[-1].size
        if begins and begins >= steps:
            raise ValueError(
                f"loader.batch_ramp={self.ramp} reaches loader.global_batch_size={size} at step {begins}, "
                f"and {key}={steps} ends the training before; set {key} to more than {begins}, or let the ramp end "
                "earlier, or leave it out (loader.batch_ramp=null)"
            )

    @property
    def ramp(self) -> list[list[int]] | None:
        """As `of` takes it; None for steps of one size."""
        return [[stage.step, stage.size] for stage in self.stages] if len(self.stages) > 1 else None

    def size(self, step: int) -> int:
        """Samples of an optimizer step."""
        return next(stage.size for stage in reversed(self.stages) if stage.step <= step)

    def start(self, step: int) -> int:
        """Position of the step's first sample: how many the steps before it have taken."""
        stage = next(stage for stage in reversed(self.stages) if stage.step <= step)
        return stage.position + (step - stage.step) * stage.size

    def step_after(self, consumed: int) -> int:
        """The step that follows so many samples. Raises ValueError where they are no whole number of steps."""
        stage = next((stage for stage in reversed(self.stages) if stage.position <= consumed), None)
        if stage is None or (consumed - stage.position) % stage.size:
            raise ValueError(
                f"the checkpoint was written after {consumed} samples, which is no whole number of steps of "
                f"loader.global_batch_size={self.stages[-1].size}; resume with the size the run began with"
            )
        return stage.step + (consumed - stage.position) // stage.size

    def place(self, position_B: Tensor) -> tuple[Tensor, Tensor]:
        """(which of its step's samples each position is, how many that step has), both (B,)."""
        size_B, place_B = torch.zeros_like(position_B), torch.zeros_like(position_B)
        for stage in self.stages:
            later_B = position_B >= stage.position
            size_B = torch.where(later_B, stage.size, size_B)
            place_B = torch.where(later_B, (position_B - stage.position) % stage.size, place_B)
        return place_B, size_B

    def __str__(self) -> str:
        return ", ".join(f"{stage.size} from step {stage.step}" for stage in self.stages)


def consumed_before(saved: Mapping[str, Any], stream: Mapping[str, Any]) -> int:
    """Samples that the training behind a checkpoint has taken, 0 without one.

    Raises:
        ValueError: it was a training of another stream than `stream` (keys as in TextData.state_dict).
    """
    for key, value in stream.items() if saved else ():
        before = saved.get(key, None if key == "batch_ramp" else value)
        if before != value:
            setting = key if key == "seed" else f"loader.{key}"
            raise ValueError(
                f"{setting}={value}, but the run to be resumed was begun with {setting}={before}; resume it with that, "
                "or start a new run"
            )
    return int(saved.get("consumed_samples", 0))


class PositionBatchSampler(Sampler[list[int]]):
    """This rank's micro-batches of stream positions, for the whole run.

    A step of G samples is A micro-batches on each of the ranks, of b = G / (A world) rows; micro-batch m of the step
    whose samples begin at position p holds, on rank r, those from p + (m * world + r) * b on.
    Iteration begins with the step that follows `consumed` samples, but `len` counts from position 0:
    Lightning compares it with the number of batches since the start of the run.
    """

    def __init__(
        self,
        global_batch_size: int,
        batch_size: int,
        max_steps: int,
        rank: int = 0,
        world: int = 1,
        consumed: int = 0,
        ramp: Sequence[Sequence[int]] | None = None,
    ) -> None:
        _, self.accumulate = batch_arithmetic(global_batch_size, batch_size, world, ramp=ramp)
        self.plan, self.max_steps, self.rank, self.world = BatchPlan.of(global_batch_size, ramp), max_steps, rank, world
        self.plan.check_reached(max_steps)
        self.first_step = self.plan.step_after(consumed)

    def __len__(self) -> int:
        return self.max_steps * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step, self.max_steps):
            rows = self.plan.size(step) // (self.accumulate * self.world)
            for micro_batch in range(self.accumulate):
                start = self.plan.start(step) + (micro_batch * self.world + self.rank) * rows
                yield list(range(start, start + rows))


class TrainingStream(Dataset):
    """The endless stream: positions -> columns of the rows there.

    crop: of each (longer) row this many tokens, from a start that is drawn anew whenever the row comes up.
    """

    def __init__(self, rows: datasets.Dataset, seed: int, crop: int | None = None) -> None:
        self.rows, self.seed, self.crop = rows, seed, crop

    def __getitems__(self, positions: list[int]) -> dict[str, Any]:
        columns = {**self.rows[rows_at(positions, len(self.rows), self.seed)], "position": np.asarray(positions)}
        for name in ("first_document", "last_document"):  # errors are measured on held-out texts
            columns.pop(name, None)
        if self.crop is not None:
            starts = draws_at(positions, columns["length"] - self.crop + 1, self.seed)
            rows = zip(columns["input_ids"], starts, strict=True)
            columns["input_ids"] = [ids[start : start + self.crop] for ids, start in rows]
            columns["length"] = np.full(len(positions), self.crop)
        return columns
