"""Texts -> rows of token ids, kept on disk: `wrap` concatenates and cuts, `pad` gives each text its own
row(s).

A packed split is a `datasets.Dataset` (numpy format) with the columns
  input_ids  list of int32, unpadded        length     int32, number of ids
  sample_id  int64, the row's lasting name  text_id    int64, the source text it is from (`pad` only)
  label      int64, where the texts have one
  first_document, last_document  int64, the documents of which the row's first and last token are: numbers in the order
             of the split. Of wrapped rows, and of padded ones whose texts are pieces of documents; absent where
             documents are not known (data/sources.py)
  part_ends  list of int32, where the texts have parts: the tokens before which each part but the last ends; BOS
             belongs to the first part, EOS to the last; with a `room` the parts between have an EOS too
`sample_id` of a padded row is window * 2**32 + text_id: it stays the same when other texts or classes are
left out.
"""

import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from palimpsest.data.cache import cached_folder, texts_fingerprint
from palimpsest.data.rows import parts_of
from palimpsest.data.tokenizers import Vocabulary, encode, encode_after

_CODE_VERSION = 2  # raise it whenever a change below gives other rows for the same texts and settings
_TEXTS_AT_ONCE = 1000  # bounds memory; the rows do not depend on it
_WINDOW = 2**32


@dataclass(frozen=True)
class Packing:
    """How texts become rows. Every field is part of the cache key.

    length: most tokens of a row. wrap: concatenate all texts and cut, else one text per row.
    bos, eos: for padded rows, put the begin token in front and the end token behind each text; for wrapped
    ones `eos` ends each text, and `chunk_special` cuts `length - 2` tokens and puts both around each chunk.
    long_texts: what a padded text beyond `length` becomes: its beginning, several rows, nothing, or an error.
    drop_empty: leave out texts without tokens (behind their prompt) instead of refusing them (padded rows; wrapped ones
    always do).
    num_proc: None for our way. Else the texts are cut as kuleshov-group's mdlm does with so many processes
    (data.protocol=reference): each joins a thousand texts at a time and drops what does not fill a row, an empty text
    leaves its end token, special tokens are read out of the text, and a padded text that is cut keeps its end token.
    room: tokens that each part between a text's first and last will take up, whatever it has: where a part ends that is
    yet to be written is not known before. None: parts follow one another.
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
        """What rows depend on: all fields; room and num_proc where they are set."""
        return {key: value for key, value in asdict(self).items() if key not in ("room", "num_proc") or value}


def with_special_tokens(packing: Packing, special: bool, eos: bool) -> Packing:
    """With the tokens that data.insert_*_special and insert_*_eos put around the texts, or the chunks, of a split."""
    return replace(packing, eos=eos, bos=special and not packing.wrap, chunk_special=special and packing.wrap)


def pack(
    rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary, packing: Packing,
    cache_dir: str | Path | None, name: str = "these texts",
) -> tuple[datasets.Dataset, dict[str, int]]:  # fmt: skip
    """The packed split of `rows` (columns text, text_id, label?, ends?), read from the cache or built into it (None: in
    memory, kept nowhere), and figures: texts, rows, tokens, empty, long (texts cut, windowed or dropped), cut (tokens
    left out), encoded (tokens of all texts), unknown (of them, unknown ones).

    `name` says in messages which split it is. Raises ValueError for empty or over-long texts (as `packing`
    says), for a tokenizer without the begin or end token that is needed, for too little text to fill one
    chunk, and for prompts that leave no room or can not be kept.
    """
    check_tokens(vocabulary, packing, name)
    has_label, has_parts = "label" in rows.column_names, "ends" in rows.column_names
    if has_parts:
        check_prompts(packing, name)
    if cache_dir is None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.arrow"
            figures = _write(path, rows, tokenizer, vocabulary, packing, name)
            return datasets.Dataset.from_file(str(path), in_memory=True).with_format("numpy"), figures
    settings = {
        "code": _CODE_VERSION, "texts": texts_fingerprint(_each_text(rows)), "tokenizer": vocabulary.fingerprint,
        "text_id": _digest(rows, "text_id"), "label": _digest(rows, "label") if has_label else None,
        "packing": packing.settings, "eos_id": vocabulary.eos_id, "bos_id": vocabulary.bos_id,
        **({"ends": _digest(rows, "ends")} if has_parts else {}),
        **({"document": _digest(rows, "document")} if "document" in rows.column_names else {}),
    }  # fmt: skip
    folder, figures = cached_folder(
        cache_dir, "wrapped" if packing.wrap else "rows", settings,
        lambda folder: _write(folder / "rows.arrow", rows, tokenizer, vocabulary, packing, name),
    )  # fmt: skip
    return datasets.Dataset.from_file(str(folder / "rows.arrow")).with_format("numpy"), figures


def check_tokens(vocabulary: Vocabulary, packing: Packing, name: str) -> None:
    """Raises ValueError for a tokenizer without the begin or end token that the rows need."""
    needs_eos = packing.eos or (packing.wrap and packing.chunk_special)
    needs_bos = packing.chunk_special if packing.wrap else packing.bos
    for needed, token_id, token, key in (
        (
            needs_eos,
            vocabulary.eos_id,
            "end (EOS or SEP)",
            "insert_*_eos=false and data.insert_*_special=false",
        ),
        (needs_bos, vocabulary.bos_id, "begin (BOS or CLS)", "insert_*_special=false"),
    ):
        if needed and token_id is None:
            raise ValueError(f"{name}: the tokenizer has no {token} token, which these rows need; choose "
                             f"another "
                             f"data.tokenizer_name_or_path, or set data.{key}")  # fmt: skip


def check_prompts(packing: Packing, name: str) -> None:
    """Raises ValueError for ways of packing that would part texts from their prompts."""
    if packing.wrap:
        raise ValueError(f"{name}: data.wrap=true joins texts and cuts them anywhere, so that their prompts could not "
                         f"be given; set data.wrap=false, or choose data without prompts")  # fmt: skip
    if packing.long_texts == "windows":
        raise ValueError(f"{name}: data.long_texts=windows would part texts from their prompts; choose truncate, drop "
                         f"or error")  # fmt: skip


def _each_text(rows: datasets.Dataset) -> Iterator[str]:
    for start in range(0, len(rows), _TEXTS_AT_ONCE):
        yield from rows[start : start + _TEXTS_AT_ONCE]["text"]


def _digest(rows: datasets.Dataset, column: str) -> str:
    values = rows.select_columns(column).with_format("numpy")[:][column]
    return texts_fingerprint([np.asarray(values, dtype=np.int64).tobytes().hex()])


@dataclass
class Figures:
    """What packing did: counts of texts, rows and tokens; `pack` says which."""

    texts: int = 0
    rows: int = 0
    tokens: int = 0
    empty: int = 0
    long: int = 0
    longest: int = 0
    cut: int = 0
    unknown: int = 0
    encoded: int = 0


@dataclass
class PackedRows:
    """Rows on their way to a file or a batch: one flat array of ids and the length of each row."""

    ids: np.ndarray
    lengths: np.ndarray
    sample_id: np.ndarray
    text_id: np.ndarray | None
    label: np.ndarray | None
    part_ends: list[list[int]] | None = None
    documents: tuple[np.ndarray, np.ndarray] | None = None  # of the first and the last token of each row


def _write(
    path: Path, rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary,
    packing: Packing, name: str,
) -> dict[str, int]:  # fmt: skip
    """Pack everything into an Arrow stream at `path` and return the figures."""
    figures = Figures(texts=len(rows))
    unk_id = tokenizer.unk_token_id if tokenizer.unk_token_id != vocabulary.eos_id else None

    def tokens() -> Iterator[tuple[dict[str, Any], list[list[int]]]]:
        for start, stop in _stretches(len(rows), packing.num_proc or 1):
            batch, ids = tokenised(tokenizer, rows[start:stop], special_from_text=packing.num_proc is not None)
            if packing.num_proc is not None:
                _refuse_masks(ids, vocabulary.mask_id, name)
            figures.unknown += sum(row.count(unk_id) for row in ids) if unk_id is not None else 0
            figures.encoded += sum(map(len, ids))
            yield batch, ids

    packer: Callable[..., Iterator[PackedRows]] = _wrap if packing.wrap else _pad
    writer = None
    with path.open("wb") as file:
        for part in packer(tokens(), vocabulary, packing, figures, name):
            table = _arrow_batch(part)
            writer = writer or pa.ipc.new_stream(file, table.schema)
            writer.write_batch(table)
            figures.rows += len(part.lengths)
            figures.tokens += int(part.lengths.sum())
        if writer is not None:
            writer.close()
    _check_figures(figures, packing, name)
    return asdict(figures)


def _stretches(number: int, parts: int) -> Iterator[tuple[int, int]]:
    """Bounds of at most a thousand texts each, for each of `parts` contiguous parts as `datasets` shards them."""
    share, larger = divmod(number, parts)
    edges = [share * part + min(part, larger) for part in range(parts + 1)]
    for first, last in itertools.pairwise(edges):
        for start in range(first, last, _TEXTS_AT_ONCE):
            yield start, min(start + _TEXTS_AT_ONCE, last)


def _refuse_masks(ids: list[list[int]], mask_id: int, name: str) -> None:
    if any(mask_id in row for row in ids):
        raise ValueError(f"{name}: a text names the mask token, which data.protocol=reference reads as a mask; correct "
                         "the text, or leave out data.protocol")  # fmt: skip


def tokenised(
    tokenizer: PreTrainedTokenizerBase, batch: dict[str, Any], special_from_text: bool = False
) -> tuple[dict[str, Any], list[list[int]]]:
    """Texts (columns text, ends?) and their token ids, as `pad_rows` takes them. Each part of a text is encoded by
    itself, as a prompt must have the same tokens when there is nothing behind it yet; `part_ends` then are the tokens
    before which each part but the last ends."""
    if "ends" not in batch:
        return batch, encode(tokenizer, batch["text"], special_from_text=special_from_text)
    texts = [parts_of(text, ends) for text, ends in zip(batch["text"], batch["ends"], strict=True)]
    pieces = [(encode if place == 0 else encode_after)(tokenizer, column)
              for place, column in enumerate(zip(*texts, strict=True))]  # fmt: skip
    encoded = list(zip(*pieces, strict=True))
    part_ends = [list(itertools.accumulate(map(len, row[:-1]))) for row in encoded]
    return {**batch, "part_ends": part_ends}, [[i for piece in row for i in piece] for row in encoded]


def _check_figures(figures: Figures, packing: Packing, name: str) -> None:
    if figures.long and not packing.wrap and packing.long_texts == "error":
        raise ValueError(
            f"{name}: {figures.long} of {figures.texts} texts are longer than "
            f"model.length={packing.length} tokens (the "
            f"longest has {figures.longest}); raise model.length, or set data.long_texts=truncate, windows or drop"
        )
    if figures.rows:
        return
    if packing.wrap and figures.empty < figures.texts:
        raise ValueError(
            f"{name}: {figures.cut} tokens do not fill one chunk of model.length={packing.length}; "
            f"lower model.length, give more text, or set data.wrap=false"
        )
    if figures.long:
        room = f" or have parts longer than data.segment_room={packing.room}" if packing.room else ""
        raise ValueError(f"{name}: data.long_texts=drop leaves no text, as all are longer than model.length="
                         f"{packing.length} tokens{room}; raise {'either' if room else 'model.length'}")  # fmt: skip
    raise ValueError(f"{name}: there is no text with any token in it; give other texts")


def _arrow_batch(rows: PackedRows) -> pa.RecordBatch:
    offsets = np.concatenate([[0], np.cumsum(rows.lengths)]).astype(np.int32)
    columns = {
        "input_ids": pa.ListArray.from_arrays(pa.array(offsets), pa.array(rows.ids.astype(np.int32))),
        "length": pa.array(rows.lengths.astype(np.int32)),
        "sample_id": pa.array(rows.sample_id.astype(np.int64)),
    }
    first, last = rows.documents or (None, None)
    for column, values in (("text_id", rows.text_id), ("label", rows.label), ("first_document", first),
                           ("last_document", last)):  # fmt: skip
        if values is not None:
            columns[column] = pa.array(np.asarray(values, dtype=np.int64))
    if rows.part_ends is not None:
        columns["part_ends"] = pa.array(rows.part_ends, pa.list_(pa.int32()))
    return pa.RecordBatch.from_pydict(columns)


def _wrap(
    batches: Iterator[tuple[dict[str, Any], list[list[int]]]], vocabulary: Vocabulary, packing: Packing,
    figures: Figures, name: str,
) -> Iterator[PackedRows]:  # fmt: skip
    """Chunks of one stream over the whole split; only the last, unfilled chunk of the split is left out."""
    nothing = np.zeros(0, dtype=np.int32)
    rest, done, label, documents = nothing, 0, None, _Documents(packing)
    for batch, ids in batches:
        if packing.num_proc is not None:
            figures.cut += len(rest)
            rest = nothing
            documents.drop_rest()
        figures.empty += sum(not row for row in ids)
        if "label" in batch:
            label = _one_label(batch["label"], label, name)
        chunks, rest = cut_chunks(rest, ids, vocabulary, packing)
        count = len(chunks)
        of_rows = documents.of_rows(batch, ids, count, len(rest))
        if not count:
            continue
        labels = None if label is None else np.full(count, label)
        yield PackedRows(
            chunks.reshape(-1), np.full(count, packing.length), np.arange(done, done + count), None, labels,
            documents=of_rows,
        )  # fmt: skip
        done += count
    figures.cut += len(rest)


class _Documents:
    """Keeps account of which documents the tokens of a wrapped stream are of."""

    def __init__(self, packing: Packing) -> None:
        self._inner = packing.length - 2 if packing.chunk_special else packing.length
        self._end = int(packing.eos)
        self._every_text = packing.num_proc is not None
        self._rest, self._number, self._newest = np.zeros(0, dtype=np.int64), -1, None

    def drop_rest(self) -> None:
        """Forget the tokens that wait for more."""
        self._rest = self._rest[:0]

    def of_rows(
        self, batch: dict[str, Any], ids: list[list[int]], count: int, left: int
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """The documents of the first and the last token of the next `count` rows, behind which `left` tokens wait for
        more; None where documents are not known."""
        named = batch.get("document", batch["text_id"])
        if min(named, default=0) < 0:
            return None
        numbers = []
        for name, row in zip(named, ids, strict=True):
            if row or self._every_text:
                self._number += name != self._newest
                self._newest = name
                numbers.append(np.full(len(row) + self._end, self._number, dtype=np.int64))
        stream = np.concatenate([self._rest, *numbers])
        used = count * self._inner
        assert len(stream) == used + left, "each text leaves its tokens and its end in the stream"
        self._rest = stream[used:]
        rows = stream[:used].reshape(count, self._inner)
        return rows[:, 0], rows[:, -1]


def cut_chunks(
    rest: np.ndarray, ids: list[list[int]], vocabulary: Vocabulary, packing: Packing
) -> tuple[np.ndarray, np.ndarray]:
    """Wrapped rows of `rest` (what the texts before have left) and further texts: chunks (C, length), and what is left
    now. Texts without tokens leave no end token either, unless the rows are the references'."""
    inner = packing.length - 2 if packing.chunk_special else packing.length
    end = [vocabulary.eos_id] if packing.eos else []
    stream = np.concatenate([rest, *(np.asarray(row + end, dtype=np.int32) for row in ids if row or packing.num_proc)])
    count = len(stream) // inner
    chunks, rest = stream[: count * inner].reshape(count, inner), stream[count * inner :]
    if packing.chunk_special:
        chunks = np.pad(chunks, ((0, 0), (1, 1)))
        chunks[:, 0], chunks[:, -1] = vocabulary.bos_id, vocabulary.eos_id
    return chunks, rest


def _one_label(labels: list[int], label: int | None, name: str) -> int:
    found = {*labels, *([] if label is None else [label])}
    if len(found) != 1:
        raise ValueError(f"{name}: data.wrap=true joins texts, so rows cannot have labels of their own; "
                         f"choose one "
                         f"class with data.label, or set data.wrap=false")  # fmt: skip
    return found.pop()


def _pad(
    batches: Iterator[tuple[dict[str, Any], list[list[int]]]], vocabulary: Vocabulary, packing: Packing,
    figures: Figures, name: str,
) -> Iterator[PackedRows]:  # fmt: skip
    for batch, ids in batches:
        rows = pad_rows(batch, ids, vocabulary, packing, figures, name)
        if rows is not None:
            yield rows


def pad_rows(
    batch: dict[str, Any], ids: list[list[int]], vocabulary: Vocabulary, packing: Packing, figures: Figures, name: str
) -> PackedRows | None:
    """Each text's row, or its windows; a text that is cut ends without the end token, as it has not ended. None where
    no text has any token, or all are dropped. `figures` are added to.

    Raises ValueError for a text without tokens (behind its prompt), unless packing.drop_empty, and for a prompt that
    would fill its row.
    """
    head = [vocabulary.bos_id] if packing.bos else []
    tail = [vocabulary.eos_id] if packing.eos else []
    windows: list[tuple[list[int], int, int]] = []  # ids, place in the batch, window
    parts, unfilled = batch.get("part_ends"), [0] * len(ids)
    if parts and packing.room:
        ids, parts, unfilled = _with_rooms(ids, parts, vocabulary.eos_id, packing, batch["text_id"], name)
    for place, row in enumerate(ids):
        prompt, text_id = parts[place][0] if parts else 0, batch["text_id"][place]
        if len(row) == prompt + (len(parts[place]) - 1 if parts and packing.room else 0):
            figures.empty += 1
            if not packing.drop_empty and packing.num_proc is None:
                where = " behind its prompt" if parts else ""
                raise ValueError(f"{name}: text {text_id} ({batch['text'][place]!r:.40}) has no tokens{where}; correct "
                                 f"it, or set data.drop_empty=true")  # fmt: skip
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
            raise ValueError(f"{name}: the prompt of text {text_id} has {prompt} tokens and leaves no room in "
                             f"model.length={packing.length}; raise it, or set data.long_texts=drop")  # fmt: skip
        if packing.num_proc and needed > packing.length:
            whole = whole[: packing.length - len(tail)] + tail
        starts = range(0, len(whole), packing.length) if packing.long_texts == "windows" else [0]
        windows += [(whole[s : s + packing.length], place, w) for w, s in enumerate(starts)]
        figures.cut += max(needed - packing.length, 0) if packing.long_texts != "windows" else 0
    if not windows:
        return None
    place = np.array([p for _, p, _ in windows])
    text_id = np.asarray(batch["text_id"])[place]
    sample_id = np.array([w for _, _, w in windows]) * _WINDOW + text_id
    label = np.asarray(batch["label"])[place] if "label" in batch else None
    flat = np.concatenate([np.asarray(w, dtype=np.int32) for w, _, _ in windows])
    part_ends = [[len(head) + end for end in parts[p]] for p in place] if parts else None
    document = np.asarray(batch["document"])[place] if min(batch.get("document", [-1])) >= 0 else None
    documents = None if document is None else (document, document)
    lengths = np.array([len(w) for w, _, _ in windows])
    return PackedRows(flat, lengths, sample_id, text_id, label, part_ends, documents)


def _with_rooms(
    ids: list[list[int]], part_ends: list[list[int]], eos_id: int, packing: Packing, text_ids: Sequence[int], name: str
) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """Each text's tokens with EOS behind every part between the first and the last, the new ends, and how many tokens
    of the rooms are left; more than a row has where a part does not fit, so that its text is dropped.

    Raises ValueError for a part that does not fit, unless such texts are dropped.
    """
    rows, ends, unfilled = [], [], []
    for row, cuts, text_id in zip(ids, part_ends, text_ids, strict=True):
        middle = [[*row[start:end], eos_id] for start, end in itertools.pairwise(cuts)]
        longest = max(map(len, middle), default=0)
        if longest > packing.room and packing.long_texts != "drop":
            raise ValueError(f"{name}: a part of text {text_id} has {longest} tokens with its EOS, more than "
                             f"data.segment_room={packing.room}; raise it, or set data.long_texts=drop")  # fmt: skip
        rows.append([*row[: cuts[0]], *itertools.chain(*middle), *row[cuts[-1] :]])
        ends.append(list(itertools.accumulate(map(len, middle), initial=cuts[0])))
        left = sum(packing.room - len(part) for part in middle)
        unfilled.append(left if longest <= packing.room else packing.length + 1)
    return rows, ends, unfilled
