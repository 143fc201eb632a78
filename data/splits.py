"""The texts that a run asks for: one class, a limit, several splits joined, the beginning of a stream."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import datasets
import numpy as np

from palimpsest.data.labels import first_of_each_class, with_wrong_labels
from palimpsest.data.rows import at_most, joined, keep_label, without_texts_of
from palimpsest.data.sources import Source

SPLITS = ("train", "validation", "test")


@dataclass(eq=False)
class SplitTexts:
    """The texts of a source's splits, by settings of dataloader.Texts; each split is read once.

    Args:
        limits: split -> data.max_*_texts, None for all.
        other_sources: the other sources of a mixture, whose held-out texts are not trained on.
        streaming: read no more of a split than its limit; for an unlimited train split, `sample_texts`.
        cache_dir: remembers which training texts are not held out.
    """

    source: Source
    limits: Mapping[str, int | None]
    streaming: bool
    sample_texts: int
    label: int | None
    train_splits: Sequence[str] | None
    label_noise: float
    texts_per_class: int | None
    cache_dir: str
    other_sources: tuple[Source, ...] = ()
    _texts: dict[str, datasets.Dataset] = field(default_factory=dict, init=False)
    _parts: dict[str, list["SplitTexts"]] = field(default_factory=dict, init=False)

    def read(self, split: str) -> datasets.Dataset:
        """Return the split's rows from the source; when streaming, no more of them than the limit."""
        if not self.streaming:
            return self.source.load(split)
        limit = self._limit(split)
        limit = self.sample_texts if split == "train" and limit is None else limit
        if limit is None:
            key = {"validation": "valid", "test": "test"}.get(split, "train")
            remedy = f"set data.max_{key}_texts, or data.streaming=false"
            raise ValueError(f"data.streaming=true reads a split up to its limit, and {split} has none: {remedy}")
        if not hasattr(self.source, "stream"):
            raise ValueError("data.streaming=true: these texts are made or cut as a whole; set it to false")
        return self.source.stream(split, limit)

    def parts(self, split: str) -> list["SplitTexts"]:
        """Return the texts of each data set that a split is a mixture of; only these if it is none."""
        if split not in self._parts:
            sources = self.source.mixed(split) if hasattr(self.source, "mixed") else (self.source,)
            others = lambda source: tuple(other for other in sources if other is not source)
            alone = len(sources) == 1 or self.train_splits is not None
            self._parts[split] = (
                [self] if alone else [replace(self, source=source, other_sources=others(source)) for source in sources]
            )
        return self._parts[split]

    def of(self, split: str) -> datasets.Dataset:
        """Return columns text, text_id (number in the whole split), and label and ends (data/sources.py) if present.
        Raises ValueError for an unknown split, an unknown label or an empty split."""
        if split not in self._texts:
            mixed = self.parts(split)
            if len(mixed) > 1:
                self._texts[split] = joined([part.of(split) for part in mixed])
                return self._texts[split]
            parts = self.train_splits if split == "train" and self.train_splits else (split,)
            rows = [self._part(part) for part in parts]
            rows = rows[0] if self.train_splits is None else joined(rows)
            if not len(rows):
                raise ValueError(f"the {split} split of the data is empty")
            self._texts[split] = rows
        return self._texts[split]

    def whole(self, split: str) -> datasets.Dataset:
        """Return the split's texts without regard to label and limits, for a tokenizer."""
        mixed = self.parts(split)
        if len(mixed) == 1:
            return self.read(split)
        return datasets.concatenate_datasets(
            [part.trainable(part.read(split)).select_columns("text") for part in mixed]
        )

    def trainable(self, rows: datasets.Dataset) -> datasets.Dataset:
        """Return those rows of the train split that no other data set of a mixture holds out."""
        for other in self.other_sources:
            measured = {name: other.load(name) for name in SPLITS[1:] if name in other.splits}
            rows = without_texts_of(rows, "train", measured, self.cache_dir)
        return rows

    def _part(self, split: str) -> datasets.Dataset:
        rows = self.read(split)
        if "text_id" not in rows.column_names:
            rows = rows.add_column("text_id", np.arange(len(rows)))
        if split == "train" and self.train_splits is None:
            rows = first_of_each_class(rows, self.texts_per_class, self.source.label_names)
            rows = with_wrong_labels(rows, self.label_noise, self.source.label_names)
        if self.label is not None:
            rows = keep_label(rows, self.label, self.source.label_names, split)
        if split == "train":
            rows = self.trainable(rows)
        if split not in SPLITS:
            measured = {held_out: self.read(held_out) for held_out in SPLITS[1:] if held_out in self.source.splits}
            rows = without_texts_of(rows, split, measured, self.cache_dir)
        return at_most(rows, self._limit(split))

    def _limit(self, split: str) -> int | None:
        return self.limits.get(split, self.limits["train"])
