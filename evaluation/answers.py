"""Statistics of checked answers: shares with their errors, majority votes, groups of problems.

Shape suffixes: M prompts, K completions of each.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from palimpsest.common.metrics import Estimate, Share, ratio, share
from palimpsest.corpora.answer_checking import CheckedAnswer

_STEPS = ((0, 2), (3, 3), (4, 5), (6, math.inf))  # steps of a reference: first and last of each group
_NUM_GROUPS = 4


def majority_is_right(answers: Sequence[CheckedAnswer]) -> bool:
    """Return True if the most frequent answer to a prompt, the first of equals, is right; None has no vote."""
    votes = Counter(checked.answer for checked in answers if checked.answer is not None)
    return bool(votes) and votes.most_common(1)[0][0] == answers[0].wanted


@dataclass(frozen=True)
class Answers:
    """Results of M prompts with K completions each."""

    exact_match: Share  # of all completions
    no_answer: Share  # of all completions
    unfinished: Share  # of all completions: those without an end of text
    majority: Share | None  # of prompts; None if K is 1
    any_right: Share | None  # of prompts, pass@K; None if K is 1
    checks: dict[str, Estimate]  # each outcome's share of all checks
    num_checks: int
    findings: dict[str, Share]  # each as a share of the completions that it applies to
    by_steps: dict[str, Share]  # exact match by steps of the reference
    by_length: dict[str, Share]  # exact match by tokens of the prompt


def measure(answers: Sequence[Sequence[CheckedAnswer]], ended_MK: np.ndarray, prompt_tokens_M: np.ndarray) -> Answers:
    """Summarise the checked answers of M prompts, K each."""
    right_MK = np.array([[checked.right for checked in row] for row in answers])
    no_answer_MK = np.array([[checked.answer is None for checked in row] for row in answers])
    many = right_MK.shape[1] > 1
    majority_M = np.array([majority_is_right(row) for row in answers])
    num_checks, checks = check_shares([_summed([checked.checks for checked in row]) for row in answers])
    return Answers(
        share(right_MK),
        share(no_answer_MK),
        share(~ended_MK),
        share(majority_M) if many else None,
        share(right_MK.any(1)) if many else None,
        checks,
        num_checks,
        _findings(answers),
        _by_steps(answers, right_MK),
        _by_length(prompt_tokens_M, right_MK),
    )


def _summed(checks: Sequence[Mapping[str, int]]) -> dict[str, int]:
    return {name: sum(counts.get(name, 0) for counts in checks) for counts in checks for name in counts}


def check_shares(checks: Sequence[Mapping[str, int]]) -> tuple[int, dict[str, Estimate]]:
    """Return the number of checks in all texts, and the share of each outcome."""
    names = list(dict.fromkeys(name for counts in checks for name in counts))
    counts_M = {name: np.array([float(counts.get(name, 0)) for counts in checks]) for name in names}
    total_M = sum(counts_M.values(), np.zeros(len(checks)))
    if not total_M.sum():
        return 0, {}
    return int(total_M.sum()), {name: ratio(count_M, total_M) for name, count_M in counts_M.items()}


def _findings(answers: Sequence[Sequence[CheckedAnswer]]) -> dict[str, Share]:
    names = dict.fromkeys(name for row in answers for checked in row for name in checked.findings)
    rows_of = {name: [row for row in answers if all(name in checked.findings for checked in row)] for name in names}
    return {name: share(np.array([[checked.findings[name] for checked in row] for row in rows]))
            for name, rows in rows_of.items() if rows}  # fmt: skip


def _by_steps(answers: Sequence[Sequence[CheckedAnswer]], right_MK: np.ndarray) -> dict[str, Share]:
    if any(row[0].steps is None for row in answers):
        return {}
    steps_M = np.array([row[0].steps for row in answers])
    here = {_range(first, last): (steps_M >= first) & (steps_M <= last) for first, last in _STEPS}
    return {name: share(right_MK[here_M]) for name, here_M in here.items() if here_M.any()}


def _by_length(tokens_M: np.ndarray, right_MK: np.ndarray) -> dict[str, Share]:
    """Group prompts of neighbouring lengths into groups of about equal size; equal lengths stay together."""
    edges = np.unique(np.quantile(tokens_M, np.linspace(0, 1, _NUM_GROUPS + 1)[1:-1], method="higher"))
    group_M = np.digitize(tokens_M, edges)
    groups = {}
    for number in np.unique(group_M):
        here_M = group_M == number
        groups[_range(tokens_M[here_M].min(), tokens_M[here_M].max())] = share(right_MK[here_M])
    return groups


def _range(first: float, last: float) -> str:
    if first == last:
        return f"{first}"
    return f"{first} or more" if last == math.inf else f"{first} to {last}"
