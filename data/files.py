"""Readers for the rows of text files in common formats. No missing value, number or date is ever guessed.

Each format has one reader, which yields tables of a thousand rows. Only the requested columns are read. A
row that does not fit its file is an error with file, line and row; rows are counted from 0.

  txt            one text per line that is not blank
  csv            as Python's csv module reads it, strictly; every row has as many fields as the header
  tsv            one row per line, with as many fields as the header. A field enclosed in quotation marks is read
      without them and may contain tabs; it may contain line breaks if it has no tab and there are several columns. Any
      other quotation mark is part of the text.
  json, jsonl    one object per line, or one list of objects, which is read whole even when streamed
  parquet        row group by row group

All but Parquet may be compressed by gzip, bzip2, xz or zstd, with a second ending as in `part.jsonl.gz`. Text is UTF-8.
"""

import bz2
import csv
import glob
import gzip
import io
import itertools
import json
import logging
import lzma
import os
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from palimpsest.common.messages import listed, short_repr

log = logging.getLogger(__name__)

NUMBER = re.compile(r"-?[0-9]+")
_DIGITS = 9  # digits of the longest label that is a number
_AT_ONCE = 1000  # rows in a table
_CHARACTERS = 1 << 24  # in a table, approximately
_BUFFER = 1 << 20  # bytes of a Parquet column that are read at once; else a whole row group, which may be the file
_OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_PACKED = (*_OPENERS, ".zst")
_FAULTS = (ValueError, OSError, EOFError, csv.Error, pa.ArrowException, lzma.LZMAError, zlib.error)
_JSON_FORM = (
    "a JSON file holds one object per line, or one list of objects; pandas writes it by to_json(path, "
    "orient='records', lines=True)"
)

_LONGEST_LINE = 1 << 28  # characters: a small compressed file may contain a line that exceeds the memory
csv.field_size_limit(_LONGEST_LINE)  # the library's own limit is below the length of long documents


@dataclass(frozen=True)
class Columns:
    """The columns to read.

    Args:
        texts: columns whose values must be texts.
        label: column whose values must be words or whole numbers. They are read as words, without blanks around them.
        label_names: the classes, if known; a label must be one of them, or the number of one.
        indexed: labels are indices into `label_names`, even if these are numbers themselves.
        numbered: whether labels must be numbers (True) or words (False), if known.
        settings: column -> the setting that names it, for messages.
    """

    texts: tuple[str, ...] = ("text",)
    label: str | None = None
    label_names: tuple[str, ...] | None = None
    indexed: bool = False
    numbered: bool | None = None
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        return self.texts if self.label is None else (*self.texts, self.label)

    def positions(self, present: Sequence[str]) -> list[int]:
        """Return the positions of the columns among those of a file. Raises ValueError for an absent or repeated
        one."""
        for name in self.names:
            if name not in present:
                setting = f" ({self.settings[name]}={name})" if name in self.settings else ""
                raise ValueError(f"there is no column {short_repr(name)}{setting}; it has {listed(present)}")
            if present.count(name) > 1:
                raise ValueError(f"{present.count(name)} columns are called {short_repr(name)}; rename all but one")
        return [present.index(name) for name in self.names]


# A row of a file: its line (None in formats without lines) and its values in the order of Columns.names.
_Row = tuple[int | None, Sequence[object]]
# Consecutive rows: the number of the first, their lines (empty for Parquet files), column -> values.
_Batch = tuple[int, Sequence[int | None], Mapping[str, Sequence[object] | pa.Array]]


# -------------------------------------------------------------------------------- files


def readable_files(path: str, key: str) -> list[Path]:
    """Return a file, every readable file in a folder, or those of a glob, sorted, without opening any.

    `key` is the setting that gave `path`.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: one of them is a pipe or device; the folder was written by `save_to_disk`.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        _check_not_saved(place, key)
        entries = [p for p in sorted(place.iterdir()) if kind_of(p) in KINDS and not p.name.startswith(".")]
        fault = f"the folder holds no file of {', '.join(KINDS)}"
    else:
        entries = [place] if os.path.lexists(place) else map(Path, sorted(glob.glob(str(place), recursive=True)))
        fault = f"there is no such file; correct the path (relative to {Path.cwd()})"
    found = matching_files(entries, key)
    if not found:
        raise FileNotFoundError(f"{key}={path}: {fault}")
    return found


def matching_files(paths: Iterable[Path], key: str) -> list[Path]:
    """Return the paths that are not folders. Raises ValueError for pipes and devices, whose reading might never end."""
    found = [path for path in paths if not path.is_dir()]
    for path in found:
        if not path.is_file():
            what = "is no ordinary file but a pipe, a device or a socket" if path.exists() else "is a link to nothing"
            raise ValueError(f"{key}={path} {what}; remove it, or give a file")
    return found


def kind_of(path: Path) -> str:
    """Return the ending that names a file's format, without the compression's: jsonl for part.jsonl.gz."""
    name = path.name.lower()
    for ending in _PACKED:
        name = name.removesuffix(ending)
    return Path(name).suffix.lstrip(".")


def _check_not_saved(folder: Path, key: str) -> None:
    one_split = (folder / "state.json").exists() and any(folder.glob("*.arrow"))
    if one_split or (folder / "dataset_dict.json").exists():
        raise ValueError(
            f"{key}={folder} was written by save_to_disk of the library datasets; write Parquet files "
            f"instead: datasets.load_from_disk('{folder}').to_parquet('train.parquet') "
            f"(of several splits, one file for each)"
        )


# -------------------------------------------------------------------------------- reading


def read_files(files: Iterable[Path], key: str, columns: Columns) -> Iterator[pa.Table]:
    """Yield the rows of files one after the other. Raises ValueError as `read_tables` does."""
    for path in files:
        yield from read_tables(path, key, columns)


def read_tables(path: Path, key: str, columns: Columns, row_group: int | None = None) -> Iterator[pa.Table]:
    """Yield the rows of a file, or of one Parquet row group, in tables of large_string columns without nulls. Raises
    ValueError with file, line and remedy if the file or a row cannot be read, or the format is unknown."""
    with reading(path, key):
        if kind_of(path) == "parquet":
            yield from _tables(_parquet_batches(path, columns, row_group), columns, path)
        else:
            yield from _tables(_batches(_reader(path)(path, columns), columns), columns, path)


@contextmanager
def reading(path: Path, key: str) -> Iterator[None]:
    """Turn errors of reading a file into a ValueError that names the file and the setting that gave it."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"{key}={path} cannot be read: {_not_utf8(path)}") from error
    except _FAULTS as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        reason = re.sub("Exceeds the limit .*", "a number has over 4,300 digits; put it into quotation marks", reason)
        raise ValueError(f"{key}={path} cannot be read: {reason}") from error


def _reader(path: Path) -> Callable[[Path, Columns], Iterator[_Row]]:
    kind = kind_of(path)
    if kind not in _READERS:
        other = " (a file of save_to_disk: see datasets.Dataset.to_parquet)" if kind == "arrow" else ""
        raise ValueError(
            f"files of type {path.suffix or '(none)'} cannot be read{other}; give one of {', '.join(KINDS)}"
        )
    return _READERS[kind]


def open_text(path: Path, newline: str | None = None, errors: str = "strict") -> TextIO:
    """Open the uncompressed text of a file. A compressed file that ends too early is an error in all formats."""
    settings = {"encoding": "utf-8-sig", "newline": newline, "errors": errors}
    if path.suffix.lower() == ".zst":
        return io.TextIOWrapper(pa.input_stream(str(path), compression="zstd"), **settings)
    return _OPENERS.get(path.suffix.lower(), open)(path, "rt", **settings)


def _not_utf8(path: Path) -> str:
    """Say which line is not UTF-8, and how to convert the file."""
    with open_text(path, errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            found = re.search("[\udc80-\udcff]", line)
            if found:
                byte = ord(found.group()) - 0xDC00
                coding = "UTF-16" if number == 1 and byte in (0xFE, 0xFF) else "WINDOWS-1252"
                return (
                    f"line {number} is not UTF-8 (byte 0x{byte:02x}); convert the file, for example by "
                    f"iconv -f {coding} -t UTF-8 {path.name} > new-{path.name}"
                )
    return "it is not UTF-8; convert it"


def _tables(batches: Iterable[_Batch], columns: Columns, path: Path) -> Iterator[pa.Table]:
    has_warned = False
    for first, lines, cells in batches:

        def place(number: int, lines: Sequence[int | None] = lines, first: int = first) -> str:
            return _place(lines[number] if lines else None, first + number)

        table = {name: text_array(cells[name], name, place) for name in columns.texts}
        if columns.label is not None:
            values = cells[columns.label]
            labels = _labels(values, columns, place)
            blank = [n for n, word in enumerate(labels) if isinstance(values[n], str) and values[n] != word]
            if blank and not has_warned:
                has_warned = True
                origin = f"{path}: {place(blank[0])}"
                said = f"the label {short_repr(values[blank[0]])} is read as {labels[blank[0]]!r}"
                log.warning("%s: %s; blanks around labels are left out", origin, said)
            table[columns.label] = pa.array(labels, pa.large_string())
        yield pa.table(table)


def _batches(rows: Iterable[_Row], columns: Columns) -> Iterator[_Batch]:
    first, characters = 0, 0
    batch: list[_Row] = []
    for row in rows:
        batch.append(row)
        text = row[1][0]
        characters += len(text) if isinstance(text, str) else 0
        if len(batch) == _AT_ONCE or characters > _CHARACTERS:
            yield _batch(first, batch, columns)
            first += len(batch)
            batch, characters = [], 0
    if batch:
        yield _batch(first, batch, columns)


def _batch(first: int, rows: Sequence[_Row], columns: Columns) -> _Batch:
    lines, values = zip(*rows, strict=True)
    return first, lines, dict(zip(columns.names, zip(*values, strict=True), strict=True))


def _place(line: int | None, row: int) -> str:
    return f"row {row}" if line is None else f"line {line}, row {row}"


# -------------------------------------------------------------------------------- values


def text_array(values: Sequence[object] | pa.Array, column: str, place: Callable[[int], str]) -> pa.Array:
    """Return a column of texts as large_string. Raises ValueError for the first other value, with its `place`."""
    if isinstance(values, pa.Array):
        kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
        is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
        if is_text and not values.null_count:
            return values.cast(kind).cast(pa.large_string())
        values = values.to_pylist()
    try:
        texts = pa.array(values, pa.large_string())
        if not texts.null_count:
            return texts
    except (pa.ArrowException, UnicodeEncodeError):
        pass
    for number, value in enumerate(values):
        if not isinstance(value, str):
            remedy = _JSON_FORM if isinstance(value, list | dict) else "make it a text, or leave the row out"
            raise ValueError(  # noqa: TRY004
                f"{place(number)} of column {column!r} is {short_repr(value)}, not a text; {remedy}"
            )
        if re.search("[\ud800-\udfff]", value):
            raise ValueError(
                f"{place(number)} of column {column!r} holds half a character (a lone surrogate, as where "
                f"an emoji was cut): {short_repr(value)}; remove it"
            )
    raise AssertionError("all are texts")


def _labels(values: Sequence[object], columns: Columns, place: Callable[[int], str]) -> list[str]:
    """Return labels, including whole numbers, as words without blanks around them."""
    labels, numbers = [], {name: number for number, name in enumerate(columns.label_names or ())}
    for number, value in enumerate(values):
        word = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
        word = word.strip() if isinstance(word, str) else ""
        fault = _label_fault(word, columns, numbers)
        if fault:
            raise ValueError(f"{place(number)} of column {columns.label!r} is {short_repr(value)}{fault}")
        labels.append(word)
    return labels


def _label_fault(word: str, columns: Columns, numbers: Mapping[str, int]) -> str | None:
    """Return what is wrong with a label, or None. numbers: class name -> index."""
    numbered = bool(NUMBER.fullmatch(word))
    if not word or (numbered and len(word.lstrip("-")) > _DIGITS and word not in numbers):
        return "; labels must be whole numbers, or words, throughout"
    label = int(word) if numbered and columns.indexed else word
    if columns.label_names is not None and label_number(label, numbers) is None:
        said = classes(columns.label_names)
        return f", which is none of {said}; correct the file, or name all classes in data.label_names"
    if columns.numbered not in (None, numbered):
        usual = "numbers" if columns.numbered else "words"
        return f", and most labels are {usual}; correct it, or give data.label_names"
    return None


def label_number(label: object, numbers: Mapping[str, int]) -> int | None:
    """Return the index of a class given by its name (a key of `numbers`) or index; None if there is none.

    A word that is a number is a name if names are numbers themselves; an int is always an index.
    """
    if isinstance(label, str):
        if label in numbers:
            return numbers[label]
        if not NUMBER.fullmatch(label):
            return None
        if any(NUMBER.fullmatch(name) for name in numbers):
            return numbers.get(str(int(label)))
        label = int(label)
    return label if type(label) is int and 0 <= label < len(numbers) else None


def classes(names: Sequence[str]) -> str:
    """Return the classes with their indices, for a message."""
    return listed([f"{number} ({name})" for number, name in enumerate(names)])


# -------------------------------------------------------------------------------- formats


def _numbered_lines(file: TextIO) -> Iterator[tuple[int, str]]:
    """Yield the lines of a file with their numbers from 1. Raises ValueError for one that is too long."""
    for number in count(1):
        line = file.readline(_LONGEST_LINE)
        if not line:
            return
        if len(line) == _LONGEST_LINE and not line.endswith("\n"):
            raise ValueError(f"line {number} has more than {_LONGEST_LINE:,} characters; break it into texts")
        yield number, line


def _txt_rows(path: Path, columns: Columns) -> Iterator[_Row]:
    columns.positions(columns.texts[:1])
    with open_text(path) as file:  # universal newlines, and no other separator ends a line
        for number, line in _numbered_lines(file):
            if line.strip():
                yield number, (line.removesuffix("\n"),)


def _separated_rows(path: Path, columns: Columns, tabs: bool) -> Iterator[_Row]:
    with open_text(path, newline="") as file:
        yield from _separated(_tsv_records(file) if tabs else _csv_records(file), columns, "tabs" if tabs else "commas")


def _csv_records(file: TextIO) -> Iterator[tuple[int, list[str]]]:
    """Yield the line on which each row begins, and its fields."""
    reader, end = csv.reader(file, strict=True), 0
    try:
        for fields in reader:
            if fields:  # else a blank line
                yield end + 1, fields
            end = reader.line_num
    except csv.Error as error:
        raise ValueError(
            f"line {end + 1}: {error}; a field that begins with a quotation mark must end with one, and "
            "those within it are doubled"
        ) from error


def _tsv_records(file: TextIO) -> Iterator[tuple[int, list[str]]]:
    """Do the same for TSV; the header of this module has the rules of quotation marks."""
    ahead = deque[str]()
    number, tabs = 0, None
    while True:
        line = ahead.popleft() if ahead else next(file, None)
        if line is None:
            return
        number += 1
        plain = line.rstrip("\r\n")
        if not plain:
            continue
        taken: list[str] = []
        fields = plain.split("\t")
        tabs = len(fields) - 1 if tabs is None else tabs  # those of the header
        if '"' in plain:
            quoted = _unquoted(line, tabs, ahead, file, taken)
            if quoted is None or len(quoted) != tabs + 1:
                ahead.extendleft(reversed(taken))
                taken = []
            else:
                fields = quoted
        yield number, fields
        number += len(taken)


def _unquoted(line: str, tabs: int, ahead: deque[str], file: TextIO, taken: list[str]) -> list[str] | None:
    """Return the fields of a row whose quotation marks are paired, else None.

    Further lines of the row are appended to `taken`; together they have no more tabs than the header.
    """

    def lines() -> Iterator[str]:
        yield line
        left = tabs - line.count("\t")
        while tabs:
            more = ahead.popleft() if ahead else next(file, None)
            if more is None:
                return
            taken.append(more)
            left -= more.count("\t")
            if left < 0:
                return
            yield more

    try:
        return next(csv.reader(lines(), delimiter="\t", strict=True))
    except csv.Error:
        return None


def _separated(records: Iterator[tuple[int, list[str]]], columns: Columns, separators: str) -> Iterator[_Row]:
    """Yield the rows of a file after its header. Raises ValueError for a row with more or fewer fields."""
    line, header = next(records, (0, None))
    if header is None:
        raise ValueError("it is empty; its first line must name the columns")
    try:
        at = columns.positions(header)
    except ValueError as error:
        other = len(header) == 1 and re.search(r"[;,\t|]", header[0])
        raise ValueError(f"{error} (fields are separated by {separators})" if other else str(error)) from error
    width = len(header)
    for line, fields in records:
        if len(fields) != width:
            if len(fields) == 1 and not fields[0].strip():
                continue
            remedy = "complete the row, or leave it out"
            if len(fields) > width:
                remedy = f"put texts with {separators} into quotation marks"
            raise ValueError(
                f"line {line} has another number of fields ({len(fields)}) than the header ({width}: "
                f"{listed(header)}); {remedy}"
            )
        yield line, [fields[i] for i in at]


def _json_rows(path: Path, columns: Columns) -> Iterator[_Row]:
    with open_text(path) as file:
        filled = ((number, line) for number, line in _numbered_lines(file) if line.strip())
        begin = next(filled, None)
        if begin is None:
            return
        if begin[1].lstrip().startswith("["):
            parsed = _parsed(begin[1] + file.read(), begin[0], _without_repeats)
            yield from ((None, _cells(row, columns, f"row {number}")) for number, row in enumerate(parsed))
            return
        marks = [json.dumps(name) for name in columns.names]
        for row, (line, content) in enumerate(itertools.chain([begin], filled)):
            repeats = any(content.count(mark) > 1 for mark in marks)  # perhaps: it may stand in a text
            parsed = _parsed(content.strip(), line, _without_repeats if repeats else None)
            yield line, _cells(parsed, columns, _place(line, row))


def _parsed(content: str, line: int, hook: Callable[[list[tuple[str, object]]], dict] | None) -> object:
    """Parse JSON that begins on a line of a file."""
    try:
        return json.loads(content, object_pairs_hook=hook)
    except json.JSONDecodeError as error:
        bad = content.split("\n")[error.lineno - 1]
        raise ValueError(
            f"line {line + error.lineno - 1} is not JSON ({error.msg} at character {error.colno}): "
            f"{short_repr(bad)}; {_JSON_FORM}"
        ) from error
    except RecursionError as error:
        raise ValueError(f"line {line} has too many brackets within brackets") from error
    except ValueError as error:  # a repeated column, or a number of thousands of digits
        raise ValueError(f"line {line}: {error}") from error


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Build a JSON object from pairs with different names."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"an object has {names.count(repeated)} values called {short_repr(repeated)}; rename all but one"
        )
    return made


def _cells(row: object, columns: Columns, place: str) -> list[object]:
    if not isinstance(row, dict):
        raise ValueError(f"{place} is {short_repr(row)}, not an object with columns; {_JSON_FORM}")  # noqa: TRY004
    if not row.keys() >= set(columns.names):
        try:
            columns.positions(list(row))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
    return [row[name] for name in columns.names]


def _parquet_batches(path: Path, columns: Columns, row_group: int | None) -> Iterator[_Batch]:
    if path.suffix.lower() in _PACKED:
        raise ValueError("a Parquet file is packed inside; unpack it, and give the .parquet file")
    with pq.ParquetFile(path, buffer_size=_BUFFER) as file:
        columns.positions(file.schema_arrow.names)
        groups = None if row_group is None else [row_group]
        first = sum(file.metadata.row_group(group).num_rows for group in range(row_group or 0))
        for batch in file.iter_batches(_AT_ONCE, row_groups=groups, columns=list(columns.names)):
            batch.validate(full=True)  # the bytes of texts are UTF-8
            cells = {name: batch.column(name) for name in columns.texts}
            if columns.label is not None:
                cells[columns.label] = batch.column(columns.label).to_pylist()
            yield first, (), cells
            first += batch.num_rows


def class_names(files: Sequence[Path], key: str, column: str) -> tuple[str, ...] | None:
    """Return the class names that the library datasets stores in Parquet files (ClassLabel), or None. Raises ValueError
    if two files have different ones, or a file cannot be read."""
    found: dict[tuple[str, ...], Path] = {}
    for path in files:
        if kind_of(path) != "parquet":
            continue
        with reading(path, key):
            said = json.loads((pq.read_schema(path).metadata or {}).get(b"huggingface", b"{}"))
        feature = said.get("info", {}).get("features", {}).get(column)
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel":
            found.setdefault(tuple(map(str, feature["names"])), path)
    if len(found) > 1:
        (ours, first), (theirs, second) = list(found.items())[:2]
        raise ValueError(
            f"{key}: {first} has the classes {classes(ours)}, but {second} has {classes(theirs)}; number them alike"
        )
    return next(iter(found), None)


_READERS: dict[str, Callable[[Path, Columns], Iterator[_Row]]] = {
    "txt": _txt_rows,
    "csv": partial(_separated_rows, tabs=False),
    "tsv": partial(_separated_rows, tabs=True),
    "json": _json_rows,
    "jsonl": _json_rows,
}
KINDS = (*_READERS, "parquet")
