"""Data sets of texts: making them from tables, choosing rows, holding some out.

A data set has the column `text` and, if known, `label`, `ends` and `document` (data/sources.py). Everything stays in
Arrow, so that tens of millions of texts need no Python objects.
"""

import hashlib
import itertools
import logging
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from palimpsest.common.messages import listed, short_repr
from palimpsest.data.cache import cached_folder
from palimpsest.data.files import classes, label_number, text_array
from palimpsest.data.tables import fingerprint_of, read, texts_of, write

log = logging.getLogger(__name__)

_KEPT = "kept.npy"


def text_table(
    texts: pa.ChunkedArray | Sequence[str],
    labels: Sequence[int] | None = None,
    ends: Sequence[Sequence[int]] | None = None,
) -> pa.Table:
    """Return the columns `text` (large_string) and, if given, `label` (int64) and `ends` (list of int64)."""
    if not isinstance(texts, pa.ChunkedArray):
        texts = pa.chunked_array([pa.array(texts, pa.large_string())])
    columns = {"text": texts} | ({} if labels is None else {"label": pa.array(labels, pa.int64())})
    columns |= {} if ends is None else {"ends": pa.array(ends, pa.list_(pa.int64()))}
    return pa.table(columns)


def with_documents(tables: Iterable[pa.Table], start: str | None) -> Iterator[pa.Table]:
    """Add the column `document`: the number of texts so far that match `start`, the pattern that begins a document.

    It is -1 throughout if `start` is None.
    """
    begun = 0
    for table in tables:
        numbers = np.full(table.num_rows, -1)
        if start is not None:
            begins = pc.match_substring_regex(table["text"], f"^(?:{start})")
            numbers = begun + np.cumsum(begins.to_numpy())
            begun = int(numbers[-1]) if len(numbers) else begun
        yield table.append_column("document", pa.array(numbers, pa.int64()))


def in_parts(parts: Sequence[Sequence[str]]) -> tuple[list[str], list[list[int]]]:
    """Join the parts of each text; return the texts and the end of each part but the last, in characters."""
    ends = [list(itertools.accumulate(map(len, pieces[:-1]))) for pieces in parts]
    return ["".join(pieces) for pieces in parts], ends


def parts_of(text: str, ends: Sequence[int]) -> list[str]:
    """Split a text into the parts that `in_parts` joined."""
    bounds = [0, *map(int, ends), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(bounds)]


def from_table(table: pa.Table) -> datasets.Dataset:
    """Return a Dataset that shares the memory of `table`."""
    return datasets.Dataset(datasets.table.InMemoryTable(table))


def to_table(rows: datasets.Dataset) -> pa.Table:
    """Return all rows as an Arrow table, memory-mapped if they are on disk."""
    return rows.with_format("arrow")[:]


def take_rows(rows: datasets.Dataset, indices: Sequence[int] | np.ndarray) -> datasets.Dataset:
    """Return the rows at `indices`: in memory without an index table, so that later reads are plain slices, unless the
    rows are on disk, where they stay."""
    indices = np.asarray(indices, dtype=np.int64)
    return rows.select(indices) if rows.cache_files else from_table(to_table(rows).take(pa.array(indices)))


def permutation(n: int, seed: int) -> np.ndarray:
    """Return a permutation of n rows, (n,), fixed by the seed and n."""
    return np.random.default_rng([seed, n]).permutation(n)


# -------------------------------------------------------------------------------- choosing


def keep_label(rows: datasets.Dataset, label: int, label_names: Sequence[str] | None, split: str) -> datasets.Dataset:
    """Return the rows of one class. Raises ValueError if there are no labels, no such class, or no row of it."""
    if label_names is None or "label" not in rows.column_names:
        raise ValueError(f"data.label={label}: these texts have no labels; leave data.label=null")
    if type(label) is not int or label not in range(len(label_names)):
        raise ValueError(f"data.label={label} is not one of the labels: {classes(label_names)}")
    keep = np.flatnonzero(np.asarray(rows["label"][:]) == label)
    if not len(keep):
        raise ValueError(
            f"data.label={label}: the {split} split has no text of class {label_names[label]}; give it some (more "
            "texts, a larger data.validation_share or data.test_share), or leave the class out of the data"
        )
    return take_rows(rows, keep)


def at_most(rows: datasets.Dataset, limit: int | None) -> datasets.Dataset:
    """Return `limit` rows in their order; None returns all.

    With labels they are a fixed random choice, because files may be sorted by label; without, they are the first rows,
    which may belong together.
    """
    if limit is None or limit >= len(rows):
        return rows
    some = np.random.default_rng(0).permutation(len(rows))[:limit] if "label" in rows.column_names else range(limit)
    return take_rows(rows, np.sort(some))


def without_blanks(table: pa.Table) -> pa.Table:
    """Drop rows of white space, and the line end that some data sets keep."""
    table = table.filter(pc.not_equal(pc.utf8_trim_whitespace(table["text"]), ""))
    stripped = pc.utf8_rtrim(table["text"], characters="\r\n")
    return table.set_column(table.column_names.index("text"), "text", stripped)


def carve(
    whole: Path,
    folder: Path,
    shares: Mapping[str, float],
    seed: int,
    prepare: Callable[[Iterable[pa.Table]], Iterable[pa.Table]] = iter,
) -> None:
    """Divide the rows of the table at `whole` among `<split>.arrow` for each of `shares`, and `train.arrow`.

    The parts are disjoint, each has at least one row, in the order of the table. The choice depends only on `seed` and
    the number of rows. `prepare` makes texts of the chosen rows. Rows of train whose text is also in a held-out part
    are dropped, because they would make that part too easy. Raises ValueError if there are too few rows, or every text
    of train is also held out.
    """
    part = _parts(sum(table.num_rows for table in read(whole)), shares, seed)
    held_out: list[np.ndarray] = []

    def hashed(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        for table in tables:
            held_out.append(text_hashes(table["text"].to_pylist()))
            yield table

    for number, split in enumerate(shares, 1):
        write(folder / f"{split}.arrow", hashed(prepare(_chosen(read(whole), part == number))))
    hashes = np.unique(np.concatenate(held_out))
    train = (_without(table, hashes) for table in prepare(_chosen(read(whole), part == 0)))
    kept, expected = write(folder / "train.arrow", train), int(np.count_nonzero(part == 0))
    _report_dropped(expected, kept, "train", shares)


def _parts(number: int, shares: Mapping[str, float], seed: int) -> np.ndarray:
    """Return the part of each row, (n,): k for the k-th of `shares`, 0 for train."""
    sizes = {split: max(1, round(share * number)) for split, share in shares.items()}
    if sum(sizes.values()) >= number:
        held_out = ", ".join(sizes)
        raise ValueError(
            f"{number} texts are too few to hold out {held_out} and keep a train split; give data.validation_path "
            "and data.test_path, or more texts"
        )
    part = np.zeros(number, dtype=np.int8)
    chosen = permutation(number, seed)[: sum(sizes.values())]
    part[chosen] = np.repeat(np.arange(1, len(sizes) + 1), list(sizes.values()))
    return part


def _chosen(tables: Iterable[pa.Table], keep: np.ndarray) -> Iterator[pa.Table]:
    start = 0
    for table in tables:
        yield table.filter(pa.array(keep[start : start + table.num_rows]))
        start += table.num_rows


def text_hashes(texts: Iterable[str], key: bytes = b"") -> np.ndarray:
    """Return a hash of 64 bits of each text, (n,).

    One of ten million texts has the hash of another one out of a million by chance in one of two million corpora.
    """
    digests = (hashlib.blake2b(t.encode("utf-8", "surrogatepass"), digest_size=8, key=key).digest() for t in texts)
    return np.frombuffer(b"".join(digests), dtype="<u8")


def _without(table: pa.Table, hashes: np.ndarray) -> pa.Table:
    """Drop the rows whose text has one of `hashes`, which are sorted."""
    own = text_hashes(table["text"].to_pylist())
    found = hashes[np.minimum(np.searchsorted(hashes, own), len(hashes) - 1)] == own
    return table.filter(pa.array(~found))


def without_texts_of(
    rows: datasets.Dataset, name: str, held_out: Mapping[str, datasets.Dataset], cache_dir: str
) -> datasets.Dataset:
    """Drop the rows of the split `name` whose text is in a held-out split.

    Which rows stay is remembered in `cache_dir`, if the rows are on disk. Raises ValueError if none is left.
    """

    def find(folder: Path) -> None:
        np.save(folder / _KEPT, _not_in(rows, held_out.values()))

    if rows.cache_files:
        key = {"rows": fingerprint_of(rows), "held_out": [fingerprint_of(part) for part in held_out.values()]}
        keep = np.load(cached_folder(cache_dir, "kept", key, find)[0] / _KEPT)
    else:
        keep = _not_in(rows, held_out.values())
    _report_dropped(len(rows), len(keep), name, held_out)
    return take_rows(rows, keep) if len(keep) < len(rows) else rows


def _not_in(rows: datasets.Dataset, others: Iterable[datasets.Dataset]) -> np.ndarray:
    """Return the numbers of the rows whose text is in none of the others."""
    hashes = np.concatenate([text_hashes(texts_of(other)) for other in others])
    return np.flatnonzero(~np.isin(text_hashes(texts_of(rows)), hashes))


def _report_dropped(before: int, kept: int, name: str, held_out: Iterable[str]) -> None:
    if not kept:
        raise ValueError(f"every text of the {name} split also stands in a held-out split; they are too much alike")
    if kept < before:
        log.info("%d texts that also stand in %s were dropped from %s", before - kept, ", ".join(held_out), name)


def joined(parts: Sequence[datasets.Dataset]) -> datasets.Dataset:
    """Concatenate several splits' texts without labels; text_id continues from split to split."""
    tables, start = [], 0
    for part in parts:
        numbers = np.asarray(part["text_id"][:])
        table, kept = to_table(part), [name for name in ("text", "ends") if name in part.column_names]
        tables.append(pa.table({**{name: table[name] for name in kept}, "text_id": numbers + start}))
        start += int(numbers.max(initial=-1)) + 1
    return from_table(pa.concat_tables(tables))


# -------------------------------------------------------------------------------- checks


def need_columns(present: Sequence[str], wanted: Sequence[str], origin: str) -> None:
    """Raise ValueError with the columns that `origin` lacks and those it has."""
    absent = [column for column in wanted if column not in present]
    if absent:
        raise ValueError(f"{origin} has no column {', '.join(absent)}; it has {listed(present)}")


def text_column(table: pa.Table, column: str, origin: str, first: int = 0) -> pa.ChunkedArray:
    """Return a column as large_string. Raises ValueError with the first row that is not a text.

    `first` is the number of the table's first row.
    """
    values = table.column(column).combine_chunks()
    return pa.chunked_array([text_array(values, column, lambda number: f"{origin}: row {first + number}")])


def as_labels(values: Sequence[object], names: Sequence[str], origin: str, first: int = 0) -> list[int]:
    """Return the class numbers of labels, which are names or numbers. Raises ValueError with the row of another
    value, counted from `first`."""
    numbers = {name: number for number, name in enumerate(names)}
    labels = [label_number(value, numbers) for value in values]
    if None in labels:
        row = labels.index(None)
        raise ValueError(
            f"{origin}: row {first + row} has the label {short_repr(values[row])}, which is none of {classes(names)}; "
            "correct the file, or give data.label_names"
        )
    return labels


def check_not_empty(number: int, origin: str) -> None:
    """Raise ValueError if the number of rows is 0."""
    if not number:
        raise ValueError(f"{origin} holds no text; give another file")


def check_split(split: str, splits: Sequence[str]) -> None:
    """Raise ValueError with the existing splits if `split` is none of them."""
    if split not in splits:
        raise ValueError(f"there is no split {split!r}; there are {', '.join(splits)}")


def check_parts(parts: Sequence[str] | None, text_columns: Sequence[str]) -> None:
    """Raise ValueError for templates that are missing, or that name columns other than those of the text."""
    columns = ", ".join(text_columns)
    if parts is None:
        if len(text_columns) > 1:
            raise ValueError(f"data.source.text_columns=[{columns}]: say in data.source.parts how they make a text")
        return
    if not parts:
        raise ValueError(f"data.source.parts=[] makes no text out of the columns {columns}; give at least one part")
    for part in parts:
        names = [name for _, name, _, _ in string.Formatter().parse(part) if name is not None]
        unknown = [name for name in names if name not in text_columns]
        if unknown:
            raise ValueError(
                f"data.source.parts: {part!r} asks for {', '.join(unknown)}; data.source.text_columns has {columns}"
            )
