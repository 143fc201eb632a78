"""Figures of a classification: accuracy, calibration, abstention, other texts, and accuracy by draws.

Like `report.plots`: each function returns a new figure in the colours of `THEME`, bars and bands are 95% intervals and
labelled so, and values that are not finite are counted. Shapes: K classes or bins, M texts, N points.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import ArrayLike

from palimpsest.common.metrics import wilson_interval
from palimpsest.report import style
from palimpsest.report.formatting import format_number

PERCENT = FuncFormatter(lambda share, _: f"{100 * share:.10g}")

Curve = tuple[ArrayLike, ArrayLike, ArrayLike]
"""Network evaluations per text and class, accuracy (a share) and its standard error (NaN if unknown), all N."""

_MOST_LABELLED_CLASSES = 12
_MOST_BARS = 64
# A curve against coverage begins at this share and at this many texts, and has this many points.
_LEAST_COVERAGE = 0.05
_LEAST_PREDICTED = 10
_COVERAGES = 100


def accuracy_ladder(rows: Sequence[style.Row], highlight: str | None = None) -> Figure:
    """Plot accuracies as shares in [0, 1], one dot with its 95% interval per (name, value, standard error)."""
    figure, axes = style.dot_rows(rows, highlight, scale=100.0)
    axes.set_xlabel("accuracy (% of texts); bars: 95%; further right is better", loc="right")
    return figure


def confusion_matrix(counts_KK: ArrayLike, label_names: Sequence[str]) -> Figure:
    """Plot counts [K, K], true class in rows and predicted in columns, with their share of each row."""
    counts = np.asarray(counts_KK, dtype=np.int64)
    size = len(label_names)
    if counts.shape != (size, size):
        raise ValueError(f"confusion matrix is {counts.shape} but there are {size} label names")
    figure = style.new_figure(1.1 + min(4.6, 0.75 * size))
    if size == 0:
        return style.empty_figure(figure)
    axes = style.style_axes(figure.add_subplot(), "predicted class", "true class", grid="")
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    for row, column in np.ndindex(counts.shape):
        share = float(shares[row, column])
        # Opacity instead of a colour map: the cells fade into the page in both colour schemes.
        axes.add_patch(Rectangle((column, row), 1, 1, facecolor=(style.BLUE, 0.04 + 0.86 * share), edgecolor="none"))
        if size <= _MOST_LABELLED_CLASSES:
            colour = style.PAPER if share > 0.55 else style.INK
            percent = f"\n{share:.0%}" if size > 6 else f"\n{share:.1%}"
            text = f"{counts[row, column]:,}{percent if counts[row].any() else ''}"
            style.write(axes, column + 0.5, row + 0.5, text, colour, ha="center", va="center", linespacing=1.35)
    centres = np.arange(size) + 0.5
    axes.set_xticks(centres, label_names, parse_math=False, rotation=90 if size > 6 else 0)
    axes.set_yticks(centres, label_names, parse_math=False)
    axes.tick_params(length=0)
    axes.set(xlim=(0, size), ylim=(size, 0))
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure


def calibration(confidence_K: ArrayLike, right_K: ArrayLike, count_K: ArrayLike, ece: float) -> Figure:
    """Plot a reliability diagram (Wilson 95% bars) over a histogram of the confidences, from K equal-width bins of [0,
    1].

    Each bin gives its mean confidence, the share of right answers and the number of texts; empty bins may hold NaN.
    `ece` is the expected calibration error in [0, 1]. Raises ValueError if the lengths differ.
    """
    confidence, right, count = (np.asarray(a, dtype=np.float64).reshape(-1) for a in (confidence_K, right_K, count_K))
    if not confidence.size == right.size == count.size:
        raise ValueError(
            f"{confidence.size} confidences, {right.size} shares and {count.size} counts for the same bins"
        )
    figure = style.new_figure(4.6)
    if not count.size:
        return style.empty_figure(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    style.style_axes(top, "", "share correct (%)")
    style.style_axes(bottom, "confidence of the answer (%)", "texts")
    top.plot([0, 1], [0, 1], color=style.MUTED, linewidth=1, linestyle=(0, (4, 3)))
    along = {"rotation": 45, "rotation_mode": "anchor", "transform_rotates_text": True}
    style.write(top, 0.08, 0.125, "perfectly calibrated", style.MUTED, **along)
    full = count > 0
    (x, y, n), dropped = style.finite(confidence[full], right[full], count[full])
    if n.size:
        intervals = [wilson_interval(*pair) for pair in zip(y * n, n, strict=True)]
        low, high = np.array([(interval.low, interval.high) for interval in intervals]).T
        # Rounding can put an end of the interval on the wrong side of the proportion by one ulp.
        errors = np.maximum([y - low, high - y], 0)
        top.errorbar(x, y, errors, fmt="o", color=style.BLUE, markersize=5, elinewidth=1.4)
    style.draw_histogram(bottom, count, np.linspace(0, 1, count.size + 1))
    top.set(xlim=(-0.01, 1.01), ylim=(-0.03, 1.03))
    for axis in (top.yaxis, top.xaxis):
        axis.set_major_formatter(PERCENT)
    bottom.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    text = f"ECE {format_number(ece, 3)}\n{int(count.sum()):,} texts\nbars: 95% (Wilson)"
    style.write(top, 0.02, 0.97, text, transform=top.transAxes, va="top", linespacing=1.5)
    style.note_dropped(top, dropped)
    return figure


def llr_histogram(margin_by_label: Mapping[str, ArrayLike]) -> Figure:
    """Plot log p(x | second class) − log p(x | first) [nats] of the texts [N] of each class, in this order."""
    first, second = (*map(str, margin_by_label), "", "")[:2]
    return _histograms(margin_by_label, f"log p(x | {second}) − log p(x | {first})  (nats)", 0.0)


def likelihood_histogram(nats_by_name: Mapping[str, ArrayLike], typical: float) -> Figure:
    """Plot −log p(x) per token [nats] of groups of texts [N], with a line at the `typical` value."""
    return _histograms(nats_by_name, "−log p(x) per token  (nats); line: median of validation texts", typical)


def _histograms(values_by_name: Mapping[str, ArrayLike], xlabel: str, line: float) -> Figure:
    """Plot a histogram of each group, with a vertical line."""
    figure = style.new_figure(3.0)
    kept = {str(name): style.finite(values, values) for name, values in values_by_name.items()}
    dropped = sum(count for _, count in kept.values())
    groups = {name: columns[0] for name, (columns, _) in kept.items()}
    if not sum(values.size for values in groups.values()):
        return style.empty_figure(figure, dropped)
    axes = style.style_axes(figure.add_subplot(), xlabel, "texts per bin")
    pooled = np.concatenate(list(groups.values()))
    edges = np.histogram_bin_edges(pooled, bins=min(40, max(5, 2 * round(pooled.size**0.5))))
    for i, values in enumerate(groups.values()):
        style.draw_histogram(axes, np.histogram(values, edges)[0], edges, style.SERIES[i % len(style.SERIES)])
    axes.axvline(line, color=style.INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.margins(x=0.03)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    _label_histograms(axes, groups)
    style.note_dropped(axes, dropped)
    return figure


def _label_histograms(axes: Axes, groups: Mapping[str, style.Floats]) -> None:
    """Name each group above its median, one line further up if names would collide."""
    low, high = axes.get_xlim()
    ends = [-1.0]
    items = [(float(np.median(v)), i, name) for i, (name, v) in enumerate(groups.items()) if v.size]
    for median, i, name in sorted(items):
        text = f"{name} (n = {groups[name].size:,})"
        width = len(text) / 68
        centre = min(max((median - low) / (high - low), width / 2), 1 - width / 2)
        level = next((k for k, end in enumerate(ends) if centre - width / 2 > end), len(ends))
        ends[level : level + 1] = [centre + width / 2]
        y = 1.03 + 0.075 * level
        colour = style.SERIES[i % len(style.SERIES)]
        style.write(axes, centre, y, text, colour, transform=axes.transAxes, ha="center", va="bottom")


def accuracy_against_coverage(right_by_method: Mapping[str, ArrayLike], highlight: str) -> Figure:
    """Plot the accuracy of the most confident predictions against the share of texts that is predicted.

    Args:
        right_by_method: number of right predictions among the 1, 2, ..., N most confident texts, of each method.
        highlight: the method with a band, which is its 95% interval (Wilson).
    """
    curves = {str(name): np.asarray(right, dtype=np.float64) for name, right in right_by_method.items() if len(right)}
    figure = style.new_figure(3.2 + 0.11 * len(curves))
    if not curves:
        return style.empty_figure(figure)
    axes = style.style_axes(
        figure.add_subplot(), "texts predicted (% of all, the most confident first)", "accuracy (% of these)"
    )
    others = sorted((name for name in curves if name != highlight), key=lambda name: -curves[name][-1])
    for i, name in enumerate([*curves.keys() & {highlight}, *others]):
        right, total = curves[name], len(curves[name])
        first = min(total, max(_LEAST_PREDICTED, round(_LEAST_COVERAGE * total)))
        number = np.unique(np.linspace(first, total, _COVERAGES).round().astype(int))
        x, y = number / total, right[number - 1] / number
        colour = style.SERIES[i % len(style.SERIES)]
        linestyle = ("solid", "dashed", "dotted")[i // len(style.SERIES) % 3]
        if name == highlight:
            intervals = [wilson_interval(k, n) for k, n in zip(right[number - 1], number, strict=True)]
            low, high = [one.low for one in intervals], [one.high for one in intervals]
            axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        width = 2.0 if name == highlight else 1.1
        axes.plot(x, y, label=name, linewidth=width, color=colour, linestyle=linestyle)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PERCENT)
    axes.margins(x=0.02, y=0.08)
    # Below the axes, because names may be paths, which would leave no room beside them.
    look = {"frameon": False, "fontsize": style.TEXT, "labelcolor": style.INK}
    legend = figure.legend(loc="outside lower center", ncols=2, **look)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def accuracy_against_draws(
    curves: Mapping[str, Curve], references: Mapping[str, float], points: Mapping[str, Curve]
) -> Figure:
    """Plot accuracy [share] with its 95% band against network evaluations per text and class, one curve per method.

    `references` are accuracies without evaluations (naive Bayes), drawn as dashed lines. `points` are single marks,
    such as a sequential test at its mean number of draws.
    """
    figure = style.new_figure(3.4)
    bands = "; bands: 95%" if curves else ""
    xlabel = f"network evaluations per text and class{bands}"
    axes = style.style_axes(figure.add_subplot(), xlabel, "accuracy (% of texts)")
    labels = []
    notes = []
    drawn = []
    dropped = 0
    for i, (name, (evaluations, accuracy, se)) in enumerate([*curves.items(), *points.items()]):
        cost = np.asarray(evaluations, dtype=np.float64)
        columns, bad = style.finite(np.where(cost > 0, cost, np.nan), accuracy, se)  # a logarithmic axis has no 0
        dropped += bad
        if not columns[0].size:
            continue
        order = np.argsort(columns[0], kind="stable")
        x, y, error = (column[order] for column in columns)
        half = style.half_width(error)
        drawn.append(x)
        colour = style.SERIES[i % len(style.SERIES)]
        if i < len(curves):
            axes.fill_between(x, y - half, y + half, color=colour, alpha=0.18, linewidth=0)
            axes.plot(x, y, color=colour, linewidth=1.5, marker="o", markersize=3.5)
            labels.append((float(y[-1]), name, colour))
        else:
            axes.errorbar(x, y, half, fmt="D", color=colour, markersize=6, elinewidth=1.4, zorder=5)
            notes.append((float(x[0]), float(y[0]), f"{name}, {format_number(float(x[0]), 3)}", colour))
    for name, accuracy in references.items():
        if np.isfinite(accuracy):
            axes.axhline(accuracy, color=style.MUTED, linewidth=1, linestyle=(0, (4, 3)))
            labels.append((accuracy, name, style.MUTED))
        else:
            dropped += 1
    if not labels and not notes:
        return style.empty_figure(style.new_figure(3.4), dropped)
    axes.yaxis.set_major_formatter(PERCENT)
    axes.margins(x=0.04, y=0.12)
    _log2_axis(axes, np.concatenate(drawn) if drawn else np.ones(1))
    style.end_labels(axes, labels)
    for x, y, text, colour in notes:
        # Curves rise, so there is room above a mark, and to its left unless it is among the cheapest.
        left = axes.transAxes.inverted().transform(axes.transData.transform((x, y)))[0] > 1 / 3
        place = {"textcoords": "offset points", "ha": "right" if left else "left", "va": "bottom"}
        axes.annotate(text, (x, y), (0, 9), color=colour, fontsize=style.TEXT, parse_math=False, **place)
    style.note_dropped(axes, dropped)
    return figure


def _log2_axis(axes: Axes, x: style.Floats) -> None:
    """Set ticks at the powers of two from the smallest to the largest of `x`."""
    axes.set_xscale("log", base=2)
    low, high = np.floor(np.log2(x.min())), np.ceil(np.log2(x.max()))
    step = max(1, round((high - low) / 9))
    ticks = 2.0 ** np.arange(low, high + 1, step)
    axes.set_xticks(ticks, [style.thousands(tick, 0) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(2 ** (np.log2(x.min()) - 0.25), 2 ** (np.log2(x.max()) + 0.25))


def accuracy_against_mask_rate(rate: ArrayLike, accuracy: ArrayLike, se: ArrayLike) -> Figure:
    """Plot the accuracy [share] of a single draw against the share of masked tokens in [0, 1]; all N."""
    figure = style.by_mask_rate(rate, accuracy, se, "accuracy of one draw (%)")
    figure.axes[0].yaxis.set_major_formatter(PERCENT)
    return figure


def draws_histogram(draws_M: ArrayLike, total: int) -> Figure:
    """Plot how many draws of at most `total` a sequential test used for each of M texts.

    Raises ValueError if `total` is not positive or a text used less than 0 or more than `total`.
    """
    (draws, _), dropped = style.finite(draws_M, draws_M)
    if total < 1 or draws.min(initial=0) < 0 or draws.max(initial=0) > total:
        raise ValueError(
            f"draws per text lie in {draws.min(initial=0):g}..{draws.max(initial=0):g}, but the test may spend "
            f"0..{total}: pass the largest number of draws as total"
        )
    figure = style.new_figure(3.0)
    if not draws.size:
        return style.empty_figure(figure, dropped)
    axes = style.style_axes(figure.add_subplot(), f"draws per text (of at most {total:,})", "texts")
    width = -(-total // _MOST_BARS)
    edges = np.arange(0, total + width + 1, width) - 0.5
    counts, _ = np.histogram(draws, edges)
    style.draw_histogram(axes, counts, edges)
    axes.set_xlim(-0.5 - 0.02 * total, edges[-1] + 0.02 * total)
    axes.set_ylim(0, 1.08 * counts.max())
    mean = float(draws.mean())
    axes.axvline(mean, color=style.INK, linewidth=1, linestyle=(0, (4, 3)))
    text = f"mean {format_number(mean, 3)}: {mean / total:.0%} of the draws"
    anchor = "left" if mean < total / 3 else "right" if mean > 2 * total / 3 else "center"
    style.write(axes, mean, 1.02, text, transform=axes.get_xaxis_transform(), ha=anchor, va="bottom")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=style.TICK_STEPS))
    axes.xaxis.set_major_formatter(FuncFormatter(style.thousands))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(style.thousands))
    style.note_dropped(axes, dropped)
    return figure
