"""What a direction found, in tables that put its controls beside it, and texts that a reader can judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from palimpsest.common.metrics import Estimate
from palimpsest.report.formatting import Interval
from palimpsest.report.report import Metric, Report
from palimpsest.tasks.latent_measures import Agreement, Share

VARIANTS = ("true", "shuffled", "none")
_TITLES = {"true": "its own", "shuffled": "another's", "none": "none"}
_CONTROLS = (
    "Beside the direction stand two controls under the same noise: told what is another text's, and told nothing. All "
    "of them know how long a text is. "
    "Retrieval: whose wanted latent is among the k nearest, by cosine, of all that were wanted, with 95 % intervals."
)


def cell(value: object) -> object:
    """A number as tables show it."""
    if isinstance(value, Share):
        return Interval(100 * value.value, 100 * value.low, 100 * value.high)
    return Metric("", value.value, value.se) if isinstance(value, Estimate) else value


def agreement_table(
    report: Report, found: Mapping[str, Agreement], more: Mapping[str, Mapping[str, object]], missing: str
) -> None:
    """How well what was found agrees with what was wanted, by what was told. more: further rows, by name and told.
    missing: why texts can not be encoded."""
    names = [name for name in VARIANTS if name in found or any(name in row for row in more.values())]
    report.section("Agreement", _CONTROLS + (f" Texts were not encoded again: {missing}" if missing else ""))
    rows = [(title, *(cell(values[name]) for name in names)) for title, values in more.items()]
    if found:
        rows += [(title, *(cell(read(found[name])) for name in names)) for title, read in _rows(found)]
    report.table(["told", *(_TITLES[name] for name in names)], rows)
    first = next(iter(found.values()), None)
    if first is not None and first.by_attribute:
        lines = [(key, *(100 * found[name].by_attribute[key] for name in names)) for key in first.by_attribute]
        report.table(["right, %", *(_TITLES[name] for name in names)], lines, "By attribute.")


def _rows(found: Mapping[str, Agreement]) -> list:
    first = next(iter(found.values()))
    rows = [("cosine", lambda one: one.cosine), ("squared error", lambda one: one.mse)]
    for k, one in first.retrieval.items():
        title = f"retrieval@{k}, % (chance {100 * one.chance:.3g})"
        rows.append((title, lambda one, k=k: one.retrieval[k]))
    rows.append(("without a latent, %", lambda one: 100 * one.unread))
    if first.attributes:
        rows.append(("attributes", lambda one: one.attributes))
    return rows


def figures_of(results: Mapping[str, object], found: Mapping[str, Agreement]) -> str:
    """Lines for a terminal."""
    lines = []
    for name in VARIANTS:
        line = [f"{_TITLES[name]:>9}:"]
        of = results.get(name)
        if isinstance(of, Mapping) and "token_f1" in of:
            line.append(f"token F1 {of['token_f1']}, BLEU {of['bleu']:.4f}")
        if name in found:
            one = found[name]
            line.append(f"cosine {one.cosine}, " + ", ".join(
                f"retrieval@{k} {100 * hit.value:.1f} % [{100 * hit.low:.1f}, {100 * hit.high:.1f}] (chance "
                f"{100 * hit.chance:.3g})" for k, hit in one.retrieval.items()))  # fmt: skip
            if one.attributes:
                line.append(f"attributes {one.attributes}")
        if len(line) > 1:
            lines.append(" ".join(line))
    return "\n".join(lines)


def examples(report: Report, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Texts side by side."""
    report.section("Texts")
    report.table(list(header), rows)
