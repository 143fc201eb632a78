"""Checking the answers in completed texts. A data set names its checker with data.judge; corpora/gsm8k.py has one."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class CheckedAnswer:
    """The result for one prompt."""

    answer: str | None  # of the completion, in a form for comparison; None without one
    wanted: str | None  # of the reference
    steps: int | None = None  # of the reference, a measure of the difficulty
    checks: Mapping[str, int] = field(default_factory=dict)  # counts of checkable parts of the completion, by name
    findings: Mapping[str, bool] = field(default_factory=dict)  # other properties of the completion, by name

    @property
    def right(self) -> bool:
        return self.answer is not None and self.answer == self.wanted


class AnswerChecker(Protocol):
    """A function that compares a completion with the reference, both without their prompt."""

    def __call__(self, completion: str, reference: str) -> CheckedAnswer: ...


def check_same_text(completion: str, reference: str) -> CheckedAnswer:
    """Compare word for word, except for surrounding white space: the default of data without a checker."""
    return CheckedAnswer(completion.strip() or None, reference.strip())
