"""Complete the prompts of a split, and judge the completions.

Shape suffixes: M prompts, K completions of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from palimpsest.common.metrics import Estimate, Share, share
from palimpsest.common.randomness import KeyedNoise
from palimpsest.corpora.answer_checking import AnswerChecker, CheckedAnswer, check_same_text
from palimpsest.data.rows import parts_of
from palimpsest.data.tokenizers import decode, encode
from palimpsest.dataloader import TextData
from palimpsest.diffusion import Diffusion
from palimpsest.evaluation.answers import Answers, check_shares, measure
from palimpsest.evaluation.drawing import Drawn, Sampled, Setting
from palimpsest.evaluation.sampling_inputs import Template, check_amount

_COMPLETIONS = 2**32  # names of a prompt's completions are so far apart


@dataclass(frozen=True)
class Asked:
    """The request to complete prompts. num_prompts: None for every prompt of `split`. samples_per_prompt: completions
    of each.

    Raises:
        ValueError: there is no split to take prompts from.
    """

    split: str | None
    num_prompts: int | None
    samples_per_prompt: int
    judge: AnswerChecker = check_same_text

    def __post_init__(self) -> None:
        if self.split is None:
            raise ValueError("eval.split=null: prompts are those of a split; choose test or validation")

    @property
    def folder(self) -> str:
        """The folder of the results."""
        return self.split

    def check(self, data: TextData, given: Template, perplexity: bool) -> None:
        """Raise ValueError if something is asked for that means nothing for prompts."""
        if perplexity:
            raise ValueError("eval.compute_generative_perplexity=true measures free texts, and these answer prompts; "
                             "leave it out")  # fmt: skip
        if any(asdict(given).values()):
            raise ValueError(f"data={data.name} gives each text a prompt and its room; leave sampling.prefix, "
                             "sampling.template and sampling.max_length out")  # fmt: skip

    def __call__(self, setting: Setting) -> Completions:
        """Complete the prompts, shared out over all devices, and judge the completions.

        Raises:
            ValueError: the model cannot choose where a text ends.
        """
        data = setting.data
        check_ends(setting.diffusion, data)
        done = complete(setting, self)
        rows = [row for one in done for row in _rows(one)]
        setting.keep(rows)
        answers = measure([c.verdicts for c in done], np.array([c.ended for c in done]),
                          np.array([c.prompt_tokens for c in done]))  # fmt: skip
        beside, drawn = _beside(data, self.judge, done), [text for c in done for text in c.drawn]
        evaluations = float(np.mean([text.evaluations for text in drawn])) if drawn else 0.0
        results = {**_results(answers, beside, done, self), "network_evaluations_per_sample": evaluations}
        known = {"data": data.name, "split": self.split, "fill": data.fill, "length": data.length,
                 "tokenizer": data.vocabulary.fingerprint, "prompts": self.num_prompts or "all",
                 "samples_per_prompt": self.samples_per_prompt}  # fmt: skip
        return Completions(results, rows, drawn, known, self.split, self.samples_per_prompt, done, answers, beside)


@dataclass(frozen=True)
class Completed:
    """One prompt with its completions. drawn is empty where the prompt leaves no room for any."""

    text_id: int
    prompt: str
    reference: str
    prompt_tokens: int
    drawn: list[Drawn]
    completions: list[str]
    ended: list[bool]
    verdicts: list[CheckedAnswer]


@dataclass(frozen=True)
class Completions(Sampled):
    """Prompts of `split` that were completed, and what their answers came to."""

    split: str
    samples_per_prompt: int
    completed: list[Completed]
    answers: Answers
    beside: Beside


def check_ends(diffusion: Diffusion, data: TextData) -> None:
    """Raises ValueError where a model of masks was shown how long each text is, which no prompt can tell it."""
    if not diffusion.objective.causal and not data.fill:
        raise ValueError(
            f"data.fill=null: this model of data={data.name} learned p(text | prompt, its length), and a prompt does "
            "not tell the length; train and sample with data.fill=eos, or use parameterization=ar"
        )


def complete(setting: Setting, asked: Asked) -> list[Completed]:
    """Return the chosen prompts, in the order of the split; those that leave no room are kept, without an answer."""
    data = setting.data
    texts = data.texts(asked.split)
    order = KeyedNoise(setting.seed, torch.arange(len(texts)), draw=-7).uniform().argsort()
    texts = texts.select(np.sort(order[: asked.num_prompts].numpy()))
    check_amount(len(texts) * asked.samples_per_prompt, data.length)
    pairs = [(parts[0], "".join(parts[1:])) for parts in map(parts_of, texts["text"][:], texts["ends"][:])]
    bos = [data.vocabulary.bos_id] * data.packing(asked.split).bos
    heads = [bos + ids for ids in encode(data.tokenizer, [prompt for prompt, _ in pairs])]
    ids_M, times = np.asarray(texts["text_id"][:], dtype=np.int64), range(asked.samples_per_prompt)
    blank = [np.array(head + [setting.blank_id] * (data.length - len(head))) for head in heads]
    taken = np.array([len(head) for head in heads])  # by the prompt, and by what has a room of its own behind it
    taken = data.segment_ends(taken)[:, -1] if data.segments else taken
    fits = [m for m in range(len(heads)) if taken[m] < data.length]
    names = np.array([ids_M[m] + k * _COMPLETIONS for m in fits for k in times], dtype=np.int64)
    rows = [blank[m] for m in fits for _ in times]
    drawn = iter(setting.fill(rows, names))
    of_prompt = {m: [next(drawn) for _ in times] for m in fits}
    done = []
    for m, ((prompt, reference), head) in enumerate(zip(pairs, heads, strict=True)):
        made = of_prompt.get(m, [])
        tails = [text.ids[len(head) :] for text in made] or [[] for _ in times]
        completions = [decode(data.tokenizer, ids, skip_special=True) for ids in tails]
        ended = [ids[-1:] == [data.vocabulary.eos_id] for ids in tails]
        verdicts = [asked.judge(completion, reference) for completion in completions]
        done.append(Completed(int(ids_M[m]), prompt, reference, len(head), made, completions, ended, verdicts))
    return done


@dataclass(frozen=True)
class Beside:
    """What the numbers are to be held against. checks: of the references themselves. constant: the share of prompts
    that the most frequent answer of the training texts gets right, and that answer; None without training texts."""

    checks: dict[str, Estimate]
    constant: Share | None
    constant_answer: str | None


def _beside(data: TextData, judge: AnswerChecker, done: Sequence[Completed]) -> Beside:
    checks = check_shares([judge(c.reference, c.reference).checks for c in done])[1]
    if "train" not in data.splits:
        return Beside(checks, None, None)
    train = data.texts("train")
    answers = [judge("", "".join(parts_of(text, ends)[1:])).wanted
               for text, ends in zip(train["text"][:], train["ends"][:], strict=True)]  # fmt: skip
    known, counts = np.unique([answer for answer in answers if answer is not None], return_counts=True)
    if not len(known):
        return Beside(checks, None, None)
    answer = str(known[counts.argmax()])
    return Beside(checks, share(np.array([c.verdicts[0].wanted == answer for c in done])), answer)


def _rows(c: Completed) -> list[dict[str, object]]:
    """Return the lines of samples.jsonl, one for each completion."""
    rows = []
    for number, (text, ended, verdict) in enumerate(zip(c.completions, c.ended, c.verdicts, strict=True)):
        drawn = c.drawn[number] if c.drawn else Drawn([], [], [], [], 0, 0)
        rows.append({"text_id": c.text_id, "completion": number, "prompt": c.prompt, "reference": c.reference,
                     "text": text, "right": verdict.right, "answer": verdict.answer, "wanted": verdict.wanted,
                     "ended": ended, "steps_of_reference": verdict.steps, "checks": dict(verdict.checks),
                     "findings": dict(verdict.findings), "prompt_tokens": c.prompt_tokens, "ids": drawn.ids,
                     "steps": drawn.steps, "confidence": [round(p, 4) for p in drawn.confidence],
                     "evaluations": drawn.evaluations})  # fmt: skip
    return rows


def _share(found: Share | None) -> dict[str, object] | None:
    if found is None:
        return None
    return {"value": found.value, "se": found.se, "low": found.low, "high": found.high, "prompts": found.texts}


def _results(answers: Answers, beside: Beside, done: Sequence[Completed], asked: Asked) -> dict[str, object]:
    """Return the numbers for results.json."""
    return {
        "prompts": len(done), "samples_per_prompt": asked.samples_per_prompt,
        "prompts_without_room": sum(not c.drawn for c in done),
        "exact_match": _share(answers.exact_match), "no_answer": _share(answers.no_answer),
        "unfinished": _share(answers.unfinished), "majority_vote": _share(answers.majority),
        f"pass_at_{asked.samples_per_prompt}": _share(answers.any_right),
        "findings": {name: _share(found) for name, found in answers.findings.items()},
        "checks": answers.checks, "num_checks": answers.num_checks, "checks_of_references": beside.checks,
        "most_frequent_answer": _share(beside.constant),
        "by_steps_of_reference": {group.name: _share(group.right) for group in answers.by_steps},
        "by_prompt_tokens": {group.name: _share(group.right) for group in answers.by_length},
    }  # fmt: skip
