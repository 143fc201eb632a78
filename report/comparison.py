"""Show a comparison of runs: as lines for a terminal, as a page, and as a table for programs."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

from palimpsest.common.files import write_atomically
from palimpsest.common.metrics import Estimate
from palimpsest.evaluation.comparison import Comparison
from palimpsest.report.formatting import Metric, format_measurement, format_number
from palimpsest.report.report import Report
from palimpsest.report.style import dot_rows

_TITLES = {
    "accuracy": "accuracy", "log_loss_nats": "log loss, nats", "ece": "ECE", "nll_nats_per_token": "NLL, nats/token",
    "nll_of_own_class_nats_per_token": "NLL of the own class, nats/token",
    "perplexity": "perplexity", "generative_perplexity": "generative perplexity", "unigram_entropy": "unigram entropy",
    "network_evaluations_per_text": "evaluations/text", "network_evaluations_per_sample": "evaluations/sample",
}  # fmt: skip
_PAIRED = ("nll_nats_per_token", "accuracy")


def header(found: Comparison) -> list[str]:
    """Return the titles of the columns: the run, settings that differ, figures, their differences, the speed."""
    titles = ["run", *found.differing]
    for name in found.figures:
        titles.append(_TITLES[name])
        if name in found.differences:
            titles.append("− first, paired")
    return [*titles, "training tokens/s", "likelihood not comparable: other"]


def rows(found: Comparison) -> list[list[object]]:
    """Return one row per run, with the columns of `header`; cells are text, `Estimate`, numbers or None."""
    lines = []
    for number, run in enumerate(found.runs):
        line: list[object] = [found.names[number], *(run.settings.get(key) for key in found.differing)]
        for name in found.figures:
            line.append(run.figures.get(name))
            if name in found.differences:
                line.append(found.differences[name][number])
        unlike = found.unlike[number] if "nll_nats_per_token" in run.figures else []
        lines.append([*line, run.speed, ", ".join(unlike) or None])
    return lines


def columns(found: Comparison) -> tuple[list[str], list[list[object]]]:
    """Return `header` and `rows` without the columns that are empty."""
    titles = header(found)
    lines = rows(found)
    kept = [i for i in range(len(titles)) if any(line[i] is not None for line in lines)]
    return [titles[i] for i in kept], [[line[i] for i in kept] for line in lines]


def comparison_lines(found: Comparison) -> str:
    """Return the table as text, columns aligned."""
    titles, lines = columns(found)
    cells = [titles, *([_text(cell) for cell in line] for line in lines)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(titles))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def write_comparison(found: Comparison, folder: Path, command: str) -> list[Path]:
    """Write comparison.html and comparison.csv into `folder`; return their paths."""
    titles, lines = columns(found)
    report = Report("Comparison", f"{len(found.runs)} runs", command)
    report.section("Figures", _ABOUT)
    report.table(titles, [[_cell(cell) for cell in line] for line in lines])
    for name in found.figures:
        measured = [
            (title, run.figures[name])
            for title, run in zip(found.names, found.runs, strict=True)
            if name in run.figures
        ]
        known = [(title, one.value, None if math.isnan(one.se) else one.se) for title, one in measured]
        if len(known) > 1:
            figure, axes = dot_rows(known, None, scale=1.0)
            axes.set_xlabel(f"{_TITLES[name]}; bars: 95%")
            report.figure(figure, f"{_TITLES[name]} of each run.", _TITLES[name])
    page = folder / "comparison.html"
    report.write(page)
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow([one for i, title in enumerate(titles) for one in _spread(title, [line[i] for line in lines])])
    for line in lines:
        writer.writerow([one for i, cell in enumerate(line) for one in _values(cell, [other[i] for other in lines])])
    write_atomically(folder / "comparison.csv", table.getvalue().encode())
    return [page, folder / "comparison.csv"]


def _text(cell: object) -> str:
    if isinstance(cell, Estimate):
        return format_measurement(cell.value, None if math.isnan(cell.se) else cell.se)
    if isinstance(cell, float):
        return format_number(cell)
    return "–" if cell is None else str(cell)


def _cell(cell: object) -> object:
    if isinstance(cell, Estimate):
        return Metric("", cell.value, None if math.isnan(cell.se) else cell.se)
    return format_number(cell) if isinstance(cell, float) else cell


def _spread(title: str, column: list[object]) -> list[str]:
    """Return the titles of a column in a file: the value and its error have one each."""
    return [title, f"{title} ±"] if any(isinstance(cell, Estimate) for cell in column) else [title]


def _values(cell: object, column: list[object]) -> list[object]:
    if not any(isinstance(one, Estimate) for one in column):
        return [cell]
    return [cell.value, cell.se] if isinstance(cell, Estimate) else [None, None]


_ABOUT = (
    "± is one standard error. A paired difference is taken text by text, so its error is smaller than that of either "
    "figure; it stands where both runs measured the same texts. Likelihoods are comparable only under one protocol."
)
