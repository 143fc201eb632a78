"""Training on a corpus that is kept nowhere, but read, shuffled, tokenised and packed as it goes: the order.

The order of the rows is a function of the corpus and the settings, never of the number of processes. The stream is
dealt to K lanes: position p belongs to lane (p // u) % K with u = G / K, G = loader.global_batch_size. So every step
takes u rows of each lane, and a lane is a sequence of its own that any process can read. Its rows come about in three
steps.
  1. Pieces. The corpus is made of P pieces: its files (row groups of Parquet files), each of them dealt out among
     lanes where there are fewer files than lanes, so that every text is in one piece. An endless list goes through
     all pieces epoch by epoch, in an order by (seed, epoch); lane l takes its entries l, l + K, l + 2K, ... Hence
     each text comes once in each epoch of the list; lanes whose pieces are shorter are a little ahead of the others.
  2. Blocks. `shuffle_buffer` texts, as they follow in a file, are shuffled by (seed, epoch, piece, block).
  3. Chunks. As many texts as have CHUNK_CHARACTERS characters are tokenised and packed by data/packing.py (what does
     not fill a row waits for the next chunk), and their rows shuffled by (seed, lane, row).
Where a lane stands before a chunk is a few numbers and the waiting tokens (`LaneCursor`). A checkpoint holds one for
each lane, whichever process read it. A resume reads again, without tokenising, what the present pieces had given,
tokenises one chunk of each lane, and goes on with the very next row. A lane without a place is read from its
beginning: that is slow, and gives the same rows.

What it costs: the rows of a batch come from K places of the corpus, each shuffled over a buffer, not from all of it.
Lanes that share a file make every process decode all of it (once), and tokenise its own part. Processes whose
positions share a lane both read it; they share none where their micro-batches are multiples of u.
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
from palimpsest.data.shards import Shards, SharedReading
from palimpsest.data.tokenizers import Vocabulary

CHUNK_CHARACTERS = 2**16  # characters; another number is another order for every stream
_PIECES, _TEXTS, _ROWS = range(3)  # what an order is of, so that no two orders share their numbers


@dataclass(frozen=True)
class Order:
    """The keys of `streaming`: what the order of a stream hangs on, beside the corpus and the seed.

    lanes: the largest divisor of loader.global_batch_size that is not above it is K. shuffle_buffer: texts of a lane
    that are shuffled together; with 1 neither they nor rows are. sample_texts: the first texts of the train split, kept
    for what needs a split that lies still: tokenizers built here, the unigram baseline, training.start_from_counts,
    the lengths of samples.
    """

    lanes: AtLeastOne = 16
    shuffle_buffer: AtLeastOne = 1000
    sample_texts: AtLeastOne = 10000

    def lanes_of(self, global_batch_size: int) -> int:
        """K."""
        return max(k for k in range(1, min(self.lanes, global_batch_size) + 1) if global_batch_size % k == 0)


@dataclass(frozen=True)
class LaneCursor:
    """Where a lane stands before a chunk.

    piece: entries of its list that lie behind it. block: blocks of the present one that do. used: texts of the present
    block that do. mark: a digest of that block, which shows whether the corpus has changed. rows: what the lane has
    given so far. rest: int32 tokens that wait for the next chunk.
    """

    piece: int = 0
    block: int = 0
    used: int = 0
    mark: str = ""
    rows: int = 0
    rest: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int32))

    def plain(self) -> dict[str, object]:
        """For a checkpoint: numbers, a word and a tensor."""
        return {**self.__dict__, "rest": torch.from_numpy(self.rest.copy())}

    @classmethod
    def from_plain(cls, plain: dict[str, object]) -> "LaneCursor":
        """What `plain` made."""
        return cls(**{**plain, "rest": plain["rest"].numpy()})


@dataclass(frozen=True)
class LaneChunk:
    """Some rows of a lane in their order, with the places before and behind them. label, part_ends (data/packing.py):
    one for each row, None where there is none. figures: what packing did."""

    place: LaneCursor
    after: LaneCursor
    ids: list[np.ndarray]
    label: np.ndarray | None
    part_ends: list[list[int]] | None
    figures: Figures


@dataclass(frozen=True)
class _Block:
    """Texts in the order in which they are taken. ends: of their parts, where they have such (data/sources.py)."""

    texts: list[str]
    label: np.ndarray | None
    ends: list[list[int]] | None
    mark: str


class Corpus:
    """What is streamed, and in which order. `label`: only the texts of this class.

    Raises:
        ValueError: texts could turn out too long; the tokenizer lacks a token that the rows need; there is no text.
    """

    def __init__(
        self, shards: Shards, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary, packing: Packing,
        order: Order, global_batch_size: int, seed: int, label: int | None = None,
    ) -> None:  # fmt: skip
        check_tokens(vocabulary, packing, "train stream")
        if not packing.wrap and packing.long_texts == "error":
            raise ValueError("data.long_texts=error can not hold for data.streaming=true, as a text that is too long "
                             "may come at any time; set data.long_texts=truncate, windows or drop")  # fmt: skip
        self.lanes = order.lanes_of(global_batch_size)
        self.unit = global_batch_size // self.lanes
        if shards.rows.num_shards < self.lanes:
            shards = replace(shards, rows=shards.rows.reshard())
        self.shards, self.tokenizer, self.vocabulary, self.packing = shards, tokenizer, vocabulary, packing
        self.buffer, self.seed, self.label = order.shuffle_buffer, seed, label
        if not shards.ranges:
            raise ValueError(f"{shards.origin} holds no text; give another file")
        self.parts = -(-self.lanes // len(shards.ranges))
        self.pieces = len(shards.ranges) * self.parts
        # Lanes that share a file are seldom more than a block apart.
        keep = 2 * len(shards.ranges) if self.parts > 1 else 0
        self.reading = SharedReading(shards, self.buffer * self.parts, keep, readers=2 * self.lanes)

    @property
    def settings(self) -> dict[str, object]:
        """What a resumed run must have in common with its beginning, by name."""
        corpus = {f"the corpus ({name})": value for name, value in self.shards.fingerprint.items()}
        return {"streaming.lanes": self.lanes, "streaming.shuffle_buffer": self.buffer, **corpus}

    def locate(self, position: int) -> tuple[int, int]:
        """(lane, row of that lane) of a position of the stream."""
        turn, place = divmod(position, self.lanes * self.unit)
        return place // self.unit, turn * self.unit + place % self.unit

    def rows_before(self, position: int, lane: int) -> int:
        """How many rows of a lane stand before a position."""
        turns, place = divmod(position, self.lanes * self.unit)
        return turns * self.unit + min(self.unit, max(0, place - lane * self.unit))

    def chunks(self, lane: int, place: LaneCursor) -> Iterator[LaneChunk]:
        """The lane from a place on, without end.

        Raises:
            ValueError: texts that packing refuses; a corpus that has changed; no text in all pieces.
        """
        barren = 0
        while True:
            barren += 1
            for chunk in self._piece(lane, place):
                place = chunk.after
                if chunk.ids:
                    yield chunk
                    barren = 0
            place = replace(place, piece=place.piece + 1, block=0, used=0, mark="")
            if barren > 2 * self.pieces + 2:
                dropping = not self.packing.wrap and self.packing.long_texts == "drop"
                why = ("it has no text, or none that is short enough: lower streaming.lanes, raise model.length"
                       if dropping else
                       "there are too few texts for so many lanes: lower streaming.lanes or model.length")  # fmt: skip
                raise ValueError(
                    f"{self.shards.origin}: lane {lane} of the stream found no row in {barren} pieces; {why}, or set "
                    "data.streaming=false"
                )

    def _piece(self, lane: int, place: LaneCursor) -> Iterator[LaneChunk]:
        """The chunks of the piece in which a place lies, from there on; they may be without rows."""
        epoch, entry = divmod(lane + place.piece * self.lanes, self.pieces)
        piece = int(shuffled(self.pieces, self.seed, _PIECES, epoch)[entry])
        changed = ValueError(f"{self.shards.origin}: these are not the texts that the run to be resumed has read; "
                             "restore them, or start a new run")  # fmt: skip
        unread = bool(place.mark)
        for block in self._blocks(epoch, piece, place.block):
            if place.mark not in ("", block.mark):
                raise changed
            unread = False
            place = replace(place, mark=block.mark)
            while place.used < len(block.texts):
                chunk = self._next_chunk(lane, place, block)
                yield chunk
                place = chunk.after
            place = replace(place, block=place.block + 1, used=0, mark="")
        if unread:
            raise changed

    def _blocks(self, epoch: int, piece: int, skip: int) -> Iterator[_Block]:
        """The texts of a piece, without the first `skip` blocks."""
        number, part = divmod(piece, self.parts)
        for block in itertools.count(skip):
            table = self.reading.block(number, block)
            if table is None:
                return
            if self.parts > 1:
                table = table.take(pa.array(np.arange(part, table.num_rows, self.parts)))
            rows = self.shards.prepare(table)
            texts = rows["text"][:]
            label = np.asarray(rows["label"][:]) if "label" in rows.column_names else None
            ends = rows["ends"][:] if "ends" in rows.column_names else None
            chosen = shuffled(len(texts), self.seed, _TEXTS, epoch, piece, block)
            if self.buffer == 1:
                chosen.sort()
            if self.label is not None:
                chosen = chosen[label[chosen] == self.label]
            keep_label = label is not None and (self.label is not None or not self.packing.wrap)
            mark = hashlib.blake2b("\0".join(texts).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
            yield _Block(
                [texts[i] for i in chosen], label[chosen] if keep_label else None,
                None if ends is None else [ends[i] for i in chosen], mark,
            )  # fmt: skip

    def _next_chunk(self, lane: int, cursor: LaneCursor, block: _Block) -> LaneChunk:
        stop, characters = cursor.used, 0
        while stop < len(block.texts) and characters < CHUNK_CHARACTERS:
            characters += len(block.texts[stop])
            stop += 1
        columns = {"text": block.texts, "label": block.label, "ends": block.ends}
        batch = {name: values[cursor.used : stop] for name, values in columns.items() if values is not None}
        packer = Packer(self.tokenizer, self.vocabulary, self.packing, self.shards.origin)
        batch, ids = packer.tokenise({**batch, "text_id": range(cursor.used, stop)})
        if self.packing.wrap:
            chunks, rest = packer.cut_chunks(cursor.rest, ids)
            rows, label, part_ends = list(chunks), None, None
            if "label" in batch:
                label = np.full(len(chunks), self.label)
        else:
            packed = packer.pad_rows(batch, ids)
            rows = [] if packed is None else np.split(packed.ids, np.cumsum(packed.lengths)[:-1])
            rest, label, part_ends = cursor.rest, packed and packed.label, packed and packed.part_ends
        order = shuffled(len(rows), self.seed, _ROWS, lane, cursor.rows) if self.buffer > 1 else np.arange(len(rows))
        rows = [rows[i] for i in order]
        packer.figures.rows, packer.figures.tokens = len(rows), sum(len(row) for row in rows)
        after = replace(cursor, used=stop, rows=cursor.rows + len(rows), rest=rest)
        label = None if label is None else label[order]
        part_ends = part_ends and [part_ends[i] for i in order]
        return LaneChunk(cursor, after, rows, label, part_ends, packer.figures)
