"""Texts with the course of their denoising: what stood where after each step, and the page that plays it.

Shape suffix: L tokens of a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from palimpsest.report.page import render, write_page
from palimpsest.report.palette import age
from palimpsest.report.plain_text import inline, split_lead

_MOST_BARS = 120
_DIGITS = 3  # of a confidence in the page


@dataclass(frozen=True)
class Visit:
    """A token that stood at the place `place` of a text (an index of its tokens) for a while: from the step `written`
    until the step `erased`, which masked it again or put another one there. confidence: the model's probability of it
    when it was written."""

    place: int
    token: str
    written: int
    erased: int
    confidence: float


@dataclass(frozen=True)
class Shown:
    """A token as it stands in a text after some step. confidence: None where it is not known."""

    token: str
    written: int
    confidence: float | None


@dataclass(frozen=True)
class Sample:
    """A generated text of L tokens and the sampler step at which each appeared.

    `reveal_step[i]` is in 1..`num_steps`, or 0 for a token that was given (prefix, context). Tokens carry
    their own spacing: concatenated they are the text. confidence: the model's probability of each token when it was
    written, where that is known. past: what stood in their places before, if anything did. facts: what else is to be
    said of the text, in a few words.

    Raises ValueError where these disagree.
    """

    tokens: list[str]
    reveal_step: list[int]
    num_steps: int
    title: str = ""
    confidence: list[float] | None = None
    past: Sequence[Visit] = ()
    facts: str = ""

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.reveal_step):
            raise ValueError(f"sample has {len(self.tokens)} tokens but {len(self.reveal_step)} reveal steps")
        if self.confidence is not None and len(self.tokens) != len(self.confidence):
            raise ValueError(f"sample has {len(self.tokens)} tokens but {len(self.confidence)} confidences")
        outside = [step for step in self.reveal_step if not 0 <= step <= self.num_steps]
        if outside:
            raise ValueError(f"reveal step {outside[0]} is not in 0..num_steps = {self.num_steps}")
        for place, visits in self._past_by_place().items():
            times = [time for visit in visits for time in (visit.written, visit.erased)]
            times.append(self.reveal_step[place] if 0 <= place < len(self.tokens) else -1)
            if not (times[0] >= 1 and all(a <= b for a, b in pairwise(times))):
                raise ValueError(f"the past of place {place} is not in order: steps {times}, of {len(self.tokens)} "
                                 "tokens")  # fmt: skip

    @property
    def text(self) -> str:
        """The final text."""
        return "".join(self.tokens)

    def at(self, step: int) -> list[Shown | None]:
        """What stands at each place after `step` (0: what was given), None for a mask."""
        past = self._past_by_place()
        return [self._at(place, step, past.get(place, [])) for place in range(len(self.tokens))]

    def _at(self, place: int, step: int, past: list[Visit]) -> Shown | None:
        if self.reveal_step[place] <= step:
            confidence = None if self.confidence is None else self.confidence[place]
            return Shown(self.tokens[place], self.reveal_step[place], confidence)
        now = [visit for visit in past if visit.written <= step < visit.erased]
        return Shown(now[0].token, now[0].written, now[0].confidence) if now else None

    def _past_by_place(self) -> dict[int, list[Visit]]:
        past: dict[int, list[Visit]] = {}
        for visit in sorted(self.past, key=lambda visit: visit.written):
            past.setdefault(visit.place, []).append(visit)
        return past


def samples_block(samples: Sequence[Sample]) -> dict[str, Any]:
    """What the template and the player need to show `samples`."""
    return {
        "samples": [_sample(sample) for sample in samples],
        "given": any(0 in sample.reveal_step for sample in samples),
        "confident": any(sample.confidence is not None for sample in samples),
        "past": any(sample.past for sample in samples),
        "window": max((_window(sample) for sample in samples), default=1),
    }


def write_denoising(
    path: Path, samples: Sequence[Sample], title: str = "Denoising", subtitle: str = "", command: str = ""
) -> None:
    """`denoising.html`: the texts with a player of their denoising, in one file that opens from disk, loads nothing and
    shows the final texts where no script runs."""
    write_page(path, denoising_page(samples, title, subtitle, command))


def denoising_page(samples: Sequence[Sample], title: str = "", subtitle: str = "", command: str = "") -> str:
    """The same as HTML. Without a title it is to be framed by another page: texts and player alone, which wait at the
    end."""
    block = samples_block(samples)
    return render("denoising.html.j2", title=title, subtitle=inline(subtitle), command=command, block=block)


def _window(sample: Sample) -> int:
    """How many steps count as just written."""
    return max(1, -(-sample.num_steps // 64))


def _sample(sample: Sample) -> dict[str, Any]:
    pieces = []
    for i, token in enumerate(sample.tokens):
        lead, body = split_lead(token)
        confidence = 1.0 if sample.confidence is None else sample.confidence[i]
        step = sample.reveal_step[i]
        pieces.append({"lead": lead, "body": body, "given": step == 0, "confidence": _short(confidence),
                       "age": _short(age(step, sample.num_steps))})  # fmt: skip
    return {
        "title": sample.title,
        "facts": sample.facts,
        "pieces": pieces,
        "steps": " ".join(map(str, sample.reveal_step)),
        "confidence": None if sample.confidence is None else " ".join(map(_short, sample.confidence)),
        "past": [[visit.place, visit.written, visit.erased, split_lead(visit.token)[1],
                  float(_short(visit.confidence))] for visit in sample.past],
        "bars": _bars(sample),
        "num_steps": sample.num_steps,
        "window": _window(sample),
        "num_tokens": len(sample.tokens),
        "given": sample.reveal_step.count(0),
    }  # fmt: skip


def _short(value: float) -> str:
    return f"{value:.{_DIGITS}f}".rstrip("0").rstrip(".")


def _bars(sample: Sample) -> dict[str, Any]:
    """How many tokens were written, and how many masked again, along the steps: bars of a figure 100 wide, the tallest
    100 tall."""
    steps = sample.num_steps
    if not steps:
        return {"up": [], "down": []}
    count = min(_MOST_BARS, steps)
    up, down = [0] * count, [0] * count
    for step in (*(s for s in sample.reveal_step if s), *(visit.written for visit in sample.past)):
        up[(step - 1) * count // steps] += 1
    for visit in sample.past:
        down[(visit.erased - 1) * count // steps] += 1
    tallest = max(*up, *down, 1)

    def bars(heights: list[int]) -> list[dict[str, str]]:
        ages = [age(i + 1, count) for i in range(count)]
        return [{"x": _short(100 * i / count), "height": _short(100 * n / tallest), "age": _short(ages[i])}
                for i, n in enumerate(heights) if n]  # fmt: skip

    return {"up": bars(up), "down": bars(down), "width": _short(100 / count * (0.8 if count > 1 else 1))}
