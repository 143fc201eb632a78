"""Denoising histories: what changed in a text at each step, recorded from a sampler.

Shape suffixes: B batch, L length, N places that changed at a step.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from palimpsest.data.tokenizers import hidden_special_ids, token_strings
from palimpsest.evaluation.drawing import SampledTokens
from palimpsest.report.denoising import PastToken, Sample
from palimpsest.samplers.trace import Trace

_TOGETHER = 128  # steps kept on the device before they are fetched and compared


@dataclass(frozen=True)
class Change:
    """Changes of a step in a row: `places_N` now hold `ids_N`, which may be masks."""

    step: int
    places_N: np.ndarray
    ids_N: np.ndarray
    confidence_N: np.ndarray


class RowHistory:
    """The denoising history of one row; tokens may be masked again.

    Attributes:
        ids_L, confidence_L: the tokens and the model's probability of each when it was written.
        age_L: when each token appeared: 0 with the first, 1 with the last; NaN for prompt tokens.
        new_L: tokens written by the last step.
        changes: by step; step 0 writes the prompt.
    """

    def __init__(self, blank_id: int) -> None:
        self._blank_id = blank_id
        self._most, self._age = 0, math.nan
        self.ids_L, self.new_L = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=bool)
        self.confidence_L, self.age_L = np.zeros(0), np.zeros(0)
        self.changes: list[Change] = []

    @property
    def num_masks(self) -> int:
        """Number of masks."""
        return int((self.ids_L == self._blank_id).sum())

    @property
    def last_written(self) -> int:
        """The last place that was written; -1 if none was."""
        return int(np.flatnonzero(~np.isnan(self.age_L) & (self.ids_L != self._blank_id)).max(initial=-1))

    def update(self, step: int, ids_L: np.ndarray, confidence_L: np.ndarray) -> bool:
        """Add the row after a step; return True if something changed."""
        more = len(ids_L) - len(self.ids_L)
        before_L = np.pad(self.ids_L, (0, more), constant_values=self._blank_id)
        sure_L, age_L = np.pad(self.confidence_L, (0, more)), np.pad(self.age_L, (0, more), constant_values=math.nan)
        again_L = (ids_L != self._blank_id) & (confidence_L != sure_L)  # the same token, rewritten
        changed_L = (ids_L != before_L) | again_L
        self.new_L = changed_L & (not math.isnan(self._age))
        if not changed_L.any() and not more:
            return False
        age_L[changed_L] = self._age
        self.ids_L, self.age_L = ids_L.copy(), age_L
        self.confidence_L = confidence_L.copy()
        if changed_L.any():
            self.changes.append(Change(step, changed_L.nonzero()[0], ids_L[changed_L], confidence_L[changed_L]))
        self._most = max(self._most, self.num_masks)
        self._age = max(0.0 if math.isnan(self._age) else self._age, 1 - self.num_masks / max(1, self._most))
        return True

    def past(self, tokenizer: PreTrainedTokenizerBase) -> dict[int, list[PastToken]]:
        """Return the earlier tokens of each place, in order."""
        ended, current = dict[int, list[PastToken]](), dict[int, tuple[int, int, float]]()
        for change in self.changes:
            for place, token, confidence in zip(
                change.places_N.tolist(), change.ids_N.tolist(), change.confidence_N.tolist(), strict=True
            ):
                if place in current:
                    written, token_before, sure = current.pop(place)
                    text = token_text(tokenizer, token_before, self._blank_id)
                    ended.setdefault(place, []).append(PastToken(place, text, written, change.step, sure))
                if token != self._blank_id:
                    current[place] = (change.step, token, confidence)
        return ended


class Recorder:
    """Records the first `num_texts` rows of a batch. Synchronises with the device only once in many steps."""

    def __init__(self, num_texts: int, blank_id: int) -> None:
        self._num_texts, self._blank_id = num_texts, blank_id
        self._pending: list[tuple[int, Tensor, Tensor]] = []
        self._rows: list[RowHistory] = []

    def __call__(self, trace: Trace) -> None:
        seen = slice(self._num_texts)
        self._pending.append((trace.num_steps, trace.ids_BL[seen].clone(), trace.confidence_BL[seen].clone()))
        if len(self._pending) == _TOGETHER:
            self.histories()

    def histories(self) -> list[RowHistory]:
        """Return the histories of the rows so far."""
        for step, *columns in self._pending:
            ids_BL, confidence_BL = (column.cpu().numpy() for column in columns)
            self._rows = self._rows or [RowHistory(self._blank_id) for _ in ids_BL]
            for row, ids_L, sure_L in zip(self._rows, ids_BL, confidence_BL, strict=True):
                row.update(step, ids_L, sure_L)
        self._pending = []
        return self._rows


def token_text(tokenizer: PreTrainedTokenizerBase, token: int, blank_id: int) -> str:
    """Return a token's text as it follows another token."""
    return token_strings(tokenizer, [blank_id, token])[1]


def sample_of(
    text: SampledTokens,
    tokenizer: PreTrainedTokenizerBase,
    title: str,
    history: RowHistory | None = None,
    facts: str = "",
) -> Sample:
    """Return a sampled text for a report: decoded, without special tokens.

    Args:
        title: heading above the text.
        history: the tokens of its row after each sampling step, if they were recorded.
        facts: a line below the title, such as what the text cost.
    """
    hidden = hidden_special_ids(tokenizer)
    kept = [i for i, token in enumerate(text.ids) if token not in hidden]
    strings = token_strings(tokenizer, [text.ids[i] for i in kept])
    past = {} if history is None else history.past(tokenizer)
    before = [PastToken(new, visit.token, visit.written, visit.erased, visit.confidence)
              for new, i in enumerate(kept) if text.steps[i] for visit in past.get(text.places[i], [])]  # fmt: skip
    return Sample(
        strings, [text.steps[i] for i in kept], text.num_steps, title, [text.confidence[i] for i in kept], before, facts
    )


def samples_of(
    sampled: Sequence[SampledTokens], tokenizer: PreTrainedTokenizerBase, histories: Sequence[RowHistory] = ()
) -> list[Sample]:
    """Return texts as reports show them, the first ones with their histories."""
    known = [*histories[: len(sampled)], *[None] * (len(sampled) - len(histories))]
    return [sample_of(text, tokenizer, f"Text {i + 1}", known[i], f"{text.evaluations:,} network evaluations")
            for i, text in enumerate(sampled)]  # fmt: skip
