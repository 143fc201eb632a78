"""Live view: texts during sampling, and their HTML.

Shape suffixes: B batch, L length.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import median
from typing import Self

from transformers import PreTrainedTokenizerBase

from palimpsest.data.tokenizers import hidden_special_ids, token_strings
from palimpsest.dataloader import TextData
from palimpsest.diffusion import Diffusion
from palimpsest.evaluation.drawing import Drawing
from palimpsest.report.history import RowHistory, token_text
from palimpsest.report.page import render
from palimpsest.report.plain_text import split_lead, visible
from palimpsest.samplers.trace import Trace


@dataclass(frozen=True)
class LiveToken:
    """A token or mask of a text during sampling."""

    text: str  # with its own spacing; for a mask, dots
    age: float | None = None  # share of the text that was written when it appeared, in [0, 1]; None for the prompt
    confidence: float = 1.0  # the model's probability of it, in [0, 1]
    masked: bool = False
    new: bool = False  # written by the last step


class LiveView:
    """The first `num_texts` rows of a batch after the last update.

    Attributes:
        blank: how a mask is shown.
        end_id: nothing is shown after this token, once it was written.
        rows: the texts; none before the first update.
        step, evaluations: of the last update.
        left, total: masks of the whole batch, now and at most.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        blank_id: int,
        num_texts: int,
        blank: str = " ····",
        end_id: int | None = None,
    ) -> None:
        self._tokenizer, self._num_texts = tokenizer, num_texts
        self._blank_id, self._end_id = blank_id, end_id
        self._blank = blank
        self._hidden = hidden_special_ids(tokenizer) - {blank_id}
        self._strings = lru_cache(maxsize=None)(lambda token: visible(token_text(tokenizer, token, blank_id)))
        self.rows: list[RowHistory] = []
        self.step = self.evaluations = self.left = self.total = 0

    @classmethod
    def of(cls, num_texts: int, diffusion: Diffusion, data: TextData, drawing: Drawing) -> Self:
        """Create the view of the first `num_texts` texts of a drawing."""
        ends = (diffusion.objective.causal and not data.wrap) or data.fill or drawing.var_length
        end_id = data.vocabulary.eos_id if ends and not data.segments else None
        return cls(data.tokenizer, diffusion.objective.process.blank_id, num_texts, blank_of(data), end_id)

    def update(self, trace: Trace) -> bool:
        """Take over the state of the sampler after a step, without printing; return True if a shown text changed."""
        seen = slice(self._num_texts)
        ids_BL, confidence_BL = trace.ids_BL[seen].cpu().numpy(), trace.confidence_BL[seen].cpu().numpy()
        if not self.rows:
            self.rows = [RowHistory(self._blank_id) for _ in ids_BL]
        self.step, self.evaluations = trace.num_steps, int(trace.evaluations_B[seen].max())
        self.left = int((trace.ids_BL == self._blank_id).sum())
        self.total = max(self.total, self.left)
        texts = zip(self.rows, ids_BL, confidence_BL, strict=True)
        return any([row.update(trace.num_steps, ids_L, sure_L) for row, ids_L, sure_L in texts])

    def tokens(self, row: RowHistory, upto: int | None = None) -> Iterator[LiveToken]:
        """Yield the tokens of a row, or of its first `upto` places, without special tokens and up to its end.

        A text without masks is decoded as a whole, because a character may consist of several tokens.
        """
        ids, started = row.ids_L.tolist(), False
        decoded = [visible(string) for string in token_strings(self._tokenizer, ids)] if row.num_masks == 0 else None
        for place, token in enumerate(ids[:upto]):
            age, masked = float(row.age_L[place]), token == self._blank_id
            if token == self._end_id and not math.isnan(age):
                break
            if token in self._hidden:
                continue
            string = self._blank if masked else decoded[place] if decoded else self._strings(token)
            string = string if started else string.lstrip()
            appeared = None if math.isnan(age) else age
            yield LiveToken(string, appeared, float(row.confidence_L[place]), masked, bool(row.new_L[place]))
            started = started or bool(string)


def blank_of(data: TextData) -> str:
    """Return dots for a mask, as many as a typical token of the data has letters."""
    rows = data.split("validation" if data.prompted else "train")
    hidden = hidden_special_ids(data.tokenizer)
    ids = [token for token in rows[0]["input_ids"] if token not in hidden][:200]
    pieces = [split_lead(string) for string in token_strings(data.tokenizer, ids)]
    leads = sorted(lead for lead, _ in pieces[1:])
    lead = leads[len(leads) // 2] if leads else ""
    return (" " if lead else "") + "·" * max(1, round(median(len(body) for _, body in pieces) if pieces else 1))


def live_texts(texts: Sequence[Sequence[LiveToken]]) -> str:
    """Return the texts as HTML, styled by live.css.j2."""
    return render("live.html.j2", texts=[[_token_style(token) for token in tokens] for tokens in texts])


def _token_style(token: LiveToken) -> dict[str, str]:
    lead, body = split_lead(token.text)
    kind = "m" if token.masked else "g" if token.age is None else "new" if token.new else ""
    coloured = not token.masked and token.age is not None
    style = f"--a:{token.age:.3f};--c:{token.confidence:.3f}" if coloured else ""
    return {"lead": lead, "body": body, "kind": kind, "style": style}
