"""The stream of training samples: how many rows a device takes at once, which positions, and what stands there."""

from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
from torch.utils.data import Dataset, Sampler

from text.order import draws_at, rows_at


def batch_arithmetic(
    global_batch_size: int,
    batch_size: int | None,
    devices: int,
    num_nodes: int = 1,
    max_batch_size: int | None = None,
) -> tuple[int, int]:
    """(rows per device and micro-batch, micro-batches per optimizer step); their product over all devices is
    global.

    batch_size None: the largest that divides a device's share, at most `max_batch_size` where that is given.
    Raises ValueError naming the settings that do not divide.
    """
    world = devices * num_nodes
    names = f"trainer.devices={devices} x trainer.num_nodes={num_nodes}"
    given = {"loader.global_batch_size": global_batch_size, "loader.batch_size": batch_size,
             "trainer.devices": devices, "trainer.num_nodes": num_nodes}  # fmt: skip
    for key, value in given.items():
        if value is not None and value < 1:
            raise ValueError(f"{key}={value} must be at least 1")
    if global_batch_size % world:
        raise ValueError(
            f"loader.global_batch_size={global_batch_size} is not a multiple of the {world} devices "
            f"({names}); "
            f"give {world * max(1, global_batch_size // world)} or {world * (global_batch_size // world + 1)}"
        )
    share = global_batch_size // world
    if batch_size is None:
        largest = min(share, max_batch_size or share)
        batch_size = next(size for size in range(largest, 0, -1) if share % size == 0)
    if share % batch_size:
        choices = ", ".join(str(size) for size in range(1, share + 1) if share % size == 0)
        raise ValueError(
            f"loader.batch_size={batch_size} does not divide the {share} rows of each device and step "
            f"(loader.global_batch_size={global_batch_size} over {names}); give one of {choices}"
        )
    return batch_size, share // batch_size


class PositionBatchSampler(Sampler[list[int]]):
    """This rank's micro-batches of stream positions, for the whole run.

    Micro-batch m of step s on rank r holds b positions from s * G + (m * world + r) * b on.
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
    ) -> None:
        self.batch_size, self.accumulate = batch_arithmetic(global_batch_size, batch_size, world)
        self.global_batch_size, self.max_steps = global_batch_size, max_steps
        self.rank, self.world = rank, world
        if consumed % global_batch_size or consumed < 0:
            raise ValueError(
                f"the checkpoint was written after {consumed} samples, which is no whole number of steps of "
                f"loader.global_batch_size={global_batch_size}; resume with the size the run began with"
            )
        self.first_step = consumed // global_batch_size

    def __len__(self) -> int:
        return self.max_steps * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step, self.max_steps):
            for micro_batch in range(self.accumulate):
                place = (micro_batch * self.world + self.rank) * self.batch_size
                start = step * self.global_batch_size + place
                yield list(range(start, start + self.batch_size))


class TrainingStream(Dataset):
    """The endless stream: positions -> columns of the rows there.

    crop: of each (longer) row this many tokens, from a start that is drawn anew whenever the row comes up.
    """

    def __init__(self, rows: datasets.Dataset, seed: int, crop: int | None = None) -> None:
        self.rows, self.seed, self.crop = rows, seed, crop

    def __getitems__(self, positions: list[int]) -> dict[str, Any]:
        columns = {**self.rows[rows_at(positions, len(self.rows), self.seed)], "position": np.asarray(positions)}
        if self.crop is not None:
            starts = draws_at(positions, columns["length"] - self.crop + 1, self.seed)
            rows = zip(columns["input_ids"], starts, strict=True)
            columns["input_ids"] = [ids[start : start + self.crop] for ids, start in rows]
            columns["length"] = np.full(len(positions), self.crop)
        return columns
