"""Batches of a stream (data/streaming.py): every worker process reads lanes of its own, and what each has of a batch is
put together in the training process."""

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import fsspec.asyn
import numpy as np
import torch
import torch.distributed
from torch.utils.data import IterableDataset, Sampler, get_worker_info

from palimpsest.data.loading import TimedLoader
from palimpsest.data.packing import Figures
from palimpsest.data.streaming import Corpus, LaneChunk, LaneCursor

log = logging.getLogger(__name__)

_OFTEN = 64  # batches between two looks at what can be forgotten


@dataclass(frozen=True)
class _Row:
    """label, part_ends (data/packing.py): None where the texts have none."""

    ids: np.ndarray
    label: int | None
    part_ends: list[int] | None


@dataclass(frozen=True)
class _Part:
    """What one worker has of a batch: rows and their places in it, and the chunks it has begun for them."""

    places: list[int]
    rows: list[_Row]
    begun: list[tuple[int, LaneCursor]]
    figures: list[Figures]


class _Lane:
    """Rows of a lane by number, each one later than the one before."""

    def __init__(self, chunks: Iterator[LaneChunk]) -> None:
        self.chunks, self.now = chunks, next(chunks)
        self.news = [self.now]

    def row(self, number: int) -> _Row:
        while number >= self.now.after.rows:
            self.now = next(self.chunks)
            self.news.append(self.now)
        row, now = number - self.now.place.rows, self.now
        assert row >= 0, "rows of a lane are asked for in their order"
        return _Row(
            now.ids[row], None if now.label is None else int(now.label[row]), now.part_ends and now.part_ends[row]
        )


class _Parts(IterableDataset):
    """This worker's part of every batch, in their order."""

    def __init__(
        self, corpus: Corpus, batches: Sampler[list[int]], places: Mapping[int, LaneCursor], num_workers: int
    ) -> None:
        self.corpus, self.batches, self.places, self.num_workers = corpus, batches, places, max(1, num_workers)

    def __iter__(self) -> Iterator[_Part]:
        info = get_worker_info()
        own, lanes, owners = info.id if info else 0, dict[int, _Lane](), dict[int, int]()
        for positions in self.batches:
            part = _Part([], [], [], [])
            for place, position in enumerate(positions):
                lane, row = self.corpus.locate(position)
                # Lanes are dealt out as they come up, the same in every worker, so that each has as many.
                if owners.setdefault(lane, len(owners) % self.num_workers) != own:
                    continue
                if lane not in lanes:
                    lanes[lane] = _Lane(self.corpus.chunks(lane, self.places.get(lane, LaneCursor())))
                part.places.append(place)
                part.rows.append(lanes[lane].row(row))
            for number, lane in lanes.items():
                part.begun.extend((number, chunk.place) for chunk in lane.news)
                part.figures.extend(chunk.figures for chunk in lane.news)
                lane.news = []
            yield part


class StreamLoader(TimedLoader):
    """This rank's micro-batches of a stream.

    batches: the positions of each. collate: columns of rows -> a batch. arguments: further ones of DataLoader. state:
    what `state` gave for the checkpoint that is resumed. consumed: how many positions finished steps have taken; places
    before that are forgotten.

    Raises:
        ValueError: the run to be resumed had another stream.
    """

    def __init__(
        self, corpus: Corpus, batches: Sampler[list[int]], collate: Callable[[dict[str, Any]], dict[str, torch.Tensor]],
        arguments: Mapping[str, Any], state: Mapping[str, Any] | None, consumed: Callable[[], int],
    ) -> None:  # fmt: skip
        for name, value in corpus.settings.items():
            before = (state or {}).get("settings", {}).get(name, value)
            if before != value:
                raise ValueError(f"{name}={value}, but the stream of the run to be resumed was begun with {before}; "
                                 f"resume it with that, or start a new run")  # fmt: skip
        places = {int(lane): LaneCursor.from_plain(plain) for lane, plain in (state or {}).get("places", {}).items()}
        settings = dict(arguments)
        self.pinned, workers = settings.pop("pin_memory"), settings["num_workers"]
        super().__init__(
            _Parts(corpus, batches, places, workers), batch_size=None, collate_fn=_as_it_is,
            worker_init_fn=_begin_worker, **settings,
        )  # fmt: skip
        self.corpus, self.positions, self.assemble, self.consumed = corpus, batches, collate, consumed
        self.places = {lane: deque([place]) for lane, place in places.items()}
        self.figures, self.told = Figures(), False
        log.info("train stream: %d pieces of %s in %d lanes, %d workers", corpus.pieces, corpus.shards.origin,
                 corpus.lanes, workers)  # fmt: skip

    def __len__(self) -> int:
        return len(self.positions)

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        parts = super().batches()
        for number, positions in enumerate(self.positions):
            together = [next(parts) for _ in range(max(1, self.num_workers))]
            for part in together:
                self._note(part)
            if number % _OFTEN == 0:
                self._forget(self.consumed())
                self._tell()
            batch = self.assemble(_columns(positions, together))
            yield {name: values.pin_memory() for name, values in batch.items()} if self.pinned else batch

    def _note(self, part: _Part) -> None:
        for lane, place in part.begun:
            self.places.setdefault(lane, deque()).append(place)
        for figures in part.figures:
            self.figures = Figures(**{key: n + getattr(self.figures, key) for key, n in asdict(figures).items()})

    def _forget(self, consumed: int) -> None:
        """Keep, of every lane, the last place at or before its first row that no finished step has taken."""
        for lane, places in self.places.items():
            while len(places) > 1 and places[1].rows <= self.corpus.rows_before(consumed, lane):
                places.popleft()

    def _tell(self) -> None:
        """Say once that texts are cut; of a stream it is not known before."""
        packing, figures = self.corpus.packing, self.figures
        if figures.cut and not packing.wrap and not self.told:
            self.told = True
            log.warning("train stream: %d of the first %d texts are longer than model.length=%d; tokens left out: %d",
                        figures.long, figures.texts, packing.length, figures.cut)  # fmt: skip

    def state(self) -> dict[str, Any]:
        """For a checkpoint: the settings of the stream, and where each lane stands, of all ranks together. Every rank
        has to call this."""
        self._forget(self.consumed())
        mine = {lane: places[0].plain() for lane, places in self.places.items()}
        ranks = [mine]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            ranks = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(ranks, mine)
        places: dict[int, dict[str, Any]] = {}
        for lane, place in sorted((item for rank in ranks for item in rank.items()), key=lambda item: item[0]):
            if lane not in places or place["rows"] > places[lane]["rows"]:
                places[lane] = place
        return {"settings": self.corpus.settings, "places": places}


def _columns(positions: Sequence[int], parts: Sequence[_Part]) -> dict[str, Any]:
    """The rows of a batch in their order, as columns."""
    at = {place: row for part in parts for place, row in zip(part.places, part.rows, strict=True)}
    rows = [at[place] for place in range(len(positions))]
    columns = {"input_ids": [row.ids for row in rows], "length": np.array([len(row.ids) for row in rows])}
    columns |= {"sample_id": np.asarray(positions), "position": np.asarray(positions)}
    if rows[0].label is not None:
        columns["label"] = np.array([row.label for row in rows])
    if rows[0].part_ends is not None:
        columns["part_ends"] = [row.part_ends for row in rows]
    return columns


def _as_it_is(part: _Part) -> _Part:
    return part


def _begin_worker(_: int) -> None:
    """In a forked process: a file system of its own, and no threads of the tokenizer, which do not survive a fork."""
    fsspec.asyn.reset_lock()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
