"""The prediction for one text as HTML: class probabilities with the intervals that the draws leave."""

from collections.abc import Sequence
from dataclasses import dataclass

from palimpsest.report.formatting import format_measurement
from palimpsest.report.page import render


@dataclass(frozen=True)
class ClassProbability:
    """Probability and likelihood of a class."""

    name: str
    probability: float  # p(class | text)
    low: float  # 95 % interval, to `high`
    high: float
    log_p: float  # of the text given the class, nats
    se: float  # Monte Carlo error; NaN if unknown
    side: str = ""  # colour of its attributions (report/evidence.py): "p", "n", or none


def prediction_html(classes: Sequence[ClassProbability], facts: Sequence[str]) -> str:
    """Return the classes, the most probable first, with `facts` below them."""
    ranked = sorted(classes, key=lambda one: -one.probability)
    rows = [{
        "name": one.name, "probability": _percent(one.probability), "width": f"{100 * one.probability:.2f}",
        "low": f"{100 * one.low:.2f}", "span": f"{100 * (one.high - one.low):.2f}",
        "interval": f"{_percent(one.low)} to {_percent(one.high)}",
        "side": one.side, "log_p": format_measurement(one.log_p, one.se if one.se > 0 else None),
    } for one in ranked]  # fmt: skip
    return render("prediction.html.j2", rows=rows, facts=facts)


def _percent(share: float) -> str:
    """Format a probability with enough digits to distinguish it from 0 and 1."""
    rest = min(share, 1 - share)
    decimals = 0 if rest >= 0.1 else 1 if rest >= 0.01 else 2
    text = f"{100 * share:.{decimals}f}"
    if share > 0 and float(text) == 0:
        return "< 0.01 %"
    return "> 99.99 %" if share < 1 and float(text) == 100 else f"{text} %"
