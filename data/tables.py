"""Tables of texts on disk: written piece by piece, so that a corpus of any size takes little memory.

A source writes its texts once, as Arrow streams in a folder of the cache (data/cache.py), and reads them memory-mapped.
Whoever needs all texts in order reads them with `consecutive`, which does not go through the memory map, because mapped
pages count as memory of the process.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from palimpsest.data.cache import cached_folder, content_digests, texts_fingerprint

_KIND = "texts"
_CODE_VERSION = 2  # raise it whenever a source gives other texts for the same files and settings
_PIECE = 1 << 20  # bytes of a record batch, approximately
_ROWS_AT_ONCE = 1000


def stored(
    cache_dir: str | None,
    settings: Mapping[str, Any],
    files: Iterable[Path],
    build: Callable[[Path], dict[str, Any] | None],
) -> tuple[dict[str, datasets.Dataset], dict[str, Any]]:
    """Return the tables that `build(folder)` writes as `<name>.arrow`, by name, and the figures that it returns.

    They are built once for the same settings and contents of `files`, and memory-mapped. Without a `cache_dir` they are
    built in a temporary folder and read into memory.
    """
    if cache_dir is None:
        with tempfile.TemporaryDirectory() as folder:
            figures = build(Path(folder)) or {}
            return {path.stem: _dataset(path, in_memory=True) for path in Path(folder).glob("*.arrow")}, figures
    key = {"code": _CODE_VERSION, "files": content_digests(files, cache_dir), **settings}
    folder, figures = cached_folder(cache_dir, _KIND, key, build)
    return {path.stem: _dataset(path, in_memory=False) for path in folder.glob("*.arrow")}, figures


def _dataset(path: Path, in_memory: bool) -> datasets.Dataset:
    kind = datasets.table.InMemoryTable if in_memory else datasets.table.MemoryMappedTable
    # The library makes the fingerprint of the content, for which it would read everything.
    fingerprint = datasets.fingerprint.generate_random_fingerprint() if in_memory else f"{path.parent.name}-{path.stem}"
    return datasets.Dataset(kind.from_file(str(path)), fingerprint=fingerprint)


def write(path: Path, tables: Iterable[pa.Table]) -> int:
    """Write tables one after the other into an Arrow stream; return the number of rows. Without rows there is no file.

    The column `text_id` numbers the rows.
    """
    writer, count = None, 0
    with path.open("wb") as file:
        for table in _pieces(tables):
            table = table.select([name for name in table.column_names if name != "text_id"])
            table = table.append_column("text_id", pa.array(np.arange(count, count + table.num_rows)))
            writer = writer or pa.ipc.new_stream(file, table.schema)
            writer.write_table(table)
            count += table.num_rows
        if writer is not None:
            writer.close()
    if not count:
        path.unlink()
    return count


def _pieces(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Yield the same rows in tables of about _PIECE bytes: a text is never divided."""
    held: list[pa.Table] = []
    for table in tables:
        rows = max(1, table.num_rows * _PIECE // max(table.nbytes, 1))
        for start in range(0, table.num_rows, rows):
            held.append(table.slice(start, rows))
            if sum(part.nbytes for part in held) >= _PIECE or rows < table.num_rows:
                yield pa.concat_tables(held).combine_chunks()
                held = []
    if held:
        yield pa.concat_tables(held).combine_chunks()


def read(path: Path) -> Iterator[pa.Table]:
    """Yield the tables of an Arrow stream in order, each in memory of its own."""
    with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as stream:
        for batch in stream:
            yield pa.Table.from_batches([batch])


def between(tables: Iterable[pa.Table], first: int, last: int | None) -> Iterator[pa.Table]:
    """Yield the rows from `first` to `last`, which does not belong to them; None: to the end. The rest is not read."""
    begin = 0
    for table in tables:
        end = table.num_rows if last is None else min(table.num_rows, last - begin)
        start = min(max(0, first - begin), end)
        yield table.slice(start, end - start)
        begin += table.num_rows
        if last is not None and begin >= last:
            return


def consecutive(rows: datasets.Dataset) -> Iterator[pa.Table]:
    """Yield all rows in order, in small tables."""
    path = _file_of(rows)
    if path is None:
        arrow = rows.with_format("arrow")
        yield from (arrow[start : start + _ROWS_AT_ONCE] for start in range(0, len(rows), _ROWS_AT_ONCE))
    else:
        yield from (table.select(rows.column_names) for table in between(read(path), 0, len(rows)))


def _file_of(rows: datasets.Dataset) -> Path | None:
    """Return the file of `stored` that begins with these rows, if there is one."""
    paths = [Path(file["filename"]) for file in rows.cache_files]
    if len(paths) != 1 or not paths[0].parent.name.startswith(f"{_KIND}-") or "text_id" not in rows.column_names:
        return None
    ends = rows.select_columns("text_id")
    return paths[0] if (ends[0]["text_id"], ends[len(rows) - 1]["text_id"]) == (0, len(rows) - 1) else None


def texts_of(rows: datasets.Dataset) -> Iterator[str]:
    """Yield the texts of all rows."""
    for table in consecutive(rows.select_columns([n for n in ("text", "text_id") if n in rows.column_names])):
        yield from table["text"].to_pylist()


def size_of(rows: datasets.Dataset) -> dict[str, int]:
    """Return the number of texts and that of their bytes, by which a resumed training notices other texts."""
    texts = rows.select_columns([name for name in ("text", "text_id") if name in rows.column_names])
    lengths = (pc.sum(pc.binary_length(table["text"])).as_py() for table in consecutive(texts))
    return {"texts": len(rows), "bytes": sum(lengths)}


def fingerprint_of(rows: datasets.Dataset) -> str:
    """Return a digest of the texts: of rows on disk the one that the library keeps, else one of their content."""
    return rows._fingerprint if rows.cache_files else texts_fingerprint(texts_of(rows))
