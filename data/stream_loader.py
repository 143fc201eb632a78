"""Batches of a stream (data/streaming.py).

Every worker process reads different lanes; the training process joins their parts of each batch.
"""

import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch.utils.data import IterableDataset, Sampler, get_worker_info

from palimpsest.data.loading import TimedLoader
from palimpsest.data.packing import Figures
from palimpsest.data.streaming import Corpus, LaneChunk, LaneCursor

log = logging.getLogger(__name__)

_INTERVAL = 64  # batches between two removals of old cursors


@dataclass(frozen=True)
class _Part:
    """A worker's part of a batch: rows and their places in it; lane, cursor and counts of the chunks begun for them."""

    places: list[int]
    rows: list[dict[str, Any]]
    begun: list[tuple[int, LaneCursor, Figures]]


class _Lane:
    """The rows of a lane by increasing number."""

    def __init__(self, chunks: Iterator[LaneChunk]) -> None:
        self.chunks, self.now = chunks, next(chunks)
        self.new_chunks = [self.now]

    def row(self, number: int) -> dict[str, Any]:
        while number >= self.now.after.rows:
            self.now = next(self.chunks)
            self.new_chunks.append(self.now)
        row = number - self.now.before.rows
        assert row >= 0, "rows of a lane must be requested in order"
        return {name: values[row] for name, values in self.now.columns.items()}


class _Parts(IterableDataset):
    """This worker's part of every batch, in order."""

    def __init__(
        self, corpus: Corpus, batches: Sampler[list[int]], places: Mapping[int, LaneCursor], num_workers: int
    ) -> None:
        self.corpus, self.batches = corpus, batches
        self.places, self.num_workers = places, max(1, num_workers)

    def __iter__(self) -> Iterator[_Part]:
        info = get_worker_info()
        own = info.id if info else 0
        lanes: dict[int, _Lane] = {}
        owners: dict[int, int] = {}
        for positions in self.batches:
            part = _Part([], [], [])
            for place, position in enumerate(positions):
                lane, row = self.corpus.locate(position)
                # Lanes are assigned in order of appearance, equally in every worker, so that each has as many.
                if owners.setdefault(lane, len(owners) % self.num_workers) != own:
                    continue
                if lane not in lanes:
                    lanes[lane] = _Lane(self.corpus.chunks(lane, self.places.get(lane, LaneCursor())))
                part.places.append(place)
                part.rows.append(lanes[lane].row(row))
            for number, lane in lanes.items():
                part.begun.extend((number, chunk.before, chunk.figures) for chunk in lane.new_chunks)
                lane.new_chunks = []
            yield part


class StreamLoader(TimedLoader):
    """This rank's micro-batches of a stream.

    Args:
        batches: the positions of each batch.
        collate: turns columns of rows into a batch.
        arguments: further arguments of DataLoader.
        state: result of `state` in the checkpoint that is resumed.
        consumed: returns how many positions finished steps have taken; cursors before that are forgotten.

    Raises:
        ValueError: the run to be resumed had another stream.
    """

    def __init__(
        self,
        corpus: Corpus,
        batches: Sampler[list[int]],
        collate: Callable[[dict[str, Any]], dict[str, torch.Tensor]],
        arguments: Mapping[str, Any],
        state: Mapping[str, Any] | None,
        consumed: Callable[[], int],
    ) -> None:
        for name, value in corpus.settings.items():
            before = (state or {}).get("settings", {}).get(name, value)
            if before != value:
                raise ValueError(
                    f"{name}={value}, but the stream of the run to be resumed was begun with {before}; resume it with "
                    "that, or start a new run"
                )
        places = {int(lane): LaneCursor.from_plain(plain) for lane, plain in (state or {}).get("places", {}).items()}
        settings = dict(arguments)
        self.pinned, workers = settings.pop("pin_memory"), settings["num_workers"]
        parts = _Parts(corpus, batches, places, workers)
        super().__init__(parts, batch_size=None, **settings)
        self.corpus, self.positions = corpus, batches
        self.assemble, self.consumed = collate, consumed
        self.places = {lane: deque([place]) for lane, place in places.items()}
        self.figures, self.has_warned = Figures(), False
        sizes = f"{corpus.pieces} pieces of {corpus.shards.origin} in {corpus.lanes} lanes, {workers} workers"
        log.info("train stream: %s", sizes)

    def __len__(self) -> int:
        return len(self.positions)

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        parts = super().batches()
        for number, positions in enumerate(self.positions):
            together = [next(parts) for _ in range(max(1, self.num_workers))]
            for lane, cursor, figures in itertools.chain(*(part.begun for part in together)):
                self.places.setdefault(lane, deque()).append(cursor)
                self.figures.add(figures)
            if number % _INTERVAL == 0:
                self._forget(self.consumed())
                self._warn()
            batch = self.assemble(_columns(positions, together))
            yield {name: values.pin_memory() for name, values in batch.items()} if self.pinned else batch

    def _forget(self, consumed: int) -> None:
        """Keep each lane's last cursor at or before the first row that no finished step has taken, and later ones."""
        for lane, places in self.places.items():
            while len(places) > 1 and places[1].rows <= self.corpus.rows_before(consumed, lane):
                places.popleft()

    def _warn(self) -> None:
        """Warn once that texts are cut, which is not known of a stream before."""
        packing, figures = self.corpus.packing, self.figures
        if figures.cut and not packing.wrap and not self.has_warned:
            self.has_warned = True
            long = f"{figures.long} of the first {figures.texts} texts are longer than model.length={packing.length}"
            log.warning("train stream: %s; tokens left out: %d", long, figures.cut)

    def state(self) -> dict[str, Any]:
        """Return the settings of the stream and the cursor of each lane, for a checkpoint.

        Every rank must call this, because it gathers the lanes of all ranks.
        """
        self._forget(self.consumed())
        mine = {lane: places[0].plain() for lane, places in self.places.items()}
        ranks = [mine]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            ranks = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(ranks, mine)
        found = (item for rank in ranks for item in rank.items())
        places = dict(sorted(found, key=lambda item: (item[0], item[1]["rows"])))  # the last of a lane is the furthest
        return {"settings": self.corpus.settings, "places": places}


def _columns(positions: Sequence[int], parts: Sequence[_Part]) -> dict[str, Any]:
    """Return the rows of a batch in order, as columns."""
    at = {place: row for part in parts for place, row in zip(part.places, part.rows, strict=True)}
    rows = [at[place] for place in range(len(positions))]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    lengths = [len(ids) for ids in columns["input_ids"]]
    return {**columns, "length": lengths, "sample_id": positions, "position": positions}
