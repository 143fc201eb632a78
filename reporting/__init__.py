"""Self-contained HTML reports of runs: numbers with their errors, figures, and samples as they were written.

Imports nothing else of the project. `reporting.plots` and `reporting.classification_plots` draw the figures, `Report`
sets the page.
"""

from reporting.evidence import Evidence
from reporting.formatting import Interval, Metric, format_measurement, format_number
from reporting.report import Report, Sample

__all__ = ["Evidence", "Interval", "Metric", "Report", "Sample", "format_measurement", "format_number"]
