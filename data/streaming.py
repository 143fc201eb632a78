"""The order of training on a corpus that is read, shuffled, tokenised and packed while training, and never stored.

The order of the rows is a function of the corpus and the settings, never of the number of processes. The stream is
divided into K lanes: position p belongs to lane (p // u) % K with u = G / K, G = loader.global_batch_size. Every step
therefore takes u rows of each lane, and a lane is a sequence that any process can read. Its rows are made in three
steps.
  1. Pieces. The corpus has P pieces: its files (row groups of Parquet files). With fewer files than lanes each file is
      divided among lanes, so that every text is in one piece. An endless list goes through all pieces in each epoch, in
      an order by (seed, epoch); lane l takes its entries l, l + K, l + 2K, ... Each text therefore comes once in each
      epoch of the list; lanes with shorter pieces are a little ahead of the others.
  2. Blocks. `shuffle_buffer` consecutive texts of a file are shuffled by (seed, epoch, piece, block).
  3. Chunks. Texts of CHUNK_CHARACTERS characters are tokenised and packed by data/packing.py, and their rows are
      shuffled by (seed, lane, row). Tokens that do not fill a row wait for the next chunk.
The position of a lane before a chunk is a few numbers and the waiting tokens (`LaneCursor`). A checkpoint contains one
for each lane, whichever process read it. A resume reads again, without tokenising, what the present pieces have
produced, tokenises one chunk of each lane, and continues with the very next row. A lane without a cursor is read from
its beginning, which is slow and gives the same rows.

The cost: the rows of a batch come from K places of the corpus, each shuffled over a buffer, not from all of it. If
lanes share a file, every process decodes all of it (once) and tokenises its part. Processes whose positions share a
lane both read it; they share none if their micro-batches are multiples of u.
"""

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import torch
from transformers import PreTrainedTokenizerBase

from palimpsest.common.values import AtLeastOne
from palimpsest.data.order import shuffled
from palimpsest.data.packing import Figures, Packer, Packing, check_tokens
from palimpsest.data.rows import check_not_empty
from palimpsest.data.shards import Shards, SharedBlocks
from palimpsest.data.tokenizers import Vocabulary

CHUNK_CHARACTERS = 2**16  # changing this number changes the order of every stream
# First key of each kind of permutation, so that no two kinds use the same random numbers.
_PIECES = 0
_TEXTS = 1
_ROWS = 2


@dataclass(frozen=True)
class Order:
    """The keys of `streaming`, which determine the order of a stream together with the corpus and the seed.

    Attributes:
        lanes: K is the largest divisor of loader.global_batch_size up to this number.
        shuffle_buffer: texts of a lane that are shuffled together; 1 shuffles neither texts nor rows.
        sample_texts: first texts of the train split that are kept for whatever needs stored texts: tokenizers built
            here, the unigram baseline, training.start_from_counts, the lengths of samples.
    """

    lanes: AtLeastOne = 16
    shuffle_buffer: AtLeastOne = 1000
    sample_texts: AtLeastOne = 10000

    def lanes_of(self, global_batch_size: int) -> int:
        """Return K."""
        return max(k for k in range(1, min(self.lanes, global_batch_size) + 1) if global_batch_size % k == 0)


@dataclass(frozen=True)
class LaneCursor:
    """The position of a lane before a chunk.

    Attributes:
        piece: entries of the lane's list that are finished.
        block: finished blocks of the present piece.
        used: used texts of the present block.
        mark: a digest of that block, which reveals a changed corpus.
        rows: rows that the lane has produced.
        rest: int32 tokens that wait for the next chunk.
    """

    piece: int = 0
    block: int = 0
    used: int = 0
    mark: str = ""
    rows: int = 0
    rest: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int32))

    def plain(self) -> dict[str, object]:
        """Return numbers, a string and a tensor, for a checkpoint."""
        return {**self.__dict__, "rest": torch.from_numpy(self.rest.copy())}

    @classmethod
    def from_plain(cls, plain: dict[str, object]) -> "LaneCursor":
        """Rebuild a cursor from the result of `plain`."""
        return cls(**{**plain, "rest": plain["rest"].numpy()})


@dataclass(frozen=True)
class LaneChunk:
    """Consecutive rows of a lane, with the cursors before and after them.

    columns: input_ids and, if the texts have them, label and part_ends (data/packing.py); one entry per row.
    """

    before: LaneCursor
    after: LaneCursor
    columns: dict[str, list]
    figures: Figures


@dataclass(frozen=True)
class _Block:
    """Shuffled texts: the columns text and, if there are any, label and ends (data/sources.py)."""

    columns: dict[str, list]
    mark: str


class Corpus:
    """A corpus and the order in which it is streamed. `label`: only the texts of this class.

    Raises:
        ValueError: a text might be too long; the tokenizer lacks a token that the rows need; there is no text.
    """

    def __init__(
        self,
        shards: Shards,
        tokenizer: PreTrainedTokenizerBase,
        vocabulary: Vocabulary,
        packing: Packing,
        order: Order,
        global_batch_size: int,
        seed: int,
        label: int | None = None,
    ) -> None:
        check_tokens(vocabulary, packing, "train stream")
        if not packing.wrap and packing.long_texts == "error":
            raise ValueError(
                "data.long_texts=error cannot be kept with data.streaming=true, because a longer text may come at any "
                "time; set data.long_texts=truncate, windows or drop"
            )
        self.lanes = order.lanes_of(global_batch_size)
        self.unit = global_batch_size // self.lanes
        if shards.rows.num_shards < self.lanes:
            shards = replace(shards, rows=shards.rows.reshard())
        self.shards, self.packing = shards, packing
        self.tokenizer, self.vocabulary = tokenizer, vocabulary
        self.buffer = order.shuffle_buffer
        self.seed, self.label = seed, label
        check_not_empty(len(shards.ranges), shards.origin)
        self.parts = -(-self.lanes // len(shards.ranges))
        self.pieces = len(shards.ranges) * self.parts
        # Lanes that share a file are rarely more than a block apart.
        keep = 2 * len(shards.ranges) if self.parts > 1 else 0
        self.reading = SharedBlocks(shards, self.buffer * self.parts, keep, readers=2 * self.lanes)

    @property
    def settings(self) -> dict[str, object]:
        """Return the settings that a resumed run must share with its beginning, by name."""
        corpus = {f"the corpus ({name})": value for name, value in self.shards.fingerprint.items()}
        return {"streaming.lanes": self.lanes, "streaming.shuffle_buffer": self.buffer, **corpus}

    def locate(self, position: int) -> tuple[int, int]:
        """Return (lane, row of that lane) of a position of the stream."""
        turn, place = divmod(position, self.lanes * self.unit)
        return place // self.unit, turn * self.unit + place % self.unit

    def rows_before(self, position: int, lane: int) -> int:
        """Return the number of rows of a lane before a position."""
        turns, place = divmod(position, self.lanes * self.unit)
        return turns * self.unit + min(self.unit, max(0, place - lane * self.unit))

    def chunks(self, lane: int, cursor: LaneCursor) -> Iterator[LaneChunk]:
        """Yield the lane's chunks from a cursor on, without end. Raises ValueError if packing refuses a text, the
        corpus has changed, or no piece has a row."""
        without_rows = 0
        while True:
            without_rows += 1
            for chunk in self._piece(lane, cursor):
                cursor = chunk.after
                if chunk.columns["input_ids"]:
                    yield chunk
                    without_rows = 0
            cursor = replace(cursor, piece=cursor.piece + 1, block=0, used=0, mark="")
            if without_rows > 2 * self.pieces + 2:
                drops = not self.packing.wrap and self.packing.long_texts == "drop"
                none = "it has no text, or none that is short enough: lower streaming.lanes, raise model.length"
                few = "there are too few texts for so many lanes: lower streaming.lanes or model.length"
                raise ValueError(
                    f"{self.shards.origin}: lane {lane} of the stream found no row in {without_rows} pieces; "
                    f"{none if drops else few}, or set data.streaming=false"
                )

    def _piece(self, lane: int, cursor: LaneCursor) -> Iterator[LaneChunk]:
        """Yield the chunks of the cursor's piece from there on; they may have no rows."""
        epoch, entry = divmod(lane + cursor.piece * self.lanes, self.pieces)
        piece = int(shuffled(self.pieces, self.seed, _PIECES, epoch)[entry])
        changed = f"{self.shards.origin}: these are not the texts that the run to be resumed has read"
        unread = bool(cursor.mark)
        for block in self._blocks(epoch, piece, cursor.block):
            if cursor.mark not in ("", block.mark):
                raise ValueError(f"{changed}; restore them, or start a new run")
            unread = False
            cursor = replace(cursor, mark=block.mark)
            while cursor.used < len(block.columns["text"]):
                chunk = self._next_chunk(lane, cursor, block)
                yield chunk
                cursor = chunk.after
            cursor = replace(cursor, block=cursor.block + 1, used=0, mark="")
        if unread:
            raise ValueError(f"{changed}; restore them, or start a new run")

    def _blocks(self, epoch: int, piece: int, skip: int) -> Iterator[_Block]:
        """Yield the blocks of a piece, without the first `skip`."""
        number, part = divmod(piece, self.parts)
        for block in itertools.count(skip):
            table = self.reading.block(number, block)
            if table is None:
                return
            if self.parts > 1:
                table = table.take(pa.array(np.arange(part, table.num_rows, self.parts)))
            rows = self.shards.prepare(table)
            columns = {name: rows[name][:] for name in ("text", "label", "ends") if name in rows.column_names}
            text = "\0".join(columns["text"]).encode("utf-8", "surrogatepass")
            chosen = shuffled(len(rows), self.seed, _TEXTS, epoch, piece, block)
            if self.buffer == 1:
                chosen.sort()
            if self.label is not None:
                chosen = chosen[np.asarray(columns["label"])[chosen] == self.label]
            elif self.packing.wrap:
                columns.pop("label", None)
            chosen_columns = {name: [values[i] for i in chosen] for name, values in columns.items()}
            yield _Block(chosen_columns, hashlib.blake2b(text, digest_size=8).hexdigest())

    def _next_chunk(self, lane: int, cursor: LaneCursor, block: _Block) -> LaneChunk:
        texts = block.columns["text"]
        stop, characters = cursor.used, 0
        while stop < len(texts) and characters < CHUNK_CHARACTERS:
            characters += len(texts[stop])
            stop += 1
        batch = {name: values[cursor.used : stop] for name, values in block.columns.items()}
        packer = Packer(self.tokenizer, self.vocabulary, self.packing, self.shards.origin)
        batch, ids = packer.tokenise({**batch, "text_id": range(cursor.used, stop)})
        rows = {"input_ids": []}
        rest = cursor.rest
        if self.packing.wrap:
            chunks, rest = packer.cut_chunks(np.concatenate([cursor.rest, packer.joined(ids)[0]]))
            rows = {"input_ids": chunks, "label": [self.label] * len(chunks) if "label" in batch else None}
        elif packed := packer.pad_rows(batch, ids):
            split = np.split(packed.ids, np.cumsum(packed.lengths)[:-1])
            rows = {"input_ids": split, "label": packed.label, "part_ends": packed.part_ends}
        count = len(rows["input_ids"])
        order = shuffled(count, self.seed, _ROWS, lane, cursor.rows) if self.buffer > 1 else range(count)
        rows = {name: [values[i] for i in order] for name, values in rows.items() if values is not None}
        packer.figures.rows = count
        packer.figures.tokens = sum(map(len, rows["input_ids"]))
        after = replace(cursor, used=stop, rows=cursor.rows + count, rest=rest)
        return LaneChunk(cursor, after, rows, packer.figures)
