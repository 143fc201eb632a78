"""Corpora that are read from their beginning in pieces and never stored: files, or a streamed data set of the Hub."""

import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from palimpsest.data.files import Columns, kind_of, read_tables, reading
from palimpsest.data.rows import check_not_empty, from_table, need_columns, text_hashes, to_table
from palimpsest.data.tables import between

_AT_ONCE = 1000  # rows


@dataclass(frozen=True)
class FilePieces:
    """Files as pieces (data/files.py), Parquet files by row groups. `key`: the setting that named them."""

    shards: tuple[tuple[Path, int | None], ...]
    key: str
    columns: Columns

    @classmethod
    def of(cls, files: Sequence[Path], key: str, columns: Columns) -> "FilePieces":
        """Build the pieces of files. Raises ValueError for a Parquet file that cannot be read."""
        return cls(tuple((path, group) for path in files for group in _groups(path, key)), key, columns)

    @property
    def num_shards(self) -> int:
        return len(self.shards)

    def tables(self, shard: int) -> Iterator[pa.Table]:
        """Yield the rows of a piece. Raises ValueError for rows that cannot be read."""
        path, group = self.shards[shard]
        return read_tables(path, self.key, self.columns, group)

    def count(self, shard: int) -> int | None:
        """Return the number of rows of a piece, if it is known without reading them."""
        path, group = self.shards[shard]
        return None if group is None else _footer(path, path.stat().st_mtime_ns).row_group(group).num_rows

    def reshard(self) -> "FilePieces":
        return self


def _groups(path: Path, key: str) -> Sequence[int | None]:
    if kind_of(path) != "parquet" or path.suffix.lower() != ".parquet":
        return [None]
    with reading(path, key):
        return range(_footer(path, path.stat().st_mtime_ns).num_row_groups)


@lru_cache(maxsize=1)
def _footer(path: Path, modified: int) -> pq.FileMetaData:  # `modified` is for the cache: a file may be replaced
    return pq.read_metadata(path)


@dataclass(frozen=True)
class HubPieces:
    """A streamed split of a data set on the Hub. `origin`: where it is from, for messages."""

    rows: datasets.IterableDataset
    columns: tuple[str, ...]
    origin: str

    @property
    def num_shards(self) -> int:
        return self.rows.num_shards

    def tables(self, shard: int) -> Iterator[pa.Table]:
        """Yield the rows of a piece. Raises ValueError if a column is missing."""
        piece = self.rows.shard(num_shards=self.num_shards, index=shard).with_format("arrow")
        for table in piece.iter(batch_size=_AT_ONCE):
            need_columns(table.column_names, self.columns, self.origin)
            yield table.select(self.columns)

    def count(self, shard: int) -> None:
        """Return None: the rows of a piece are not known without reading them."""

    def reshard(self) -> "HubPieces":
        return replace(self, rows=self.rows.reshard())  # Parquet: by row groups


@dataclass(frozen=True)
class Shards:
    """A split of a corpus in the pieces given by its files.

    Attributes:
        rows: raw rows, streamed.
        prepare: turns a table of raw rows into texts (columns as in data/sources.py), perhaps fewer.
        origin: where they are from, for messages.
        start, stop: bounds of the raw rows that belong to the split.
        files: name and size of each file in a folder, which reveal a changed corpus.
    """

    rows: FilePieces | HubPieces
    prepare: Callable[[pa.Table], datasets.Dataset]
    origin: str
    start: int = 0
    stop: int | None = None
    files: tuple[tuple[str, int], ...] = ()

    @cached_property
    def ranges(self) -> list[tuple[int, int, int | None]]:
        """Return (shard, first row, end row) of each shard that overlaps the split.

        Rows are counted only as far as `start` and `stop` reach.
        """
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
        """Return the number of rows of a shard, at most `reach`."""
        if (known := self.rows.count(shard)) is not None:
            return min(known, reach)
        seen = 0
        for table in self.rows.tables(shard):
            seen += table.num_rows
            if seen >= reach:
                return reach
        return seen

    def blocks(self, number: int, size: int, skip: int = 0) -> Iterator[pa.Table]:
        """Yield the raw rows of a piece in tables of `size` rows (the last may be smaller), without the first `skip`.

        Skipped tables are read but not processed, because few formats can be entered in the middle.
        """
        shard, first, end = self.ranges[number]
        held: list[pa.Table] = []
        count = 0
        for table in between(self.rows.tables(shard), first + skip * size, end):
            while table.num_rows:
                part = table.slice(0, size - count)
                held.append(part)
                count += part.num_rows
                table = table.slice(part.num_rows)
                if count == size:
                    yield pa.concat_tables(held, promote_options="permissive")
                    held, count = [], 0
        if held:
            yield pa.concat_tables(held, promote_options="permissive")

    def first(self, limit: int) -> datasets.Dataset:
        """Return the first `limit` texts, or all if there are fewer, in memory. Raises ValueError if there are none."""
        found, count = [], 0
        tables = itertools.chain.from_iterable(map(self.rows.tables, range(self.rows.num_shards)))
        for table in between(tables, self.start, self.stop):
            found.append(to_table(self.prepare(table)))
            count += found[-1].num_rows
            if count >= limit:
                break
        check_not_empty(count, self.origin)
        return from_table(pa.concat_tables(found).slice(0, limit))

    @property
    def fingerprint(self) -> dict[str, object]:
        """Return plain values that a resumed run compares."""
        files = hashlib.sha256(repr(self.files).encode()).hexdigest()[:16] if self.files else None
        return {"pieces": len(self.ranges), "files": files}


@dataclass
class SharedBlocks:
    """Blocks of `size` rows by number, decoded once for at most `readers` readers that follow one another closely.

    The last `keep` blocks are kept for other readers.
    """

    shards: Shards
    size: int
    keep: int
    readers: int
    _decoded: OrderedDict[tuple[int, int], pa.Table | None] = field(default_factory=OrderedDict)
    _ahead: OrderedDict[tuple[int, int], Iterator[pa.Table]] = field(default_factory=OrderedDict)  # by their next block

    def block(self, piece: int, number: int) -> pa.Table | None:
        """Return a block; None if the piece ends before it."""
        key = (piece, number)
        if key in self._decoded:
            return self._decoded[key]
        blocks = self._ahead.pop(key, None) or self.shards.blocks(piece, self.size, number)
        table = next(blocks, None)
        if table is not None:
            self._ahead[piece, number + 1] = blocks
        self._decoded[key] = table
        for some, most in ((self._decoded, self.keep), (self._ahead, self.readers)):
            while len(some) > most:
                some.popitem(last=False)
        return table


def num_rows(files: Sequence[Path]) -> int | None:
    """Return the number of rows in Parquet files by their footers; None for other kinds."""
    if any(kind_of(path) != "parquet" for path in files):
        return None
    return sum(pq.read_metadata(path).num_rows for path in files)


def listing(files: Sequence[Path]) -> tuple[tuple[str, int], ...]:
    """Return the name and size of each file."""
    return tuple((path.name, path.stat().st_size) for path in files)


def share_of(texts: Sequence[str], seed: int, shares: Mapping[str, float]) -> np.ndarray:
    """Return the split of each text, `train` or a name in `shares`, (n,), by a hash of the text and the seed.

    The split depends on the text alone, so equal texts are always in the same one.
    """
    bounds = list(itertools.accumulate(shares.values()))
    names = np.array([*shares, "train"])
    key = seed.to_bytes(8, "little", signed=True)
    places = text_hashes(texts, key).astype(np.float64) / 2.0**64
    return names[np.searchsorted(bounds, places, side="right")]
