"""Verdicts on completed texts. A data set names its judge with data.judge; corpora/gsm8k.py has one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class Verdict:
    """What became of one prompt.

    answer: what the completion answers, in the form in which answers are compared; None where it gives none.
    wanted: the reference's answer. right: whether they agree. steps: of the reference, a measure of how hard the
    problem is; None where it has none. checks: counts of things that could be checked in the completion, by name.
    findings: what else is true of the completion, or is not, by name.
    """

    answer: str | None
    wanted: str | None
    steps: int | None = None
    checks: Mapping[str, int] = field(default_factory=dict)
    findings: Mapping[str, bool] = field(default_factory=dict)

    @property
    def right(self) -> bool:
        return self.answer is not None and self.answer == self.wanted


class Judge(Protocol):
    """Reads a completion and the reference's, both without their prompt."""

    def __call__(self, completion: str, reference: str) -> Verdict: ...


def same_text(completion: str, reference: str) -> Verdict:
    """The judge of data that name none: right is the reference word for word, white space around it aside."""
    return Verdict(completion.strip() or None, reference.strip())
