"""Sources of text: named data sets in a local folder or on the Hub, and several of them joined.

data/user_files.py has the user's files. Every source has `splits` (names that it can load), `label_names` (None if
texts have no labels) and `load(split) -> datasets.Dataset` with the columns
  text      str
  label     int64, if there are labels
  ends      list of int64, if texts have parts, equally many in every text: the end of each part but the last, in
      characters
  document  int64, if texts are pieces of longer documents, such as lines: the document's number, or -1 throughout if
      documents are unknown. Without this column each text is a document.
  text_id   int64, the number of the row in its split; may be left out
`load` gives the same rows in the same order every time, in every process. Split names are `train`, `validation`,
`test`. A source may also have
  stream(split, limit)    the first rows of a split without reading the rest (data.streaming=true)
  open(split)             the split in pieces that are read one after the other (data/shards.py), for training on a
      stream
  detokenizer_of(split)   the name of the detokenizer that was applied to its texts (data/detokenizers.py), or None
  mixed(split)            the sources that a split is a weighted mixture of, with `weights`
  sources                 names of the data sets that it joins, which data.train and data.valid may name
  published()             the source as the reference projects read it (data.protocol=reference)
  cached(cache_dir)       the source with its texts kept in that folder: converted once, then memory-mapped
  prompted                True if the first part of each text is a prompt: observed, never masked nor scored
"""

import contextlib
import copy
import itertools
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Protocol

import datasets
import pyarrow as pa

from palimpsest.common.values import NAME, TEXT, InsideOne, Name, Positive, PresentPath, list_of
from palimpsest.data.detokenizers import PUBLISHED, VERSION
from palimpsest.data.detokenizers import detokenizer as find_detokenizer
from palimpsest.data.files import Columns, kind_of, matching_files, open_text, read_files, reading
from palimpsest.data.hub import local_folder, not_found_message, quick_when_offline
from palimpsest.data.order import MIXED, quotas
from palimpsest.data.rows import (
    as_labels,
    carve,
    check_not_empty,
    check_parts,
    check_split,
    from_table,
    in_parts,
    need_columns,
    permutation,
    text_column,
    text_table,
    to_table,
    with_documents,
    without_blanks,
)
from palimpsest.data.shards import FilePieces, HubPieces, Shards, listing, num_rows
from palimpsest.data.tables import between, read, stored, write

# Data sets whose rows on the Hub are lines with line feeds, including empty lines.
_LINES_WITH_ENDS = ("Salesforce/wikitext",)
_AT_ONCE = 1000  # rows


class Source(Protocol):
    """The interface that TextData requires of a source."""

    splits: tuple[str, ...]
    label_names: tuple[str, ...] | None

    def load(self, split: str) -> datasets.Dataset: ...


def cached(source: Source, cache_dir: str) -> Source:
    """Return the source with its texts kept in a folder, if it reads any from files or the Hub."""
    return source.cached(cache_dir) if hasattr(source, "cached") else source


class HubOrFolder:
    r"""A named data set: `$DATA_DIR/<folder>/<files[split]>` if that exists, else `hub_id` on the Hub.

    Args:
        files: split -> file name or pattern; may end in a slice, `train[:-1000]`.
        hub_splits: split -> split expression of the Hub at `hub_revision` (None: the current one); may end in a slice
            too.
        text_columns: the column of the texts, or several that `parts` combines.
        parts: templates such as "Question: {question}\nAnswer:" and " {answer}". The first of several is a prompt.
        unlabelled: splits without labels, whatever the files say.
        drop_blank: drop texts of white space, and strip the line end that the Hub keeps (data sets of one text per
            line).
        detokenizer: a name in data/detokenizers.py.
        document_start: pattern of the texts that begin a document, if texts are lines of documents; None if these are
            unknown; "" if each text is a document.
        validation_share: share of the train split that is held out by `seed` if there is no validation split. Texts
            that also occur in the held-out part are dropped from the train split.
        shuffle: put rows into an order fixed by `seed`, for files sorted by label.

    Raises:
        FileNotFoundError: neither the folder nor the Hub has it; names both ways.
    """

    def __init__(
        self,
        hub_id: Name,
        folder: PresentPath,
        files: Mapping[str, str],
        hub_splits: Mapping[str, str],
        hub_config: Name | None = None,
        hub_revision: Name | None = None,
        text_columns: Name | Annotated[Sequence[str], list_of(NAME, 1, "[question,answer]")] = "text",
        parts: Annotated[Sequence[str], list_of(TEXT, 1, "['{question}',' {answer}']")] | None = None,
        label_column: Name | None = None,
        label_names: Annotated[Sequence[str], list_of(NAME, 1, "[negative,positive]")] | None = None,
        drop_blank: bool = False,
        detokenizer: Name | None = None,
        validation_share: InsideOne | None = None,
        shuffle: bool = False,
        seed: int = 0,
        unlabelled: Annotated[Sequence[str], list_of(NAME, 0, "[unsupervised]")] = (),
        document_start: str | None = "",
    ) -> None:
        self.document_start = document_start
        self.hub_id, self.folder = hub_id, folder
        self.hub_config, self.hub_revision = hub_config, hub_revision
        self.files, self.hub_splits = dict(files), dict(hub_splits)
        self.text_columns = [text_columns] if isinstance(text_columns, str) else list(text_columns)
        self.parts, self.drop_blank = None if parts is None else tuple(parts), drop_blank
        self.prompted = parts is not None and len(parts) > 1
        self.label_column, self.unlabelled = label_column, tuple(unlabelled)
        self.label_names = tuple(label_names) if label_names else None
        self.shuffle, self.seed = shuffle, seed
        self.validation_share = validation_share
        self.detokenizer, self._as_published = detokenizer, False
        self.cache_dir: str | None = None
        self._loaded: dict[str, datasets.Dataset] = {}
        if label_column and not label_names:
            raise ValueError(f"data.source.label_column={label_column} needs data.source.label_names")
        check_parts(self.parts, self.text_columns)
        if detokenizer is not None:
            find_detokenizer(detokenizer)  # raises for an unknown name
            if parts is not None:
                columns = ", ".join(self.text_columns)
                raise ValueError(
                    f"data.source.detokenizer={detokenizer} applies to whole texts, and data.source.parts combines "
                    f"{columns}; set one of them to null"
                )

    @property
    def splits(self) -> tuple[str, ...]:
        found = {*self.files} | ({"validation"} if self.validation_share is not None else set())
        usual = ("train", "validation", "test")
        return (*(split for split in usual if split in found), *sorted(found.difference(usual)))

    def detokenizer_of(self, split: str) -> str | None:
        """Return the name of the detokenizer; None if texts are natural."""
        return self.detokenizer

    def published(self) -> "HubOrFolder":
        """Return this data set as the reference projects read it.

        It has every row of the Hub in the Hub's order, including empty ones, with their line ends and the published
        detokenizer.
        """
        other = copy.copy(self)
        other._as_published, other._loaded = True, {}
        other.drop_blank = other.shuffle = False
        other.detokenizer = PUBLISHED.get(self.detokenizer, self.detokenizer)
        return other

    def cached(self, cache_dir: str) -> "HubOrFolder":
        """Return this data set with its texts kept in `cache_dir`."""
        other = copy.copy(self)
        other.cache_dir, other._loaded = cache_dir, {}
        return other

    def load(self, split: str) -> datasets.Dataset:
        """Return the split's rows. Raises ValueError for an unknown split or bad rows."""
        check_split(split, self.splits)
        if split not in self._loaded:
            self._loaded |= self._stored(*self._shared(split))
        return self._loaded[split]

    def _shared(self, split: str) -> tuple[str, dict[str, float]]:
        """Return the split of the files or the Hub that a split is part of, and the shares that are held out of it."""
        carved = self.validation_share is not None and split in ("train", "validation")
        return ("train", {"validation": self.validation_share}) if carved else (split, {})

    def stream(self, split: str, limit: int) -> datasets.Dataset:
        """Return the first `limit` rows of the split, downloading no more than they need. Raises ValueError if the rows
        of the split are only known after reading all of it."""
        self._check_streaming(split)
        if self._files(split):
            tables = [to_table(self.open(split).first(limit))]
        else:
            table, origin = self._beginning(split, limit)
            tables = [made.slice(0, limit) for made in self._prepared([table], origin)]
            check_not_empty(sum(made.num_rows for made in tables), origin)
        return from_table(pa.concat_tables(self._with_documents(tables)))

    def open(self, split: str) -> Shards:
        """Return the split, to be read in pieces.

        Raises:
            ValueError: its rows are only known after reading all of it, or its end.
            FileNotFoundError: neither the folder nor the Hub has it.
        """
        self._check_streaming(split)
        files, expression = self._files(split), self.files.get(split, "")
        if files:
            origin = f"{local_folder(self.folder)}/{expression}"
            rows = FilePieces.of(files, "DATA_DIR", self._file_columns(split))
        else:
            expression, origin = self.hub_splits[split], self._origin(split)
            rows = HubPieces(self._hub_stream(split), tuple(self._columns(split)), origin)
        prepare = partial(self._piece, origin=origin)
        start, stop = self._bounds(expression, num_rows(files) if files else None)
        return Shards(rows, prepare, origin, start, stop, listing(files))

    def _bounds(self, expression: str, total: int | None) -> tuple[int, int | None]:
        """Return the rows that an expression names, of `total` rows (None: unknown)."""
        _, start, stop = _sliced(expression)
        if total is not None:
            first, last, _ = slice(start, stop).indices(total)
            return first, last if stop is not None else None
        if min(start or 0, stop or 0) < 0:
            raise ValueError(
                f"data.streaming=true reads {self.hub_id} from its beginning, so it cannot cut {expression}, which "
                "counts from the end; set it to false"
            )
        return start or 0, stop

    def _check_streaming(self, split: str) -> None:
        check_split(split, self.splits)
        _, carved = self._shared(split)
        if carved or self.shuffle:
            why = "is held out of the whole train split" if carved else "has to be shuffled as a whole"
            raise ValueError(f"data.streaming=true: the {split} split of {self.hub_id} {why}; set it to false")

    def _files(self, split: str) -> list[Path]:
        """Return the split's files in the folder, if it has any."""
        name, folder = _sliced(self.files.get(split, ""))[0], local_folder(self.folder)
        return matching_files(sorted(folder.glob(name)), "DATA_DIR") if folder and name else []

    def _hub_stream(self, split: str) -> datasets.IterableDataset:
        with self._hub_errors(split):
            name = _sliced(self.hub_splits[split])[0]
            return datasets.load_dataset(
                self.hub_id, self.hub_config, split=name, revision=self.hub_revision, streaming=True
            )

    def _columns(self, split: str) -> list[str]:
        labelled = self.label_column and split not in self.unlabelled
        return [*self.text_columns, *([self.label_column] if labelled else [])]

    def _file_columns(self, split: str) -> Columns:
        label = self.label_column if self.label_column in self._columns(split) else None
        return Columns(tuple(self.text_columns), label, label and self.label_names)

    def _stored(self, split: str, shares: Mapping[str, float]) -> dict[str, datasets.Dataset]:
        """Return the rows of a split, and those that are held out of it, by their names."""
        files = self._files(split)
        hub = None if files else self._hub(split)
        settings = {
            "text_columns": self.text_columns, "parts": self.parts, "label_column": self.label_column,
            "label_names": self.label_names, "columns": self._columns(split), "drop_blank": self.drop_blank,
            "detokenizer": [self.detokenizer, VERSION], "shuffle": self.shuffle, "seed": self.seed,
            "document_start": self.document_start, "published": self._as_published, "split": split,
            "ends": self.hub_id in _LINES_WITH_ENDS, "shares": shares,
            "rows": list(_sliced(self.files[split])[1:]) if hub is None else hub._fingerprint,
        }  # fmt: skip

        def build(folder: Path) -> None:
            with tempfile.TemporaryDirectory(dir=folder) as aside:
                if hub is None:
                    raw, origin = self._local(split, files, Path(aside))
                else:
                    raw, origin = hub.with_format("arrow").iter(_AT_ONCE), self._origin(split)
                tables = self._with_documents(self._prepared(raw, origin))
                if self.shuffle:
                    table = pa.concat_tables(tables)
                    tables = [table.take(pa.array(permutation(table.num_rows, self.seed)))]
                whole = (Path(aside) if shares else folder) / f"{split}.arrow"
                check_not_empty(write(whole, tables), origin)
                if shares:
                    carve(whole, folder, shares, self.seed)

        return stored(self.cache_dir, settings, files, build)[0]

    def _with_documents(self, tables: Iterable[pa.Table]) -> Iterable[pa.Table]:
        return tables if self.document_start == "" else with_documents(tables, self.document_start)

    def _prepared(self, tables: Iterable[pa.Table], origin: str) -> Iterator[pa.Table]:
        """Turn raw columns into text, label and ends."""
        first = 0
        for table in tables:
            texts = [text_column(table, column, origin, first) for column in self.text_columns]
            whole = texts[0]
            ends = None
            labels = None
            if self.detokenizer is not None:
                whole = list(map(find_detokenizer(self.detokenizer), texts[0].to_pylist()))
            if self.parts is not None:
                rows = pa.Table.from_arrays(texts, self.text_columns).to_pylist()
                whole, ends = in_parts([[part.format(**row) for part in self.parts] for row in rows])
            if self.label_column in table.column_names:
                labels = as_labels(table.column(self.label_column).to_pylist(), self.label_names, origin, first)
            made = text_table(whole, labels, ends if self.prompted else None)
            yield without_blanks(made) if self.drop_blank else made
            first += table.num_rows

    def _piece(self, table: pa.Table, origin: str) -> datasets.Dataset:
        """Do the same for some rows of a stream."""
        return from_table(next(self._prepared([table], origin)))

    def _local(self, split: str, files: Sequence[Path], aside: Path) -> tuple[Iterable[pa.Table], str]:
        """Return the raw columns of files and their origin for messages. `aside`: a folder for a copy."""
        if self._as_published and all(kind_of(path) == "txt" for path in files):
            tables = self._lines(files)
        else:
            tables = read_files(files, "DATA_DIR", self._file_columns(split))
        _, start, stop = _sliced(self.files[split])
        if (start, stop) != (None, None):  # bounds may count from the end
            number = write(aside / "whole.arrow", tables)
            first, last, _ = slice(start, stop).indices(number)
            tables = between(read(aside / "whole.arrow"), first, last) if number else []
        return tables, str(local_folder(self.folder) / self.files[split])

    def _lines(self, files: Sequence[Path]) -> Iterator[pa.Table]:
        """Yield every line of txt files as the Hub has it; a blank line is an empty text."""
        ends = self.hub_id in _LINES_WITH_ENDS
        for path in files:
            with reading(path, "DATA_DIR"), open_text(path) as read_lines:
                lines = (line if ends and line.strip() else line.strip() for line in read_lines)
                while some := list(itertools.islice(lines, _AT_ONCE)):
                    yield pa.table({self.text_columns[0]: pa.array(some, pa.large_string())})

    def _origin(self, split: str) -> str:
        return f"{self.hub_id} ({self.hub_splits[split]})"

    def _hub(self, split: str) -> datasets.Dataset:
        """Return the raw columns on the Hub."""
        expression = self.hub_splits[split]
        with self._hub_errors(split):
            rows = datasets.load_dataset(self.hub_id, self.hub_config, split=expression, revision=self.hub_revision)
        need_columns(rows.column_names, self._columns(split), self._origin(split))
        return rows.select_columns(self._columns(split))

    def _beginning(self, split: str, limit: int) -> tuple[pa.Table, str]:
        """Return the raw columns of the first `limit` texts on the Hub and their origin."""
        expression = self.hub_splits[split]
        start, stop = self._bounds(expression, None)
        stream = self._hub_stream(split)
        with self._hub_errors(split):
            part = itertools.islice(stream.skip(start), None if stop is None else stop - start)
            found = list(itertools.islice((row for row in part if not self._is_blank(row)), limit))
        origin, columns = self._origin(split), self._columns(split)
        need_columns(list(found[0]) if found else columns, columns, origin)
        return pa.table({name: [row[name] for row in found] for name in columns}), origin

    def _is_blank(self, row: Mapping[str, object]) -> bool:
        texts = (row.get(column) for column in self.text_columns)
        return self.drop_blank and not any(text.strip() for text in texts if isinstance(text, str))

    @contextlib.contextmanager
    def _hub_errors(self, split: str) -> Iterator[None]:
        try:
            with quick_when_offline():
                yield
        except Exception as error:  # the Hub libraries raise many types, none of them for users
            place = f"{self.folder}/{self.files.get(split, '')}"
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            raise FileNotFoundError(f"{not_found_message('data', self.hub_id, place)} ({reason})") from error


class Combined:
    """Splits of several data sets under one name: trained on one, or a mixture, and measured on one. Texts have no
    labels.

    Args:
        sources: name -> source.
        train, validation, test: the name of the source of each split (data.train; data.valid for the other two).
        weights: source -> its share of the training rows, on any scale; None trains on `train` alone.

    Raises:
        ValueError: a name is not in `sources`; a weight is missing, or too small.
    """

    label_names = None

    def __init__(
        self,
        sources: Mapping[str, Source],
        train: Name | None,
        validation: Name,
        test: Name,
        weights: Mapping[str, Positive] | None = None,
    ) -> None:
        self.sources = dict(sources)
        self.weights = None if weights is None else {name: weights[name] for name in _weighted(weights, self.sources)}
        self.choice = {"train": train, "validation": validation, "test": test}
        for split, name in self.choice.items():
            if name not in self.sources and not (split == "train" and self.weights):
                key = "data.train" if split == "train" else "data.valid"
                raise ValueError(f"{key}={name} is none of {', '.join(self.sources)}, which this data set joins")

    @property
    def splits(self) -> tuple[str, ...]:
        found = ((split, self._names(split)) for split in self.choice)
        return tuple(split for split, names in found if all(split in self.sources[name].splits for name in names))

    def _names(self, split: str) -> tuple[str, ...]:
        return tuple(self.weights) if split == "train" and self.weights else (self.choice[split],)

    def mixed(self, split: str) -> tuple[Source, ...]:
        """Return the sources that a split is a mixture of; one if it is none."""
        return tuple(self.sources[name] for name in self._names(split))

    def detokenizer_of(self, split: str) -> str | None:
        """Return the detokenizer of the split's data set; of a mixture the names of all that its data sets have."""
        found = {source.detokenizer_of(split) for source in self.mixed(split)} - {None}
        return "+".join(sorted(found)) or None

    def published(self) -> "Combined":
        """Return these data sets as the reference projects read them (HubOrFolder.published)."""
        other = copy.copy(self)
        other.sources = {name: source.published() for name, source in self.sources.items()}
        return other

    def cached(self, cache_dir: str) -> "Combined":
        """Return these data sets with their texts kept in `cache_dir`."""
        other = copy.copy(self)
        other.sources = {name: cached(source, cache_dir) for name, source in self.sources.items()}
        return other

    @property
    def prompted(self) -> bool:
        """Return True if texts begin with a prompt. Raises ValueError if only some of the data sets have prompts."""
        used = [name for split in self.choice for name in self._names(split)]
        kinds = {name: getattr(self.sources[name], "prompted", False) for name in used}
        if len(set(kinds.values())) > 1:
            names = ", ".join(kinds)
            raise ValueError(f"{names}: some of these data sets have prompts, others have not; join one kind")
        return kinds[used[0]]

    def load(self, split: str) -> datasets.Dataset:
        """Return the split's rows; those of a mixture one data set after the other, without their numbers.

        Raises ValueError for an unknown split.
        """
        check_split(split, self.splits)
        rows = [source.load(split) for source in self.mixed(split)]
        if len(rows) == 1:
            return rows[0]
        return datasets.concatenate_datasets([part.select_columns("text") for part in rows])

    def stream(self, split: str, limit: int) -> datasets.Dataset:
        """Return the first `limit` rows of the split (HubOrFolder.stream)."""
        return self._streamed(split).stream(split, limit)

    def open(self, split: str) -> Shards:
        """Return the split, to be read in pieces (HubOrFolder.open)."""
        return self._streamed(split).open(split)

    def _streamed(self, split: str) -> Source:
        check_split(split, self.splits)
        if len(self._names(split)) > 1:
            raise ValueError(
                f"data.streaming=true reads one data set, and this is a mixture of {', '.join(self.weights)}; set it "
                "to false"
            )
        return self.mixed(split)[0]


def _weighted(weights: Mapping[str, float], sources: Mapping[str, Source]) -> tuple[str, ...]:
    """Return the names of the sources, sorted, so that the order in which they were typed changes nothing.

    Raises ValueError if weights are not theirs, or too small.
    """
    names = ", ".join(sources)
    if set(weights) != set(sources):
        raise ValueError(f"data.weights={dict(weights)} must name each data set of the mixture ({names}), and no other")
    for name, share in zip(sources, quotas([weights[name] for name in sources]), strict=True):
        if share == 0:
            raise ValueError(
                f"data.weights: {name} has {weights[name]} of {sum(weights.values())}, less than one row in {MIXED}; "
                "raise it, or leave the data set out"
            )
    return tuple(sorted(sources))


def _sliced(expression: str) -> tuple[str, int | None, int | None]:
    """Split `name[start:stop]`, with either bound absent, into (name, start, stop)."""
    name, start, stop = re.fullmatch(r"(.*?)(?:\[(-?\d*):(-?\d*)\])?", expression).groups()
    return name, int(start) if start else None, int(stop) if stop else None
