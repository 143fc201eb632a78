"""Report of completed prompts: how many answers are right, and the baselines."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from palimpsest.common.metrics import Share
from palimpsest.evaluation.completions import CompletedPrompt, Completions
from palimpsest.report.denoising import Sample
from palimpsest.report.formatting import Metric, percent
from palimpsest.report.history import sample_of
from palimpsest.report.report import Report


def _metric(name: str, found: Share, note: str = "") -> Metric:
    interval = f"{100 * found.low:.1f} to {100 * found.high:.1f} %{note}"
    return Metric.of(name, found, "%", interval, scale=100)


def completions_report(report: Report, found: Completions, tokenizer: PreTrainedTokenizerBase, number: int) -> None:
    """Write the sections of `found`, with `number` right and as many wrong completions."""
    answers, baselines = found.answers, found.baselines
    report.section("Answers", _ABOUT)
    metrics = [_metric("exact match", answers.exact_match), _metric("no answer", answers.no_answer),
               _metric("unfinished", answers.unfinished)]  # fmt: skip
    if answers.majority and answers.any_right:
        metrics += [_metric("majority vote", answers.majority), _metric("any right", answers.any_right)]
    if baselines.constant:
        note = f"; always {baselines.constant_answer[:20]}, the most frequent of the training texts"
        metrics.append(_metric("one answer for all", baselines.constant, note))
    metrics += [_metric(name, share) for name, share in answers.findings.items()]
    report.metrics([*metrics, Metric("network evaluations", found.evaluations, None, "per completion")])
    if answers.checks:
        measured = {name: (share, baselines.checks.get(name)) for name, share in answers.checks.items()}
        rows = [(name, *(one and Metric.of("", one, scale=100) for one in both)) for name, both in measured.items()]
        caption = f"{answers.num_checks} in all completions, with the error over prompts, and in the references."
        report.table(["", "completions, %", "references, %"], rows, caption)
    for header, groups, caption in (
        ("steps of the reference", answers.by_steps, "Exact match by how many calculations the reference takes."),
        ("tokens of the prompt", answers.by_length, "Exact match by the length of the prompt."),
    ):
        if groups:
            rows = [(name, right.texts, percent(right)) for name, right in groups.items()]
            report.table([header, "prompts", "right, % [95 % interval]"], rows, caption)
    _examples(report, tokenizer, [one for one in found.completed if one.sampled], number)


def _examples(
    report: Report, tokenizer: PreTrainedTokenizerBase, sampled: Sequence[CompletedPrompt], number: int
) -> None:
    """Add right and wrong completions with their denoising, and the references."""
    right = [c for c in sampled if c.answers[0].right][:number]
    wrong = [c for c in sampled if not c.answers[0].right][:number]
    for heading, chosen in (("Right ones", right), ("Wrong ones", wrong)):
        if chosen:
            report.section(heading)
            report.samples([_sample(c, tokenizer) for c in chosen])
            rows = [(c.text_id, c.answers[0].answer, c.answers[0].wanted, c.reference.strip()) for c in chosen]
            report.table(["problem", "answer", "wanted", "reference"], rows)


def _sample(completed: CompletedPrompt, tokenizer: PreTrainedTokenizerBase) -> Sample:
    text, checked = completed.sampled[0], completed.answers[0]
    answer = "no answer" if checked.answer is None else f"answer {checked.answer[:40]}"
    title = f"problem {completed.text_id} · {answer}, wanted {(checked.wanted or '–')[:40]}"
    return sample_of(text, tokenizer, title)


def completions_lines(found: Completions) -> str:
    """Return the lines for a terminal."""
    answers, baselines = found.answers, found.baselines

    def line(name: str, share: Share) -> str:
        return f"{name} {percent(share)} %"

    lines = [f"{answers.exact_match.texts} prompts of {found.split}, {found.samples_per_prompt} completions each",
             line("exact match", answers.exact_match), line("no answer", answers.no_answer),
             line("unfinished", answers.unfinished)]  # fmt: skip
    if without := found.results["prompts_without_room"]:
        lines.append(f"{without} prompts left no room in a row and count as wrong; raise model.length")
    if baselines.readable.value < 1:
        lines.append(line("right at most, because the tokenizer changes the references:", baselines.readable))
    if answers.majority and answers.any_right:
        lines += [line("majority vote", answers.majority), line(f"pass@{found.samples_per_prompt}", answers.any_right)]
    if baselines.constant:
        lines.append(line(f"always {baselines.constant_answer[:20]}", baselines.constant))
    lines += [line(name, share) for name, share in answers.findings.items()]
    lines += [f"{name} {100 * share.value:.1f} ± {100 * share.se:.1f} % of {answers.num_checks}"
              for name, share in answers.checks.items()]  # fmt: skip
    lines += [f"{line(f'  steps {name}:', right)} of {right.texts}" for name, right in answers.by_steps.items()]
    return "\n".join(lines)


_ABOUT = (
    "Each prompt was completed and the completion's answer compared with the reference's. Intervals are 95 % intervals "
    "over prompts. A completion without an answer is wrong; an unfinished one has no end of text. "
    "The baseline always gives the most frequent answer of the training texts."
)
