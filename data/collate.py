"""Rows to batches; the batch contract is in the header of dataloader.py."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset

PAD_MULTIPLE = 8


@dataclass(eq=False)
class Rows(Dataset):
    """A torch data set that maps row numbers to the columns of these rows."""

    rows: datasets.Dataset

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        return self.rows[indices]


@dataclass(eq=False)
class Collate:
    """Turns columns of rows into a batch with the contract of dataloader.py.

    Args:
        pad_id: None if rows have equal length.
        frame_ids: tokens that are observed at the ends of padded rows, and anywhere in rows of equal length.
        fill: pad rows to `length` with EOS, the `pad_id` then; only frame tokens at the beginning are observed.
        segments: put the ends of each text's parts into the batch; parts between the first and the last get `room`
            tokens.
        prefix: number of observed tokens at the beginning of each row, after a leading `bos_id`.
        first_given: observe at least the first token of each row.
        end_id: the token that ends a document; the batch then has the document of each token. None leaves it out.
    """

    length: int
    pad_id: int | None
    frame_ids: Collection[int] = ()
    fill: bool = False
    segments: bool = False
    room: int | None = None
    prefix: int = 0
    bos_id: int | None = None
    first_given: bool = False
    end_id: int | None = None

    def __post_init__(self) -> None:
        self.frame_ids = np.array(sorted(self.frame_ids), dtype=np.int64)

    def __call__(self, columns: dict[str, Any]) -> dict[str, torch.Tensor]:
        columns = dict(columns)
        rows, lengths = columns.pop("input_ids"), np.asarray(columns.pop("length"))
        part_ends, latents = columns.pop("part_ends", None), columns.pop("latent", None)
        batch = {name: torch.from_numpy(np.array(values, dtype=np.int64)) for name, values in columns.items()}
        batch |= {} if latents is None else {"latent": torch.from_numpy(latents)}
        if self.pad_id is None:
            return {**self._wrapped(np.stack(rows).astype(np.int64)), **batch}
        width = min(-(-int(lengths.max()) // PAD_MULTIPLE) * PAD_MULTIPLE, self.length)
        place = np.arange(self.length if self.fill else width)
        if part_ends is not None:
            part_ends = np.stack([np.asarray(cuts, dtype=np.int64) for cuts in part_ends])
        mask = place < lengths[:, None]
        if self.segments:
            segments = segment_ends(part_ends[:, 0], part_ends.shape[1], self.room)
            mask = _token_positions(place, lengths, part_ends, segments)
            batch["segment_ends"] = torch.from_numpy(segments)
        ids = np.full(mask.shape, self.pad_id, dtype=np.int64)
        ids[mask] = np.concatenate(list(rows))
        batch["input_ids"] = torch.from_numpy(ids)
        batch |= {"eos_padding": torch.from_numpy(~mask)} if self.fill else {"attention_mask": torch.from_numpy(mask)}
        ends = (place == 0) | ((place == lengths[:, None] - 1) & (not self.fill))
        observed = ends & np.isin(ids, self.frame_ids)
        if part_ends is not None:
            observed |= place < part_ends[:, :1]
        observed |= self._in_prefix(ids) & mask
        if len(self.frame_ids) or part_ends is not None or self.prefix or self.first_given:
            batch["observed"] = torch.from_numpy(observed)
        return batch

    def _wrapped(self, ids: np.ndarray) -> dict[str, torch.Tensor]:
        """Return the batch of equally long rows, which begin and end anywhere in a text."""
        batch = {"input_ids": torch.from_numpy(ids)}
        if len(self.frame_ids) or self.prefix or self.first_given:
            batch["observed"] = torch.from_numpy(np.isin(ids, self.frame_ids) | self._in_prefix(ids))
        if self.end_id is not None:
            ends = ids == self.end_id
            batch["document"] = torch.from_numpy(ends.cumsum(1) - ends)
        return batch

    def _in_prefix(self, ids: np.ndarray) -> np.ndarray:
        return np.arange(ids.shape[1]) < self.leading(ids[:, 0])[:, None]

    def leading(self, first_ids: np.ndarray) -> np.ndarray:
        """Return how many tokens are observed at the beginning of rows with these first tokens, BOS included, (B,)."""
        in_prefix_B = (self.prefix + (first_ids == self.bos_id)) * (self.prefix > 0)
        return np.maximum(in_prefix_B, int(self.first_given))


def segment_ends(prompt_tokens_B: np.ndarray, number: int, room: int | None) -> np.ndarray:
    """Return the end of each segment but the last, in tokens, (B, number): the prompt's, then one every `room` tokens.
    Raises ValueError for several segments if `room` is None."""
    if number > 1 and room is None:
        raise ValueError(
            f"data.segments=true: the texts have {number + 1} parts, and where one ends is unknown before it is "
            "written; set data.segment_room, the tokens reserved for each part between the first and the last"
        )
    return prompt_tokens_B[:, None].astype(np.int64) + (room or 0) * np.arange(number)


def _token_positions(
    place_L: np.ndarray, lengths_B: np.ndarray, part_ends: np.ndarray, segment_ends: np.ndarray
) -> np.ndarray:
    """Return where a row has a token, (B, L), if each part stands at the beginning of its segment."""
    edges = np.concatenate([np.zeros_like(part_ends[:, :1]), part_ends, lengths_B[:, None]], axis=1)
    starts = np.concatenate([np.zeros_like(segment_ends[:, :1]), segment_ends], axis=1)[..., None]
    return ((place_L >= starts) & (place_L < starts + np.diff(edges)[..., None])).any(1)
