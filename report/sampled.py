"""Show what was sampled, whatever was asked for: free texts, completed prompts, or a direction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from palimpsest.dataloader import TextData
from palimpsest.evaluation.completions import Completions
from palimpsest.evaluation.directions import Outcome
from palimpsest.evaluation.drawing import Sampled
from palimpsest.evaluation.free_texts import FreeTexts
from palimpsest.report.completions import completions_lines, completions_report
from palimpsest.report.denoising import Sample
from palimpsest.report.directions import TITLES, direction_lines, direction_report
from palimpsest.report.free_texts import free_texts_lines, free_texts_report
from palimpsest.report.report import Report


def sampled_report(
    found: Sampled, data: TextData, samples: Sequence[Sample], how: str, command: str, facts: Mapping[str, object]
) -> Report:
    """Return the report of `found`. samples: the texts to show. how: the sampler, in a line."""
    if isinstance(found, Completions):
        about = f"{len(found.completed)} prompts of {data.name}, {found.split} split"
        report = Report("Completed prompts", about, command, facts)
        completions_report(report, found, data.tokenizer, max(len(samples), 1))
    elif isinstance(found, Outcome):
        title, split = TITLES[found.protocol["direction"]], found.protocol["split"]
        report = Report(title, f"{data.name}, {split} split", command, facts)
        direction_report(report, found, samples, data.tokenizer)
    else:
        report = Report("Samples", f"{len(samples)} of the texts out of masks", command, facts)
        free_texts_report(report, found, samples, how)
    return report


def sampled_lines(found: Sampled, shown: slice, how: str) -> str:
    """Return the lines for a terminal. shown: which free texts are printed."""
    if isinstance(found, Completions):
        return completions_lines(found)
    if isinstance(found, Outcome):
        return direction_lines(found)
    assert isinstance(found, FreeTexts)
    return free_texts_lines(found, found.texts[shown], how)
