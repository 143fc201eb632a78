"""Figures of a classification: every one draws, follows the page's colours and says what it could not draw."""

from __future__ import annotations

import math

import matplotlib
import numpy as np
import pytest
from matplotlib._pylab_helpers import Gcf
from matplotlib.figure import Figure

from palimpsest.common.metrics import wilson_interval
from palimpsest.report import classification_plots as figures
from palimpsest.report.report import Report
from palimpsest.report.style import THEME

pytestmark = pytest.mark.usefixtures("real_figures")

NAN = float("nan")
FIGURES = {
    "confusion": lambda: figures.confusion_matrix([[3, 1], [0, 0]], ["neg", "pos"]),
    "confusion, one class": lambda: figures.confusion_matrix([[3]], ["only"]),
    "confusion, no class": lambda: figures.confusion_matrix(np.zeros((0, 0)), []),
    "confusion, many": lambda: figures.confusion_matrix(np.eye(20), [f"class {i}" for i in range(20)]),
    "calibration": lambda: figures.calibration([NAN, 0.3, 0.9, 1.0], [NAN, 0.0, 0.8, 1.0], [0, 1, 50, 9], 0.1),
    "calibration, one bin": lambda: figures.calibration([1.0], [1.0], [3], 0.0),
    "calibration, no text": lambda: figures.calibration([NAN, NAN], [NAN, NAN], [0, 0], NAN),
    "calibration, nothing": lambda: figures.calibration([], [], [], NAN),
    "ladder": lambda: figures.accuracy_ladder([("chance", 0.5, None), ("ours", 0.9, 0.0)], highlight="ours"),
    "ladder, one": lambda: figures.accuracy_ladder([("ours", 1.0, 0.0)]),
    "llr": lambda: figures.llr_histogram({"neg": [-3.0, -1, math.inf], "pos": [2.0, 4, 5]}),
    "llr, single class": lambda: figures.llr_histogram({"pos": [1.0]}),
    "llr, one empty": lambda: figures.llr_histogram({"neg": [], "pos": [1.0, 1.0]}),
    "llr, nothing": lambda: figures.llr_histogram({}),
    "llr, all infinite": lambda: figures.llr_histogram({"neg": [-math.inf]}),
    "likelihood": lambda: figures.likelihood_histogram({"test": [1.0, 2, 2.5], "other texts": [3.0, NAN]}, 2.0),
    "likelihood, nothing": lambda: figures.likelihood_histogram({"test": [], "other texts": []}, NAN),
    "coverage": lambda: figures.accuracy_against_coverage(
        {f"$m_ {i}": np.cumsum(np.arange(300) % (i + 2) > 0) for i in range(9)}, "$m_ 3"
    ),
    "coverage, one text": lambda: figures.accuracy_against_coverage({"ours": [1.0]}, "ours"),
    "coverage, no text": lambda: figures.accuracy_against_coverage({"ours": []}, "ours"),
    "coverage, nothing": lambda: figures.accuracy_against_coverage({}, "ours"),
    "draws": lambda: figures.accuracy_against_draws(
        {
            "common masks": ([1, 2, 4, 8], [0.6, 0.7, 0.8, 0.82], [0.02] * 4),
            "$a_ b": ([4, 1], [0.5, 0.4], [NAN, 0]),
        },
        {"naive Bayes": 0.7},
        {"sequential": ([3.7], [0.81], [0.01])},
    ),
    "draws, one point": lambda: figures.accuracy_against_draws({"a": ([8], [1.0], [0.0])}, {}, {}),
    "draws, far": lambda: figures.accuracy_against_draws({"a": ([1, 1e6], [0.5, 1.0], [0.0, 0.0])}, {}, {}),
    "draws, only a line": lambda: figures.accuracy_against_draws({}, {"naive Bayes": 0.7}, {}),
    "draws, only a point": lambda: figures.accuracy_against_draws({}, {}, {"ours": ([5], [0.7], [NAN])}),
    "draws, nothing": lambda: figures.accuracy_against_draws({}, {}, {}),
    "draws, all NaN": lambda: figures.accuracy_against_draws({"a": ([1], [NAN], [NAN])}, {"b": NAN}, {}),
    "rate": lambda: figures.accuracy_against_mask_rate([0.9, 0.1], [0.7, 0.5], [0.1, NAN]),
    "rate, no error": lambda: figures.accuracy_against_mask_rate([0.5], [1.0], [NAN]),
    "rate, nothing": lambda: figures.accuracy_against_mask_rate([], [], []),
    "spent": lambda: figures.draws_histogram([2, 2, 4, 32, NAN], 32),
    "spent, nothing": lambda: figures.draws_histogram([], 8),
    "spent, all at the end": lambda: figures.draws_histogram([8, 8], 8),
    "spent, of very many": lambda: figures.draws_histogram([1, 1000], 1000),
}


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_draws_and_touches_nothing_global(name: str) -> None:
    before = dict(matplotlib.rcParams)
    report = Report("t")
    report.figure(FIGURES[name](), "caption", "alternative text")
    page = report.render()
    assert page.count("<svg") == 1 and 'aria-label="alternative text"' in page
    drawing = page[page.index("<svg") : page.index("</svg>")]
    assert not any(colour in drawing for colour in THEME), "colours follow the scheme"
    assert dict(matplotlib.rcParams) == before
    assert not Gcf.figs, "pyplot manages no figure"


@pytest.mark.parametrize(
    ("figure", "count"),
    [
        (lambda: figures.accuracy_against_draws({"a": ([1, 2, 0], [0.5, NAN, 0.5], [0.1] * 3)}, {"b": NAN}, {}), 3),
        (lambda: figures.accuracy_against_draws({"a": ([1], [0.5], [0.1])}, {}, {"p": ([NAN], [1.0], [NAN])}), 1),
        (lambda: figures.accuracy_against_mask_rate([0.1, 0.2, 0.3], [0.5, NAN, math.inf], [0.1] * 3), 2),
        (lambda: figures.draws_histogram([1, NAN], 2), 1),
        (lambda: figures.calibration([NAN, 0.5], [1.0, 0.5], [3, 4], 0.0), 1),
    ],
)
def test_values_that_cannot_be_drawn_are_counted_aloud(figure: object, count: int) -> None:
    noun = "value is" if count == 1 else "values are"
    assert f"{count} {noun} not finite and not drawn" in texts(figure())


def test_curves_are_drawn_where_their_numbers_are() -> None:
    curve = ([4, 1, 2], [0.8, 0.5, 0.7], [0.02, 0.01, NAN])
    figure = figures.accuracy_against_draws(
        {"ours": curve}, {"naive Bayes": 0.6}, {"sequential": ([2.5], [0.79], [0.03])}
    )
    (axes,) = figure.axes
    assert axes.get_xscale() == "log" and [t.get_text() for t in axes.get_xticklabels()] == ["1", "2", "4"]
    assert axes.lines[0].get_xydata().tolist() == [[1, 0.5], [2, 0.7], [4, 0.8]]
    band = axes.collections[0].get_paths()[0].vertices
    assert band[band[:, 0] == 4][:, 1].max() == pytest.approx(0.8 + 1.959964 * 0.02)
    assert np.ptp(band[band[:, 0] == 2][:, 1]) == 0, "an unknown error draws no band"
    assert {"ours", "naive Bayes", "sequential, 2.5"} == set(texts(figure))
    assert "bands: 95%" in axes.get_xlabel()


def test_histogram_of_draws_counts_every_text_once() -> None:
    for total in (8, 64, 1000):
        draws = np.random.default_rng(total).integers(1, total + 1, 500)
        figure = figures.draws_histogram([*draws, total, 1], total)
        counts, edges, _ = figure.axes[0].patches[0].get_data()
        assert counts.sum() == 502 and counts.size <= 65 and edges[-1] >= total
        assert f"of at most {total:,}" in figure.axes[0].get_xlabel()
    counts, edges, _ = figures.draws_histogram([2, 2, 3], 4).axes[0].patches[0].get_data()
    assert dict(zip(edges[:-1] + 0.5, counts, strict=True)) == {0: 0, 1: 0, 2: 2, 3: 1, 4: 0}
    assert "mean 2.33: 58% of the draws" in texts(figures.draws_histogram([2, 2, 3], 4))
    for draws, total in (([5], 4), ([-1], 4), ([], 0)):
        with pytest.raises(ValueError, match="largest number of draws"):
            figures.draws_histogram(draws, total)


def test_calibration_draws_the_bins_it_is_given() -> None:
    figure = figures.calibration([NAN, 0.2, 0.9], [NAN, 0.0, 0.75], [0, 10, 20], 0.123)
    top, bottom = figure.axes
    assert top.containers[0].lines[0].get_xydata().tolist() == [[0.2, 0.0], [0.9, 0.75]]
    (low, high), _ = (segment[:, 1] for segment in top.containers[0].lines[2][0].get_segments())
    assert low == 0.0 and high == pytest.approx(wilson_interval(0, 10).high)
    assert bottom.patches[0].get_data().values.tolist() == [0, 10, 20]
    assert "ECE 0.123\n30 texts\nbars: 95% (Wilson)" in texts(figure)
    with pytest.raises(ValueError, match="2 confidences"):
        figures.calibration([0.5, 0.6], [1], [1], 0.0)


def test_accuracy_against_coverage_is_that_of_the_surest_texts() -> None:
    right = {"other": [1, 1, 2, *range(3, 40)], "ours": [*range(1, 31), *[30] * 10]}
    figure = figures.accuracy_against_coverage(right, "ours")
    (axes,) = figure.axes
    ours, other = (line.get_xydata() for line in axes.lines)
    assert ours[0].tolist() == [0.25, 1] and ours[-1].tolist() == [1, 0.75], "from ten texts on"
    assert other[-1].tolist() == [1, 39 / 40]
    band = axes.collections[0].get_paths()[0].vertices
    interval = wilson_interval(30, 40)
    assert sorted({y for x, y in band if x == 1}) == pytest.approx([interval.low, interval.high])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ours", "other"]


def test_accuracies_are_in_percent() -> None:
    figure = figures.accuracy_against_mask_rate([0.1, 0.9], [0.5, 0.75], [0.0, 0.0])
    figure.draw_without_rendering()
    labels = {label.get_text() for label in figure.axes[0].get_yticklabels()}
    assert {"50", "75"} <= labels
