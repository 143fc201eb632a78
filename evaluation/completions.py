"""Complete the prompts of a split, and check the answers.

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
from palimpsest.evaluation.answers import Answers, check_shares, measure
from palimpsest.evaluation.drawing import SampledTokens, SamplingContext, SamplingResult
from palimpsest.evaluation.sampling_inputs import Template, check_amount

_ID_STRIDE = 2**32  # distance between the sample ids of a prompt's completions


@dataclass(frozen=True)
class CompletionRequest:
    """A request to complete prompts. Raises ValueError without a split to take prompts from."""

    split: str | None
    num_prompts: int | None  # None for every prompt of `split`
    samples_per_prompt: int
    judge: AnswerChecker = check_same_text

    def __post_init__(self) -> None:
        if self.split is None:
            raise ValueError("eval.split=null: prompts are those of a split; choose test or validation")

    @property
    def folder(self) -> str:
        """Folder of the results."""
        return self.split

    def check(self, data: TextData, template: Template, perplexity: bool) -> None:
        """Raise ValueError for settings that do not apply to prompts."""
        if perplexity:
            raise ValueError(
                "eval.compute_generative_perplexity=true measures free texts, and these answer prompts; leave it out"
            )
        if any(asdict(template).values()):
            raise ValueError(
                f"data={data.name} gives each text a prompt and its room; leave sampling.prefix, "
                "sampling.template and sampling.max_length out"
            )

    def __call__(self, context: SamplingContext) -> Completions:
        """Complete the prompts on all devices, and check the answers.

        Raises ValueError if the model was trained with known text lengths, which a prompt does not tell.
        """
        data = context.data
        if not context.diffusion.objective.causal and not data.fill:
            raise ValueError(
                f"data.fill=null: this model of data={data.name} learned p(text | prompt, its length), and a prompt "
                "does not tell the length; train and sample with data.fill=eos, or use parameterization=ar"
            )
        completed = complete(context, self)
        rows = [row for one in completed for row in _rows(one)]
        context.save_rows(rows)
        ended_MK = np.array([c.ended for c in completed])
        answers = measure([c.answers for c in completed], ended_MK, np.array([c.prompt_tokens for c in completed]))
        baselines, sampled = _baselines(data, self.judge, completed), [text for c in completed for text in c.sampled]
        evaluations = float(np.mean([text.evaluations for text in sampled])) if sampled else 0.0
        results = {**_results(answers, baselines, completed, self), "network_evaluations_per_sample": evaluations}
        known = {"data": data.name, "split": self.split, "fill": data.fill, "length": data.length,
                 "tokenizer": data.vocabulary.fingerprint, "prompts": self.num_prompts or "all",
                 "samples_per_prompt": self.samples_per_prompt}  # fmt: skip
        return Completions(
            results, rows, sampled, known, self.split, self.samples_per_prompt, completed, answers, baselines
        )


@dataclass(frozen=True)
class CompletedPrompt:
    """One prompt with its completions."""

    text_id: int
    prompt: str
    reference: str
    prompt_tokens: int
    sampled: list[SampledTokens]  # empty if the prompt leaves no space for a completion
    completions: list[str]
    ended: list[bool]
    answers: list[CheckedAnswer]


@dataclass(frozen=True)
class Completions(SamplingResult):
    """Completed prompts of `split`, with the statistics of their answers."""

    split: str
    samples_per_prompt: int
    completed: list[CompletedPrompt]
    answers: Answers
    baselines: CompletionBaselines


def complete(context: SamplingContext, request: CompletionRequest) -> list[CompletedPrompt]:
    """Complete the chosen prompts, in the order of the split; prompts that leave no space get no answer."""
    data = context.data
    texts = data.texts(request.split)
    order = KeyedNoise(context.seed, torch.arange(len(texts)), draw=-7).uniform().argsort()
    texts = texts.select(np.sort(order[: request.num_prompts].numpy()))
    check_amount(len(texts) * request.samples_per_prompt, data.length)
    pairs = [(parts[0], "".join(parts[1:])) for parts in map(parts_of, texts["text"][:], texts["ends"][:])]
    bos = [data.vocabulary.bos_id] * data.packing(request.split).bos
    prompts_ids = [bos + ids for ids in encode(data.tokenizer, [prompt for prompt, _ in pairs])]
    ids_M, repeats = np.asarray(texts["text_id"][:], dtype=np.int64), range(request.samples_per_prompt)
    masked = [np.array(prompt_ids + [context.blank_id] * (data.length - len(prompt_ids))) for prompt_ids in prompts_ids]
    used_M = np.array([len(prompt_ids) for prompt_ids in prompts_ids])
    if data.segments:
        used_M = data.segment_ends(used_M)[:, -1]  # with the segments reserved after the prompt
    fitting = np.flatnonzero(used_M < data.length).tolist()
    sample_ids = np.array([ids_M[m] + k * _ID_STRIDE for m in fitting for k in repeats], dtype=np.int64)
    rows = [masked[m] for m in fitting for _ in repeats]
    sampled = iter(context.sample(rows, sample_ids))
    of_prompt = {m: [next(sampled) for _ in repeats] for m in fitting}
    completed = []
    for m, ((prompt, reference), prompt_ids) in enumerate(zip(pairs, prompts_ids, strict=True)):
        samples = of_prompt.get(m, [])
        endings = [text.ids[len(prompt_ids) :] for text in samples] or [[] for _ in repeats]
        completions = [decode(data.tokenizer, ids, skip_special=True) for ids in endings]
        ended = [ids[-1:] == [data.vocabulary.eos_id] for ids in endings]
        answers = [request.judge(completion, reference) for completion in completions]
        completed.append(
            CompletedPrompt(int(ids_M[m]), prompt, reference, len(prompt_ids), samples, completions, ended, answers)
        )
    return completed


@dataclass(frozen=True)
class CompletionBaselines:
    """Baselines of the answers."""

    checks: dict[str, Estimate]  # outcomes of the checks on the references themselves
    readable: Share  # share of the references that are right after the tokenizer: no model can have more
    constant: Share | None  # share that the most frequent training answer gets right; None without training texts
    constant_answer: str | None


def _baselines(data: TextData, judge: AnswerChecker, completed: Sequence[CompletedPrompt]) -> CompletionBaselines:
    checks = check_shares([judge(c.reference, c.reference).checks for c in completed])[1]
    references = [c.reference for c in completed]
    read = [decode(data.tokenizer, ids, skip_special=True) for ids in encode(data.tokenizer, references)]
    readable = share(np.array([judge(*pair).right for pair in zip(read, references, strict=True)]))
    if "train" not in data.splits:
        return CompletionBaselines(checks, readable, None, None)
    train = data.texts("train")
    answers = [judge("", "".join(parts_of(text, ends)[1:])).wanted
               for text, ends in zip(train["text"][:], train["ends"][:], strict=True)]  # fmt: skip
    answers_seen, counts = np.unique([answer for answer in answers if answer is not None], return_counts=True)
    if not len(answers_seen):
        return CompletionBaselines(checks, readable, None, None)
    answer = str(answers_seen[counts.argmax()])
    return CompletionBaselines(
        checks, readable, share(np.array([c.answers[0].wanted == answer for c in completed])), answer
    )


def _rows(c: CompletedPrompt) -> list[dict[str, object]]:
    """Return the lines of samples.jsonl, one for each completion."""
    rows = []
    for number, (text, ended, checked) in enumerate(zip(c.completions, c.ended, c.answers, strict=True)):
        sampled = c.sampled[number] if c.sampled else SampledTokens([], [], [], [], 0, 0)
        rows.append({"text_id": c.text_id, "completion": number, "prompt": c.prompt, "reference": c.reference,
                     "text": text, "right": checked.right, "answer": checked.answer, "wanted": checked.wanted,
                     "ended": ended, "steps_of_reference": checked.steps, "checks": dict(checked.checks),
                     "findings": dict(checked.findings), "prompt_tokens": c.prompt_tokens,
                     **sampled.columns()})  # fmt: skip
    return rows


def _share(found: Share | None) -> dict[str, object] | None:
    if found is None:
        return None
    return {"value": found.value, "se": found.se, "low": found.low, "high": found.high, "prompts": found.texts}


def _results(
    answers: Answers, baselines: CompletionBaselines, completed: Sequence[CompletedPrompt], request: CompletionRequest
) -> dict[str, object]:
    """Return the numbers for results.json."""
    return {
        "prompts": len(completed), "samples_per_prompt": request.samples_per_prompt,
        "prompts_without_room": sum(not c.sampled for c in completed),
        "exact_match": _share(answers.exact_match), "no_answer": _share(answers.no_answer),
        "unfinished": _share(answers.unfinished), "majority_vote": _share(answers.majority),
        f"pass_at_{request.samples_per_prompt}": _share(answers.any_right),
        "findings": {name: _share(found) for name, found in answers.findings.items()},
        "checks": answers.checks, "num_checks": answers.num_checks, "checks_of_references": baselines.checks,
        "most_frequent_answer": _share(baselines.constant), "references_after_tokenizer": _share(baselines.readable),
        "by_steps_of_reference": {name: _share(right) for name, right in answers.by_steps.items()},
        "by_prompt_tokens": {name: _share(right) for name, right in answers.by_length.items()},
    }  # fmt: skip
