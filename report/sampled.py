"""Report of sampled texts: free texts, completed prompts, or conditional generation."""

from collections.abc import Mapping, Sequence

from palimpsest.dataloader import TextData
from palimpsest.evaluation.completions import Completions
from palimpsest.evaluation.conditional_generation import ConditionalResult
from palimpsest.evaluation.drawing import SamplingResult
from palimpsest.evaluation.free_texts import FreeTexts
from palimpsest.report.completions import completions_lines, completions_report
from palimpsest.report.conditional_generation import TITLES, direction_lines, direction_report
from palimpsest.report.denoising import Sample
from palimpsest.report.free_texts import free_texts_lines, free_texts_report
from palimpsest.report.report import Report


def sampled_report(
    found: SamplingResult,
    data: TextData,
    samples: Sequence[Sample],
    how: str,
    command: str,
    facts: Mapping[str, object],
) -> Report:
    """Return the report of `found`. samples: the texts to show. how: the sampler, in a line."""
    if isinstance(found, Completions):
        about = f"{len(found.completed)} prompts of {data.name}, {found.split} split"
        report = Report("Completed prompts", about, command, facts)
        completions_report(report, found, data.tokenizer, max(len(samples), 1))
    elif isinstance(found, ConditionalResult):
        title, split = TITLES[found.protocol["direction"]], found.protocol["split"]
        report = Report(title, f"{data.name}, {split} split", command, facts)
        direction_report(report, found, samples, data.tokenizer)
    else:
        report = Report("Samples", f"{len(samples)} of the sampled texts", command, facts)
        free_texts_report(report, found, samples, how)
    return report


def sampled_lines(found: SamplingResult, shown: slice, how: str) -> str:
    """Return the lines for a terminal. shown: the free texts to print."""
    if isinstance(found, Completions):
        return completions_lines(found)
    if isinstance(found, ConditionalResult):
        return direction_lines(found)
    assert isinstance(found, FreeTexts)
    return free_texts_lines(found, found.texts[shown], how)
