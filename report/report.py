"""The report of a run: one self-contained HTML file."""

import numbers
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from palimpsest.report.denoising import Sample, samples_block
from palimpsest.report.evidence import Evidence, evidence_block
from palimpsest.report.formatting import Metric, format_number
from palimpsest.report.page import render, write_page
from palimpsest.report.plain_text import inline, paragraphs, visible
from palimpsest.report.style import THEME
from palimpsest.report.svg import inline_figure

_NUMERIC = re.compile(r"^(NaN|[−-]?∞|[(<>≤≥~≈+−-]*\d[\d.,:/ ()\[\]±×?%⁻⁰¹²³⁴⁵⁶⁷⁸⁹−-]*)( ?[A-Za-zµ/%]{1,12})?$")
_NAME = 60  # characters of a first cell that is kept on one line
_BLANK = {"", "–", "—", "-"}


class Report:
    """Collects sections of numbers, tables, figures and samples, and writes them as one HTML page.

    Without a title it has only the sections, to be framed by another page. `facts` is a small table of what was run
    (data, tokenizer, model size, seed, device, wall time, ...). Texts are plain: they are escaped, blank lines separate
    paragraphs, and `backticks` set code. Figures are rendered when added. `write` may be called repeatedly.
    """

    def __init__(
        self, title: str, subtitle: str = "", command: str = "", facts: Mapping[str, object] | None = None
    ) -> None:
        cells = {str(key): _cell(value) for key, value in (facts or {}).items()}
        self._head = {"title": title, "subtitle": inline(subtitle), "command": command, "facts": cells}
        self._sections: list[dict[str, Any]] = []
        self._counts = {"figure": 0, "table": 0}

    def section(self, heading: str, text: str = "") -> None:
        """Open a section for everything added after."""
        self._sections.append({"heading": heading, "paragraphs": paragraphs(text), "blocks": []})

    def metrics(self, metrics: Sequence[Metric]) -> None:
        """Add a row of measured numbers, each with its standard error, unit and note."""
        self._add("metrics", metrics=[_metric(metric) for metric in metrics])

    def table(self, header: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "") -> None:
        """Add a table; cells may be text, numbers, None (a dash), `Metric` or `Interval`. Columns of numbers align
        right.

        Raises ValueError if a row is not as long as the header.
        """
        for row in rows:
            if len(row) != len(header):
                raise ValueError(f"table row {list(row)} has {len(row)} cells; the header has {len(header)}")
        cells = [[_cell(value, strip=False) for value in row] for row in rows]
        numeric = [_is_numeric([row[i] for row in cells]) for i in range(len(header))]
        prose = any(len(row[0]) > _NAME for row in cells)
        about = {"caption": inline(caption), "number": self._number("table") if caption else 0}
        self._add("table", header=list(header), rows=cells, numeric=numeric, prose=prose, **about)

    def figure(self, figure: Figure, caption: str, alt: str) -> None:
        """Add a figure; `alt` describes it to readers who cannot see it."""
        number = self._number("figure")
        markup, card = inline_figure(figure, alt, f"f{number}", THEME)
        self._add("figure", markup=markup, card=card, caption=inline(caption), number=number)

    def samples(self, samples: Sequence[Sample]) -> None:
        """Add texts with their denoising; without JavaScript the final text is readable."""
        self._add("samples", **samples_block(samples))

    def evidence(self, evidence: Sequence[Evidence]) -> None:
        """Add texts coloured by token attributions, with one scale for all of them."""
        self._add("evidence", **evidence_block(evidence))

    def code(self, text: str, caption: str = "") -> None:
        """Add literal text behind a fold, such as the resolved configuration."""
        self._add("code", text=visible(text), caption=caption or "Listing")

    def render(self) -> str:
        """Return the page as HTML."""
        return render("report.html.j2", sections=self._sections, **self._head)

    def write(self, path: Path) -> None:
        """Write the page to `path` atomically, in the first process."""
        write_page(path, self.render())

    def _add(self, kind: str, **content: Any) -> None:
        if not self._sections:
            self.section("")
        self._sections[-1]["blocks"].append({"kind": kind, **content})

    def _number(self, kind: str) -> int:
        self._counts[kind] += 1
        return self._counts[kind]


def _metric(metric: Metric) -> dict[str, str]:
    value, _, error = metric.measurement.partition(" ± ")
    return {"name": metric.name, "value": value, "error": error, "unit": metric.unit, "note": metric.note}


def _cell(value: object, strip: bool = True) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, numbers.Real):
        return format_number(value, strip=strip)
    return visible(str(value))


def _is_numeric(column: Sequence[str]) -> bool:
    filled = [cell for cell in column if cell.strip() not in _BLANK]
    return bool(filled) and all(_NUMERIC.match(cell) for cell in filled)
