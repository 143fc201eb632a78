"""Texts with their denoising trace: the token at each place after each step, and the page that plays it.

Shape suffix: L tokens of a text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from palimpsest.report.page import render
from palimpsest.report.palette import age
from palimpsest.report.plain_text import inline, split_lead

_MOST_BARS = 120
_DIGITS = 3  # of a confidence in the page


@dataclass(frozen=True)
class PastToken:
    """A token that was replaced or masked again."""

    place: int  # index of its place among the tokens
    token: str
    written: int  # step that wrote it
    erased: int  # step that replaced or masked it
    confidence: float  # the model's probability of it when it was written


@dataclass(frozen=True)
class TokenState:
    """A token as it is after some step."""

    token: str
    written: int
    confidence: float | None  # None if unknown


@dataclass(frozen=True)
class Sample:
    """A generated text of L tokens and the sampler step at which each appeared.

    Tokens carry their own spacing: concatenated they are the text.

    Raises ValueError if the fields disagree.
    """

    tokens: list[str]
    reveal_step: list[int]  # in 1..num_steps, or 0 for a prompt token
    num_steps: int
    title: str = ""
    confidence: list[float] | None = None  # of each token when it was written, if known
    past: Sequence[PastToken] = ()  # earlier tokens at the same places
    facts: str = ""  # a short note

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.reveal_step):
            raise ValueError(f"sample has {len(self.tokens)} tokens but {len(self.reveal_step)} reveal steps")
        if self.confidence is not None and len(self.tokens) != len(self.confidence):
            raise ValueError(f"sample has {len(self.tokens)} tokens but {len(self.confidence)} confidences")
        outside = [step for step in self.reveal_step if not 0 <= step <= self.num_steps]
        if outside:
            raise ValueError(f"reveal step {outside[0]} is not in 0..num_steps = {self.num_steps}")
        for place, past in self._past_by_place().items():
            times = [time for old in past for time in (old.written, old.erased)]
            times.append(self.reveal_step[place] if 0 <= place < len(self.tokens) else -1)
            if not (times[0] >= 1 and all(a <= b for a, b in pairwise(times))):
                raise ValueError(
                    f"the past of place {place} is not in order: steps {times}, of {len(self.tokens)} tokens"
                )

    @property
    def text(self) -> str:
        """The final text."""
        return "".join(self.tokens)

    def at(self, step: int) -> list[TokenState | None]:
        """Return the token at each place after `step` (0: the prompt), None for a mask."""
        past = self._past_by_place()
        return [self._at(place, step, past.get(place, [])) for place in range(len(self.tokens))]

    def _at(self, place: int, step: int, past: list[PastToken]) -> TokenState | None:
        if self.reveal_step[place] <= step:
            confidence = None if self.confidence is None else self.confidence[place]
            return TokenState(self.tokens[place], self.reveal_step[place], confidence)
        now = [old for old in past if old.written <= step < old.erased]
        return TokenState(now[0].token, now[0].written, now[0].confidence) if now else None

    def _past_by_place(self) -> dict[int, list[PastToken]]:
        past: dict[int, list[PastToken]] = {}
        for old in sorted(self.past, key=lambda old: old.written):
            past.setdefault(old.place, []).append(old)
        return past


def samples_block(samples: Sequence[Sample]) -> dict[str, Any]:
    """Return the content of the template and the player for `samples`."""
    return {
        "samples": [_sample(sample) for sample in samples],
        "given": any(0 in sample.reveal_step for sample in samples),
        "confident": any(sample.confidence is not None for sample in samples),
        "past": any(sample.past for sample in samples),
        "window": max((_window(sample) for sample in samples), default=1),
    }


def denoising_page(samples: Sequence[Sample], title: str = "", subtitle: str = "", command: str = "") -> str:
    """Return the texts with a player as a page that needs no network; texts are readable without scripts.

    Without a title, to be framed by another page, it has only texts and player.
    """
    block = samples_block(samples)
    return render("denoising.html.j2", title=title, subtitle=inline(subtitle), command=command, block=block)


def _window(sample: Sample) -> int:
    """Return how many steps count as just written."""
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
        "past": [[old.place, old.written, old.erased, split_lead(old.token)[1],
                  float(_short(old.confidence))] for old in sample.past],
        "bars": _bars(sample),
        "num_steps": sample.num_steps,
        "window": _window(sample),
        "num_tokens": len(sample.tokens),
        "given": sample.reveal_step.count(0),
    }  # fmt: skip


def _short(value: float) -> str:
    return f"{value:.{_DIGITS}f}".rstrip("0").rstrip(".")


def _bars(sample: Sample) -> dict[str, Any]:
    """Return how many tokens were written and remasked along the steps, as bars of a figure 100 by 100."""
    steps = sample.num_steps
    if not steps:
        return {"up": [], "down": []}
    count = min(_MOST_BARS, steps)
    up, down = [0] * count, [0] * count
    for step in (*(s for s in sample.reveal_step if s), *(old.written for old in sample.past)):
        up[(step - 1) * count // steps] += 1
    for old in sample.past:
        down[(old.erased - 1) * count // steps] += 1
    tallest = max(*up, *down, 1)

    def bars(heights: list[int]) -> list[dict[str, str]]:
        ages = [age(i + 1, count) for i in range(count)]
        return [{"x": _short(100 * i / count), "height": _short(100 * n / tallest), "age": _short(ages[i])}
                for i, n in enumerate(heights) if n]  # fmt: skip

    return {"up": bars(up), "down": bars(down), "width": _short(100 / count * (0.8 if count > 1 else 1))}
