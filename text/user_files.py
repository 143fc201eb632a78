"""The user's own files as a source (text/sources.py says what a source is)."""

from collections.abc import Mapping, Sequence
from functools import cached_property, partial

import datasets
import numpy as np
import pyarrow as pa

from text.files import read_files, readable_files
from text.rows import (
    as_labels,
    carve,
    check_share,
    check_split,
    in_parts,
    label_values,
    not_empty,
    take_rows,
    text_column,
    text_rows,
    with_documents,
    without_blanks,
)
from text.shards import Shards, kind_of, listing, open_files, share_of


class UserFiles:
    """The user's own files: txt (one text per non-empty line), csv, tsv, json, jsonl, parquet; a file, a
    folder or a glob.

    label_column: None = texts without labels. Labels are ints from 0 on, or strings (numbered in sorted
    order over all splits); `label_names` names ints, or fixes which strings there are and their order.
    prompt_column: what each text is given as its beginning, followed by a line feed.
    validation_path, test_path: files of their own; without them shares of `path` are held out, chosen by
    `seed` (of a stream by a hash of each text, since their number is not known).
    Raises FileNotFoundError for absent files, ValueError for absent columns, bad rows, empty splits.
    """

    def __init__(
        self,
        path: str | None,
        text_column: str = "text",
        label_column: str | None = None,
        label_names: Sequence[str] | None = None,
        prompt_column: str | None = None,
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
        self.text_column, self.label_column, self.prompt_column = text_column, label_column, prompt_column
        self.given_names = tuple(map(str, label_names)) if label_names else None
        self.seed = seed
        shares = {"validation": validation_share, "test": test_share}
        self.shares = {split: share for split, share in shares.items() if not self.paths[split]}
        for split, share in self.shares.items():
            check_share(f"data.{split}_share", share)
        if sum(self.shares.values()) >= 1:
            raise ValueError(
                f"data.validation_share + data.test_share = {sum(self.shares.values())}: no train split is left"
            )

    @property
    def splits(self) -> tuple[str, ...]:
        return ("train", "validation", "test")

    @property
    def prompted(self) -> bool:
        """Whether texts begin with a prompt."""
        return self.prompt_column is not None

    @property
    def label_names(self) -> tuple[str, ...] | None:
        return self._loaded[1] if self.label_column else None

    def load(self, split: str) -> datasets.Dataset:
        """The split's rows. Raises ValueError for a split that does not exist."""
        check_split(split, self.splits)
        return self._loaded[0][split]

    def stream(self, split: str, limit: int) -> datasets.Dataset:
        """The first `limit` rows of the split, without reading on."""
        rows = self.open(split).first(limit)
        own = split if self.paths[split] else "train"
        lines = "txt" in map(kind_of, readable_files(self.paths[own], self.keys[own]))
        return with_documents(rows, None) if lines else rows

    def open(self, split: str) -> Shards:
        """The split, to be read piece by piece. Raises ValueError for labelled texts, whose names all files together
        give."""
        check_split(split, self.splits)
        if self.label_column:
            raise ValueError(f"data.streaming=true reads texts without labels, and data.label_column="
                             f"{self.label_column} names some; use data=text, or set data.streaming=false")  # fmt: skip
        own = split if self.paths[split] else "train"
        files = readable_files(self.paths[own], self.keys[own])
        rows = open_files(files, f"{self.keys[own]}={self.paths[own]}", self.text_column)
        held_out = self.shares if own == "train" else {}
        prepare = partial(self._streamed, split=split, held_out=held_out, lines=kind_of(files[0]) == "txt")
        columns = (self.text_column, *([self.prompt_column] if self.prompted else []))
        return Shards(rows, columns, prepare, str(self.paths[own]), files=listing(files))

    def _streamed(self, table: pa.Table, split: str, held_out: Mapping[str, float], lines: bool) -> datasets.Dataset:
        rows = self._made(table, str(self.paths["train"]))
        rows = without_blanks(rows) if lines else rows
        if not held_out:
            return rows
        return take_rows(rows, np.flatnonzero(share_of(rows["text"][:], self.seed, held_out) == split))

    @cached_property
    def _loaded(self) -> tuple[dict[str, datasets.Dataset], tuple[str, ...] | None]:
        """All splits at once, as label names are common to them."""
        tables = {split: self._read(split, path) for split, path in self.paths.items() if path}
        names = self._names(tables) if self.label_column else None
        rows = {split: not_empty(self._made(table, self.paths[split], names), self.paths[split])
                for split, table in tables.items()}  # fmt: skip
        if not self.label_column and "txt" in {kind_of(file) for key, path in self.paths.items() if path
                                               for file in readable_files(path, self.keys[key])}:  # fmt: skip
            rows = {split: with_documents(part, None) for split, part in rows.items()}  # lines of longer texts
        return {**rows, **carve(rows["train"], self.shares, self.seed)}, names

    def _read(self, split: str, path: str) -> pa.Table:
        table = read_files(path, self.keys[split], self.text_column)
        wanted = {"data.text_column": self.text_column, "data.label_column": self.label_column,
                  "data.prompt_column": self.prompt_column}  # fmt: skip
        for key, column in wanted.items():
            if column is not None and column not in table.column_names:
                raise ValueError(f"{key}={column}: {path} has no such column; it has {', '.join(table.column_names)}")
        return table

    def _names(self, tables: Mapping[str, pa.Table]) -> tuple[str, ...]:
        key = f"data.label_column={self.label_column}"
        values = label_values(tables["train"], self.label_column, self.paths["train"])
        found = sorted(set(values))
        names = self.given_names or tuple(map(str, found))
        if self.given_names is None and isinstance(found[0], int) and found != list(range(len(found))):
            raise ValueError(f"{key}: the labels are {', '.join(names)}; number them from 0 without gaps, "
                             f"or give "
                             f"data.label_names, or use words")  # fmt: skip
        if len(names) < 2:
            raise ValueError(f"{key}: there is one label only ({names[0]}); for texts without labels use data=text")
        return names

    def _made(self, table: pa.Table, origin: str, names: tuple[str, ...] | None = None) -> datasets.Dataset:
        texts, labels, ends = text_column(table, self.text_column, origin), None, None
        if names is not None:
            labels = as_labels(label_values(table, self.label_column, origin), names, origin)
        if self.prompted:
            prompts = text_column(table, self.prompt_column, origin)
            pairs = zip(prompts.to_pylist(), texts.to_pylist(), strict=True)
            texts, ends = in_parts([[f"{prompt}\n", text] for prompt, text in pairs])
        return text_rows(texts, labels, ends)
