"""The user's files as a source (see data/sources.py)."""

import copy
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any

import datasets
import numpy as np
import pyarrow as pa

from palimpsest.common.messages import listed
from palimpsest.common.values import IF_SET, NAME, BelowOne, FilePath, Name, Positive, list_of
from palimpsest.data.detokenizers import VERSION
from palimpsest.data.detokenizers import detokenizer as detokenizer_named
from palimpsest.data.files import KINDS, NUMBER, Columns, class_names, classes, kind_of, read_files, readable_files
from palimpsest.data.rows import (
    as_labels,
    carve,
    check_not_empty,
    check_split,
    from_table,
    in_parts,
    take_rows,
    text_table,
    to_table,
    with_documents,
)
from palimpsest.data.shards import FilePieces, Shards, listing, share_of
from palimpsest.data.sources import Combined
from palimpsest.data.tables import read, stored, write

_MANY = 20  # more labels than this must have two texts each on average


class UserFiles:
    """The user's files in the formats of data/files.py: a file, a folder or a glob.

    Labels are whole numbers or words; the classes are those of `path`, sorted.

    Args:
        label_column: None for texts without labels.
        label_names: names for the numbers from 0 on, or the allowed words in order; None uses the ClassLabel that
            Parquet files may have, else the values found.
        prompt_column: the column that each text begins with, followed by a line feed.
        detokenizer: a name in data/detokenizers.py, for tokenised texts without prompts.
        validation_path, test_path: separate files; without them shares of `path` are held out, chosen by `seed` (in a
            stream by a hash of each text, because their number is unknown).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: absent columns, bad rows, empty splits.
    """

    splits = ("train", "validation", "test")

    def __init__(
        self,
        path: FilePath | None,
        text_column: Name = "text",
        label_column: Name | None = None,
        label_names: Annotated[Sequence[str], list_of(NAME, 1, "[negative,positive]")] | None = None,
        prompt_column: Annotated[Name, IF_SET] | None = None,
        detokenizer: Annotated[Name, IF_SET] | None = None,
        validation_path: FilePath | None = None,
        test_path: FilePath | None = None,
        validation_share: BelowOne = 0.05,
        test_share: BelowOne = 0.05,
        seed: int = 0,
    ) -> None:
        if not path:
            raise ValueError(f"data.path is not set: give a file, a folder or a glob ({', '.join(KINDS)})")
        self.paths = {"train": path, "validation": validation_path, "test": test_path}
        self.keys = {"train": "data.path", "validation": "data.validation_path", "test": "data.test_path"}
        self.text_column = text_column
        self.label_column = label_column
        self.prompt_column = prompt_column
        self.prompted = prompt_column is not None
        self._detokenizer = detokenizer
        if detokenizer:
            detokenizer_named(detokenizer)  # refuses another name
            if prompt_column:
                raise ValueError(
                    f"data.detokenizer={detokenizer} applies to whole texts, and data.prompt_column={prompt_column} "
                    "puts prompts in front of them; set one of them to null"
                )
        if prompt_column == text_column:
            raise ValueError(f"data.prompt_column={prompt_column} is the column of the texts; name that of the prompts")
        if label_column and label_column in (text_column, prompt_column):
            raise ValueError(f"data.label_column={label_column} is a column of the texts; name that of the labels")
        self.given_names = tuple(str(name).strip() for name in label_names) if label_names else None
        _check_different(self.given_names or (), "data.label_names")
        self.seed = seed
        self.cache_dir: str | None = None
        shares = {"validation": validation_share, "test": test_share}
        self.shares = {split: share for split, share in shares.items() if not self.paths[split]}
        for split, share in self.shares.items():
            if not share:
                raise ValueError(f"data.{split}_share=0 holds out no text; raise it, or set data.{split}_path")
        total = sum(self.shares.values())
        if total >= 1:
            raise ValueError(f"data.validation_share + data.test_share = {total}: no train split is left; lower them")

    def detokenizer_of(self, split: str) -> str | None:
        """Return the name of the detokenizer of a split's texts, or None."""
        return self._detokenizer

    @property
    def label_names(self) -> tuple[str, ...] | None:
        return self._loaded[1] if self.label_column else None

    def cached(self, cache_dir: str) -> "UserFiles":
        """Return these files with their texts kept in `cache_dir`."""
        other = copy.copy(self)
        other.cache_dir = cache_dir
        return other

    def load(self, split: str) -> datasets.Dataset:
        """Return the split's rows. Raises ValueError for an unknown split."""
        check_split(split, self.splits)
        return self._loaded[0][split]

    def stream(self, split: str, limit: int) -> datasets.Dataset:
        """Return the first `limit` rows of the split, without reading on."""
        rows, own = self.open(split).first(limit), split if self.paths[split] else "train"
        has_lines = _has_lines(readable_files(self.paths[own], self.keys[own]))
        return from_table(next(with_documents([to_table(rows)], None))) if has_lines else rows

    def open(self, split: str) -> Shards:
        """Return the split, to be read in pieces. Raises ValueError for labelled texts."""
        check_split(split, self.splits)
        if self.label_column:
            raise ValueError(
                f"data.streaming=true reads texts without labels, but data.label_column={self.label_column}; use "
                "data=text, or set data.streaming=false"
            )
        own = split if self.paths[split] else "train"
        files = readable_files(self.paths[own], self.keys[own])
        prepare = partial(self._streamed, split=split, held_out=self.shares if own == "train" else {})
        rows = FilePieces.of(files, self.keys[own], self._columns())
        return Shards(rows, prepare, str(self.paths[own]), files=listing(files))

    def _streamed(self, table: pa.Table, split: str, held_out: Mapping[str, float]) -> datasets.Dataset:
        rows = from_table(self._made(table))
        if not held_out:
            return rows
        return take_rows(rows, np.flatnonzero(share_of(rows["text"][:], self.seed, held_out) == split))

    @cached_property
    def _loaded(self) -> tuple[dict[str, datasets.Dataset], tuple[str, ...] | None]:
        """Return all splits at once, because they share the label names, and these names."""
        files = {split: readable_files(path, self.keys[split]) for split, path in self.paths.items() if path}
        settings = {
            "columns": [self.text_column, self.label_column, self.prompt_column], "label_names": self.given_names,
            "detokenizer": [self._detokenizer, VERSION], "shares": self.shares, "seed": self.seed,
            "files_of": {split: len(some) for split, some in files.items()},
        }  # fmt: skip
        every = [path for some in files.values() for path in some]
        rows, found = stored(self.cache_dir, settings, every, partial(self._convert, files))
        return rows, found["label_names"] and tuple(found["label_names"])

    def _convert(self, files: Mapping[str, Sequence[Path]], folder: Path) -> dict[str, Any]:
        """Write the splits into a folder, and return the label names; train comes first."""
        names = self.given_names if self.label_column else None
        indexed = False
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            whole = {split: Path(aside) / split for split in files}
            for split, some in files.items():
                own = class_names(some, self.keys[split], self.label_column) if self.label_column else None
                if own is not None:
                    renames = self.given_names is not None and set(own) != set(self.given_names)
                    if names is not None and own != tuple(names) and not renames:
                        raise ValueError(
                            f"{self.keys[split]}: {some[0]} has the classes {classes(own)}, and the training has "
                            f"{classes(tuple(names))}; number them alike"
                        )
                    indexed = indexed or self.given_names is None
                    names = own if names is None else names
                tables = read_files(some, self.keys[split], self._columns(names, indexed))
                check_not_empty(write(whole[split], tables), self.paths[split])
                if self.label_column and names is None:
                    names = self._names(read(whole[split]), some)
            has_lines = not self.label_column and any(map(_has_lines, files.values()))

            def prepare(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
                made = (self._made(table, names, indexed) for table in tables)
                return with_documents(made, None) if has_lines else made

            for split, path in whole.items():
                if split == "train" and self.shares:
                    carve(path, folder, self.shares, self.seed, prepare)
                else:
                    write(folder / f"{split}.arrow", prepare(read(path)))
        return {"label_names": names}

    def _columns(self, names: Sequence[str] | None = None, indexed: bool = False) -> Columns:
        settings = {self.text_column: "data.text_column", self.prompt_column: "data.prompt_column"}
        texts = tuple(filter(None, settings))
        settings[self.label_column] = "data.label_column"
        return Columns(texts, self.label_column, names and tuple(names), indexed, settings=settings)

    def _names(self, tables: Iterable[pa.Table], files: Sequence[Path]) -> tuple[str, ...]:
        """Return the classes in the labels of the train split."""
        key = f"data.label_column={self.label_column}"
        counts = Counter(word for table in tables for word in table.column(self.label_column).to_pylist())
        numbers = [word for word in counts if NUMBER.fullmatch(word)]
        words = sorted(counts.keys() - set(numbers))
        if numbers and words:  # the reader reports the first of the rarer kind, with its line
            numbered = sum(counts[word] for word in numbers) >= sum(counts[word] for word in words)
            for _ in read_files(files, self.keys["train"], replace(self._columns(), numbered=numbered)):
                pass
        names = tuple(words) or tuple(map(str, sorted(set(map(int, numbers)))))
        if len(names) > _MANY and 2 * len(names) > counts.total():
            found = f"there are {len(names)} labels ({listed(names)}) for {counts.total()} texts"
            raise ValueError(f"{key}: {found}; name the column of the classes")
        if numbers and names[0].startswith("-"):
            raise ValueError(
                f"{key}: the labels are {listed(names)}; a negative one usually means that a text has no label: remove "
                f"these texts, or, if it is a class, give data.label_names=[{','.join(names)}]"
            )
        if len(names) < 2:
            raise ValueError(f"{key}: there is one label only ({names[0]}); for texts without labels use data=text")
        _check_different(names, key)
        return names

    def _made(self, table: pa.Table, names: Sequence[str] | None = None, indexed: bool = False) -> pa.Table:
        """Turn columns of the files into text, label and ends."""
        texts = table.column(self.text_column)
        labels = ends = None
        if self._detokenizer:
            texts = list(map(detokenizer_named(self._detokenizer), texts.to_pylist()))
        if names is not None:
            words = table.column(self.label_column).to_pylist()
            own = [int(word) if indexed and NUMBER.fullmatch(word) else word for word in words]
            labels = as_labels(own, names, str(self.paths["train"]))
        if self.prompted:
            pairs = zip(table.column(self.prompt_column).to_pylist(), texts.to_pylist(), strict=True)
            texts, ends = in_parts([[f"{prompt}\n", text] for prompt, text in pairs])
        return text_table(texts, labels, ends)


def mixture(
    paths: Mapping[str, str] | None,
    weights: Mapping[str, Positive] | None,
    validation: Name | None = None,
    text_column: Name = "text",
    detokenizer: Annotated[Name, IF_SET] | None = None,
    validation_share: BelowOne = 0.05,
    test_share: BelowOne = 0.05,
) -> Combined:
    """Return a mixture of the user's files, each a `UserFiles`, measured on one of them.

    Args:
        paths: name -> file, folder or glob.
        weights: name -> its share of the training rows, on any scale.
        validation: the name of the data set to measure on; None: the first.

    Raises:
        ValueError: as Combined and UserFiles do.
    """
    for key, value in (("data.paths", paths), ("data.weights", weights)):
        if not value:
            raise ValueError(f"{key} is not set: give a value for each name, such as '{key}={_EXAMPLES[key]}'")
    shares = {"validation_share": validation_share, "test_share": test_share}
    sources = {name: UserFiles(path, text_column, detokenizer=detokenizer, **shares) for name, path in paths.items()}
    for name, source in sources.items():
        source.keys["train"] = f"data.paths.{name}"
    measured = validation or next(iter(paths))
    return Combined(sources, None, measured, measured, weights)


_EXAMPLES = {"data.paths": "{web:web/*.jsonl,books:books.txt}", "data.weights": "{web:3,books:1}"}


def _has_lines(files: Sequence[Path]) -> bool:
    """Return True if texts are lines of longer documents, which are unknown."""
    return "txt" in map(kind_of, files)


def _check_different(names: Sequence[str], key: str) -> None:
    """Raise ValueError for two class names that look the same: repeated, or with look-alike characters."""
    seen: dict[str, str] = {}
    for name in names:
        look = "".join(c for c in unicodedata.normalize("NFKC", name) if unicodedata.category(c) != "Cf")
        look = " ".join(look.split())
        if look in seen:
            raise ValueError(f"{key}: two labels look the same, {ascii(seen[look])} and {ascii(name)}; make them one")
        seen[look] = name
