"""Solutions in the notation of GSM8K (Cobbe et al., arXiv 2110.14168), `He has 48/2 = <<48/2=24>>24 clips.` and, on a
line of its own, `#### 24`.

Calculator annotations `<<expression=result>>` and the final answer are read, calculated exactly and compared as
numbers; the operations of a solution are its plan.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Literal

import datasets

from palimpsest.corpora.judging import Verdict
from palimpsest.data.rows import in_parts, parts_of, text_rows
from palimpsest.data.sources import Source

PLAN, EXECUTION, ANSWER = "[PLAN]", "[EXECUTION]", "[ANSWER]"

_FINAL = re.compile(r"####|\[ANSWER\]")
_NUMBER = re.compile(r"\s*([-+\u2212]?)\s*\$?\s*([-\u2212]?)(\d[\d,]*(?:\.\d+)?|\.\d+)")
_ANNOTATION = re.compile(r"<<([^<>]*)>>")
_TOKEN = re.compile(r"\d[\d,]*\.?\d*|\.\d+|//|[-+*/()%]")
_LONGEST = 120  # characters of an expression: bounds what a generated one can cost


# -------------------------------------------------------------------------------- numbers


def number(text: str) -> Fraction | None:
    """The number that a text begins with: sign, $, thousands separators, decimals; what follows it (%, a full stop, a
    unit) is not read. None where it begins with something else."""
    match = _NUMBER.match(text)
    if match is None:
        return None
    value = Fraction(match[3].replace(",", ""))
    return -value if {match[1], match[2]} & {"-", "\u2212"} else value


def final_answer(solution: str) -> Fraction | None:
    """The number behind the last `####` (or `[ANSWER]`) of a solution, on its line; None without one."""
    marks = list(_FINAL.finditer(solution))
    return number(solution[marks[-1].end() :].split("\n")[0]) if marks else None


def calculate(expression: str) -> Fraction | None:
    """Exact value of numbers, + - * / // (rounded down), signs and parentheses; `20%` is 20/100. None for anything
    else, for a division by zero and for an expression too long for a calculator. Nothing of it is ever run as a
    program."""
    tokens = _TOKEN.findall(expression)
    if len(expression) > _LONGEST or re.sub(r"[ $]", "", expression) != "".join(tokens):
        return None
    try:
        return _Calculation(tokens).value()
    except (_Malformed, ZeroDivisionError):
        return None


class _Malformed(Exception):  # noqa: N818 - never leaves this file
    """The tokens are no expression."""


class _Calculation:
    """Recursive descent: sum of products of signed numbers and parentheses."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens, self.place = tokens, 0

    def value(self) -> Fraction:
        found = self._sum()
        if self.place < len(self.tokens):
            raise _Malformed
        return found

    def _next(self, *wanted: str) -> str | None:
        """The next token if it is one of these, which then is passed."""
        token = self.tokens[self.place] if self.place < len(self.tokens) else None
        if token not in wanted:
            return None
        self.place += 1
        return token

    def _sum(self) -> Fraction:
        found = self._product()
        while sign := self._next("+", "-"):
            found = found + self._product() if sign == "+" else found - self._product()
        return found

    def _product(self) -> Fraction:
        found = self._signed()
        while sign := self._next("*", "/", "//"):
            other = self._signed()
            found = found * other if sign == "*" else found / other if sign == "/" else Fraction(found // other)
        return found

    def _signed(self) -> Fraction:
        if sign := self._next("+", "-"):
            return self._signed() if sign == "+" else -self._signed()
        if self._next("("):
            found = self._sum()
            if not self._next(")"):
                raise _Malformed
        elif self.place < len(self.tokens) and self.tokens[self.place][0] in ".0123456789":
            found = Fraction(self.tokens[self.place].replace(",", "").rstrip("."))
            self.place += 1
        else:
            raise _Malformed
        while self._next("%"):
            found /= 100
        return found


# -------------------------------------------------------------------------------- annotations


@dataclass(frozen=True)
class Annotations:
    """How many calculator annotations of a text are right, wrong, and no calculation at all."""

    right: int = 0
    wrong: int = 0
    malformed: int = 0


def annotations(text: str) -> list[str]:
    """What stands between `<<` and `>>`, in order."""
    return _ANNOTATION.findall(text)


def annotation_is_right(annotation: str) -> bool | None:
    """Whether `48/2=24` holds: all sides are the last one, which may be rounded where it has decimals (`1/3=0.33`) and
    has to be exact where it has none. None for what is no calculation."""
    sides = annotation.split("=")
    values = [calculate(side) for side in sides]
    if len(values) < 2 or None in values:
        return None
    _, point, decimals = sides[-1].strip().partition(".")
    tolerance = Fraction(1, 2 * 10 ** len(decimals)) if point and decimals else Fraction(0)
    return all(abs(value - values[-1]) <= tolerance for value in values[:-1])


def check_annotations(text: str) -> Annotations:
    """Calculate every annotation again; a `<<` that is never closed is malformed too."""
    found = [annotation_is_right(annotation) for annotation in annotations(text)]
    unclosed = text.count("<<") - len(found)
    return Annotations(found.count(True), found.count(False), found.count(None) + unclosed)


# -------------------------------------------------------------------------------- verdicts


def judge(completion: str, reference: str) -> Verdict:
    """The judge of GSM8K: right is the reference's final answer as a number. Steps are the reference's annotations."""
    found, wanted = final_answer(completion), final_answer(reference)
    checked = check_annotations(completion)
    checks = {f"calculations {kind}": count for kind, count in asdict(checked).items()}
    return Verdict(_plain(found), _plain(wanted), len(annotations(reference)), checks)


def _plain(value: Fraction | None) -> str | None:
    """One spelling for each number: 1080, -3/4."""
    return None if value is None else str(value)


# -------------------------------------------------------------------------------- plans


def plan(solution: str, kind: str = "operations") -> str:
    """The skeleton of a solution, taken from its annotations: its operations, `48/2=24 ; 48+24=72`, or their operators
    alone, `/ ; +`; "none" for a solution without annotations."""
    found = annotations(solution)
    if kind == "operators":
        found = [" ".join(re.findall(r"//|[-+*/]", annotation.partition("=")[0])) for annotation in found]
    return " ; ".join(found) or "none"


def judge_planned(completion: str, reference: str, kind: Literal["operations", "operators"] = "operations") -> Verdict:
    """As `judge`, for problems with plans (see `Planned`), with findings: whether the plan is the reference's, whether
    its calculations are right (of plans of operations), and whether the execution carries them out, in their order."""
    found, wanted = written_plan(completion), written_plan(reference)
    done = plan(completion.partition(EXECUTION)[2], kind)
    findings = {
        "plan as the reference's": found == wanted, "plan carried out": found is not None and found == _tight(done),
    }  # fmt: skip
    if kind == "operations" and wanted not in (None, "none"):
        right = [annotation_is_right(operation) for operation in (found or "").split(";")]
        findings["plan's calculations right"] = all(right)
    return replace(judge(completion, reference), findings=findings)


def written_plan(text: str) -> str | None:
    """The plan that a text has between its markers, without white space; None where it has none."""
    marked = text.partition(PLAN)[2]
    return _tight(marked.partition(EXECUTION)[0]) or None


def _tight(text: str) -> str:
    return "".join(text.split())


def planned(question: str, solution: str, kind: str = "operations") -> list[str]:
    """A problem in three parts: question, plan, execution with the answer."""
    execution, _, answer = solution.rpartition("\n####")
    return [
        f"Question: {question}\n", f"{PLAN} {plan(solution, kind)}\n", f"{EXECUTION} {execution}\n{ANSWER}{answer}",
    ]  # fmt: skip


class Planned:
    """Problems of `source`, whose texts have two parts (question, solution), as question | plan | execution, with the
    markers [PLAN], [EXECUTION] and [ANSWER]. The question is the prompt.

    plan: operations or operators (see `plan`).
    """

    label_names, prompted = None, True

    def __init__(self, source: Source, plan: Literal["operations", "operators"] = "operations") -> None:
        self.source, self.plan = source, plan

    @property
    def splits(self) -> tuple[str, ...]:
        return self.source.splits

    def load(self, split: str) -> datasets.Dataset:
        """The split's rows. Raises ValueError for a split that does not exist."""
        rows = self.source.load(split)
        problems = [parts_of(text, ends) for text, ends in zip(rows["text"][:], rows["ends"][:], strict=True)]
        texts, ends = in_parts([planned(question, solution, self.plan) for question, solution in problems])
        return text_rows(texts, ends=ends)
