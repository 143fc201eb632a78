"""Drawings that several figures share: rows of dots with their intervals, a value against the share of masked tokens.

Shapes: N points.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike

from palimpsest.report.formatting import format_measurement
from palimpsest.report.style import (
    BLUE,
    MUTED,
    RULE,
    Z95,
    finite,
    half_width,
    new_figure,
    note_dropped,
    style_axes,
    write,
)

TICK_STEPS = (1, 2, 2.5, 5, 10)

Row = tuple[str, float, float | None]


def dot_rows(
    rows: Sequence[Row], highlight: str | None, scale: float, marks: Sequence[float] = ()
) -> tuple[Figure, Axes]:
    """Horizontal dots from top to bottom; values times `scale` are written at the right edge."""
    figure = new_figure(0.95 + 0.34 * max(1, len(rows)))
    axes = style_axes(figure.add_subplot(), " ", "", grid="x")
    for y, (name, value, se) in enumerate(rows):
        axes.axhline(y, color=RULE, linewidth=0.6, linestyle=(0, (1, 2)), zorder=0)
        colour = BLUE if highlight is None or name == highlight else MUTED
        if np.isfinite(value):
            axes.errorbar(
                value * scale, y, xerr=half_width(se) * scale,
                fmt="o", color=colour, markersize=5.5, elinewidth=1.6,
            )  # fmt: skip
        written = format_measurement(value * scale, None if se is None else se * scale)
        write(axes, 1.02, y, written, transform=axes.get_yaxis_transform(), va="center")
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows], parse_math=False)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(max(1, len(rows)) - 0.4, -0.6)
    for mark in marks:
        if np.isfinite(mark):
            axes.update_datalim([(mark * scale, 0.0)])
    axes.margins(x=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=TICK_STEPS))
    return figure, axes


def by_mask_rate(rate: ArrayLike, value: ArrayLike, se: ArrayLike | None, ylabel: str) -> tuple[Figure, Axes]:
    """`value` with its 95% interval against the share of masked tokens in [0, 1]; all N."""
    figure = new_figure(3.0)
    axes = style_axes(figure.add_subplot(), f"share of tokens masked{'' if se is None else '; bars: 95%'}", ylabel)
    errors = np.zeros(np.size(rate)) if se is None else se
    (rate, value, errors), dropped = finite(rate, value, errors)
    order = np.argsort(rate, kind="stable")
    bars = Z95 * np.nan_to_num(errors[order], nan=0.0, posinf=0.0)
    axes.errorbar(
        rate[order], value[order], bars if se is not None else None,
        color=BLUE, linewidth=1.3, marker="o", markersize=4, elinewidth=1.1,
    )  # fmt: skip
    axes.set_xlim(-0.02, 1.02)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    note_dropped(axes, dropped)
    return figure, axes
