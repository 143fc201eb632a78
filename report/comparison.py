"""Show a comparison of runs: as lines for a terminal, as a page, and as a table for programs."""

import csv
import io
import math
from pathlib import Path

from palimpsest.common.files import write_atomically
from palimpsest.common.metrics import Estimate
from palimpsest.evaluation.comparison import Comparison
from palimpsest.report.formatting import Metric, aligned, format_number
from palimpsest.report.report import Report
from palimpsest.report.style import dot_rows

_TITLES = {
    "accuracy": "accuracy", "log_loss_nats": "log loss, nats", "ece": "ECE", "nll_nats_per_token": "NLL, nats/token",
    "nll_of_own_class_nats_per_token": "NLL of the own class, nats/token",
    "perplexity": "perplexity", "generative_perplexity": "generative perplexity",
    "unigram_entropy_nats": "unigram entropy, nats", "exact_match": "exact match",
    "network_evaluations_per_text": "evaluations/text", "network_evaluations_per_sample": "evaluations/sample",
}  # fmt: skip


def columns(found: Comparison) -> list[tuple[str, list[object]]]:
    """Return the columns that are not empty: title, and one cell per run (text, `Estimate`, a number or None).

    They are the run, settings that differ, figures, their differences, the speed.
    """
    runs = found.runs
    table = [("run", found.names), *((key, [run.settings.get(key) for run in runs]) for key in found.differing)]
    for name in found.figures:
        table.append((_TITLES[name], [run.figures.get(name) for run in runs]))
        if name in found.differences:
            table.append(("− first, paired", found.differences[name]))
    table.append(("training tokens/s", [run.speed for run in runs]))
    unlike = [run.figures.get("nll_nats_per_token") and keys for run, keys in zip(runs, found.unlike, strict=True)]
    table.append(("likelihood not comparable: other", [", ".join(keys) if keys else None for keys in unlike]))
    return [(title, cells) for title, cells in table if any(cell is not None for cell in cells)]


def comparison_lines(found: Comparison) -> str:
    """Return the table as text, columns aligned."""
    table = columns(found)
    lines = zip(*([_text(cell) for cell in cells] for _, cells in table), strict=True)
    return aligned([[title for title, _ in table], *lines])


def write_comparison(found: Comparison, folder: Path, command: str) -> list[Path]:
    """Write comparison.html and comparison.csv into `folder`; return their paths."""
    table = columns(found)
    report = Report("Comparison", f"{len(found.runs)} runs", command)
    report.section("Figures", _ABOUT)
    lines = zip(*([_cell(cell) for cell in cells] for _, cells in table), strict=True)
    report.table([title for title, _ in table], list(lines))
    for name in found.figures:
        cells = [_cell(run.figures.get(name)) for run in found.runs]
        known = [(title, cell.value, cell.se) for title, cell in zip(found.names, cells, strict=True) if cell]
        if len(known) > 1:
            figure, axes = dot_rows(known, None, scale=1.0)
            axes.set_xlabel(f"{_TITLES[name]}; bars: 95%", loc="right")
            report.figure(figure, f"{_TITLES[name]} of each run.", _TITLES[name])
    report.write(folder / "comparison.html")
    text = io.StringIO()
    columns_of_file = [column for title, cells in table for column in _values(title, cells)]
    csv.writer(text).writerows(zip(*columns_of_file, strict=True))
    write_atomically(folder / "comparison.csv", text.getvalue().encode())
    return [folder / "comparison.html", folder / "comparison.csv"]


def _cell(cell: object) -> object:
    if isinstance(cell, Estimate):
        return Metric("", cell.value, None if math.isnan(cell.se) else cell.se)
    return format_number(cell) if isinstance(cell, float) else cell


def _text(cell: object) -> str:
    return "–" if cell is None else str(_cell(cell))


def _values(title: str, cells: list[object]) -> list[list[object]]:
    """Return a column of the file with its title; values with an error have two."""
    if not any(isinstance(cell, Estimate) for cell in cells):
        return [[title, *cells]]
    return [[title, *(cell and cell.value for cell in cells)], [f"{title} ±", *(cell and cell.se for cell in cells)]]


_ABOUT = (
    "± is one standard error. A paired difference is taken text by text, so its error is smaller than that of either "
    "figure; it stands where both runs measured the same texts. Likelihoods are comparable only under one protocol."
)
