"""A source's splits as the texts that are asked for: one class, a limit, several splits joined, a stream's first."""

from collections.abc import Mapping, Sequence

import datasets
import numpy as np

from palimpsest.data.rows import at_most, joined, keep_label, without_texts_of
from palimpsest.data.sources import Source

SPLITS = ("train", "validation", "test")


class SplitTexts:
    """The texts of the splits of a source; each is read once.

    limits: split -> data.max_*_texts, None for all. streaming: read no more of a split than its limit; of train, if it
    has none, `sample_texts`. label: only the texts of this class. train_splits: these together are the train split.
    """

    def __init__(
        self, source: Source, limits: Mapping[str, int | None], streaming: bool, sample_texts: int, label: int | None,
        train_splits: Sequence[str] | None,
    ) -> None:  # fmt: skip
        self.source, self.limits, self.label, self.train_splits = source, dict(limits), label, train_splits
        self.streaming, self.sample_texts = streaming, sample_texts
        self._texts: dict[str, datasets.Dataset] = {}

    def read(self, split: str) -> datasets.Dataset:
        """The split's rows from the source, when streaming no more of them than the limit."""
        if not self.streaming:
            return self.source.load(split)
        limit = self._limit(split)
        limit = self.sample_texts if split == "train" and limit is None else limit
        if limit is None:
            raise ValueError(f"data.streaming=true reads a split up to its limit, and {split} has none: "
                             f"set {limit_key(split)}, or data.streaming=false")  # fmt: skip
        if not hasattr(self.source, "stream"):
            raise ValueError("data.streaming=true: these texts are made or cut as a whole; set it to false")
        return self.source.stream(split, limit)

    def of(self, split: str) -> datasets.Dataset:
        """Columns text, text_id (number in the whole split), label and ends (data/sources.py) where there are such.

        Raises ValueError for an unknown split, an unknown label, an empty split.
        """
        if split not in self._texts:
            parts = self.train_splits if split == "train" and self.train_splits else (split,)
            rows = [self._part(part) for part in parts]
            rows = rows[0] if self.train_splits is None else joined(rows)
            if not len(rows):
                raise ValueError(f"the {split} split of the data is empty")
            self._texts[split] = rows
        return self._texts[split]

    def _part(self, split: str) -> datasets.Dataset:
        rows = self.read(split)
        rows = rows.add_column("text_id", np.arange(len(rows)))
        if self.label is not None:
            rows = keep_label(rows, self.label, self.source.label_names, split)
        if split not in SPLITS:
            measured = {held_out: self.read(held_out) for held_out in SPLITS[1:] if held_out in self.source.splits}
            rows = without_texts_of(rows, split, measured)
        return at_most(rows, self._limit(split))

    def _limit(self, split: str) -> int | None:
        return self.limits.get(split, self.limits["train"])


def limit_key(split: str) -> str:
    """The key that limits a split."""
    return f"data.max_{ {'validation': 'valid', 'test': 'test'}.get(split, 'train') }_texts"
