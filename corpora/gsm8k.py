"""Solutions in the notation of GSM8K (Cobbe et al., arXiv 2110.14168), `He has 48/2 = <<48/2=24>>24 clips.` and, on a
line of its own, `#### 24`.

Calculator annotations `<<expression=result>>` and the final answer are parsed, calculated exactly and compared as
numbers; the operations of a solution are its plan.
"""

import re
from dataclasses import replace
from fractions import Fraction
from typing import Literal

import datasets

from palimpsest.corpora.answer_checking import CheckedAnswer
from palimpsest.data.rows import from_table, in_parts, parts_of, text_table
from palimpsest.data.sources import Source

PLAN, EXECUTION, ANSWER = "[PLAN]", "[EXECUTION]", "[ANSWER]"

_FINAL = re.compile(r"####|\[ANSWER\]")
_NUMBER = re.compile(r"\s*([-+\u2212]?)\s*\$?\s*([-\u2212]?)(\d[\d,]*(?:\.\d+)?|\.\d+)")
_ANNOTATION = re.compile(r"<<([^<>]*)>>")
_TOKEN = re.compile(r"\d[\d,]*\.?\d*|\.\d+|//|[-+*/()%]")
_LONGEST = 120  # characters of an expression, which bounds the cost of a generated one


# -------------------------------------------------------------------------------- numbers


def number(text: str) -> Fraction | None:
    """Return the number at the start of a text, with sign, $, thousands separators and decimals; the rest (%, a full
    stop, a unit) is ignored. None if there is no number, or one of more than 100 characters."""
    match = _NUMBER.match(text)
    if match is None or len(match[3]) > 100:  # a model that repeats itself; Python refuses the longest ones
        return None
    value = Fraction(match[3].replace(",", ""))
    return -value if {match[1], match[2]} & {"-", "\u2212"} else value


def final_answer(solution: str) -> Fraction | None:
    """Return the number behind the last `####` (or `[ANSWER]`) of a solution, on the same line; None without one."""
    marks = list(_FINAL.finditer(solution))
    return number(solution[marks[-1].end() :].split("\n")[0]) if marks else None


def calculate(expression: str) -> Fraction | None:
    """Return the exact value of an expression of numbers, + - * / // (rounded down), signs and parentheses; `20%` is
    20/100. None for anything else, a division by zero, or an expression that is too long. Nothing is executed as code.
    """
    tokens = _TOKEN.findall(expression)
    if len(expression) > _LONGEST or re.sub(r"[ $]", "", expression) != "".join(tokens):
        return None
    try:
        return _Calculation(tokens).value()
    except (_Malformed, ZeroDivisionError):
        return None


class _Malformed(Exception):  # noqa: N818 - never leaves this file
    """The tokens are not an expression."""


class _Calculation:
    """A recursive-descent parser: sum of products of signed numbers and parentheses."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens, self.position = tokens, 0

    def value(self) -> Fraction:
        found = self._sum()
        if self.position < len(self.tokens):
            raise _Malformed
        return found

    def _next(self, *wanted: str) -> str | None:
        """Consume and return the next token if it is one of `wanted`, else return None."""
        token = self.tokens[self.position] if self.position < len(self.tokens) else None
        if token not in wanted:
            return None
        self.position += 1
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
        elif self.position < len(self.tokens) and self.tokens[self.position][0] in ".0123456789":
            found = Fraction(self.tokens[self.position].replace(",", "").rstrip("."))
            self.position += 1
        else:
            raise _Malformed
        while self._next("%"):
            found /= 100
        return found


# -------------------------------------------------------------------------------- annotations


def annotations(text: str) -> list[str]:
    """Return the contents of all `<<...>>`, in order."""
    return _ANNOTATION.findall(text)


def annotation_is_right(annotation: str) -> bool | None:
    """Return whether `48/2=24` holds: all sides equal the last, which may be rounded if it has decimals (`1/3=0.33`).
    None if it is not a calculation."""
    sides = annotation.split("=")
    values = [calculate(side) for side in sides]
    if len(values) < 2 or None in values:
        return None
    _, point, decimals = sides[-1].strip().partition(".")
    tolerance = Fraction(1, 2 * 10 ** len(decimals)) if point and decimals else Fraction(0)
    return all(abs(value - values[-1]) <= tolerance for value in values[:-1])


def check_annotations(text: str) -> dict[str, int]:
    """Return how many annotations are `right`, `wrong` and `malformed`: not a calculation, or a `<<` without an end."""
    found = [annotation_is_right(annotation) for annotation in annotations(text)]
    right = found.count(True)
    wrong = found.count(False)
    return {"right": right, "wrong": wrong, "malformed": text.count("<<") - right - wrong}


# -------------------------------------------------------------------------------- answers


def check_answer(completion: str, reference: str) -> CheckedAnswer:
    """Compare the final answers as numbers. Steps are the annotations of the reference."""
    found, wanted = final_answer(completion), final_answer(reference)
    checks = {f"calculations {kind}": count for kind, count in check_annotations(completion).items()}
    answer, wanted = (None if value is None else str(value) for value in (found, wanted))
    return CheckedAnswer(answer, wanted, len(annotations(reference)), checks)


# -------------------------------------------------------------------------------- plans


def plan(solution: str, kind: str = "operations") -> str:
    """Return the plan of a solution from its annotations: the operations, `48/2=24 ; 48+24=72`, or only the operators,
    `/ ; +`; "none" without annotations."""
    found = annotations(solution)
    if kind == "operators":
        found = [" ".join(re.findall(r"//|[-+*/]", annotation.partition("=")[0])) for annotation in found]
    return " ; ".join(found) or "none"


def check_planned_answer(
    completion: str, reference: str, kind: Literal["operations", "operators"] = "operations"
) -> CheckedAnswer:
    """Check an answer as `check_answer`, and the plan (see `Planned`): whether it is that of the reference, whether its
    calculations are right (for plans of operations), and whether the execution follows it in order."""
    found, wanted = written_plan(completion), written_plan(reference)
    executed = _without_spaces(plan(completion.partition(EXECUTION)[2], kind))
    findings = {"plan as the reference's": found == wanted, "plan carried out": found is not None and found == executed}
    if kind == "operations" and wanted not in (None, "none"):
        right = [annotation_is_right(operation) for operation in (found or "").split(";")]
        findings["plan's calculations right"] = all(right)
    return replace(check_answer(completion, reference), findings=findings)


def written_plan(text: str) -> str | None:
    """Return the plan between the markers of a text, without white space; None without one."""
    marked = text.partition(PLAN)[2]
    return _without_spaces(marked.partition(EXECUTION)[0]) or None


def _without_spaces(text: str) -> str:
    return "".join(text.split())


def planned(question: str, solution: str, kind: str = "operations") -> list[str]:
    """Return a problem in three parts: question, plan, execution with the answer."""
    execution, _, answer = solution.rpartition("\n####")
    steps = plan(solution, kind)
    return [f"Question: {question}\n", f"{PLAN} {steps}\n", f"{EXECUTION} {execution}\n{ANSWER}{answer}"]


class Planned:
    """Problems of `source`, whose texts have two parts (question, solution), as question | plan | execution, with the
    markers [PLAN], [EXECUTION] and [ANSWER]. The question is the prompt.

    Args:
        plan: operations or operators (see `plan`).
    """

    label_names, prompted = None, True

    def __init__(self, source: Source, plan: Literal["operations", "operators"] = "operations") -> None:
        self.source, self.plan = source, plan

    @property
    def splits(self) -> tuple[str, ...]:
        return self.source.splits

    def load(self, split: str) -> datasets.Dataset:
        """Return the rows of a split. Raises ValueError if it does not exist."""
        rows = self.source.load(split)
        problems = [parts_of(text, ends) for text, ends in zip(rows["text"][:], rows["ends"][:], strict=True)]
        texts, ends = in_parts([planned(question, solution, self.plan) for question, solution in problems])
        return from_table(text_table(texts, ends=ends))
