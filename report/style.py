"""The quiet look shared by all figures of a report: colours of the page, axes, direct labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

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

Z95 = 1.959964
WIDTH, TEXT = 5.6, 9.0


def new_figure(height: float) -> Figure:
    """An empty figure of the common width, `height` inches tall, marked for the page's colours."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.set_gid(THEMED)
    return figure


def style_axes(axes: Axes, xlabel: str = "", ylabel: str = "", grid: str = "y") -> Axes:
    """Gives `axes` the common look, with grid lines for the axis `grid` ("x", "y" or none); returns it."""
    axes.set_facecolor("none")
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom" or (side == "left" and grid != "x"))
        spine.set_color(MUTED)
        spine.set_linewidth(0.7)
    axes.tick_params(colors=INK, labelsize=TEXT, length=3, width=0.7, color=MUTED)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis=grid, color=RULE, linewidth=0.6)
    axes.set_xlabel(xlabel, color=INK, fontsize=TEXT, labelpad=6)
    axes.set_ylabel(ylabel, color=INK, fontsize=TEXT, labelpad=6)
    return axes


def write(axes: Axes, x: float, y: float, text: str, colour: str = INK, **options: object) -> None:
    """Sets `text` at (x, y) in data units, or in those of the `transform` among the options."""
    # User strings may hold "$"; they are names, not formulas.
    axes.text(x, y, text, **{"color": colour, "fontsize": TEXT, "parse_math": False, **options})


def note_dropped(axes: Axes, count: int) -> None:
    """Says in the figure how many values could not be drawn; nothing if none."""
    if count > 0:
        noun = "value is" if count == 1 else "values are"
        text = f"{count:,} {noun} not finite and not drawn"
        write(axes, 0.01, 0.02, text, ORANGE, transform=axes.transAxes, va="bottom")


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """`positions` moved as little as possible, in squares, so that neighbours keep `gap`; those with room stay.

    Pool adjacent violators (Ayer et al. 1955) on the positions less the room that those below them need.
    """
    order = np.argsort(positions, kind="stable")
    groups: list[list[float]] = []
    for rank, i in enumerate(order):
        groups.append([positions[i] - rank * gap])
        while len(groups) > 1 and np.mean(groups[-2]) > np.mean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    result = np.empty(len(order))
    result[order] = [float(np.mean(group)) for group in groups for _ in group]
    result[order] += gap * np.arange(len(order))
    return result.tolist()


def end_labels(axes: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Direct labels (y in data units, text, colour) right of the axes, moved apart where they would touch."""
    low, high = axes.get_ylim()
    heights = [(y - low) / (high - low) for y, _, _ in labels]
    lines = max((text.count("\n") + 1 for _, text, _ in labels), default=1)
    for height, (_, text, colour) in zip(spread(heights, 0.065 * lines), labels, strict=True):
        write(axes, 1.03, height, text, colour, transform=axes.transAxes, va="center", linespacing=1.25)


def finite(*arrays: ArrayLike) -> tuple[list[Floats], int]:
    """The arrays as float64 [N] without the positions where the first two hold no finite value; the count."""
    columns = [np.asarray(a, dtype=np.float64).reshape(-1) for a in arrays]
    keep = np.logical_and.reduce([np.isfinite(c) for c in columns[:2]])
    return [c[keep] for c in columns], int((~keep).sum())


def thousands(value: float, _position: int) -> str:
    """Tick label of a count: 500, 5,000, 50k."""
    return f"{value / 1000:,.10g}k" if abs(value) >= 10_000 else f"{value:,.10g}"


def half_width(se: float | None) -> float:
    """Half width of the 95% interval; 0 where the standard error is unknown."""
    return Z95 * se if se is not None and np.isfinite(se) else 0.0


def empty_figure(figure: Figure, text: str = "nothing to draw") -> Figure:
    """`figure` with `text` in place of axes."""
    axes = figure.add_subplot()
    axes.set_axis_off()
    write(axes, 0.5, 0.5, text, MUTED, ha="center", va="center", transform=axes.transAxes)
    return figure
