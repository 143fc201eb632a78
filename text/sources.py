"""Where text comes from: named data sets (a local folder or the Hub), the user's own files, the embedded
corpus.

Every source has `splits` (names it can load), `label_names` (None where texts have no labels) and
`load(split) -> datasets.Dataset` with the columns `text` (str) and, where there are labels, `label` (int64).
`load` gives the same rows in the same order every time, in every process. Split names are `train`,
`validation`, `test`.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Protocol

import datasets
import numpy as np
import pyarrow as pa

from text import reviews
from text.files import read_files
from text.hub import both_ways, local_folder, quick_when_offline

log = logging.getLogger(__name__)


class Source(Protocol):
    """What TextData asks of a source."""

    @property
    def splits(self) -> tuple[str, ...]: ...

    @property
    def label_names(self) -> tuple[str, ...] | None: ...

    def load(self, split: str) -> datasets.Dataset: ...


class HubOrFolder:
    """A named data set: `$DATA_DIR/<folder>/<files[split]>` where that exists, else `hub_id` on the Hub.

    files, hub_splits: split -> file name, split -> split expression of the Hub.
    text_columns: columns joined by `separator` into one text. drop_blank: leave out texts of white space and
    strip the line end that the Hub keeps (data sets of one text per line).
    A data set without a validation split has `validation_share` of its train split held out, chosen by
    `seed`; texts that also occur in the held-out part are dropped from the train part. shuffle: put rows
    into an order fixed by `seed` (for files sorted by label).
    Raises FileNotFoundError naming both ways where neither the folder nor the Hub has it.
    """

    def __init__(
        self,
        hub_id: str,
        folder: str,
        files: Mapping[str, str],
        hub_splits: Mapping[str, str],
        hub_config: str | None = None,
        text_columns: str | Sequence[str] = "text",
        separator: str = "\n",
        label_column: str | None = None,
        label_names: Sequence[str] | None = None,
        drop_blank: bool = False,
        validation_share: float | None = None,
        shuffle: bool = False,
        seed: int = 0,
    ) -> None:
        self.hub_id, self.hub_config, self.folder = hub_id, hub_config, folder
        self.files, self.hub_splits = dict(files), dict(hub_splits)
        self.text_columns = [text_columns] if isinstance(text_columns, str) else list(text_columns)
        self.separator, self.drop_blank = separator, drop_blank
        self.label_column = label_column
        self.label_names = tuple(label_names) if label_names else None
        self.shuffle, self.seed = shuffle, seed
        self.validation_share = validation_share
        if label_column and not label_names:
            raise ValueError(f"data.source.label_column={label_column} needs data.source.label_names")
        if validation_share is not None:
            _check_share("data.source.validation_share", validation_share)

    @property
    def splits(self) -> tuple[str, ...]:
        carved = ("validation",) if self.validation_share is not None else ()
        return _ordered({*self.files, *carved})

    def load(self, split: str) -> datasets.Dataset:
        """The split's rows. Raises ValueError for a split that does not exist or that holds bad rows."""
        _check_split(split, self.splits)
        if self.validation_share is None or split not in ("train", "validation"):
            return self._rows(split)
        return self._carved[split]

    @cached_property
    def _carved(self) -> dict[str, datasets.Dataset]:
        return carve(self._rows("train"), {"validation": self.validation_share}, self.seed)

    def _rows(self, split: str) -> datasets.Dataset:
        table, origin = self._table(split)
        table = _need_columns(table, [*self.text_columns, *([self.label_column] if self.label_column else [])], origin)
        texts = [_as_text_column(table, column, origin) for column in self.text_columns]
        joined = texts[0] if len(texts) == 1 else [self.separator.join(row) for row in zip(*texts, strict=True)]
        columns: dict[str, Sequence] = {"text": joined}
        if self.label_column is not None:
            columns["label"] = _as_labels(table.column(self.label_column).to_pylist(), self.label_names, origin)
        if self.drop_blank:
            keep = [i for i, text in enumerate(joined) if text.strip()]
            columns = {name: [column[i] for i in keep] for name, column in columns.items()}
            columns["text"] = [text.rstrip("\r\n") for text in columns["text"]]
        rows = datasets.Dataset.from_dict(columns, features=_features(self.label_column is not None))
        rows = _not_empty(rows, origin)
        return _select(rows, _permutation(len(rows), self.seed)) if self.shuffle else rows

    def _table(self, split: str) -> tuple[pa.Table, str]:
        """The raw columns, and where they are from (for messages)."""
        folder = local_folder(self.folder)
        if folder is not None and (folder / self.files[split]).is_file():
            path = folder / self.files[split]
            return read_files(str(path), "DATA_DIR"), str(path)
        try:
            with quick_when_offline():
                rows = datasets.load_dataset(self.hub_id, self.hub_config, split=self.hub_splits[split])
        except Exception as error:  # the Hub libraries raise many types, none of them for users
            place = f"{self.folder}/{self.files[split]}"
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            raise FileNotFoundError(f"{both_ways('data', self.hub_id, place)} ({reason})") from error
        return rows.with_format("arrow")[:], f"{self.hub_id} ({self.hub_splits[split]})"


class UserFiles:
    """The user's own files: txt (one text per non-empty line), csv, tsv, json, jsonl, parquet; a file, a
    folder or a glob.

    label_column: None = texts without labels. Labels are ints from 0 on, or strings (numbered in sorted
    order over all splits); `label_names` names ints, or fixes which strings there are and their order.
    validation_path, test_path: files of their own; without them shares of `path` are held out, chosen by
    `seed`. Raises FileNotFoundError for absent files, ValueError for absent columns, bad rows, empty splits.
    """

    def __init__(
        self,
        path: str | None,
        text_column: str = "text",
        label_column: str | None = None,
        label_names: Sequence[str] | None = None,
        validation_path: str | None = None,
        test_path: str | None = None,
        validation_share: float = 0.05,
        test_share: float = 0.05,
        seed: int = 0,
    ) -> None:
        if not path:
            raise ValueError(
                "data.path is not set: give a file, a folder or a glob (txt, csv, tsv, json, jsonl, parquet)"
            )
        self.paths = {"train": path, "validation": validation_path, "test": test_path}
        self.keys = {"train": "data.path", "validation": "data.validation_path", "test": "data.test_path"}
        self.text_column, self.label_column = text_column, label_column
        self.given_names = tuple(map(str, label_names)) if label_names else None
        self.seed = seed
        shares = {"validation": validation_share, "test": test_share}
        self.shares = {split: share for split, share in shares.items() if not self.paths[split]}
        for split, share in self.shares.items():
            _check_share(f"data.{split}_share", share)
        if sum(self.shares.values()) >= 1:
            raise ValueError(
                f"data.validation_share + data.test_share = {sum(self.shares.values())}: no train split is left"
            )

    @property
    def splits(self) -> tuple[str, ...]:
        return ("train", "validation", "test")

    @property
    def label_names(self) -> tuple[str, ...] | None:
        return self._loaded[1]

    def load(self, split: str) -> datasets.Dataset:
        """The split's rows. Raises ValueError for a split that does not exist."""
        _check_split(split, self.splits)
        return self._loaded[0][split]

    @cached_property
    def _loaded(self) -> tuple[dict[str, datasets.Dataset], tuple[str, ...] | None]:
        """All splits at once, as label names are common to them."""
        tables = {split: self._read(split, path) for split, path in self.paths.items() if path}
        names = self._names(tables) if self.label_column else None
        rows = {split: self._rows(table, self.paths[split], names) for split, table in tables.items()}
        return {**rows, **carve(rows["train"], self.shares, self.seed)}, names

    def _read(self, split: str, path: str) -> pa.Table:
        table = read_files(path, self.keys[split], self.text_column)
        wanted = {"data.text_column": self.text_column, "data.label_column": self.label_column}
        for key, column in wanted.items():
            if column is not None and column not in table.column_names:
                raise ValueError(f"{key}={column}: {path} has no such column; it has {', '.join(table.column_names)}")
        return table

    def _names(self, tables: Mapping[str, pa.Table]) -> tuple[str, ...]:
        key = f"data.label_column={self.label_column}"
        values = _label_values(tables["train"], self.label_column, self.paths["train"])
        found = sorted(set(values))
        names = self.given_names or tuple(map(str, found))
        if self.given_names is None and isinstance(found[0], int) and found != list(range(len(found))):
            raise ValueError(f"{key}: the labels are {', '.join(names)}; number them from 0 without gaps, "
                             f"or give "
                             f"data.label_names, or use words")  # fmt: skip
        if len(names) < 2:
            raise ValueError(f"{key}: there is one label only ({names[0]}); for texts without labels use data=text")
        return names

    def _rows(self, table: pa.Table, origin: str, names: tuple[str, ...] | None) -> datasets.Dataset:
        columns: dict[str, Sequence] = {"text": _as_text_column(table, self.text_column, origin)}
        if names is not None:
            columns["label"] = _as_labels(_label_values(table, self.label_column, origin), names, origin)
        return _not_empty(datasets.Dataset.from_dict(columns, features=_features(names is not None)), origin)


class GeneratedReviews:
    """The embedded corpus (text/reviews.py): as many texts per class as asked, the two classes shuffled
    together."""

    splits = ("train", "validation", "test")
    label_names = reviews.ReviewGrammar.label_names

    def __init__(
        self, num_train_per_class: int, num_validation_per_class: int, num_test_per_class: int, seed: int = 0
    ) -> None:
        self.sizes = dict(
            zip(self.splits, (num_train_per_class, num_validation_per_class, num_test_per_class), strict=True)
        )
        self.seed = seed
        for split, size in self.sizes.items():
            if size < 1:
                raise ValueError(f"data.source.num_{split}_per_class={size} must be at least 1")

    def load(self, split: str) -> datasets.Dataset:
        """The split's rows. Raises ValueError for a split that does not exist."""
        _check_split(split, self.splits)
        rows = reviews.generate_split(split, self.sizes[split], self.seed)
        return datasets.Dataset.from_dict(dict(rows), features=_features(True))


# -------------------------------------------------------------------------------- rows


def keep_label(rows: datasets.Dataset, label: int, label_names: Sequence[str] | None) -> datasets.Dataset:
    """The rows of one class. Raises ValueError where there are no labels, no such label, or no row of it."""
    if label_names is None or "label" not in rows.column_names:
        raise ValueError(f"data.label={label}: these texts have no labels; leave data.label=null")
    listing = ", ".join(f"{i} ({name})" for i, name in enumerate(label_names))
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(label_names):
        raise ValueError(f"data.label={label} is not one of the labels: {listing}")
    keep = np.flatnonzero(np.asarray(rows["label"][:]) == label)
    if not len(keep):
        raise ValueError(f"data.label={label} ({label_names[label]}): this split has no text with that label")
    return _select(rows, keep)


def at_most(rows: datasets.Dataset, limit: int | None) -> datasets.Dataset:
    """`limit` rows in their order, None: all. Where there are labels a choice that is always the same (files
    may be sorted by them), else the first rows (which may belong together)."""
    if limit is None or limit >= len(rows):
        return rows
    some = np.random.default_rng(0).permutation(len(rows))[:limit] if "label" in rows.column_names else range(limit)
    return _select(rows, np.sort(some))


def carve(rows: datasets.Dataset, shares: Mapping[str, float], seed: int) -> dict[str, datasets.Dataset]:
    """Split `rows` into the named shares and `train`, disjoint, each at least one row and in the order of
    `rows`.

    Rows are chosen by `seed` and the number of rows alone. Rows of `train` whose text also stands in a
    held-out part are dropped, as they would make it too easy.
    """
    if not shares:
        return {"train": rows}
    order = _permutation(len(rows), seed)
    sizes = {split: max(1, round(share * len(rows))) for split, share in shares.items()}
    if sum(sizes.values()) >= len(rows):
        raise ValueError(f"{len(rows)} texts are too few to hold out {', '.join(sizes)} and keep a train "
                         f"split; "
                         f"give data.validation_path and data.test_path, or more texts")  # fmt: skip
    parts, start = {}, 0
    for split, size in sizes.items():
        parts[split] = _select(rows, np.sort(order[start : start + size]))
        start += size
    held_out = {text for part in parts.values() for text in part["text"][:]}
    left = np.sort(order[start:])
    texts = rows["text"][:]
    keep = [i for i in left if texts[i] not in held_out]
    if not keep:
        raise ValueError("every text of the train split also stands in a held-out split; the texts are too much alike")
    if len(keep) < len(left):
        log.info("%d texts that also stand in %s were dropped from train", len(left) - len(keep), ", ".join(sizes))
    return {**parts, "train": _select(rows, keep)}


def _select(rows: datasets.Dataset, indices: Sequence[int] | np.ndarray) -> datasets.Dataset:
    """Rows at `indices`, in memory without an index table: later reads are plain slices."""
    table = rows.with_format("arrow")[:].take(pa.array(np.asarray(indices, dtype=np.int64)))
    return datasets.Dataset(datasets.table.InMemoryTable(table))


def _permutation(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, n]).permutation(n)


def _features(has_labels: bool) -> datasets.Features:
    labels = {"label": datasets.Value("int64")} if has_labels else {}
    return datasets.Features({"text": datasets.Value("large_string"), **labels})


def _need_columns(table: pa.Table, columns: Sequence[str], origin: str) -> pa.Table:
    absent = [column for column in columns if column not in table.column_names]
    if absent:
        raise ValueError(f"{origin} has no column {', '.join(absent)}; it has {', '.join(table.column_names)}")
    return table


def _as_text_column(table: pa.Table, column: str, origin: str) -> list[str]:
    texts = table.column(column).to_pylist()
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{origin}: row {row} of column {column!r} is {text!r}, not a text")  # noqa: TRY004
    return texts


def _label_values(table: pa.Table, column: str, origin: str) -> list[int] | list[str]:
    """Labels as the file has them, numbers in quotes or csv as numbers. Raises ValueError naming the bad
    row."""
    values = table.column(column).to_pylist()
    if not values:
        raise ValueError(f"{origin} holds no text; give another file")
    if all(isinstance(v, str) and re.fullmatch(r"-?[0-9]{1,9}", v) for v in values):
        return [int(v) for v in values]
    kind = str if isinstance(values[0], str) else int
    for row, value in enumerate(values):
        if not isinstance(value, kind) or isinstance(value, bool) or value == "":
            raise ValueError(f"{origin}: row {row} of column {column!r} is {value!r}; labels must be "
                             f"whole numbers from "
                             f"0 on, or words, throughout")  # fmt: skip
    return values


def _as_labels(values: Sequence[object], names: Sequence[str], origin: str) -> list[int]:
    """Label ids; strings are looked up in `names`. Raises ValueError with the row of a value out of range."""
    numbers = {name: i for i, name in enumerate(names)}
    labels = []
    for row, value in enumerate(values):
        number = numbers.get(value) if isinstance(value, str) else value
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(names):
            listing = ", ".join(f"{i} ({name})" for i, name in enumerate(names))
            raise ValueError(f"{origin}: row {row} has the label {value!r}, which is none of {listing}; "
                             f"correct the "
                             f"file, or give data.label_names")  # fmt: skip
        labels.append(number)
    return labels


def _not_empty(rows: datasets.Dataset, origin: str) -> datasets.Dataset:
    if not len(rows):
        raise ValueError(f"{origin} holds no text; give another file")
    return rows


def _check_split(split: str, splits: Sequence[str]) -> None:
    if split not in splits:
        raise ValueError(f"there is no split {split!r}; there are {', '.join(splits)}")


def _check_share(key: str, share: float) -> None:
    if not 0 < share < 1:
        raise ValueError(f"{key}={share} must lie between 0 and 1")


def _ordered(splits: set[str]) -> tuple[str, ...]:
    usual = ("train", "validation", "test")
    return (*(s for s in usual if s in splits), *sorted(splits.difference(usual)))
