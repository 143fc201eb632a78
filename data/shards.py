"""Corpora read from their beginning, piece by piece, and kept nowhere: files, or a data set of the Hub, by the
streaming of `datasets`."""

import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from palimpsest.data.files import Columns, kind_of, read_tables, reading
from palimpsest.data.rows import from_table, need_columns, to_table

_AT_ONCE = 1000  # rows


class Pieces(Protocol):
    """A corpus in pieces that can be read independently, in an order that does not change."""

    @property
    def num_shards(self) -> int: ...

    def tables(self, shard: int) -> Iterator[pa.Table]:
        """Raw rows of a piece, some at a time."""

    def reshard(self) -> "Pieces":
        """The same rows in more pieces, if there can be more."""


@dataclass(frozen=True)
class FilePieces:
    """Files as pieces (data/files.py), Parquet files by their row groups. key: the setting that gave them."""

    shards: tuple[tuple[Path, int | None], ...]
    key: str
    columns: Columns

    @classmethod
    def of(cls, files: Sequence[Path], key: str, columns: Columns) -> "FilePieces":
        """Raises ValueError for a Parquet file that cannot be read."""
        return cls(tuple((path, group) for path in files for group in _groups(path, key)), key, columns)

    @property
    def num_shards(self) -> int:
        return len(self.shards)

    def tables(self, shard: int) -> Iterator[pa.Table]:
        """Raises ValueError for rows that cannot be read."""
        path, group = self.shards[shard]
        return read_tables(path, self.key, self.columns, group)

    def reshard(self) -> "FilePieces":
        return self


def _groups(path: Path, key: str) -> Sequence[int | None]:
    if kind_of(path) != "parquet" or path.suffix.lower() != ".parquet":
        return [None]
    with reading(path, key):
        return range(pq.read_metadata(path).num_row_groups)


@dataclass(frozen=True)
class HubPieces:
    """A split on the Hub, by the streaming of `datasets`. origin: where from, for messages."""

    rows: datasets.IterableDataset
    columns: tuple[str, ...]
    origin: str

    @property
    def num_shards(self) -> int:
        return self.rows.num_shards

    def tables(self, shard: int) -> Iterator[pa.Table]:
        """Raises ValueError where a column is missing."""
        piece = self.rows.shard(num_shards=self.num_shards, index=shard).with_format("arrow")
        for table in piece.iter(batch_size=_AT_ONCE):
            need_columns(table.column_names, self.columns, self.origin)
            yield table.select(self.columns)

    def reshard(self) -> "HubPieces":
        return replace(self, rows=self.rows.reshard())  # Parquet: by row groups


@dataclass(frozen=True)
class Shards:
    """A split of a corpus as the pieces that its files make.

    rows: raw rows, streamed. prepare: a table of raw rows -> texts (columns as in data/sources.py), perhaps fewer.
    start, stop: the raw rows that belong to the split. origin: where from, for messages. files: name and size of each,
    where they lie in a folder: what tells that a corpus has changed.
    """

    rows: Pieces
    prepare: Callable[[pa.Table], datasets.Dataset]
    origin: str
    start: int = 0
    stop: int | None = None
    files: tuple[tuple[str, int], ...] = ()

    @cached_property
    def ranges(self) -> list[tuple[int, int, int | None]]:
        """(shard, first row, row to stop before) of each shard that has a part in the split. Rows are counted only as
        far as `start` and `stop` reach."""
        found, begin = [], 0
        for shard in range(self.rows.num_shards):
            if self.stop is not None and begin >= self.stop:
                break
            first = max(0, self.start - begin)
            if first == 0 and self.stop is None:
                found.append((shard, 0, None))
                continue
            reach = (self.start if self.stop is None else self.stop) - begin
            seen = self._count(shard, reach)
            if seen > first or (self.stop is None and seen == reach):
                found.append((shard, first, None if self.stop is None else seen))
            begin += seen
        return found

    def _count(self, shard: int, reach: int) -> int:
        """Rows of a shard, at most `reach`."""
        seen = 0
        for table in self.rows.tables(shard):
            seen += table.num_rows
            if seen >= reach:
                return reach
        return seen

    def blocks(self, number: int, size: int, skip: int = 0) -> Iterator[pa.Table]:
        """The raw rows of a piece in tables of `size` (the last one may be smaller), without the first `skip` tables.
        These are read, as few formats can be entered in the middle, but nothing is done with them."""
        shard, first, end = self.ranges[number]
        first += skip * size
        held: list[pa.Table] = []
        place, count = 0, 0
        for table in self.rows.tables(shard):
            begin, place = place, place + table.num_rows
            stop = table.num_rows if end is None else min(table.num_rows, end - begin)
            table = table.slice(max(0, first - begin), max(0, stop - max(0, first - begin)))
            while table.num_rows:
                part = table.slice(0, size - count)
                held.append(part)
                count += part.num_rows
                table = table.slice(part.num_rows)
                if count == size:
                    yield pa.concat_tables(held, promote_options="permissive")
                    held, count = [], 0
            if end is not None and place >= end:
                break
        if held:
            yield pa.concat_tables(held, promote_options="permissive")

    def texts(self) -> Iterator[datasets.Dataset]:
        """All texts in the order of the files, a few at a time."""
        for number in range(len(self.ranges)):
            for table in self.blocks(number, _AT_ONCE):
                yield self.prepare(table)

    def first(self, limit: int) -> datasets.Dataset:
        """The first `limit` texts (all there are, if they are fewer), in memory.

        Raises ValueError where there is none.
        """
        found, count = [], 0
        for rows in self.texts():
            found.append(to_table(rows))
            count += len(rows)
            if count >= limit:
                break
        if not count:
            raise ValueError(f"{self.origin} holds no text; give another file")
        return from_table(pa.concat_tables(found).slice(0, limit))

    @property
    def fingerprint(self) -> dict[str, object]:
        """What a resumed run compares: plain values."""
        listing = hashlib.sha256(repr(self.files).encode()).hexdigest()[:16]
        return {"pieces": len(self.ranges), "files": listing if self.files else None}


class SharedReading:
    """Blocks of pieces by number, for readers that follow one another closely: what one has decoded the others get.

    size: rows of a block. keep: blocks held for the others. readers: at most so many go through the pieces at a time.
    """

    def __init__(self, shards: Shards, size: int, keep: int, readers: int) -> None:
        self.shards, self.size, self.keep, self.readers = shards, size, keep, readers
        self._held = OrderedDict[tuple[int, int], pa.Table | None]()
        self._ahead = OrderedDict[tuple[int, int], Iterator[pa.Table]]()  # by the block that comes next

    def block(self, piece: int, number: int) -> pa.Table | None:
        """None: the piece ends before it."""
        key = (piece, number)
        if key in self._held:
            return self._held[key]
        blocks = self._ahead.pop(key, None) or self.shards.blocks(piece, self.size, number)
        table = next(blocks, None)
        if table is not None:
            self._ahead[piece, number + 1] = blocks
        self._held[key] = table
        for some, most in ((self._held, self.keep), (self._ahead, self.readers)):
            while len(some) > most:
                some.popitem(last=False)
        return table


def num_rows(files: Sequence[Path]) -> int | None:
    """Rows in Parquet files, by their footers; None for other kinds, which would have to be read."""
    if any(kind_of(path) != "parquet" for path in files):
        return None
    return sum(pq.read_metadata(path).num_rows for path in files)


def listing(files: Sequence[Path]) -> tuple[tuple[str, int], ...]:
    """Name and size of each file."""
    return tuple((path.name, path.stat().st_size) for path in files)


def share_of(texts: Sequence[str], seed: int, shares: Mapping[str, float]) -> np.ndarray:
    """(n,) the split of each text, `train` or a name in `shares`, by a hash of the text and the seed: it can be told
    from a text alone, and equal texts are always in the same one."""
    bounds = list(itertools.accumulate(shares.values()))
    names = np.array([*shares, "train"])
    key = seed.to_bytes(8, "little", signed=True)
    digests = [hashlib.blake2b(t.encode("utf-8", "surrogatepass"), digest_size=8, key=key).digest() for t in texts]
    places = np.array([int.from_bytes(digest, "little") for digest in digests], dtype=np.float64) / 2.0**64
    return names[np.searchsorted(bounds, places, side="right")] if len(digests) else np.array([], dtype=str)
