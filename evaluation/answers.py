"""The arithmetic of verdicts on completed prompts: shares with their errors, majority votes, groups of problems.

Shape suffixes: M prompts, K completions of each.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from palimpsest.common.metrics import Estimate, Share, ratio, share
from palimpsest.corpora.answer_checking import CheckedAnswer

_STEPS = ((0, 2), (3, 3), (4, 5), (6, None))  # steps of a reference: first and last of each group
_NUM_GROUPS = 4


def majority_is_right(verdicts: Sequence[CheckedAnswer]) -> bool:
    """Whether the most frequent answer to one prompt is right, the first of equals; no answer has no vote."""
    answers = Counter(verdict.answer for verdict in verdicts if verdict.answer is not None)
    return bool(answers) and answers.most_common(1)[0][0] == verdicts[0].wanted


@dataclass(frozen=True)
class Group:
    """Problems of one kind, by name, and how many were solved."""

    name: str
    right: Share


@dataclass(frozen=True)
class Answers:
    """What M prompts with K completions each came to.

    exact_match, no_answer, unfinished: shares of all completions, the last of those that filled their room without an
    end. majority, any_right (pass@K): of prompts, with K > 1. checks: what could be checked in the completions, each as
    a share of all of them. findings: what else was found, each as a share of the completions of which it can be said.
    by_steps, by_length: exact match by steps of the reference and by tokens of the prompt.
    """

    exact_match: Share
    no_answer: Share
    unfinished: Share
    majority: Share | None
    any_right: Share | None
    checks: dict[str, Estimate]
    num_checks: int
    findings: dict[str, Share]
    by_steps: list[Group]
    by_length: list[Group]


def measure(verdicts: Sequence[Sequence[CheckedAnswer]], ended_MK: np.ndarray, prompt_tokens_M: np.ndarray) -> Answers:
    """Count the verdicts of M prompts, K each."""
    right_MK = np.array([[verdict.right for verdict in row] for row in verdicts])
    silent_MK = np.array([[verdict.answer is None for verdict in row] for row in verdicts])
    several = right_MK.shape[1] > 1
    voted_M = np.array([majority_is_right(row) for row in verdicts])
    counts, found = check_shares([_added([verdict.checks for verdict in row]) for row in verdicts])
    return Answers(
        share(right_MK), share(silent_MK), share(~ended_MK), share(voted_M) if several else None,
        share(right_MK.any(1)) if several else None, found, counts, _findings(verdicts), _by_steps(verdicts, right_MK),
        _by_length(prompt_tokens_M, right_MK),
    )  # fmt: skip


def _added(checks: Sequence[Mapping[str, int]]) -> dict[str, int]:
    return {name: sum(found.get(name, 0) for found in checks) for found in checks for name in found}


def check_shares(checks: Sequence[Mapping[str, int]]) -> tuple[int, dict[str, Estimate]]:
    """How many checks there were in all texts, and each outcome's share of them."""
    names = list(dict.fromkeys(name for found in checks for name in found))
    counts_M = {name: np.array([float(found.get(name, 0)) for found in checks]) for name in names}
    total_M = sum(counts_M.values(), np.zeros(len(checks)))
    if not total_M.sum():
        return 0, {}
    return int(total_M.sum()), {name: ratio(count_M, total_M) for name, count_M in counts_M.items()}


def _findings(verdicts: Sequence[Sequence[CheckedAnswer]]) -> dict[str, Share]:
    names = dict.fromkeys(name for row in verdicts for verdict in row for name in verdict.findings)
    told = {name: [row for row in verdicts if all(name in verdict.findings for verdict in row)] for name in names}
    return {name: share(np.array([[verdict.findings[name] for verdict in row] for row in rows]))
            for name, rows in told.items() if rows}  # fmt: skip


def _by_steps(verdicts: Sequence[Sequence[CheckedAnswer]], right_MK: np.ndarray) -> list[Group]:
    if any(row[0].steps is None for row in verdicts):
        return []
    steps_M, groups = np.array([row[0].steps for row in verdicts]), []
    for first, last in _STEPS:
        here_M = (steps_M >= first) & (steps_M <= (math.inf if last is None else last))
        name = f"{first} or more" if last is None else f"{first}" if first == last else f"{first} to {last}"
        groups += [Group(name, share(right_MK[here_M]))] if here_M.any() else []
    return groups


def _by_length(tokens_M: np.ndarray, right_MK: np.ndarray) -> list[Group]:
    """Groups of about equal size, of neighbouring lengths; equal lengths stay together."""
    edges = np.unique(np.quantile(tokens_M, np.linspace(0, 1, _NUM_GROUPS + 1)[1:-1], method="higher"))
    group_M, groups = np.digitize(tokens_M, edges), []
    for number in np.unique(group_M):
        here_M = group_M == number
        first, last = tokens_M[here_M].min(), tokens_M[here_M].max()
        groups.append(Group(f"{first}" if first == last else f"{first} to {last}", share(right_MK[here_M])))
    return groups
