"""Data sets of texts: making them from tables, choosing rows, holding some out.

A data set has the column `text` and, if known, `label`, `ends` and `document` (data/sources.py). Everything stays in
Arrow, so that tens of millions of texts need no Python objects.
"""

import itertools
import logging
import string
from collections.abc import Mapping, Sequence

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from palimpsest.common.messages import listed, short_repr
from palimpsest.data.files import classes, is_text, label_number

log = logging.getLogger(__name__)


def text_rows(
    texts: pa.ChunkedArray | Sequence[str],
    labels: Sequence[int] | None = None,
    ends: Sequence[Sequence[int]] | None = None,
) -> datasets.Dataset:
    """Return the columns `text` (large_string) and, if given, `label` (int64) and `ends` (list of int64), in memory."""
    if not isinstance(texts, pa.ChunkedArray):
        texts = pa.chunked_array([pa.array(texts, pa.large_string())])
    columns = {"text": texts} | ({} if labels is None else {"label": pa.array(labels, pa.int64())})
    columns |= {} if ends is None else {"ends": pa.array(ends, pa.list_(pa.int64()))}
    return from_table(pa.table(columns))


def with_documents(rows: datasets.Dataset, start: str | None) -> datasets.Dataset:
    """Add the column `document`: the number of texts so far that match `start`, the pattern that begins a document.

    It is -1 throughout if `start` is None.
    """
    if start is None:
        return rows.add_column("document", np.full(len(rows), -1))
    begins = pc.match_substring_regex(to_table(rows)["text"], f"^(?:{start})")
    return rows.add_column("document", np.cumsum(begins.to_numpy()))


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
    """Return the rows at `indices`, in memory without an index table, so that later reads are plain slices."""
    return from_table(to_table(rows).take(pa.array(np.asarray(indices, dtype=np.int64))))


def permutation(n: int, seed: int) -> np.ndarray:
    """Return a permutation of n rows, (n,), fixed by the seed and n."""
    return np.random.default_rng([seed, n]).permutation(n)


# -------------------------------------------------------------------------------- choosing


def keep_label(rows: datasets.Dataset, label: int, label_names: Sequence[str] | None, split: str) -> datasets.Dataset:
    """Return the rows of one class. Raises ValueError if there are no labels, no such class, or no row of it."""
    if label_names is None or "label" not in rows.column_names:
        raise ValueError(f"data.label={label}: these texts have no labels; leave data.label=null")
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(label_names):
        raise ValueError(f"data.label={label} is not one of the labels: {classes(label_names)}")
    keep = np.flatnonzero(np.asarray(rows["label"][:]) == label)
    if not len(keep):
        raise ValueError(f"data.label={label} ({label_names[label]}): the {split} split has no text with that label")
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


def without_blanks(rows: datasets.Dataset) -> datasets.Dataset:
    """Drop rows of white space, and the line end that some data sets keep."""
    table = to_table(rows)
    table = table.filter(pc.not_equal(pc.utf8_trim_whitespace(table["text"]), ""))
    stripped = pc.utf8_rtrim(table["text"], characters="\r\n")
    return from_table(table.set_column(table.column_names.index("text"), "text", stripped))


def carve(rows: datasets.Dataset, shares: Mapping[str, float], seed: int) -> dict[str, datasets.Dataset]:
    """Split `rows` into the named shares and `train`, disjoint, each with at least one row, in the order of `rows`.

    The choice depends only on `seed` and the number of rows. Rows of `train` whose text is also in a held-out part are
    dropped, because they would make that part too easy.
    """
    if not shares:
        return {"train": rows}
    order = permutation(len(rows), seed)
    sizes = {split: max(1, round(share * len(rows))) for split, share in shares.items()}
    if sum(sizes.values()) >= len(rows):
        held_out = ", ".join(sizes)
        raise ValueError(
            f"{len(rows)} texts are too few to hold out {held_out} and keep a train split; give data.validation_path "
            "and data.test_path, or more texts"
        )
    parts, start = {}, 0
    for split, size in sizes.items():
        parts[split] = take_rows(rows, np.sort(order[start : start + size]))
        start += size
    return {**parts, "train": without_texts_of(take_rows(rows, np.sort(order[start:])), "train", parts)}


def without_texts_of(rows: datasets.Dataset, name: str, held_out: Mapping[str, datasets.Dataset]) -> datasets.Dataset:
    """Drop the rows of the split `name` whose text is in a held-out split. Raises ValueError if none is left."""
    table = to_table(rows)
    for part in held_out.values():
        table = table.filter(pc.invert(pc.is_in(table["text"], value_set=to_table(part)["text"].combine_chunks())))
    if not table.num_rows:
        raise ValueError(f"every text of the {name} split also stands in a held-out split; they are too much alike")
    if table.num_rows < len(rows):
        dropped = len(rows) - table.num_rows
        log.info("%d texts that also stand in %s were dropped from %s", dropped, ", ".join(held_out), name)
    return from_table(table)


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


def text_column(table: pa.Table, column: str, origin: str) -> pa.ChunkedArray:
    """Return a column as large_string. Raises ValueError with the first row that is not a text."""
    texts = table.column(column)
    if pa.types.is_dictionary(texts.type):
        texts = texts.cast(texts.type.value_type)
    if not is_text(texts.type) or texts.null_count:
        for row, text in enumerate(texts.to_pylist()):
            if not isinstance(text, str):
                raise ValueError(f"{origin}: row {row} of column {column!r} is {short_repr(text)}, not a text")
    return texts.cast(pa.large_string())


def as_labels(values: Sequence[object], names: Sequence[str], origin: str) -> list[int]:
    """Return the class numbers of labels, which are names or numbers. Raises ValueError with the row of another
    value."""
    numbers = {name: number for number, name in enumerate(names)}
    labels = [label_number(value, numbers) for value in values]
    if None in labels:
        row = labels.index(None)
        raise ValueError(
            f"{origin}: row {row} has the label {short_repr(values[row])}, which is none of {classes(names)}; "
            "correct the file, or give data.label_names"
        )
    return labels


def not_empty(rows: datasets.Dataset, origin: str) -> datasets.Dataset:
    """Return the rows. Raises ValueError if there are none."""
    if not len(rows):
        raise ValueError(f"{origin} holds no text; give another file")
    return rows


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
