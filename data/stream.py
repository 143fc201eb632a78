"""The stream of training samples: batch sizes, the positions of each batch, and the rows at these positions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from palimpsest.data.order import draws_at, mixed_rows_at, rows_at

_MOST_CHOICES = 12  # divisors that a message lists; of more, only those next to the typed value


def batch_arithmetic(
    global_batch_size: int,
    batch_size: int | None,
    devices: int,
    num_nodes: int = 1,
    max_batch_size: int | None = None,
    accumulate: int | None = None,
    ramp: Sequence[Sequence[int]] | None = None,
) -> tuple[int, int]:
    """Return (rows per device and micro-batch, micro-batches per optimizer step).

    Args:
        batch_size: None uses `accumulate` if given, else the largest divisor of a device's share, at most
            `max_batch_size`.
        ramp: as in `BatchPlan.of`; its smaller steps have as many micro-batches, with fewer rows.

    Raises:
        ValueError: sizes do not divide; names the settings and the nearest sizes that do.
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
    """Name the multiples next to a number that is not one."""
    return f"{of * max(1, number // of)} or {of * (number // of + 1)}"


def _divisors(number: int, near: int) -> str:
    """Name the divisors of `number`, or only those next to `near` if there are many."""
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
    """A stage of a batch ramp: from optimizer step `step` and stream position `position` on, steps take `size`
    samples."""

    step: int
    size: int
    position: int


@dataclass(frozen=True)
class BatchPlan:
    """The number of samples that each optimizer step takes from the stream, over all devices and micro-batches.

    It depends on the step alone, and so does the position at which a step begins. The stages are in order; the first
    begins at step 0, the last has no end.
    """

    stages: tuple[Stage, ...]

    @classmethod
    def of(cls, global_batch_size: int, ramp: Sequence[Sequence[int]] | None = None) -> BatchPlan:
        """Build the plan of loader.global_batch_size and loader.batch_ramp, [[step, samples], ...]. Raises ValueError
        if the stages do not grow from step 0 up to the global batch."""
        if ramp is None:
            return cls((Stage(0, global_batch_size, 0),))
        steps, sizes = zip(*ramp, strict=True)
        if steps[0] != 0 or list(steps) != sorted(set(steps)) or min(sizes) < 1:
            raise ValueError(
                f"loader.batch_ramp={ramp}: the first step must be 0, steps must grow, and each takes at least 1 sample"
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
        """Raise ValueError if a training of `steps`, which `key` sets, ends before the last stage begins."""
        begins, size = self.stages[-1].step, self.stages[-1].size
        if begins and begins >= steps:
            raise ValueError(
                f"loader.batch_ramp={self.ramp} reaches loader.global_batch_size={size} at step {begins}, "
                f"and {key}={steps} ends the training before; set {key} to more than {begins}, or let the ramp end "
                "earlier, or leave it out (loader.batch_ramp=null)"
            )

    @property
    def ramp(self) -> list[list[int]] | None:
        """Return the argument of `of`; None if all steps have one size."""
        return [[stage.step, stage.size] for stage in self.stages] if len(self.stages) > 1 else None

    def size(self, step: int) -> int:
        """Return the number of samples of an optimizer step."""
        return next(stage.size for stage in reversed(self.stages) if stage.step <= step)

    def start(self, step: int) -> int:
        """Return the stream position of a step's first sample."""
        stage = next(stage for stage in reversed(self.stages) if stage.step <= step)
        return stage.position + (step - stage.step) * stage.size

    def step_after(self, consumed: int) -> int:
        """Return the step that follows `consumed` samples. Raises ValueError if that is within a step."""
        stage = next((stage for stage in reversed(self.stages) if stage.position <= consumed), None)
        if stage is None or (consumed - stage.position) % stage.size:
            raise ValueError(
                f"the checkpoint was written after {consumed} samples, which is no whole number of steps of "
                f"loader.global_batch_size={self.stages[-1].size}; resume with the size the run began with"
            )
        return stage.step + (consumed - stage.position) // stage.size

    def place(self, position_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return each position's index within its step, and the size of that step, both (B,)."""
        size_B, place_B = torch.zeros_like(position_B), torch.zeros_like(position_B)
        for stage in self.stages:
            later_B = position_B >= stage.position
            size_B = torch.where(later_B, stage.size, size_B)
            place_B = torch.where(later_B, (position_B - stage.position) % stage.size, place_B)
        return place_B, size_B

    def __str__(self) -> str:
        return ", ".join(f"{stage.size} from step {stage.step}" for stage in self.stages)


def check_same_texts(before: Mapping[str, int] | None, now: Mapping[str, int] | None) -> None:
    """Raise ValueError if a training began with texts of another number or size (`size_of`); None is not compared."""
    if before and now and before != now:
        there, here = (f"{size['texts']:,} texts of {size['bytes']:,} bytes" for size in (before, now))
        raise ValueError(
            f"the texts have changed since this training began: {there} then, {here} now; use another "
            "checkpointing.save_dir for the new texts, or give the old ones again"
        )


class PositionBatchSampler(Sampler[list[int]]):
    """This rank's micro-batches of stream positions, for the whole run.

    A step of G samples is A micro-batches on each of the ranks, of b = G / (A world) rows. On rank r, micro-batch m of
    the step that begins at position p contains the positions from p + (m * world + r) * b on. Iteration begins with the
    step that follows `consumed` samples, but `len` counts from position 0, because Lightning compares it with the
    number of batches since the start of the run.
    """

    def __init__(
        self,
        global_batch_size: int,
        batch_size: int | None,
        max_steps: int,
        rank: int = 0,
        world: int = 1,
        consumed: int = 0,
        ramp: Sequence[Sequence[int]] | None = None,
    ) -> None:
        _, self.accumulate = batch_arithmetic(global_batch_size, batch_size, world, ramp=ramp)
        self.plan = BatchPlan.of(global_batch_size, ramp)
        self.max_steps = max_steps
        self.rank = rank
        self.world = world
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


@dataclass(eq=False)
class TrainingStream(Dataset):
    """The endless stream, which maps positions to the columns of the rows there.

    crop: number of tokens to take from each (longer) row, from a start that is drawn anew at each visit.
    sizes, weights: of a mixture, the number of rows of each data set, which follow one another, and its weight.
    """

    rows: datasets.Dataset
    seed: int
    crop: int | None = None
    sizes: Sequence[int] | None = None
    weights: Sequence[float] | None = None

    def __getitems__(self, positions: list[int]) -> dict[str, Any]:
        if self.weights is None:
            rows = rows_at(positions, len(self.rows), self.seed)
        else:
            rows = mixed_rows_at(positions, self.sizes, self.weights, self.seed)
        columns = {**self.rows[rows], "position": np.asarray(positions)}
        for name in ("first_document", "last_document"):  # only held-out texts need them
            columns.pop(name, None)
        if self.crop is not None:
            starts = draws_at(positions, columns["length"] - self.crop + 1, self.seed)
            rows = zip(columns["input_ids"], starts, strict=True)
            columns["input_ids"] = [ids[start : start + self.crop] for ids, start in rows]
            columns["length"] = np.full(len(positions), self.crop)
        return columns
