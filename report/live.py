"""Texts that are still being written: what stands in them, and how a page shows it.

Shape suffixes: B batch, L length.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import median

from transformers import PreTrainedTokenizerBase

from palimpsest.data.tokenizers import hidden_special_ids, token_strings
from palimpsest.dataloader import TextData
from palimpsest.diffusion import Diffusion
from palimpsest.evaluation.drawing import Drawing
from palimpsest.report.history import Course, piece
from palimpsest.report.page import render
from palimpsest.report.plain_text import split_lead, visible
from palimpsest.samplers.trace import Trace


@dataclass(frozen=True)
class Piece:
    """What stands at a place of a text that is being written.

    text: with its own spacing; of a mask what it is drawn as wide as. age: how much of the text was written when it
    appeared, in [0, 1]; None where it was given. confidence: the model's probability of it, in [0, 1]. masked: nothing
    stands there. new: it came with the last step.
    """

    text: str
    age: float | None = None
    confidence: float = 1.0
    masked: bool = False
    new: bool = False


class Standing:
    """The first `num_texts` rows of a batch as they stand after the frame that was taken in last.

    blank: what a mask shows as. end_id: the token behind which nothing is shown, once it was written. rows: the texts;
    none before the first trace. step, evaluations: of that trace. left: masks of the whole batch, and total: the most
    that there were.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        blank_id: int,
        num_texts: int,
        blank: str = " ····",
        end_id: int | None = None,
    ) -> None:
        self._tokenizer, self._blank_id, self._num_texts = tokenizer, blank_id, num_texts
        self._blank, self._end_id = blank, end_id
        self._hidden = hidden_special_ids(tokenizer) - {blank_id}
        self._strings = lru_cache(maxsize=None)(lambda token: visible(piece(tokenizer, token, blank_id)))
        self.rows: list[Course] = []
        self.step, self.evaluations, self.left, self.total = 0, 0, 0, 0

    @classmethod
    def of(cls, num_texts: int, diffusion: Diffusion, data: TextData, drawing: Drawing) -> Standing:
        """For the first `num_texts` texts of a drawing."""
        ends = (diffusion.objective.causal and not data.wrap) or data.fill or drawing.var_length
        end_id = data.vocabulary.eos_id if ends and not data.segments else None
        return cls(data.tokenizer, diffusion.objective.process.blank_id, num_texts, blank_of(data), end_id)

    def take(self, trace: Trace) -> bool:
        """Take in what `trace` holds; True if one of the texts has changed."""
        seen = slice(self._num_texts)
        ids_BL, confidence_BL = trace.ids_BL[seen].cpu().numpy(), trace.confidence_BL[seen].cpu().numpy()
        if not self.rows:
            self.rows = [Course(self._blank_id) for _ in ids_BL]
        self.step, self.evaluations = trace.num_steps, int(trace.evaluations_B[seen].max())
        self.left = int((trace.ids_BL == self._blank_id).sum())
        self.total = max(self.total, self.left)
        return any([row.take(trace.num_steps, ids_L, sure_L)
                    for row, ids_L, sure_L in zip(self.rows, ids_BL, confidence_BL, strict=True)])  # fmt: skip

    def pieces(self, row: Course, upto: int | None = None) -> Iterator[Piece]:
        """A row, or its first `upto` places, without special tokens and what is behind the end. A text without masks is
        read as a whole, since characters may be of several tokens."""
        ids, begun = row.ids_L.tolist(), False
        whole = [visible(string) for string in token_strings(self._tokenizer, ids)] if row.left == 0 else None
        for place, token in enumerate(ids[:upto]):
            age, masked = float(row.age_L[place]), token == self._blank_id
            if token == self._end_id and not math.isnan(age):
                break
            if token in self._hidden:
                continue
            string = self._blank if masked else whole[place] if whole else self._strings(token)
            yield Piece(
                string if begun else string.lstrip(), None if math.isnan(age) else age,
                float(row.confidence_L[place]), masked, bool(row.new_L[place]),
            )  # fmt: skip
            begun = begun or bool(string.lstrip())


def blank_of(data: TextData) -> str:
    """What stands for a mask: dots, as many as a typical token of the data has letters."""
    rows = data.split("validation" if data.prompted else "train")
    hidden = hidden_special_ids(data.tokenizer)
    ids = [token for token in rows[0]["input_ids"] if token not in hidden][:200]
    pieces = [split_lead(string) for string in token_strings(data.tokenizer, ids)]
    leads = sorted(lead for lead, _ in pieces[1:])
    lead = leads[len(leads) // 2] if leads else ""
    return (" " if lead else "") + "·" * max(1, round(median(len(body) for _, body in pieces) if pieces else 1))


def live_texts(texts: Sequence[Sequence[Piece]]) -> str:
    """The texts as they stand, HTML that `live_style` gives its looks."""
    return render("live.html.j2", texts=[[_shown(piece) for piece in pieces] for pieces in texts])


def live_style() -> str:
    """CSS of `live_texts`, to be nested under whatever holds them; it needs `colours`."""
    return render("live.css.j2")


def colours() -> str:
    """CSS of the colours and typefaces of all pages, as custom properties of the root."""
    return render("colours.css")


def _shown(piece: Piece) -> dict[str, str]:
    lead, body = split_lead(piece.text)
    kind = "m" if piece.masked else "g" if piece.age is None else "new" if piece.new else ""
    drawn = not piece.masked and piece.age is not None
    style = f"--a:{piece.age:.3f};--c:{piece.confidence:.3f}" if drawn else ""
    return {"lead": lead, "body": body, "kind": kind, "style": style}
