"""How texts came to be: a watcher of samplers that keeps what changed at each step, and texts shown with it.

Shape suffixes: B batch, L length, F steps looked at together, N places that changed at a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from palimpsest.data.tokenizers import token_strings, unshown
from palimpsest.evaluation.drawing import Drawn
from palimpsest.report.denoising import Sample, Visit
from palimpsest.samplers.trace import Trace

_TOGETHER = 128  # steps that are kept where the sampler runs before they are fetched and compared


@dataclass(frozen=True)
class Change:
    """What a step changed in a row: at `places_N` now stand `ids_N`, masks among them, with `confidence_N`."""

    step: int
    places_N: np.ndarray
    ids_N: np.ndarray
    confidence_N: np.ndarray


@dataclass(frozen=True)
class History:
    """The course of one row, from a row of masks to what it is at the end; tokens that were masked again go and come
    back. changes: in the order of their steps, the first of which is 0, where what was given appears."""

    blank_id: int
    changes: tuple[Change, ...]

    def ids_at(self, step: int) -> list[int]:
        """The row after `step`."""
        length = max((int(change.places_N.max()) + 1 for change in self.changes), default=0)
        ids_L = np.full(length, self.blank_id)
        for change in self.changes:
            if change.step <= step:
                ids_L[change.places_N] = change.ids_N
        return ids_L.tolist()

    def past(self, tokenizer: object) -> dict[int, list[Visit]]:
        """For each place of the row what stood there before its last token, in order."""
        ended, standing = dict[int, list[Visit]](), dict[int, tuple[int, int, float]]()
        for change in self.changes:
            for place, token, confidence in zip(
                change.places_N.tolist(), change.ids_N.tolist(), change.confidence_N.tolist(), strict=True
            ):
                if place in standing:
                    written, was, sure = standing.pop(place)
                    text = piece(tokenizer, was, self.blank_id)
                    ended.setdefault(place, []).append(Visit(place, text, written, change.step, sure))
                if token != self.blank_id:
                    standing[place] = (change.step, token, confidence)
        return ended


class Recorder:
    """Keeps the courses of the first `num_texts` rows of the batch that it watches. Waits for no device but once in
    many steps."""

    def __init__(self, num_texts: int, blank_id: int) -> None:
        self._num_texts, self._blank_id = num_texts, blank_id
        self._waiting: list[tuple[int, Tensor, Tensor]] = []
        self._changes: list[list[Change]] = []
        self._ids_BL, self._confidence_BL = np.zeros((0, 0), dtype=np.int64), np.zeros((0, 0), dtype=np.float32)

    def __call__(self, trace: Trace) -> None:
        seen = slice(self._num_texts)
        self._waiting.append((trace.num_steps, trace.ids_BL[seen].clone(), trace.confidence_BL[seen].clone()))
        if len(self._waiting) == _TOGETHER:
            self._fetch()

    def histories(self) -> list[History]:
        """The courses of the rows so far."""
        self._fetch()
        return [History(self._blank_id, tuple(changes)) for changes in self._changes]

    def _fetch(self) -> None:
        for step, ids_BL, confidence_BL in self._waiting:
            self._compare(step, ids_BL.cpu().numpy(), confidence_BL.cpu().numpy())
        self._waiting = []

    def _compare(self, step: int, ids_BL: np.ndarray, confidence_BL: np.ndarray) -> None:
        if self._ids_BL.shape != ids_BL.shape:  # the first step, or a sampler that goes on behind the window
            self._changes = self._changes or [[] for _ in ids_BL]
            before_BL, sure_BL = self._ids_BL, self._confidence_BL
            self._ids_BL, self._confidence_BL = np.full_like(ids_BL, self._blank_id), np.zeros_like(confidence_BL)
            self._ids_BL[: len(before_BL), : before_BL.shape[1]] = before_BL
            self._confidence_BL[: len(before_BL), : before_BL.shape[1]] = sure_BL
        again_BL = (ids_BL != self._blank_id) & (confidence_BL != self._confidence_BL)  # the same token, written anew
        for changes, ids_L, sure_L, changed_L in zip(
            self._changes, ids_BL, confidence_BL, (ids_BL != self._ids_BL) | again_BL, strict=True
        ):
            if changed_L.any():
                changes.append(Change(step, changed_L.nonzero()[0], ids_L[changed_L], sure_L[changed_L]))
        self._ids_BL, self._confidence_BL = ids_BL, confidence_BL


def piece(tokenizer: object, token: int, blank_id: int) -> str:
    """A token as it shows behind another one, whatever that is."""
    return token_strings(tokenizer, [blank_id, token])[1]


def sample_of(text: Drawn, tokenizer: object, title: str, history: History | None = None, facts: str = "") -> Sample:
    """A text as pages show it, special tokens left out; with the course of its row, if there is one."""
    hidden = unshown(tokenizer)
    kept = [i for i, token in enumerate(text.ids) if token not in hidden]
    strings = token_strings(tokenizer, [text.ids[i] for i in kept])
    past = {} if history is None else history.past(tokenizer)
    before = [Visit(new, visit.token, visit.written, visit.erased, visit.confidence)
              for new, i in enumerate(kept) if text.steps[i] for visit in past.get(text.places[i], [])]  # fmt: skip
    return Sample(strings, [text.steps[i] for i in kept], text.num_steps, title,
                  [text.confidence[i] for i in kept], before, facts)  # fmt: skip


def samples_of(drawn: Sequence[Drawn], tokenizer: object, histories: Sequence[History] = ()) -> list[Sample]:
    """Texts as reports show them, the first ones with their courses."""
    known = [*histories[: len(drawn)], *[None] * (len(drawn) - len(histories))]
    return [sample_of(text, tokenizer, f"Text {i + 1}", known[i], f"{text.evaluations:,} network evaluations")
            for i, text in enumerate(drawn)]  # fmt: skip
