"""Figures of likelihoods and training. Each function returns a new matplotlib Figure and touches no global state.

Colours are those of `THEME`: the report replaces them by the page's own, for the light and the dark scheme. All error
bars are 95% intervals and labelled so. Values that are not finite are not drawn but counted. Shapes: S steps or points;
(N, 2) of optimiser step and value.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike

from palimpsest.report import style
from palimpsest.report.formatting import format_number
from palimpsest.report.style import Floats

_MOST_RAW_POINTS = 400
_FEWEST_POINTS_TO_ZOOM = 20
_WIDE = 20.0  # larger ratios of the range are drawn on a logarithmic scale


def loss_curve(
    train: tuple[ArrayLike, ArrayLike],
    validation: tuple[ArrayLike, ArrayLike, ArrayLike] | None = None,
    truth: float | None = None,
) -> Figure:
    """Plot training and validation loss [nats/token] against the optimiser step.

    `train` is (steps S, nll S); `validation` is (steps S, nll S, standard error S); `truth` is the entropy of the
    source, which no bound can pass. The raw loss is pale, its running mean strong. If the first steps dwarf the others,
    a second panel shows the second half of the run.
    """
    train, dropped = style.finite(*train)
    points, more = ([np.empty(0)] * 3, 0) if validation is None else style.finite(*validation)
    truth = truth if truth is not None and np.isfinite(truth) else None
    middle = train[0].max(initial=0.0) / 2
    late = train[1][train[0] >= middle]
    zoom = train[0].size >= _FEWEST_POINTS_TO_ZOOM and np.ptp(train[1]) > 3 * np.ptp(late)
    # The last panel has the labels, so it must hold everything labelled.
    zoom = zoom and (points[0].size == 0 or points[0].max() >= middle)
    figure = style.new_figure(3.1)
    panels = figure.subplots(1, 2 if zoom else 1, squeeze=False)[0]
    for axes, start in zip(panels, (0.0, middle), strict=False):
        style.style_axes(axes, "optimiser step")
        labels = _draw_losses(axes, train, points, truth, start)
        axes.margins(x=0.03, y=0.07)
        _step_axis(axes, 4 if zoom else 6)
    panels[0].set_ylabel("loss (nats per token)")
    if zoom:
        panels[0].set_title("whole run", color=style.MUTED, fontsize=style.TEXT, loc="left")
        panels[1].set_title("second half", color=style.MUTED, fontsize=style.TEXT, loc="left")
    style.end_labels(panels[-1], labels)
    style.note_dropped(panels[0], dropped + more)
    return figure


def _draw_losses(
    axes: Axes, train: list[Floats], validation: list[Floats], truth: float | None, start: float
) -> list[tuple[float, str, str]]:
    """Draw the run from step `start` on; return direct labels (height [nats/token], text, colour)."""
    labels: list[tuple[float, str, str]] = []
    if train[0].size:
        labels.append((_draw_train(axes, train[0], train[1], start), "training", style.BLUE))
    steps, nll, se = (column[validation[0] >= start] for column in validation)
    if steps.size:
        bars = style.half_width(se)
        axes.errorbar(steps, nll, bars, color=style.ORANGE, linewidth=1.3, marker="o", markersize=3.5, elinewidth=1.1)
        labels.append((float(nll[-1]), "validation\n± 95%", style.ORANGE))
    if truth is not None:
        axes.axhline(truth, color=style.INK, linewidth=1, linestyle=(0, (4, 3)))
        labels.append((truth, f"true entropy\n{format_number(truth)}", style.INK))
    return labels


def _draw_train(axes: Axes, steps: Floats, nll: Floats, start: float) -> float:
    """Draw the raw loss pale and its running mean strong; return the mean at the last step [nats/token]."""
    window = max(1, steps.size // 50)
    mean = style.running_mean(nll, window)
    steps, nll, mean = (column[steps >= start] for column in (steps, nll, mean))
    # The range of each chunk keeps every spike of a long run; a thinned line would lose them.
    starts = np.arange(0, steps.size, -(-steps.size // _MOST_RAW_POINTS))
    if starts.size < steps.size:
        axes.fill_between(*_thinned(steps, nll, nll), color=style.BLUE, alpha=0.28, linewidth=0)
    elif window > 1:
        axes.plot(steps, nll, color=style.BLUE, alpha=0.4, linewidth=0.7)
    marker = "o" if steps.size == 1 else None
    axes.plot(steps[starts], mean[starts], color=style.BLUE, linewidth=1.5, marker=marker, markersize=4)
    return float(mean[-1])


def losses_over_time(series: Sequence[tuple[str, ArrayLike]], ylabel: str, smooth: bool) -> Figure:
    """Plot losses [nats per masked token] against the optimiser step, one line for each share of masks.

    `series` are (label, points (N, 2)), the fewest masks first. `smooth` draws running means.
    """
    figure = style.new_figure(3.1)
    axes = style.style_axes(figure.add_subplot(), "optimiser step", ylabel)
    labels, dropped = [], 0
    for rank, (label, points) in enumerate(series):
        (steps, nats), lost = style.finite(*np.asarray(points, dtype=np.float64).reshape(-1, 2).T)
        dropped += lost
        if steps.size:
            nats = style.running_mean(nats, max(1, steps.size // 25)) if smooth else nats
            dots = {} if smooth and steps.size > 1 else {"marker": "o", "markersize": 3.5}
            axes.plot(steps, nats, color=style.BLUE, alpha=0.3 + 0.7 * (rank + 1) / len(series), linewidth=1.4, **dots)
            labels.append((float(nats[-1]), label, style.BLUE))
    _step_axis(axes, 6)
    axes.margins(x=0.03, y=0.07)
    style.note_dropped(axes, dropped)
    if smooth and labels:
        labels.append((max(y for y, *_ in labels) + 1e-9, "share masked", style.MUTED))
    style.end_labels(axes, labels)
    return figure


def vital_signs(logged: Mapping[str, ArrayLike]) -> Figure | None:
    """Plot learning rate, gradient norm before clipping, tokens per second and peak memory [GiB].

    The gradient norm is a mean with, in pale, the largest of each interval; the MFU is the run's median.

    Args:
        logged: series (N, 2) of training/callbacks/metrics.py by name. None is returned if it logged nothing.
    """
    if "train/grad_norm" not in logged:
        return None
    mfu = np.asarray(logged.get("train/mfu", ()), dtype=np.float64).reshape(-1, 2)[:, 1]
    share = f"; MFU {format_number(100 * np.median(mfu), 2)} %" if mfu.size and np.isfinite(mfu).all() else ""
    figure = style.new_figure(3.9)
    panels = figure.subplots(2, 2, sharex=True).flatten()
    _panel(panels[0], "learning rate", logged.get("train/lr", ()), zero=True)
    norm = logged["train/grad_norm"]
    largest = logged.get("train/grad_norm_max", ())
    _panel(panels[1], "gradient norm, before clipping", norm, above=largest)
    _panel(panels[2], f"tokens per second{share}", logged.get("train/tokens_per_s", ()), zero=True)
    _panel(panels[3], "peak memory (GiB)", logged.get("memory/peak_gib", ()), zero=True)
    panels[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_number(value, 3) if value else "0"))
    panels[2].yaxis.set_major_formatter(FuncFormatter(style.thousands))
    for axes in panels[2:]:
        axes.set_xlabel("optimiser step")
    return figure


def _panel(axes: Axes, title: str, points: ArrayLike, above: ArrayLike = (), zero: bool = False) -> None:
    """Draw one series with its title; `above` is the upper edge of a pale band, `zero` starts the scale at zero."""
    style.style_axes(axes)
    axes.set_title(title, color=style.INK, fontsize=style.TEXT, loc="left")
    (steps, values), dropped = style.finite(*np.asarray(points, dtype=np.float64).reshape(-1, 2).T)
    (above_at, edge), more = style.finite(*np.asarray(above, dtype=np.float64).reshape(-1, 2).T)
    if not steps.size:
        style.write(axes, 0.5, 0.5, "not logged", style.MUTED, ha="center", va="center", transform=axes.transAxes)
        return
    if above_at.size:
        edge = np.interp(steps, above_at, edge)
        axes.fill_between(*_thinned(steps, values, edge), color=style.BLUE, alpha=0.28, linewidth=0)
    starts = np.arange(0, steps.size, -(-steps.size // _MOST_RAW_POINTS))
    sampled = style.running_mean(values, max(1, steps.size // _MOST_RAW_POINTS))[starts]
    marker = "o" if steps.size == 1 else None
    axes.plot(steps[starts], sampled, color=style.BLUE, linewidth=1.3, marker=marker, markersize=4)
    highest = max(values.max(), edge.max(initial=0.0)) if above_at.size else values.max()
    if values.min() > 0 and highest > _WIDE * values.min() and not zero:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=5))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="y", which="minor", length=0)
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=style.TICK_STEPS))
    if zero:
        axes.set_ylim(0.0, 1.12 * float(values.max()) or 1.0)
    axes.margins(x=0.03)
    _step_axis(axes, 4)
    style.note_dropped(axes, dropped + more)


def _thinned(steps: Floats, low: Floats, high: Floats) -> tuple[Floats, Floats, Floats]:
    """Return at most 400 points that keep the lowest of `low` and the highest of `high`."""
    starts = np.arange(0, steps.size, -(-steps.size // _MOST_RAW_POINTS))
    return steps[starts], np.minimum.reduceat(low, starts), np.maximum.reduceat(high, starts)


def _step_axis(axes: Axes, ticks: int) -> None:
    axes.xaxis.set_major_formatter(FuncFormatter(style.thousands))
    axes.xaxis.set_major_locator(MaxNLocator(ticks, integer=True, steps=style.TICK_STEPS))


def likelihood_against_truth(rows: Sequence[style.Row], truth: float | None = None) -> Figure:
    """Plot one dot with its 95% interval per (name, value, standard error), and the true entropy as a line."""
    figure, axes = style.dot_rows(rows, None, scale=1.0, marks=() if truth is None else (truth,))
    axes.set_xlabel("negative log-likelihood (nats/token); bars: 95%; further left is better", loc="right")
    if truth is not None and np.isfinite(truth):
        axes.axvline(truth, color=style.INK, linewidth=1, linestyle=(0, (4, 3)))
        label = f"true entropy {format_number(truth)}"
        style.write(axes, truth, 1.02, label, transform=axes.get_xaxis_transform(), ha="center", va="bottom")
    return figure
