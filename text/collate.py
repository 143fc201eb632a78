"""Rows -> batches (the batch contract is the header of dataloader.py)."""

from collections.abc import Collection
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset

PAD_MULTIPLE = 8


class Rows(Dataset):
    """Row numbers -> columns of these rows."""

    def __init__(self, rows: datasets.Dataset) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        return self.rows[indices]


class Collate:
    """Columns of some rows -> a batch (the contract of dataloader.py). pad_id None: the rows are of equal length.
    `frame_ids`: tokens that are given where they begin or end a padded row. `fill`: rows are filled up to `length` with
    the pad, which is EOS then, and only their beginning is given. `segments`: batches say which part of its text each
    token belongs to."""

    def __init__(
        self, length: int, pad_id: int | None, frame_ids: Collection[int] = (), fill: bool = False,
        segments: bool = False,
    ) -> None:  # fmt: skip
        self.length, self.pad_id, self.frame_ids = length, pad_id, np.array(sorted(frame_ids), dtype=np.int64)
        self.fill, self.segments = fill, segments

    def __call__(self, columns: dict[str, Any]) -> dict[str, torch.Tensor]:
        columns = dict(columns)
        rows, lengths = columns.pop("input_ids"), np.asarray(columns.pop("length"))
        part_ends = columns.pop("part_ends", None)
        batch = {name: torch.from_numpy(np.array(values, dtype=np.int64)) for name, values in columns.items()}
        if self.pad_id is None:
            return {"input_ids": torch.from_numpy(np.stack(rows).astype(np.int64)), **batch}
        width = min(-(-int(lengths.max()) // PAD_MULTIPLE) * PAD_MULTIPLE, self.length)
        place = np.arange(self.length if self.fill else width)
        mask = place < lengths[:, None]
        ids = np.full(mask.shape, self.pad_id, dtype=np.int64)
        ids[mask] = np.concatenate(list(rows))
        batch["input_ids"] = torch.from_numpy(ids)
        batch |= {"fill": torch.from_numpy(~mask)} if self.fill else {"attention_mask": torch.from_numpy(mask)}
        ends = (place == 0) | ((place == lengths[:, None] - 1) & (not self.fill))
        given = ends & np.isin(ids, self.frame_ids)
        if part_ends is not None:
            part_ends = np.stack([np.asarray(cuts, dtype=np.int64) for cuts in part_ends])
            given |= place < part_ends[:, :1]
        if len(self.frame_ids) or part_ends is not None:
            batch["given"] = torch.from_numpy(given)
        if self.segments:
            batch["segment"] = torch.from_numpy((place[None, :, None] >= part_ends[:, None]).sum(-1))
        return batch
