"""Read text files of any usual format into a table, as they are: no value is guessed to be missing or a
number."""

import glob
import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq


def read_files(path: str, key: str, text_column: str = "text") -> pa.Table:
    """The rows of a file, of every readable file in a folder, or of a glob (files in sorted order).

    `key` is the setting that gave `path`. A txt file gives the column `text_column`: one text per non-empty
    line. Raises FileNotFoundError where nothing matches, ValueError naming the file that cannot be read.
    """
    files = readable_files(path, key)
    tables = [_read(file, key, text_column) for file in files]
    columns = tables[0].column_names
    for file, table in zip(files, tables, strict=True):
        if set(table.column_names) != set(columns):
            raise ValueError(f"{key}={path}: {file} has the columns {', '.join(table.column_names)}, but "
                             f"{files[0]} has {', '.join(columns)}; name files of one kind")  # fmt: skip
    try:
        return pa.concat_tables([t.select(columns) for t in tables], promote_options="permissive")
    except pa.ArrowInvalid as error:
        raise ValueError(f"{key}={path}: the files hold columns of different types ({error})") from error


def readable_files(path: str, key: str) -> list[Path]:
    """A file, every readable file in a folder, or those of a glob, in sorted order. Raises FileNotFoundError where
    there are none."""
    place = Path(path).expanduser()
    if place.is_dir():
        found = [p for p in sorted(place.iterdir()) if _reader(p) and not p.name.startswith(".")]
        if not found:
            raise FileNotFoundError(f"{key}={path}: the folder holds no file of {', '.join(_READERS)}")
        return found
    found = [place] if place.is_file() else [Path(p) for p in sorted(glob.glob(str(place), recursive=True))]
    found = [p for p in found if p.is_file()]
    if not found:
        raise FileNotFoundError(f"{key}={path}: there is no such file; correct the path (relative to {Path.cwd()})")
    return found


def _reader(path: Path) -> Callable[[Path, str], pa.Table] | None:
    return _READERS.get(path.suffix.lower().lstrip("."))


def _read(path: Path, key: str, text_column: str) -> pa.Table:
    reader = _reader(path)
    if reader is None:
        kind = path.suffix or "(none)"
        raise ValueError(f"{key}={path}: files of type {kind} cannot be read; give one of {', '.join(_READERS)}")
    try:
        return reader(path, text_column)
    except (ValueError, OSError, pa.ArrowException, pd.errors.ParserError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{key}={path} cannot be read: {reason}") from error


def _read_lines(path: Path, text_column: str) -> pa.Table:
    with path.open(encoding="utf-8-sig") as file:  # universal newlines, and no other separator ends a line
        lines = [line.removesuffix("\n") for line in file if line.strip()]
    return pa.table({text_column: pa.array(lines, pa.large_string())})


def _read_json(path: Path, _: str) -> pa.Table:
    """A list of objects, or one object per line."""
    content = path.read_text(encoding="utf-8-sig")
    if content.lstrip().startswith("["):
        rows = json.loads(content)
    else:
        rows = [json.loads(line) for line in content.split("\n") if line.strip()]
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"entry {number} is {type(row).__name__}, not an object with columns")  # noqa: TRY004
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({name: _column([row.get(name) for row in rows]) for name in names})


def _column(values: list[object]) -> pa.Array:
    """Values of one type keep it; mixed ones become JSON text or null, and the checks of the source name the
    row."""
    try:
        return pa.array(values)
    except pa.ArrowException:
        return pa.array([v if isinstance(v, str) else None for v in values], pa.large_string())


def _read_separated(separator: str) -> Callable[[Path, str], pa.Table]:
    def read(path: Path, _: str) -> pa.Table:
        frame = pd.read_csv(path, sep=separator, dtype=str, na_filter=False, encoding="utf-8-sig")
        return pa.table({str(name): pa.array(frame[name].tolist(), pa.large_string()) for name in frame.columns})

    return read


_READERS: dict[str, Callable[[Path, str], pa.Table]] = {
    "txt": _read_lines,
    "csv": _read_separated(","),
    "tsv": _read_separated("\t"),
    "json": _read_json,
    "jsonl": _read_json,
    "parquet": lambda path, _: pq.read_table(path),
}
