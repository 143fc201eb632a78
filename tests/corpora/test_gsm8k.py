"""GSM8K's notation: answers, calculations, plans; and what the real data hold."""

from __future__ import annotations

import json
from collections import Counter
from fractions import Fraction

import pytest

from palimpsest.corpora.gsm8k import (
    Planned,
    annotation_is_right,
    annotations,
    calculate,
    check_annotations,
    check_answer,
    check_planned_answer,
    final_answer,
    plan,
    planned,
)
from palimpsest.data.rows import from_table, in_parts, parts_of, text_table
from palimpsest.data.tokenizers import encode, encode_after, load_tokenizer


@pytest.mark.parametrize(("text", "answer"), [
    ("He has 3.\n#### 1,234", 1234), ("#### -5", -5), ("#### 2.50", Fraction(5, 2)), ("####$1,000,000.", 1000000),
    ("#### $-3", -3), ("#### -$3", -3), ("#### 20%", 20), ("#### .5 miles", Fraction(1, 2)), ("#### \u22127", -7),
    ("#### 1\n#### 2", 2), ("[ANSWER] 540", 540), ("#### 3 #### x", None), ("72", None), ("#### none", None),
    ("#### " + "0" * 4800, None),
    ("####\n7", None), ("", None),
])  # fmt: skip
def test_the_final_answer_is_the_number_behind_the_last_mark(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(("expression", "value"), [
    ("48/2", 24), ("2*(3+4)-1", 13), ("-3--2", -1), ("10/4", Fraction(5, 2)), (".5*.2", Fraction(1, 10)),
    ("50*20%", 10), ("20%*50", 10), ("1,200+5.", 1205), ("7//2", 3), ("007+1", 8), ("$5 * 3", 15), ("2-3-4", -5),
    ("8/2/2", 2), ("(1+2)%", Fraction(3, 100)),
    ("1/0", None), ("1//0", None), ("2**9", None), ("9**9**9**9", None), ("2 3", None), ("1.2.3", None), ("", None),
    ("(1", None), ("1)", None), ("x+1", None), ("__import__('os')", None), ("1e9", None), ("1+" * 59 + "1", 60),
    ("1+" * 60 + "1", None), ("(" * 5000 + "1", None), ("9" * 5000, None), ("5+", None), ("*5", None),
])  # fmt: skip
def test_calculation_is_exact_and_nothing_else_is_run(expression, value):
    assert calculate(expression) == value


def test_annotations_are_calculated_again():
    assert annotation_is_right("48/2=24") and annotation_is_right("1/3=0.33") and annotation_is_right("3=6/2=3")
    assert annotation_is_right("1/3=0.34") is False and annotation_is_right("7/2=4") is False
    assert annotation_is_right("2/3=.67") and annotation_is_right("2/3=.66") is False
    assert annotation_is_right("24") is None and annotation_is_right("a=1") is None and annotation_is_right("=") is None
    found = check_annotations("<<1+1=2>> <<1+1=3>> <<x=3>> <<2+2=4")
    assert found == {"right": 1, "wrong": 1, "malformed": 2}


SOLUTION = "He sold 48/2 = <<48/2=24>>24 in May.\nAll: <<48+24=72>>72.\n#### 72"


def test_plans_are_the_operations():
    assert (
        plan(SOLUTION) == "48/2=24 ; 48+24=72" and plan(SOLUTION, "operators") == "/ ; +" and plan("#### 1") == "none"
    )
    question, skeleton, execution = planned("Why?", SOLUTION)
    assert question == "Question: Why?\n" and skeleton == "[PLAN] 48/2=24 ; 48+24=72\n"
    assert execution.startswith("[EXECUTION] He sold") and execution.endswith("72.\n[ANSWER] 72")
    assert final_answer(execution) == 72


def test_planned_problems_have_three_parts():
    class Problems:
        splits = ("train",)

        def load(self, split):
            texts, ends = in_parts([["Why?", SOLUTION], ["How?", "#### 1"]])
            return from_table(text_table(texts, ends=ends))

    rows = Planned(Problems()).load("train")
    assert [parts_of(*row) for row in zip(rows["text"], rows["ends"], strict=True)] == [
        planned("Why?", SOLUTION),
        planned("How?", "#### 1"),
    ]


def test_plans_that_were_written_are_compared_checked_and_followed():
    reference = "".join(planned("Why?", SOLUTION)[1:])
    same = check_planned_answer(reference, reference)
    assert same.right and set(same.findings.values()) == {True} and len(same.findings) == 3
    spaced = check_planned_answer(reference.replace("48/2", " 48 / 2 "), reference)
    assert spaced.findings == same.findings, "white space is the tokenizer's"
    other = check_planned_answer(reference.replace("48/2=24 ; 48+24=72", "50-2=48"), reference).findings
    assert other == {"plan as the reference's": False, "plan carried out": False, "plan's calculations right": True}
    wrong = check_planned_answer(reference.replace("48+24=72", "48+24=73"), reference).findings
    assert wrong == {"plan as the reference's": False, "plan carried out": True, "plan's calculations right": False}
    silent = check_planned_answer("", reference)
    assert silent.answer is None and set(silent.findings.values()) == {False} and len(silent.findings) == 3
    reference = "".join(planned("Why?", SOLUTION, "operators")[1:])
    assert check_planned_answer(reference, reference, "operators").findings == {
        "plan as the reference's": True,
        "plan carried out": True,
    }
    reference = "".join(planned("Why?", "So it is.\n#### 1")[1:])
    assert check_planned_answer(reference, reference).findings == {
        "plan as the reference's": True,
        "plan carried out": True,
    }


def test_verdicts_compare_numbers():
    verdict = check_answer("So <<2*36=72>>72.\n#### 72.00", SOLUTION)
    assert verdict.right and verdict.steps == 2
    assert verdict.checks == {"calculations right": 1, "calculations wrong": 0, "calculations malformed": 0}
    assert not check_answer("#### 71", SOLUTION).right and check_answer("72", SOLUTION).answer is None
    assert not check_answer("72", "no mark").right, "no answer is never right"


@pytest.mark.parametrize(("split", "problems", "calculations"), [("train", 7473, 23716), ("test", 1319, 4282)])
def test_the_real_solutions(data_dir, split, problems, calculations):
    rows = [json.loads(line) for line in (data_dir / "gsm8k" / f"{split}.jsonl").read_text().splitlines()]
    solutions = [row["answer"] for row in rows]
    assert len(solutions) == problems and None not in map(final_answer, solutions)
    found = Counter(annotation_is_right(a) for solution in solutions for a in annotations(solution))
    assert found == {True: calculations}
    plain = [row["answer"].rsplit("#### ")[1].replace(",", "") for row in rows]
    assert [check_answer(solution, solution).answer for solution in solutions] == plain


def test_parts_of_real_problems_have_the_tokens_of_the_whole(data_dir):
    tokenizer = load_tokenizer("gpt2")
    lines = (data_dir / "gsm8k" / "train.jsonl").read_text().splitlines()[:200]
    rows = [json.loads(line) for line in lines]
    prompts = encode(tokenizer, [f"Question: {row['question']}\nAnswer:" for row in rows])
    answers = encode_after(tokenizer, [f" {row['answer']}" for row in rows])
    wholes = encode(tokenizer, [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows])
    assert [a + b for a, b in zip(prompts, answers, strict=True)] == wholes
