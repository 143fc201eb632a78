"""Report of free texts: their quality, that of real texts, and the texts themselves."""

from collections.abc import Sequence

from palimpsest.evaluation.free_texts import FreeTexts
from palimpsest.evaluation.sample_quality import Comparison, Quality
from palimpsest.report.denoising import Sample
from palimpsest.report.formatting import Metric, aligned, percent
from palimpsest.report.plain_text import visible
from palimpsest.report.report import Report


def free_texts_report(report: Report, found: FreeTexts, samples: Sequence[Sample], how: str) -> None:
    """Write the sections of `found`. how: the sampler, in a line."""
    metrics = [Metric("network evaluations", found.evaluations, None, "per sample")]
    notes = {"possible": "possible texts, by the corpus itself", "of_the_class": "of these, by exact posterior"}
    for key, note in notes.items():
        if key in found.results:
            metrics.append(Metric.of(key.replace("_", " "), found.results[key], "%", note, 100))
    comparison_section(report, found.comparison, metrics)
    report.section("Texts", f"Drawn by {how}.")
    report.samples(samples)


def free_texts_lines(found: FreeTexts, texts: Sequence[str], how: str) -> str:
    """Return the lines for a terminal: `texts`, then the numbers."""
    lines = comparison_lines(found.comparison)
    lines += f"\ndrawn by {how}, {found.evaluations:.1f} network evaluations per sample"
    if "possible" in found.results:
        lines += f"\n{percent(found.results['possible'])} % are possible texts"
    if "of_the_class" in found.results:
        lines += f", of these {percent(found.results['of_the_class'])} % of the class"
    return "\n\n".join([*map(visible, texts), lines])


def comparison_section(report: Report, comparison: Comparison, more: Sequence[Metric] = ()) -> None:
    """Write the section with the numbers of the samples, `more` of them, and the comparison with real texts."""
    text = _ABOUT if comparison.protocol is None else f"{_ABOUT}\n\n{_ABOUT_SCORER}"
    if comparison.real is None:
        text += f"\n\nThere are no real texts to compare with: {comparison.reference.missing}."
    report.section("What was measured", text)
    report.metrics([*_metrics(comparison.samples), *more])
    if comparison.real:
        about = "The samples and as many real texts under the same measures; errors of real texts are over"
        header = ["", "samples", f"real ({comparison.reference.split})"]
        report.table(header, _rows(comparison), f"{about} {comparison.units}.")
    if comparison.protocol:
        report.code("\n".join(f"{k}: {v}" for k, v in comparison.protocol.items()), "scorer")


def comparison_lines(comparison: Comparison) -> str:
    """Return the comparison as lines for a terminal."""
    rows = [("", "samples", f"real ({comparison.reference.split})")[: 3 if comparison.real else 2]]
    rows += [(name, *(getattr(v, "measurement", f"{v}") for v in values)) for name, *values in _rows(comparison)]
    missing = "" if comparison.real else f"\nno real texts to compare with: {comparison.reference.missing}"
    return aligned(rows) + missing


def _metrics(quality: Quality) -> list[Metric]:
    rows: list[Metric] = []
    if quality.likelihood:
        scorer = f"under {quality.likelihood.protocol['scorer']}"
        nats = quality.likelihood.nats_per_token
        rows.append(Metric.of("generative perplexity", quality.likelihood.perplexity, "", scorer))
        rows.append(Metric.of("generative NLL", nats, "nats/token", "the scorer's tokens"))
    rows.append(Metric.of("unigram entropy", quality.diversity.unigram_entropy, "nats", "within a text"))
    distinct = quality.diversity.distinct
    return [*rows, *(Metric.of(f"distinct-{n}", share, "", "over all texts") for n, share in distinct.items())]


def _counts(quality: Quality) -> list[tuple[str, int]]:
    """Return how much text the numbers are based on."""
    scored = quality.likelihood
    if scored is None:
        return [("texts", quality.texts)]
    return [("texts", quality.texts), ("texts scored", scored.texts), ("tokens scored", scored.tokens),
            ("left out, nothing to score", scored.left_out)]  # fmt: skip


def _rows(comparison: Comparison) -> list[tuple[str | Metric | int, ...]]:
    """Return name, samples, and real texts if there are any."""
    sides = [side for side in (comparison.samples, comparison.real) if side is not None]
    names = [*(m.name for m in _metrics(sides[0])), *(name for name, _ in _counts(sides[0]))]
    columns = [[*_metrics(side), *(count for _, count in _counts(side))] for side in sides]
    return list(zip(names, *columns, strict=True))


_ABOUT = (
    "Unigram entropy and distinct-n (different n-grams / all n-grams) fall when texts repeat themselves. They depend "
    "on length and on the number of texts: compare them with those of as many real texts."
)
_ABOUT_SCORER = (
    "Generative perplexity is that of another language model on the samples. Repetition lowers it, so compare it only "
    "at the diversity of real text; text that scores better than real text is not better text."
)
