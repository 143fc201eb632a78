"""mode=sample_eval on texts with prompts: the prompts of a split completed, and the completions judged.

Shape suffixes: M prompts, K completions of each.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import lightning
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from palimpsest.common.metrics import Estimate
from palimpsest.common.randomness import KeyedNoise
from palimpsest.corpora.judging import Judge, Verdict
from palimpsest.data.rows import parts_of
from palimpsest.data.tokenizers import decode, encode
from palimpsest.diffusion import Diffusion
from palimpsest.report.formatting import Interval
from palimpsest.report.report import Metric, Report, Sample
from palimpsest.samplers.trace import Watcher
from palimpsest.tasks.answers import Answers, Share, check_shares, measure, share
from palimpsest.tasks.base import Experiment, write_results
from palimpsest.tasks.blanks import check_amount
from palimpsest.tasks.drawing import Drawing, Drawn, fill_on_all
from palimpsest.tasks.history import sample_of
from palimpsest.tasks.watching import Views, described

_COMPLETIONS = 2**32  # names of a prompt's completions are so far apart


@dataclass(frozen=True)
class Asked:
    """num_prompts: None for every prompt of `split`. samples_per_prompt: completions of each. num_shown: so many right
    and so many wrong ones are shown.

    Raises:
        ValueError: there is no split to take prompts from, or nothing is asked for.
    """

    split: str | None
    num_prompts: int | None
    samples_per_prompt: int
    num_shown: int

    def __post_init__(self) -> None:
        if self.split is None:
            raise ValueError("eval.split=null: prompts are those of a split; choose test or validation")
        if self.samples_per_prompt < 1:
            raise ValueError(f"sampling.samples_per_prompt={self.samples_per_prompt} must be at least 1")


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
    verdicts: list[Verdict]


def complete_prompts(
    experiment: Experiment, asked: Asked, checkpoint_path: str, disable_ema: bool, perplexity: bool, views: Views
) -> dict[str, object]:
    """Complete the prompts, shared out over all devices; write samples.jsonl, results.json, report.html and what
    `views` asks for of the first completions below the name of the split.

    Raises:
        ValueError: something is asked for that means nothing here, or the model can not choose where a text ends.
    """
    if perplexity:
        raise ValueError("eval.compute_generative_perplexity=true measures free texts, and these answer prompts; leave "
                         "it out")  # fmt: skip
    data, drawing = experiment.build.data(), experiment.build.drawing()
    if any(asdict(drawing.given).values()):
        raise ValueError(f"data={data.name} gives each text a prompt and its room; leave sampling.prefix, "
                         "sampling.template and sampling.max_length out")  # fmt: skip
    diffusion = experiment.weights.trained(data, checkpoint_path, disable_ema).eval()
    check_ends(diffusion, data)
    drawing = experiment.build.drawing(diffusion.provenance.length)
    trainer = experiment.trainer("sample_eval")
    with views.watcher(max(asked.num_shown, 1), diffusion, data, drawing) as watching:
        done = _complete(trainer, diffusion, data, experiment.build.judge, drawing, asked, experiment.seed, watching)
    answers = measure([c.verdicts for c in done], np.array([c.ended for c in done]),
                      np.array([c.prompt_tokens for c in done]))  # fmt: skip
    beside = _beside(data, experiment.build.judge, done)
    folder = experiment.runs.folder() / "sample_eval" / asked.split
    folder.mkdir(parents=True, exist_ok=True)
    _write_samples(folder / "samples.jsonl", done)
    evaluations = [drawn.evaluations for c in done for drawn in c.drawn]
    results = {**_results(answers, beside, done, asked),
               "network_evaluations_per_sample": float(np.mean(evaluations)) if evaluations else 0.0}  # fmt: skip
    known = {**experiment.protocol, **drawing.protocol, "data": data.name, "split": asked.split, "fill": data.fill,
             "length": data.length, "tokenizer": data.vocabulary.fingerprint, "prompts": asked.num_prompts or "all",
             "samples_per_prompt": asked.samples_per_prompt}  # fmt: skip
    write_results(folder, {**results, "protocol": known, "command": experiment.command})
    subtitle = f"{len(done)} prompts of {data.name}, {asked.split} split"
    report = Report("Completed prompts", subtitle, experiment.command, experiment.facts)
    _report(report, answers, beside, results["network_evaluations_per_sample"])
    _report_examples(report, data, done, max(asked.num_shown, 1))
    report.code(experiment.build.settings, "configuration")
    report.write(folder / "report.html")
    first = [drawn for c in done for drawn in c.drawn][: max(asked.num_shown, 1)]
    samples = watching.samples(first, data.tokenizer)
    seen = views.write(folder, samples, described(drawing.protocol), experiment.command)
    print(f"\n{_summary(answers, beside, asked)}")
    print(*[folder / "report.html", *seen], sep="\n")
    return results


def check_ends(diffusion: Diffusion, data: object) -> None:
    """Raises ValueError where a model of masks was shown how long each text is, which no prompt can tell it."""
    if not diffusion.objective.causal and not data.fill:
        raise ValueError(
            f"data.fill=null: this model of data={data.name} learned p(text | prompt, its length), and a prompt does "
            "not tell the length; train and sample with data.fill=eos, or use parameterization=ar"
        )


def _complete(
    trainer: lightning.Trainer, diffusion: Diffusion, data: object, judge: Judge, drawing: Drawing, asked: Asked,
    seed: int, watch: Watcher | None = None,
) -> list[Completed]:  # fmt: skip
    """The chosen prompts, in the order of the split; those that leave no room are kept, without an answer."""
    texts = data.texts(asked.split)
    order = KeyedNoise(seed, torch.arange(len(texts)), draw=-7).uniform().argsort()
    texts = texts.select(np.sort(order[: asked.num_prompts].numpy()))
    check_amount(len(texts) * asked.samples_per_prompt, data.length)
    pairs = [(parts[0], "".join(parts[1:])) for parts in map(parts_of, texts["text"][:], texts["ends"][:])]
    bos = [data.vocabulary.bos_id] * data.packing(asked.split).bos
    heads = [bos + ids for ids in encode(data.tokenizer, [prompt for prompt, _ in pairs])]
    ids_M, times = np.asarray(texts["text_id"][:], dtype=np.int64), range(asked.samples_per_prompt)
    blank = [np.array(head + [diffusion.objective.process.blank_id] * (data.length - len(head))) for head in heads]
    taken = np.array([len(head) for head in heads])  # by the prompt, and by what has a room of its own behind it
    taken = data.segment_ends(taken)[:, -1] if data.segments else taken
    fits = [m for m in range(len(heads)) if taken[m] < data.length]
    names = np.array([ids_M[m] + k * _COMPLETIONS for m in fits for k in times], dtype=np.int64)
    rows = [blank[m] for m in fits for _ in times]
    drawn = iter(fill_on_all(trainer, diffusion, data, drawing, rows, names, data.eval_batch_size, seed, watch=watch))
    of_prompt = {m: [next(drawn) for _ in times] for m in fits}
    done = []
    for m, ((prompt, reference), head) in enumerate(zip(pairs, heads, strict=True)):
        made = of_prompt.get(m, [])
        tails = [text.ids[len(head) :] for text in made] or [[] for _ in times]
        completions = [decode(data.tokenizer, ids, skip_special=True) for ids in tails]
        ended = [ids[-1:] == [data.vocabulary.eos_id] for ids in tails]
        verdicts = [judge(completion, reference) for completion in completions]
        done.append(Completed(int(ids_M[m]), prompt, reference, len(head), made, completions, ended, verdicts))
    return done


# -------------------------------------------------------------------------------- beside the model


@dataclass(frozen=True)
class Beside:
    """What the numbers are to be held against. checks: of the references themselves. constant: the share of prompts
    that the most frequent answer of the training texts gets right, and that answer; None without training texts."""

    checks: dict[str, Estimate]
    constant: Share | None
    constant_answer: str | None


def _beside(data: object, judge: Judge, done: Sequence[Completed]) -> Beside:
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


# -------------------------------------------------------------------------------- writing down


@rank_zero_only
def _write_samples(path: Path, done: Sequence[Completed]) -> None:
    """`samples.jsonl`: one JSON object a line for each completion."""
    with path.open("w", encoding="utf-8") as file:
        for c in done:
            for number, (text, ended, verdict) in enumerate(zip(c.completions, c.ended, c.verdicts, strict=True)):
                drawn = c.drawn[number] if c.drawn else Drawn([], [], [], [], 0, 0)
                row = {"text_id": c.text_id, "completion": number, "prompt": c.prompt, "reference": c.reference,
                       "text": text, "right": verdict.right, "answer": verdict.answer, "wanted": verdict.wanted,
                       "ended": ended, "steps_of_reference": verdict.steps, "checks": dict(verdict.checks),
                       "findings": dict(verdict.findings),
                       "prompt_tokens": c.prompt_tokens, "ids": drawn.ids, "steps": drawn.steps,
                       "confidence": [round(p, 4) for p in drawn.confidence],
                       "evaluations": drawn.evaluations}  # fmt: skip
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _plain(value: object) -> object:
    return None if value is None else asdict(value)


def _results(answers: Answers, beside: Beside, done: Sequence[Completed], asked: Asked) -> dict[str, object]:
    """For results.json."""
    return {
        "prompts": len(done), "samples_per_prompt": asked.samples_per_prompt,
        "prompts_without_room": sum(not c.drawn for c in done),
        "exact_match": _plain(answers.exact_match), "no_answer": _plain(answers.no_answer),
        "unfinished": _plain(answers.unfinished), "majority_vote": _plain(answers.majority),
        f"pass_at_{asked.samples_per_prompt}": _plain(answers.any_right),
        "findings": {name: _plain(found) for name, found in answers.findings.items()},
        "checks": answers.checks, "num_checks": answers.num_checks, "checks_of_references": beside.checks,
        "most_frequent_answer": _plain(beside.constant),
        "by_steps_of_reference": {group.name: _plain(group.right) for group in answers.by_steps},
        "by_prompt_tokens": {group.name: _plain(group.right) for group in answers.by_length},
    }  # fmt: skip


def _interval(found: Share) -> Interval:
    return Interval(100 * found.value, 100 * found.low, 100 * found.high)


def _metric(name: str, found: Share, note: str = "") -> Metric:
    return Metric(
        name, 100 * found.value, 100 * found.se, "%", f"{100 * found.low:.1f} to {100 * found.high:.1f} %{note}"
    )


def _report(report: Report, answers: Answers, beside: Beside, evaluations: float) -> None:
    """The numbers."""
    report.section("Answers", _ABOUT)
    metrics = [_metric("exact match", answers.exact_match), _metric("no answer", answers.no_answer),
               _metric("unfinished", answers.unfinished)]  # fmt: skip
    if answers.majority and answers.any_right:
        metrics += [_metric("majority vote", answers.majority), _metric("any right", answers.any_right)]
    if beside.constant:
        note = f"; always {beside.constant_answer[:20]}, the most frequent of the training texts"
        metrics.append(_metric("one answer for all", beside.constant, note))
    metrics += [_metric(name, found) for name, found in answers.findings.items()]
    report.metrics([*metrics, Metric("network evaluations", evaluations, None, "per completion")])
    if answers.checks:
        rows = [(name, Metric("", 100 * found.value, 100 * found.se), _reference(beside, name))
                for name, found in answers.checks.items()]  # fmt: skip
        caption = f"{answers.num_checks} in all completions, with the error over prompts; beside them the references'."
        report.table(["", "completions, %", "references, %"], rows, caption)
    for header, groups, caption in (
        ("steps of the reference", answers.by_steps, "Exact match by how many calculations the reference takes."),
        ("tokens of the prompt", answers.by_length, "Exact match by the length of the prompt."),
    ):
        if groups:
            rows = [(group.name, group.right.prompts, _interval(group.right)) for group in groups]
            report.table([header, "prompts", "right, % [95 % interval]"], rows, caption)


def _reference(beside: Beside, name: str) -> Metric | None:
    found = beside.checks.get(name)
    return None if found is None else Metric("", 100 * found.value, 100 * found.se)


def _report_examples(report: Report, data: object, done: Sequence[Completed], number: int) -> None:
    """Right and wrong ones with their denoising, and the references beside them."""
    drawn = [c for c in done if c.drawn]
    right = [c for c in drawn if c.verdicts[0].right][:number]
    wrong = [c for c in drawn if not c.verdicts[0].right][:number]
    for heading, chosen in (("Right ones", right), ("Wrong ones", wrong)):
        if chosen:
            report.section(heading)
            report.samples([_sample(c, data.tokenizer) for c in chosen])
            rows = [(c.text_id, c.verdicts[0].answer, c.verdicts[0].wanted, c.reference.strip()) for c in chosen]
            report.table(["problem", "answer", "wanted", "reference"], rows)


def _sample(completed: Completed, tokenizer: object) -> Sample:
    text, verdict = completed.drawn[0], completed.verdicts[0]
    said = "no answer" if verdict.answer is None else f"answer {verdict.answer[:40]}"
    title = f"problem {completed.text_id} · {said}, wanted {(verdict.wanted or '–')[:40]}"
    return sample_of(text, tokenizer, title)


def _summary(answers: Answers, beside: Beside, asked: Asked) -> str:
    """Lines for a terminal."""

    def line(name: str, found: Share) -> str:
        return f"{name} {_interval(found)} %"

    lines = [f"{answers.exact_match.prompts} prompts of {asked.split}, {asked.samples_per_prompt} completions each",
             line("exact match", answers.exact_match), line("no answer", answers.no_answer),
             line("unfinished", answers.unfinished)]  # fmt: skip
    if answers.majority and answers.any_right:
        lines += [line("majority vote", answers.majority), line(f"pass@{asked.samples_per_prompt}", answers.any_right)]
    if beside.constant:
        lines.append(line(f"always {beside.constant_answer[:20]}", beside.constant))
    lines += [line(name, found) for name, found in answers.findings.items()]
    lines += [f"{name} {100 * found.value:.1f} ± {100 * found.se:.1f} % of {answers.num_checks}"
              for name, found in answers.checks.items()]  # fmt: skip
    lines += [f"{line(f'  steps {group.name}:', group.right)} of {group.right.prompts}" for group in answers.by_steps]
    return "\n".join(lines)


_ABOUT = (
    "Each prompt was completed and the completion's answer compared with the reference's. Intervals are 95 % intervals "
    "over prompts. A completion without an answer is wrong; an unfinished one filled its room without an end. "
    "Answers that are always the same, the most frequent one of the training texts, say what a model without "
    "understanding reaches."
)
