"""The verdict on one text: the probability of each class with the interval that the draws leave, as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from palimpsest.report.formatting import format_measurement
from palimpsest.report.page import render


@dataclass(frozen=True)
class ClassShare:
    """What is known of a class. probability: of it, given the text, with the ends of its 95 % interval. log_p: of the
    text, given the class, nats, with its Monte Carlo error (NaN: unknown). side: "p" or "n", its colour where evidence
    is shown (report/evidence.py); "" for none."""

    name: str
    probability: float
    low: float
    high: float
    log_p: float
    se: float
    side: str = ""


def verdict(shares: Sequence[ClassShare], facts: Sequence[str]) -> str:
    """The classes, the likeliest first; `facts` are said below them."""
    ranked = sorted(shares, key=lambda share: -share.probability)
    rows = [{
        "name": share.name, "probability": _percent(share.probability), "width": f"{100 * share.probability:.2f}",
        "low": f"{100 * share.low:.2f}", "span": f"{100 * (share.high - share.low):.2f}",
        "interval": f"{_percent(share.low)} to {_percent(share.high)}",
        "side": share.side, "log_p": format_measurement(share.log_p, share.se if share.se > 0 else None),
    } for share in ranked]  # fmt: skip
    return render("verdict.html.j2", rows=rows, facts=facts)


def _percent(share: float) -> str:
    """Digits enough to tell a probability from 0 and 1."""
    rest = min(share, 1 - share)
    decimals = 0 if rest >= 0.1 else 1 if rest >= 0.01 else 2
    text = f"{100 * share:.{decimals}f}"
    if share > 0 and float(text) == 0:
        return "< 0.01 %"
    return "> 99.99 %" if share < 1 and float(text) == 100 else f"{text} %"
