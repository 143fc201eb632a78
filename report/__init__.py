"""Self-contained HTML reports of runs: numbers with their errors, figures, and samples as they were written.

Imports nothing else of the project. `reporting.plots` and `reporting.classification_plots` draw the figures, `Report`
sets the page.
"""

from palimpsest.report.evidence import Evidence
from palimpsest.report.formatting import Interval, Metric, format_measurement, format_number
from palimpsest.report.report import Report, Sample

__all__ = ["Evidence", "Interval", "Metric", "Report", "Sample", "format_measurement", "format_number"]
