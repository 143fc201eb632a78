"""Figures of a run report. Each function returns a new matplotlib Figure and touches no global state.

Colours are those of `THEME`: the report replaces them by the page's own, so one figure serves the light
and the dark scheme. All error bars are 95% intervals and say so. Values that are not finite cannot be
drawn; every figure counts them aloud. Shapes: N items, K classes, S steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike, NDArray

from reporting.formatting import format_measurement, format_number
from reporting.style import (
    BLUE,
    INK,
    MUTED,
    ORANGE,
    PAPER,
    RULE,
    SERIES,
    TEXT,
    Z95,
    Floats,
    empty_figure,
    end_labels,
    finite,
    half_width,
    new_figure,
    note_dropped,
    style_axes,
    thousands,
    write,
)

_MOST_RAW_POINTS = 400
_FEWEST_POINTS_TO_ZOOM = 20
_TICK_STEPS = (1, 2, 2.5, 5, 10)
_MOST_LABELLED_CLASSES = 12

Row = tuple[str, float, float | None]


# ------------------------------------------------------------------------------------------- training
def loss_curve(
    train: tuple[ArrayLike, ArrayLike],
    validation: tuple[ArrayLike, ArrayLike, ArrayLike] | None = None,
    truth: float | None = None,
) -> Figure:
    """Training and validation loss [nats/token] against the optimiser step.

    `train` is (steps S, nll S); `validation` is (steps S, nll S, standard error S); `truth` is the entropy
    of the source, which no bound can pass. The raw loss is pale, its running mean strong. Where the first
    steps dwarf all that follows, a second panel shows the second half of the run at its own scale.
    """
    train, dropped = finite(*train)
    points, more = ([np.empty(0)] * 3, 0) if validation is None else finite(*validation)
    truth = truth if truth is not None and np.isfinite(truth) else None
    middle = train[0].max(initial=0.0) / 2
    late = train[1][train[0] >= middle]
    zoom = train[0].size >= _FEWEST_POINTS_TO_ZOOM and np.ptp(train[1]) > 3 * np.ptp(late)
    # The labels stand at the last panel, so it must hold whatever there is to label.
    zoom = zoom and (points[0].size == 0 or points[0].max() >= middle)
    figure = new_figure(3.1)
    panels = figure.subplots(1, 2 if zoom else 1, squeeze=False)[0]
    for axes, start in zip(panels, (0.0, middle), strict=False):
        style_axes(axes, "optimiser step")
        labels = _draw_losses(axes, train, points, truth, start)
        axes.margins(x=0.03, y=0.07)
        axes.xaxis.set_major_formatter(FuncFormatter(thousands))
        axes.xaxis.set_major_locator(MaxNLocator(4 if zoom else 6, integer=True, steps=_TICK_STEPS))
    panels[0].set_ylabel("loss (nats per token)")
    if zoom:
        panels[0].set_title("whole run", color=MUTED, fontsize=TEXT, loc="left")
        panels[1].set_title("second half", color=MUTED, fontsize=TEXT, loc="left")
    end_labels(panels[-1], labels)
    note_dropped(panels[0], dropped + more)
    return figure


def _draw_losses(
    axes: Axes, train: list[Floats], validation: list[Floats], truth: float | None, start: float
) -> list[tuple[float, str, str]]:
    """Draws the run from step `start` on; returns direct labels (height [nats/token], text, colour)."""
    labels: list[tuple[float, str, str]] = []
    if train[0].size:
        labels.append((_draw_train(axes, train[0], train[1], start), "training", BLUE))
    steps, nll, se = (column[validation[0] >= start] for column in validation)
    if steps.size:
        bars = Z95 * np.nan_to_num(se, nan=0.0, posinf=0.0)
        axes.errorbar(steps, nll, bars, color=ORANGE, linewidth=1.3, marker="o", markersize=3.5, elinewidth=1.1)
        labels.append((float(nll[-1]), "validation\n± 95%", ORANGE))
    if truth is not None:
        axes.axhline(truth, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        labels.append((truth, f"true entropy\n{format_number(truth)}", INK))
    return labels


def _draw_train(axes: Axes, steps: Floats, nll: Floats, start: float) -> float:
    """Draws the raw loss pale and its running mean strong; returns the mean at the last step [nats/token]."""
    window = max(1, steps.size // 50)
    ones = np.ones(window)
    # Dividing by the number of points under the window lets no zeros from beyond the ends into the mean.
    mean = np.convolve(nll, ones, "same") / np.convolve(np.ones_like(nll), ones, "same")
    steps, nll, mean = (column[steps >= start] for column in (steps, nll, mean))
    # The range of each chunk keeps every spike of a long run; a thinned line would lose them.
    starts = np.arange(0, steps.size, -(-steps.size // _MOST_RAW_POINTS))
    if starts.size < steps.size:
        low, high = np.minimum.reduceat(nll, starts), np.maximum.reduceat(nll, starts)
        axes.fill_between(steps[starts], low, high, color=BLUE, alpha=0.28, linewidth=0)
    elif window > 1:
        axes.plot(steps, nll, color=BLUE, alpha=0.4, linewidth=0.7)
    marker = "o" if steps.size == 1 else None
    axes.plot(steps[starts], mean[starts], color=BLUE, linewidth=1.5, marker=marker, markersize=4)
    return float(mean[-1])


def nll_by_mask_rate(rate: ArrayLike, nll: ArrayLike, se: ArrayLike | None = None) -> Figure:
    """Reconstruction loss [nats per masked token] against the share of masked tokens in [0, 1]; all S."""
    figure = new_figure(3.0)
    axes = style_axes(figure.add_subplot(), "share of tokens masked", "loss (nats per masked token)")
    errors = np.zeros(np.size(rate)) if se is None else se
    (rate, nll, errors), dropped = finite(rate, nll, errors)
    order = np.argsort(rate, kind="stable")
    bars = Z95 * np.nan_to_num(errors[order], nan=0.0, posinf=0.0)
    axes.errorbar(
        rate[order], nll[order], bars if se is not None else None,
        color=BLUE, linewidth=1.3, marker="o", markersize=4, elinewidth=1.1,
    )  # fmt: skip
    axes.set_xlim(-0.02, 1.02)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if se is not None:
        write(axes, 0.99, 0.03, "bars: 95%", MUTED, transform=axes.transAxes, ha="right", va="bottom")
    note_dropped(axes, dropped)
    return figure


# ------------------------------------------------------------------------------------------- rows of dots
def likelihood_against_truth(
    rows: Sequence[Row], truth: float | None = None, unit: str = "nats/token", highlight: str | None = None
) -> Figure:
    """One dot with its 95% interval per (name, value, standard error), the true entropy as a line."""
    figure, axes = _dot_rows(rows, highlight, scale=1.0, marks=() if truth is None else (truth,))
    axes.set_xlabel(f"negative log-likelihood ({unit}); bars: 95%; further left is better")
    if truth is not None and np.isfinite(truth):
        axes.axvline(truth, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        label = f"true entropy {format_number(truth)}"
        write(axes, truth, 1.02, label, transform=axes.get_xaxis_transform(), ha="center", va="bottom")
    return figure


def accuracy_ladder(rows: Sequence[Row], highlight: str | None = None) -> Figure:
    """Accuracies as shares in [0, 1], one dot with its 95% interval per (name, value, standard error)."""
    figure, axes = _dot_rows(rows, highlight, scale=100.0)
    axes.set_xlabel("accuracy (% of texts); bars: 95%; further right is better")
    return figure


def _dot_rows(
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
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=_TICK_STEPS))
    return figure, axes


# --------------------------------------------------------------------------------------- classification
def confusion_matrix(counts_KK: ArrayLike, label_names: Sequence[str]) -> Figure:
    """Counts [K, K], true class in rows and predicted in columns, with their share of each row."""
    counts = np.asarray(counts_KK, dtype=np.int64)
    size = len(label_names)
    if counts.shape != (size, size):
        raise ValueError(f"confusion matrix is {counts.shape} but there are {size} label names")
    figure = new_figure(1.1 + min(4.6, 0.75 * size))
    if size == 0:
        return empty_figure(figure)
    axes = style_axes(figure.add_subplot(), "predicted class", "true class", grid="")
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    for row, column in np.ndindex(counts.shape):
        share = float(shares[row, column])
        # Opacity instead of a colour map: the cells fade into the page in both colour schemes.
        axes.add_patch(Rectangle((column, row), 1, 1, facecolor=(BLUE, 0.04 + 0.86 * share), edgecolor="none"))
        if size <= _MOST_LABELLED_CLASSES:
            colour = PAPER if share > 0.55 else INK
            percent = f"\n{share:.0%}" if size > 6 else f"\n{share:.1%}"
            text = f"{counts[row, column]:,}{percent if counts[row].any() else ''}"
            write(axes, column + 0.5, row + 0.5, text, colour, ha="center", va="center", linespacing=1.35)
    centres = np.arange(size) + 0.5
    axes.set_xticks(centres, label_names, parse_math=False, rotation=90 if size > 6 else 0)
    axes.set_yticks(centres, label_names, parse_math=False)
    axes.tick_params(length=0)
    axes.set(xlim=(0, size), ylim=(size, 0))
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure


@dataclass(frozen=True)
class CalibrationBins:
    """Reliability per confidence bin: edges [bins + 1], the rest [bins]; means are NaN in empty bins."""

    edges: Floats
    counts: NDArray[np.int64]
    confidence: Floats
    accuracy: Floats

    @property
    def ece(self) -> float:
        """Expected calibration error, mean |accuracy − confidence| by count (Guo et al. 2017, eq. 3)."""
        total = self.counts.sum()
        gaps = np.nan_to_num(np.abs(self.accuracy - self.confidence))
        return float((self.counts * gaps).sum() / total) if total else float("nan")


def calibration_bins(confidence: ArrayLike, correct: ArrayLike, num_bins: int = 10) -> CalibrationBins:
    """Equal-width bins (low, high] of the confidence in [0, 1] of N answers, `correct` being 0 or 1 [N].

    Raises ValueError if the lengths differ or a confidence lies outside [0, 1].
    """
    confidence = np.asarray(confidence, dtype=np.float64).reshape(-1)
    correct = np.asarray(correct, dtype=np.float64).reshape(-1)
    if confidence.size != correct.size:
        raise ValueError(f"{confidence.size} confidences but {correct.size} answers")
    if not np.all((confidence >= 0) & (confidence <= 1)):
        raise ValueError("confidences must lie in [0, 1]: pass probabilities, not logits")
    edges = np.linspace(0, 1, num_bins + 1)
    index = np.digitize(confidence, edges[1:-1], right=True)
    counts = np.bincount(index, minlength=num_bins)
    with np.errstate(invalid="ignore"):
        mean_confidence = np.bincount(index, confidence, num_bins) / counts
        accuracy = np.bincount(index, correct, num_bins) / counts
    return CalibrationBins(edges, counts, mean_confidence, accuracy)


def wilson_interval(successes: ArrayLike, counts: ArrayLike) -> tuple[Floats, Floats]:
    """95% score interval of a proportion (Wilson 1927): lower and upper ends, in [0, 1]."""
    n = np.asarray(counts, dtype=np.float64)
    share = np.asarray(successes, dtype=np.float64) / n
    centre = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * np.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    return np.clip(centre - half, 0, 1), np.clip(centre + half, 0, 1)


def calibration(confidence: ArrayLike, correct: ArrayLike, num_bins: int = 10) -> Figure:
    """Reliability diagram (Wilson 95% bars) over a histogram of the N confidences; arguments as above."""
    bins = calibration_bins(confidence, correct, num_bins)
    figure = new_figure(4.6)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    style_axes(top, "", "share correct (%)")
    style_axes(bottom, "confidence of the answer (%)", "texts")
    top.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    write(top, 0.08, 0.125, "perfectly calibrated", MUTED, rotation=45, rotation_mode="anchor",
          transform_rotates_text=True)  # fmt: skip
    full = bins.counts > 0
    if full.any():
        x, y, n = bins.confidence[full], bins.accuracy[full], bins.counts[full]
        low, high = wilson_interval(y * n, n)
        # Rounding can put an end of the interval on the wrong side of the proportion by one ulp.
        errors = np.maximum([y - low, high - y], 0)
        top.errorbar(x, y, errors, fmt="o", color=BLUE, markersize=5, elinewidth=1.4)
    bottom.bar(bins.edges[:-1], bins.counts, np.diff(bins.edges), align="edge", color=BLUE, alpha=0.55,
               edgecolor=BLUE, linewidth=0.6)  # fmt: skip
    top.set(xlim=(-0.01, 1.01), ylim=(-0.03, 1.03))
    for axis in (top.yaxis, top.xaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}"))
    bottom.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    text = f"ECE {format_number(bins.ece, 3)}\n{bins.counts.sum():,} texts\nbars: 95% (Wilson)"
    write(top, 0.02, 0.97, text, transform=top.transAxes, va="top", linespacing=1.5)
    return figure


def llr_histogram(margin_by_label: Mapping[str, ArrayLike], num_bins: int = 40) -> Figure:
    """How the margin log p(x|1) − log p(x|0) [nats] is spread over the texts [N] of each true class."""
    figure = new_figure(3.0)
    kept = {str(name): finite(values, values) for name, values in margin_by_label.items()}
    dropped = sum(count for _, count in kept.values())
    margins = {name: columns[0] for name, (columns, _) in kept.items()}
    if not sum(values.size for values in margins.values()):
        return empty_figure(figure, f"no finite margin among {dropped:,}" if dropped else "nothing to draw")
    axes = style_axes(figure.add_subplot(), "log p(x | 1) − log p(x | 0)  (nats)", "texts per bin")
    pooled = np.concatenate(list(margins.values()))
    edges = np.histogram_bin_edges(pooled, bins=min(num_bins, max(5, 2 * round(pooled.size**0.5))))
    for i, values in enumerate(margins.values()):
        colour = SERIES[i % len(SERIES)]
        counts, _ = np.histogram(values, edges)
        axes.stairs(counts, edges, fill=True, color=colour, alpha=0.22)
        axes.stairs(counts, edges, color=colour, linewidth=1.3)
    axes.axvline(0, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.margins(x=0.03)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    _label_histograms(axes, margins)
    note_dropped(axes, dropped)
    return figure


def _label_histograms(axes: Axes, margins: Mapping[str, Floats]) -> None:
    """Names each class above its median, one line further up where names would collide."""
    low, high = axes.get_xlim()
    ends = [-1.0]
    items = [(float(np.median(v)), i, name) for i, (name, v) in enumerate(margins.items()) if v.size]
    for median, i, name in sorted(items):
        text = f"{name} (n = {margins[name].size:,})"
        width = len(text) / 68
        centre = min(max((median - low) / (high - low), width / 2), 1 - width / 2)
        level = next((k for k, end in enumerate(ends) if centre - width / 2 > end), len(ends))
        ends[level : level + 1] = [centre + width / 2]
        y = 1.03 + 0.075 * level
        colour = SERIES[i % len(SERIES)]
        write(axes, centre, y, text, colour, transform=axes.transAxes, ha="center", va="bottom")
