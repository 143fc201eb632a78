"""Packed rows as input for encoders of whole texts: token ids, decoded text, labels."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from palimpsest.data.cache import texts_fingerprint
from palimpsest.data.rows import to_table
from palimpsest.data.tokenizers import Vocabulary

CHUNK = 1024  # rows that are encoded at once; the last digits of a vector may depend on it


@dataclass(frozen=True, eq=False)
class Passages:
    """Some packed rows.

    Attributes:
        ids: token ids as a network sees them, without padding.
        labels: (N,) int64, None if there are none.
        sources: original texts of the rows that are whole texts, None for other rows (latents.Encoder).
    """

    ids: list[np.ndarray]
    labels: np.ndarray | None
    tokenizer: PreTrainedTokenizerBase
    special: Collection[int]
    sources: Sequence[str | None] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def content(self) -> list[np.ndarray]:
        """Return the token ids of each row without special tokens (BOS, EOS, padding, mask)."""
        special = np.array(sorted(self.special))
        return [row[~np.isin(row, special)] for row in self.ids]

    @cached_property
    def texts(self) -> list[str]:
        """Return the text of each row. A run of special tokens inside a row becomes a line break."""
        special, runs = np.array(sorted(self.special)), []
        for number, row in enumerate(self.ids):
            edges = np.flatnonzero(np.isin(row, special))
            pieces = np.split(row, np.sort(np.concatenate([edges, edges + 1])))
            runs += [(number, piece) for piece in pieces if len(piece) and piece[0] not in self.special]
        spelt = self.tokenizer.batch_decode([piece.tolist() for _, piece in runs]) if runs else []
        whole: list[list[str]] = [[] for _ in self.ids]
        for (number, _), text in zip(runs, spelt, strict=True):
            whole[number].append(text)
        return ["\n".join(lines) for lines in whole]

    def only(self, number: int) -> Passages:
        """Return the passage at index `number`."""
        one = slice(number, number + 1)
        labels, sources = (None if known is None else known[one] for known in (self.labels, self.sources))
        return Passages(self.ids[one], labels, self.tokenizer, self.special, sources)


@dataclass(eq=False)
class PackedTexts:
    """The packed rows of a split (data/packing.py), read in pieces.

    A window that contains only the end token of its text is read as the window before it, whose end it is. `sources`:
    as in Passages, for all rows.
    """

    rows: datasets.Dataset
    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    sources: Sequence[str | None] | None = None

    @cached_property
    def special(self) -> frozenset[int]:
        return special_ids(self.vocabulary)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: Sequence[int] | np.ndarray | slice) -> Passages:
        columns = self.rows[indices]
        labels = np.asarray(columns["label"]) if "label" in columns else None
        ids = [np.asarray(row) for row in columns["input_ids"]]
        numbers = np.arange(len(self.rows))[indices]
        for place in [place for place, row in enumerate(ids) if self.special.issuperset(row.tolist())]:
            before = self.rows[int(numbers[place]) - 1] if numbers[place] else {}
            if "text_id" in columns and before.get("text_id") == columns["text_id"][place]:
                ids[place] = np.asarray(before["input_ids"])
        sources = None if self.sources is None else [self.sources[i] for i in numbers]
        return Passages(ids, labels, self.tokenizer, self.special, sources)

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Passages]]:
        """Yield the rows from `start` to `stop`, CHUNK at a time, as (index of the first, rows)."""
        stop = len(self) if stop is None else stop
        for first in range(start, stop, CHUNK):
            yield first, self[first : min(first + CHUNK, stop)]

    @cached_property
    def fingerprint(self) -> str:
        """Return a hex digest of the tokens and lengths of all rows."""
        digest = hashlib.sha256(np.asarray(self.rows["length"][:], dtype=np.int64).tobytes())
        for chunk in to_table(self.rows.select_columns("input_ids"))["input_ids"].chunks:
            digest.update(chunk.flatten().to_numpy(zero_copy_only=False).astype(np.int32).tobytes())
        return digest.hexdigest()

    @cached_property
    def known_fingerprint(self) -> str:
        """Return a hex digest of the rows' labels and sources."""
        labels = np.asarray(self.rows["label"][:], dtype=np.int64) if "label" in self.rows.column_names else np.zeros(0)
        return texts_fingerprint([labels.tobytes().hex(), *(source or "" for source in self.sources or ())])


def special_ids(vocabulary: Vocabulary) -> frozenset[int]:
    """Return the ids of begin, end, padding and mask."""
    found = (vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id, vocabulary.mask_id)
    return frozenset(i for i in found if i is not None)


def without_padding(ids: Sequence[int], vocabulary: Vocabulary) -> np.ndarray:
    """Return a row without its padding; trailing end tokens are reduced to one."""
    row = [int(i) for i in ids]
    tail = list(itertools.takewhile(lambda i: i in (vocabulary.pad_id, vocabulary.eos_id), reversed(row)))
    ended = [vocabulary.eos_id] if vocabulary.eos_id in tail else []
    return np.array(row[: len(row) - len(tail)] + ended, dtype=np.int32)
