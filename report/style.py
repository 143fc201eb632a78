"""Common style of all figures of a report: page colours, axes, direct labels, rows of dots.

Shapes: N points.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import isotonic_regression

from palimpsest.common.metrics import Z95
from palimpsest.report.formatting import format_measurement
from palimpsest.report.svg import THEMED

Floats = NDArray[np.float64]

PAPER, INK, MUTED, RULE = "#fffefc", "#1f2328", "#6a6f76", "#d9d6ce"
# Okabe and Ito's palette, distinguishable with every common form of colour blindness.
BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#c84e00", "#00805f", "#a0457f"
THEME = {
    PAPER: "--paper", INK: "--ink", MUTED: "--muted", RULE: "--rule",
    BLUE: "--blue", ORANGE: "--orange", GREEN: "--green", PURPLE: "--purple",
}  # fmt: skip
SERIES = (BLUE, ORANGE, GREEN, PURPLE, INK, MUTED)

WIDTH, TEXT = 5.6, 9.0
TICK_STEPS = (1, 2, 2.5, 5, 10)

Row = tuple[str, float, float | None]


def new_figure(height: float) -> Figure:
    """Return an empty figure of the common width, `height` inches tall, marked for the page's colours."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.set_gid(THEMED)
    return figure


def style_axes(axes: Axes, xlabel: str = "", ylabel: str = "", grid: str = "y") -> Axes:
    """Give `axes` the common style, with grid lines for the axis `grid` ("x", "y" or none); return it."""
    axes.set_facecolor("none")
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom" or (side == "left" and grid != "x"))
        spine.set_color(MUTED)
        spine.set_linewidth(0.7)
    axes.tick_params(colors=INK, labelsize=TEXT, length=3, width=0.7, color=MUTED)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis=grid, color=RULE, linewidth=0.6)
    axes.set_xlabel(xlabel, color=INK, fontsize=TEXT, labelpad=6, parse_math=False)
    axes.set_ylabel(ylabel, color=INK, fontsize=TEXT, labelpad=6, parse_math=False)
    return axes


def write(axes: Axes, x: float, y: float, text: str, colour: str = INK, **options: object) -> None:
    """Write `text` at (x, y) in data units, or in those of the `transform` among the options."""
    # User strings may contain "$" but are not formulas.
    axes.text(x, y, text, **{"color": colour, "fontsize": TEXT, "parse_math": False, **options})


def note_dropped(axes: Axes, count: int) -> None:
    """Note in the figure how many values could not be drawn, if any."""
    if count > 0:
        noun = "value is" if count == 1 else "values are"
        text = f"{count:,} {noun} not finite and not drawn"
        write(axes, 0.01, 0.02, text, ORANGE, transform=axes.transAxes, va="bottom")


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """Move `positions` as little as possible, in squares, so that neighbours keep `gap`."""
    order = np.argsort(positions, kind="stable")
    gaps = gap * np.arange(len(order))
    result = np.empty(len(order))
    result[order] = isotonic_regression(np.array(positions)[order] - gaps).x + gaps if len(order) else []
    return result.tolist()


def end_labels(axes: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Write labels (y in data units, text, colour) right of the axes, moved apart if they would overlap."""
    low, high = axes.get_ylim()
    heights = [(y - low) / (high - low) for y, _, _ in labels]
    lines = max((text.count("\n") + 1 for _, text, _ in labels), default=1)
    for height, (_, text, colour) in zip(spread(heights, 0.065 * lines), labels, strict=True):
        write(axes, 1.03, height, text, colour, transform=axes.transAxes, va="center", linespacing=1.25)


def finite(*arrays: ArrayLike) -> tuple[list[Floats], int]:
    """Return float64 arrays [N] without positions where one of the first two is not finite, and the number dropped."""
    columns = [np.asarray(a, dtype=np.float64).reshape(-1) for a in arrays]
    keep = np.logical_and.reduce([np.isfinite(c) for c in columns[:2]])
    return [c[keep] for c in columns], int((~keep).sum())


def thousands(value: float, _position: int) -> str:
    """Return the tick label of a count: 500, 5,000, 50k."""
    return f"{value / 1000:,.10g}k" if abs(value) >= 10_000 else f"{value:,.10g}"


def half_width(se: ArrayLike | None) -> Floats:
    """Return half the width of the 95% interval; 0 where the standard error is unknown."""
    return Z95 * np.nan_to_num(np.asarray(se, dtype=np.float64), posinf=0.0)


def empty_figure(figure: Figure, dropped: int = 0) -> Figure:
    """Return `figure` without axes, with a note of how many values could not be drawn."""
    axes = figure.add_subplot()
    axes.set_axis_off()
    text = f"no finite value among {dropped:,}" if dropped else "nothing to draw"
    write(axes, 0.5, 0.5, text, MUTED, ha="center", va="center", transform=axes.transAxes)
    return figure


def running_mean(values: Floats, window: int) -> Floats:
    """Return the mean of `window` neighbouring values around each."""
    ones = np.ones(window)
    # Divided by the number of points under the window, so that zeros beyond the ends do not count.
    return np.convolve(values, ones, "same") / np.convolve(np.ones_like(values), ones, "same")


def dot_rows(
    rows: Sequence[Row], highlight: str | None, scale: float, marks: Sequence[float] = ()
) -> tuple[Figure, Axes]:
    """Draw horizontal dots from top to bottom; values times `scale` are written at the right edge.

    Give the label of the x axis loc="right": long names leave the axis little room, and a centred one would be cut off.
    """
    figure = new_figure(0.95 + 0.34 * max(1, len(rows)))
    axes = style_axes(figure.add_subplot(), " ", "", grid="x")
    for y, (name, value, se) in enumerate(rows):
        axes.axhline(y, color=RULE, linewidth=0.6, linestyle=(0, (1, 2)), zorder=0)
        colour = BLUE if highlight is None or name == highlight else MUTED
        if np.isfinite(value):
            axes.errorbar(
                value * scale, y, xerr=half_width(se) * scale, fmt="o", color=colour, markersize=5.5, elinewidth=1.6
            )
        written = format_measurement(value * scale, None if se is None else se * scale)
        write(axes, 1.02, y, written, transform=axes.get_yaxis_transform(), va="center")
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows], parse_math=False)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(max(1, len(rows)) - 0.4, -0.6)
    for mark in marks:
        if np.isfinite(mark):
            axes.update_datalim([(mark * scale, 0.0)])
    axes.margins(x=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=TICK_STEPS))
    return figure, axes


def by_mask_rate(rate: ArrayLike, value: ArrayLike, se: ArrayLike, ylabel: str) -> Figure:
    """Plot `value` with its 95% interval against the share of masked tokens in [0, 1]; all N."""
    figure = new_figure(3.0)
    axes = style_axes(figure.add_subplot(), "share of tokens masked; bars: 95%", ylabel)
    (rate, value, se), dropped = finite(rate, value, se)
    order = np.argsort(rate, kind="stable")
    bars = half_width(se[order])
    axes.errorbar(rate[order], value[order], bars, color=BLUE, linewidth=1.3, marker="o", markersize=4, elinewidth=1.1)
    axes.set_xlim(-0.02, 1.02)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    note_dropped(axes, dropped)
    return figure


def draw_histogram(axes: Axes, counts: ArrayLike, edges: ArrayLike, colour: str = BLUE) -> None:
    """Draw `counts` between `edges` as a filled outline."""
    axes.stairs(counts, edges, fill=True, color=colour, alpha=0.22)
    axes.stairs(counts, edges, color=colour, linewidth=1.3)
