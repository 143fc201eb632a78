"""Pack texts into rows of token ids that are kept on disk.

A packed split is a `datasets.Dataset` (numpy format) with the columns
  input_ids  list of int32, without padding  length     int32, number of ids
  sample_id  int64, permanent id of the row  text_id    int64, the source text (padded rows only)
  label      int64, if the texts have labels
  first_document, last_document  int64, the documents of the row's first and last token, numbered in the order of the
             split; for wrapped rows, and for padded rows whose texts are pieces of documents; absent if documents are
             unknown (data/sources.py)
  part_ends  list of int32, if the texts have parts: the end of each part but the last, in tokens. BOS belongs to the
             first part, EOS to the last; with `room` each part in between ends with EOS too
`sample_id` of a padded row is window * 2**32 + text_id, so it does not change when other texts or classes are left out.
"""

import itertools
import multiprocessing
import os
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from joblib import cpu_count
from transformers import PreTrainedTokenizerBase

from palimpsest.data.cache import cached_folder, texts_fingerprint
from palimpsest.data.loading import MOST_WORKERS
from palimpsest.data.rows import parts_of
from palimpsest.data.tables import consecutive, fingerprint_of
from palimpsest.data.tokenizers import Vocabulary, encode, encode_after

_CODE_VERSION = 2  # raise it whenever a change below gives other rows for the same texts and settings
_TEXTS_AT_ONCE = 1000  # limits memory; the rows do not depend on it
_WINDOW = 2**32
_LARGE = 64 * 2**20  # bytes of texts from which several processes tokenise them


@dataclass(frozen=True)
class Packing:
    """The settings that turn texts into rows; every field is part of the cache key.

    Attributes:
        length: maximum tokens of a row.
        wrap: concatenate all texts and cut, instead of one text per row.
        eos: append the end token to each text.
        bos: prepend the begin token to each text (padded rows).
        chunk_special: cut chunks of `length - 2` tokens and put both special tokens around each (wrapped rows).
        long_texts: how to treat a text longer than `length`: truncate, windows (several rows), drop or error.
        drop_empty: drop texts without tokens after their prompt instead of refusing them. Wrapped rows always do.
        room: tokens reserved for each part between the first and the last, since a model cannot know the length of a
            part that it has yet to write; None: parts are adjacent.
        num_proc: None for our packing. A number cuts texts as kuleshov-group's mdlm does with that many processes
            (data.protocol=reference): each joins a thousand texts at a time and drops the rest that does not fill a
            row, empty texts leave an end token, special tokens in texts are parsed, and truncated texts keep theirs.
    """

    length: int
    wrap: bool
    eos: bool = True
    bos: bool = False
    chunk_special: bool = False
    long_texts: str = "error"
    drop_empty: bool = False
    room: int | None = None
    num_proc: int | None = None

    def __post_init__(self) -> None:
        shortest = 3 if self.wrap and self.chunk_special else 1
        if self.length < shortest:
            raise ValueError(f"model.length={self.length} is too short; give at least {shortest}")

    @property
    def settings(self) -> dict[str, Any]:
        """Return the fields for the cache key; room and num_proc only if they are set."""
        return {key: value for key, value in asdict(self).items() if key not in ("room", "num_proc") or value}

    @property
    def content_length(self) -> int:
        """Return the tokens of a wrapped row without the special tokens around it."""
        return self.length - 2 if self.chunk_special else self.length


def with_special_tokens(packing: Packing, special: bool, eos: bool) -> Packing:
    """Return `packing` with the special tokens of data.insert_*_special and data.insert_*_eos."""
    return replace(packing, eos=eos, bos=special and not packing.wrap, chunk_special=special and packing.wrap)


def pack(
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: Vocabulary,
    packing: Packing,
    cache_dir: str | Path | None,
    name: str = "these texts",
) -> tuple[datasets.Dataset, dict[str, int]]:
    """Pack `rows` (columns text, text_id, label?, ends?, document?), or read the packed split from the cache.

    Args:
        cache_dir: None packs in memory.
        name: the split, for messages.

    Returns:
        The packed split and the fields of `Figures`.

    Raises:
        ValueError: empty or over-long texts (see `packing`), a missing begin or end token, too little text to fill a
            chunk, or prompts that cannot be kept.
    """
    check_tokens(vocabulary, packing, name)
    if "ends" in rows.column_names:
        check_prompts(packing, name)
    packer = Packer(tokenizer, vocabulary, packing, name)
    if cache_dir is None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.arrow"
            figures = packer.write(path, rows)
            return datasets.Dataset.from_file(str(path), in_memory=True).with_format("numpy"), figures
    settings = {
        "code": _CODE_VERSION,
        "texts": fingerprint_of(rows),
        "tokenizer": vocabulary.fingerprint,
        "packing": packing.settings,
        "eos_id": vocabulary.eos_id,
        "bos_id": vocabulary.bos_id,
        "label": None,
        **({} if rows.cache_files else _digests(rows)),
    }
    kind = "wrapped" if packing.wrap else "rows"
    folder, figures = cached_folder(cache_dir, kind, settings, lambda f: packer.write(f / "rows.arrow", rows))
    return datasets.Dataset.from_file(str(folder / "rows.arrow")).with_format("numpy"), figures


def check_tokens(vocabulary: Vocabulary, packing: Packing, name: str) -> None:
    """Raise ValueError if the tokenizer lacks a begin or end token that the rows need."""
    needs_eos = packing.eos or (packing.wrap and packing.chunk_special)
    needs_bos = packing.chunk_special if packing.wrap else packing.bos
    for needed, token_id, token, remedy in (
        (needs_eos, vocabulary.eos_id, "end (EOS or SEP)", "data.insert_*_eos=false and data.insert_*_special=false"),
        (needs_bos, vocabulary.bos_id, "begin (BOS or CLS)", "data.insert_*_special=false"),
    ):
        if needed and token_id is None:
            other = "choose another data.tokenizer_name_or_path"
            raise ValueError(f"{name}: the tokenizer has no {token} token; {other}, or set {remedy}")


def check_prompts(packing: Packing, name: str) -> None:
    """Raise ValueError for packings that separate texts from their prompts."""
    if packing.wrap:
        raise ValueError(f"{name}: data.wrap=true joins texts and would hide their prompts; set data.wrap=false")
    if packing.long_texts == "windows":
        raise ValueError(
            f"{name}: data.long_texts=windows would part texts from their prompts; set truncate, drop or error"
        )


def _digests(rows: datasets.Dataset) -> dict[str, str]:
    """Return a digest of each column but the texts."""
    names = [name for name in ("text_id", "label", "ends", "document") if name in rows.column_names]
    columns = {name: rows.select_columns(name).with_format("numpy")[:][name] for name in names}
    return {
        name: texts_fingerprint([np.asarray(values, dtype=np.int64).tobytes().hex()])
        for name, values in columns.items()
    }


@dataclass
class Figures:
    """Counts of what packing did.

    Attributes:
        long: texts that were truncated, split into windows or dropped; `longest` in tokens.
        cut: tokens left out.
        encoded, unknown: tokens of all texts, and the unknown ones among them.
    """

    texts: int = 0
    rows: int = 0
    tokens: int = 0
    empty: int = 0
    long: int = 0
    longest: int = 0
    cut: int = 0
    unknown: int = 0
    encoded: int = 0

    def add(self, other: "Figures") -> None:
        """Add the counts of other texts."""
        longest = max(self.longest, other.longest)
        for name, count in asdict(other).items():
            setattr(self, name, getattr(self, name) + count)
        self.longest = longest


@dataclass
class PackedRows:
    """Packed rows before they are written: a flat array of ids, the length of each row, and further columns.

    `documents`: those of the first and of the last token of each row.
    """

    ids: np.ndarray
    lengths: np.ndarray
    sample_id: np.ndarray
    text_id: np.ndarray | None
    label: np.ndarray | None
    part_ends: list[list[int]] | None = None
    documents: tuple[np.ndarray, np.ndarray] | None = None

    def arrow(self) -> pa.RecordBatch:
        """Return the columns that are present as an Arrow table."""
        offsets = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int32)
        columns = {
            "input_ids": pa.ListArray.from_arrays(pa.array(offsets), pa.array(self.ids.astype(np.int32))),
            "length": pa.array(self.lengths.astype(np.int32)),
        }
        names = ("sample_id", "text_id", "label", "first_document", "last_document")
        values = (self.sample_id, self.text_id, self.label, *(self.documents or (None, None)))
        for column, value in zip(names, values, strict=True):
            if value is not None:
                columns[column] = pa.array(np.asarray(value, dtype=np.int64))
        if self.part_ends is not None:
            columns["part_ends"] = pa.array(self.part_ends, pa.list_(pa.int32()))
        return pa.RecordBatch.from_pydict(columns)


@dataclass
class Tokens:
    """The tokens of some texts, one text after the other with its end token, and columns of the texts.

    `lengths`: tokens of each text, with its end token.
    """

    ids: np.ndarray
    lengths: np.ndarray
    columns: dict[str, Any]


@dataclass
class Packer:
    """Packs texts into rows and counts in `figures` what it did. `name`: the split, for messages."""

    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    packing: Packing
    name: str
    figures: Figures = field(default_factory=Figures)

    def write(self, path: Path, rows: datasets.Dataset) -> dict[str, int]:
        """Pack all rows into an Arrow stream at `path` and return the figures.

        Large splits are tokenised by several processes. Only this one joins, cuts and writes, in the order of the
        texts, so the rows do not depend on the number of processes.
        """
        if self.packing.num_proc is None:
            tables = consecutive(rows)
        else:
            bounds = _batch_bounds(len(rows), self.packing.num_proc)
            tables = (rows.with_format("arrow")[start:stop] for start, stop in bounds)
        processes = min(cpu_count(), MOST_WORKERS) if rows.data.nbytes > _LARGE else 1
        parts = self._counted(in_order(self.part, tables, processes))
        parts = self._wrap(parts) if self.packing.wrap else parts
        writer = None
        with path.open("wb") as file:
            for part in filter(None, parts):
                table = part.arrow()
                writer = writer or pa.ipc.new_stream(file, table.schema)
                writer.write_batch(table)
                self.figures.rows += len(part.lengths)
                self.figures.tokens += int(part.lengths.sum())
            if writer is not None:
                writer.close()
        self._check_figures()
        return asdict(self.figures)

    def part(self, table: pa.Table) -> tuple[Tokens | PackedRows | None, Figures]:
        """Return the rows of some texts, or their tokens if texts are joined, and the counts."""
        packer = replace(self, figures=Figures())
        batch, ids = packer.tokenise(table.to_pydict())
        if not self.packing.wrap:
            return packer.pad_rows(batch, ids), packer.figures
        packer.figures.empty += sum(not row for row in ids)
        columns = {name: batch[name] for name in ("text_id", "label", "document") if name in batch}
        return Tokens(*packer.joined(ids), columns), packer.figures

    def _counted(self, parts: Iterable[tuple[Any, Figures]]) -> Iterator[Any]:
        for part, figures in parts:
            self.figures.add(figures)
            yield part

    def tokenise(self, batch: dict[str, Any]) -> tuple[dict[str, Any], list[list[int]]]:
        """Return the columns of some texts and their token ids.

        Each part of a text is encoded separately, because a prompt must have the same tokens when nothing follows it.
        The column `part_ends` then holds the end of each part but the last, in tokens.
        """
        from_text = self.packing.num_proc is not None  # read special tokens out of the text
        if "ends" in batch:
            texts = [parts_of(text, ends) for text, ends in zip(batch["text"], batch["ends"], strict=True)]
            first, *others = zip(*texts, strict=True)
            columns = [encode(self.tokenizer, first), *(encode_after(self.tokenizer, column) for column in others)]
            encoded = list(zip(*columns, strict=True))
            batch = {**batch, "part_ends": [list(itertools.accumulate(map(len, row[:-1]))) for row in encoded]}
            ids = [[i for part in row for i in part] for row in encoded]
        else:
            ids = encode(self.tokenizer, batch["text"], special_from_text=from_text)
        if from_text and any(self.vocabulary.mask_id in row for row in ids):
            raise ValueError(
                f"{self.name}: a text contains the mask token, which data.protocol=reference reads as a mask; correct "
                "the text, or leave out data.protocol"
            )
        unk_id = self.tokenizer.unk_token_id
        self.figures.texts += len(ids)
        self.figures.encoded += sum(map(len, ids))
        if unk_id is not None and unk_id != self.vocabulary.eos_id:
            self.figures.unknown += sum(row.count(unk_id) for row in ids)
        return batch, ids

    def _wrap(self, texts: Iterable[Tokens]) -> Iterator[PackedRows]:
        """Yield chunks of one stream over the whole split; only its last, unfilled chunk is left out."""
        rest = np.zeros(0, dtype=np.int32)
        done = 0
        labels: set[int] = set()
        documents = _DocumentNumbers(self.packing)
        for part in texts:
            if self.packing.num_proc is not None:
                self.figures.cut += len(rest)
                rest = rest[:0]
                documents.drop_rest()
            labels.update(part.columns.get("label", ()))
            if len(labels) > 1:
                raise ValueError(
                    f"{self.name}: data.wrap=true joins texts of several classes; choose one class with data.label, or "
                    "set data.wrap=false"
                )
            chunks, rest = self.cut_chunks(np.concatenate([rest, part.ids]))
            count = len(chunks)
            of_rows = documents.of_rows(part, count, len(rest))
            if count:
                sample_id = np.arange(done, done + count)
                label = np.full(count, min(labels)) if labels else None
                lengths = np.full(count, self.packing.length)
                yield PackedRows(chunks.reshape(-1), lengths, sample_id, None, label, documents=of_rows)
            done += count
        self.figures.cut += len(rest)

    def joined(self, ids: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of texts in one array, each with its end token, and the number of each text's.

        Texts without tokens leave no end token either, except in the references' rows.
        """
        end = [self.vocabulary.eos_id] if self.packing.eos else []
        texts = [row + end if row or self.packing.num_proc else [] for row in ids]
        flat = np.fromiter(itertools.chain.from_iterable(texts), dtype=np.int32)
        return flat, np.array([len(text) for text in texts], dtype=np.int64)

    def cut_chunks(self, stream: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cut tokens into chunks (C, length); return them and the tokens that are left."""
        inner = self.packing.content_length
        count = len(stream) // inner
        chunks, rest = stream[: count * inner].reshape(count, inner), stream[count * inner :]
        if self.packing.chunk_special:
            chunks = np.pad(chunks, ((0, 0), (1, 1)))
            chunks[:, 0], chunks[:, -1] = self.vocabulary.bos_id, self.vocabulary.eos_id
        return chunks, rest

    def pad_rows(self, batch: dict[str, Any], ids: list[list[int]]) -> PackedRows | None:
        """Return each text's row, or its windows; None if there is no row.

        A truncated text has no end token, because it has not ended. Raises ValueError if a text has no tokens after its
        prompt, unless packing.drop_empty, or a prompt would fill its row.
        """
        parts, unfilled = batch.get("part_ends"), [0] * len(ids)
        if parts and self.packing.room:
            ids, parts, unfilled = self._fill_segments(ids, parts, batch["text_id"])
        windows = list(self._windows(batch, ids, parts, unfilled))
        if not windows:
            return None
        place = np.array([p for _, p, _ in windows])
        text_id = np.asarray(batch["text_id"])[place]
        sample_id = np.array([w for _, _, w in windows]) * _WINDOW + text_id
        label = np.asarray(batch["label"])[place] if "label" in batch else None
        flat = np.concatenate([np.asarray(w, dtype=np.int32) for w, _, _ in windows])
        part_ends = [[self.packing.bos + end for end in parts[p]] for p in place] if parts else None
        documents = None
        if min(batch.get("document", [-1])) >= 0:
            documents = (np.asarray(batch["document"])[place],) * 2
        lengths = np.array([len(w) for w, _, _ in windows])
        return PackedRows(flat, lengths, sample_id, text_id, label, part_ends, documents)

    def _windows(
        self, batch: dict[str, Any], ids: list[list[int]], parts: list[list[int]] | None, unfilled: list[int]
    ) -> Iterator[tuple[list[int], int, int]]:
        """Yield each row's ids, the index of its text in the batch, and the number of the window."""
        packing, figures = self.packing, self.figures
        head, tail = [self.vocabulary.bos_id] * packing.bos, [self.vocabulary.eos_id] * packing.eos
        for place, row in enumerate(ids):
            prompt, text_id = parts[place][0] if parts else 0, batch["text_id"][place]
            if len(row) == prompt + (len(parts[place]) - 1 if parts and packing.room else 0):
                figures.empty += 1
                if not packing.drop_empty and packing.num_proc is None:
                    text = f"text {text_id} ({batch['text'][place]!r:.40}) has no tokens"
                    where = " behind its prompt" if parts else ""
                    raise ValueError(f"{self.name}: {text}{where}; correct it, or set data.drop_empty=true")
                if packing.num_proc is None:
                    continue
            whole = head + row + tail
            needed = len(whole) + unfilled[place]
            figures.longest = max(figures.longest, needed)
            figures.long += needed > packing.length
            if needed > packing.length and packing.long_texts == "drop":
                figures.cut += len(whole)
                continue
            if parts and packing.long_texts == "truncate" and len(head) + prompt >= packing.length:
                raise ValueError(
                    f"{self.name}: the prompt of text {text_id} has {prompt} tokens and leaves no room in "
                    f"model.length={packing.length}; raise it, or set data.long_texts=drop"
                )
            if packing.num_proc and needed > packing.length:
                whole = whole[: packing.length - len(tail)] + tail
            starts = range(0, len(whole), packing.length) if packing.long_texts == "windows" else [0]
            for window, start in enumerate(starts):
                yield whole[start : start + packing.length], place, window
            figures.cut += max(needed - packing.length, 0) if packing.long_texts != "windows" else 0

    def _fill_segments(
        self, ids: list[list[int]], part_ends: list[list[int]], text_ids: list[int]
    ) -> tuple[list[list[int]], list[list[int]], list[int]]:
        """Append EOS to every part between the first and the last.

        Returns:
            The tokens of each text, its new part ends, and the number of unused tokens in its rooms, which exceeds a
            row if a part does not fit, so that the text is dropped.

        Raises:
            ValueError: a part does not fit, unless such texts are dropped.
        """
        room = self.packing.room
        rows, ends = [], []
        unfilled = []
        for row, old_ends, text_id in zip(ids, part_ends, text_ids, strict=True):
            middle = [[*row[start:end], self.vocabulary.eos_id] for start, end in itertools.pairwise(old_ends)]
            longest = max(map(len, middle), default=0)
            if longest > room and self.packing.long_texts != "drop":
                raise ValueError(
                    f"{self.name}: a part of text {text_id} has {longest} tokens with its EOS, more than "
                    f"data.segment_room={room}; raise it, or set data.long_texts=drop"
                )
            rows.append([*row[: old_ends[0]], *itertools.chain(*middle), *row[old_ends[-1] :]])
            ends.append(list(itertools.accumulate(map(len, middle), initial=old_ends[0])))
            left = sum(room - len(part) for part in middle)
            unfilled.append(left if longest <= room else self.packing.length + 1)
        return rows, ends, unfilled

    def _check_figures(self) -> None:
        figures, packing = self.figures, self.packing
        length = packing.length
        if figures.long and not packing.wrap and packing.long_texts == "error":
            raise ValueError(
                f"{self.name}: {figures.long} of {figures.texts} texts are longer than model.length={length} tokens "
                f"(the longest has {figures.longest}); raise it, or set data.long_texts=truncate, windows or drop"
            )
        if figures.rows:
            return
        if packing.wrap and figures.empty < figures.texts:
            remedy = "lower it, give more text, or set data.wrap=false"
            raise ValueError(
                f"{self.name}: {figures.cut} tokens do not fill one chunk of model.length={length}; {remedy}"
            )
        if figures.long:
            limits = f"model.length={length}"
            if packing.room:
                limits += f" or have parts longer than data.segment_room={packing.room}; raise either"
            raise ValueError(f"{self.name}: data.long_texts=drop leaves no text: all are longer than {limits}")
        raise ValueError(f"{self.name}: there is no text with any token in it; give other texts")


def _batch_bounds(number: int, parts: int) -> Iterator[tuple[int, int]]:
    """Yield the bounds of batches of texts, for each of `parts` contiguous shards as `datasets` makes them."""
    share, larger = divmod(number, parts)
    edges = [share * part + min(part, larger) for part in range(parts + 1)]
    for first, last in itertools.pairwise(edges):
        for start in range(first, last, _TEXTS_AT_ONCE):
            yield start, min(start + _TEXTS_AT_ONCE, last)


class _DocumentNumbers:
    """Tracks which documents the tokens of a wrapped stream belong to."""

    def __init__(self, packing: Packing) -> None:
        self._packing = packing
        self._rest = np.zeros(0, dtype=np.int64)
        self._number, self._newest = -1, None

    def drop_rest(self) -> None:
        """Forget the tokens that have not filled a row."""
        self._rest = self._rest[:0]

    def of_rows(self, part: Tokens, count: int, left: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the documents of the first and the last token of the next `count` rows, which leave `left` tokens.

        None if documents are unknown.
        """
        names = np.asarray(part.columns.get("document", part.columns["text_id"]))
        if min(names, default=0) < 0:
            return None
        kept = np.flatnonzero(part.lengths) if self._packing.num_proc is None else np.arange(len(names))
        names = names[kept]
        lengths = part.lengths[kept]
        stream = self._rest
        if len(names):
            numbers = self._number + np.cumsum(np.append(names[0] != self._newest, names[1:] != names[:-1]))
            self._number, self._newest = int(numbers[-1]), names[-1]
            stream = np.concatenate([stream, np.repeat(numbers, lengths)])
        used = count * self._packing.content_length
        assert len(stream) == used + left, "each text leaves its tokens and its end token in the stream"
        self._rest = stream[used:]
        rows = stream[:used].reshape(count, self._packing.content_length)
        return rows[:, 0], rows[:, -1]


def one_after_the_other(parts: Sequence[datasets.Dataset]) -> datasets.Dataset:
    """Join the packed rows of several data sets, without labels and documents, and number them anew.

    One data set stays as it is.
    """
    if len(parts) == 1:
        return parts[0]
    numbered, starts = [], {"sample_id": 0, "text_id": 0}
    for part in parts:
        kept = [name for name in ("input_ids", "length", "part_ends") if name in part.column_names]
        columns = part.select_columns(kept)
        for name in starts:
            if name in part.column_names:
                values = np.asarray(part[name][:])
                columns = columns.add_column(name, values + starts[name])
                starts[name] += int((values % _WINDOW).max()) + 1
        numbered.append(columns)
    return datasets.concatenate_datasets(numbered).with_format("numpy")


# -------------------------------------------------------------------------------- several processes


def in_order(function: Callable, items: Iterable, processes: int) -> Iterator:
    """Yield function(item) for each item, in order; several processes compute a few items ahead."""
    if processes == 1:
        yield from map(function, items)
        return
    with ProcessPoolExecutor(processes, initializer=_begin, initargs=(function,)) as pool:
        ahead = deque()
        for item in items:
            ahead.append(pool.submit(_work, item))
            if len(ahead) > 2 * processes:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


_function: Callable  # of a worker process: its pickle is large, so that it is sent once


def _begin(function: Callable) -> None:
    global _function
    _function = function
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads of the library are useless beside processes
    for number in (signal.SIGINT, signal.SIGTERM):  # a handler of the training would save a checkpoint here too
        signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(item: object) -> object:
    return _function(item)
