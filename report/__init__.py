"""Self-contained HTML reports of runs: numbers with their errors, figures, and samples as they were written.

`Report` sets the page; each type of result has a module that writes its sections and its lines for a terminal.
"""

from palimpsest.report.evidence import Evidence
from palimpsest.report.formatting import Interval, Metric, format_measurement, format_number
from palimpsest.report.report import Report, Sample

__all__ = ["Evidence", "Interval", "Metric", "Report", "Sample", "format_measurement", "format_number"]
