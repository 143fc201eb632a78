"""The report: numbers say what they know, hostile text stays text, nothing is loaded, every figure draws."""

from __future__ import annotations

import base64
import hashlib
import html
import math
import os
import re
import threading
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib._pylab_helpers import Gcf
from matplotlib.figure import Figure

from palimpsest.report import classification_plots, plots
from palimpsest.report.denoising import Sample
from palimpsest.report.evidence import Evidence
from palimpsest.report.formatting import Metric, format_measurement, format_number
from palimpsest.report.report import Report
from palimpsest.report.style import BLUE, THEME, by_mask_rate

pytestmark = pytest.mark.usefixtures("real_figures")

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> & \"quoted\" 'text'"


def _page(report: Report, tmp_path: Path) -> str:
    report.write(tmp_path / "report.html")
    return (tmp_path / "report.html").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------- numbers
@pytest.mark.parametrize(
    ("value", "se", "expected"),
    [
        (1.82312, 0.0041, "1.823 ± 0.004"),
        (6.1912, 0.0251, "6.191 ± 0.025"),
        (94.35, 0.0, "94.35 ± 0"),
        (0.5, 0.0096, "0.500 ± 0.010"),
        (1234.5, 12.3, "1,234 ± 12"),
        (1263.0, 56.0, "1,260 ± 60"),
        (123456.0, 7000.0, "123,000 ± 7,000"),
        (-0.001, 0.5, "0.0 ± 0.5"),
        (-2.5, 0.1, "−2.50 ± 0.10"),
        (1.23e8, 2.1e5, "123,000,000 ± 210,000"),
        (1.23e13, 2.1e10, "(1.2300 ± 0.0021) × 10¹³"),
        (3.1e-5, 4e-7, "(3.10 ± 0.04) × 10⁻⁵"),
        (2.0, math.nan, "2 ± ?"),
        (2.0, -1.0, "2 ± ?"),
        (math.nan, 0.1, "NaN"),
        (math.inf, None, "∞"),
        (-math.inf, 0.1, "−∞"),
        (1.82312, None, "1.823"),
    ],
)
def test_digits_follow_the_standard_error(value: float, se: float | None, expected: str) -> None:
    assert format_measurement(value, se) == expected
    assert Metric("name", value, se).measurement == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1_284_096, "1,284,096"),
        (np.int64(-12), "−12"),
        (0.0, "0"),
        (0.5, "0.5"),
        (9.99996, "10"),
        (50257.0, "50,257"),
        (1.5e12, "1.5 × 10¹²"),
        (2.5e-7, "2.5 × 10⁻⁷"),
        (5e-324, "4.941 × 10⁻³²⁴"),
        (np.float32(0.25), "0.25"),
    ],
)
def test_numbers_without_an_error(value: float, expected: str) -> None:
    assert format_number(value) == expected


@pytest.mark.parametrize("value", [0.0, 5e-324, 1e-310, 1e-5, 1.0, 1e300, 1.7e308])
@pytest.mark.parametrize("se", [5e-324, 1e-310, 1e-12, 1.0, 1e300, 1.7e308])
def test_no_measurement_is_too_extreme_to_print(value: float, se: float) -> None:
    text = format_measurement(value, se)
    assert "±" in text and len(text) < 60


def test_metric_as_text_carries_its_unit() -> None:
    assert str(Metric("NLL", 1.8231, 0.0041, "nats/token")) == "1.823 ± 0.004 nats/token"


# -------------------------------------------------------------------------------------------- the page
class _Loads(HTMLParser):
    """Everything in a page that would make a browser fetch something or run something."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in {"src", "href", "xlink:href", "srcset", "action", "data", "poster"}:
                self.addresses.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)
            if name == "id":
                self.ids.append(value or "")


def _full_report() -> Report:
    report = Report(HOSTILE, HOSTILE, HOSTILE, {HOSTILE: HOSTILE, "seed": 7})
    report.section(HOSTILE, f"{HOSTILE}\n\nand `{HOSTILE}`")
    report.metrics([Metric(HOSTILE, 1.0, 0.1, HOSTILE, HOSTILE)])
    report.table([HOSTILE, "n"], [[HOSTILE, 3], [None, Metric("", 2.0, 0.1)]], HOSTILE)
    report.figure(classification_plots.accuracy_ladder([(HOSTILE, 0.5, None), ("$a", 0.7, 0.1)]), HOSTILE, HOSTILE)
    report.figure(plots.likelihood_against_truth([("ours", 2.0, 0.1)], 1.5), "again", "again")
    foreign = Figure()
    axes = foreign.add_subplot()
    axes.scatter([1, 2], [3, 4])
    axes.set_title("--> " + HOSTILE)
    axes.text(1, 3, "a link", url="https://example.org/")
    report.figure(foreign, HOSTILE, HOSTILE)
    report.samples([Sample([HOSTILE, " b\x00\ud800", "\n"], [0, 1, 2], 2, HOSTILE)])
    report.evidence([Evidence(HOSTILE, (HOSTILE, " b\x00\ud800"), (1.0, -2.0), (HOSTILE, "other"), HOSTILE)])
    report.code(HOSTILE, HOSTILE)
    return report


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    page = _page(_full_report(), tmp_path)
    parser = _Loads()
    parser.feed(page)
    assert parser.tags.count("script") == 1, "only the report's own script"
    assert "img" not in parser.tags and not parser.handlers
    assert "<script>alert" not in page and "onerror=alert(2)>" not in page
    assert html.escape(HOSTILE, quote=True).replace("&quot;", "&#34;").replace("&#x27;", "&#39;") in page


def test_page_is_self_contained(tmp_path: Path) -> None:
    page = _page(_full_report(), tmp_path)
    parser = _Loads()
    parser.feed(page)
    assert all(address.startswith(("#", "data:image/")) for address in parser.addresses), parser.addresses
    assert not re.search(r"url\((?!#)|@import|https?://", page)
    assert "link" not in parser.tags and "iframe" not in parser.tags
    assert len(set(parser.ids)) == len(parser.ids), "ids of different figures must not collide"
    assert {address[1:] for address in parser.addresses if address.startswith("#")} <= set(parser.ids)


def test_security_policy_admits_exactly_the_script_of_the_page(tmp_path: Path) -> None:
    page = _page(_full_report(), tmp_path)
    script = re.search(r"<script>(.*)</script>", page, re.DOTALL)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert script and policy
    digest = base64.b64encode(hashlib.sha256(script.group(1).encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy.group(1)
    assert "default-src 'none'" in policy.group(1)


def test_write_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "report.html"
    Report("first").write(path)
    before = path.read_bytes()

    def fail(_source: object, _target: object) -> None:
        raise OSError("disk went away")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="went away"):
            Report("second").write(path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["report.html"], "no temporary file is left"
    Report("second").write(path)
    assert b"<title>second</title>" in path.read_bytes()


def test_content_before_any_section_and_an_empty_report(tmp_path: Path) -> None:
    report = Report("bare")
    assert "bare" in _page(report, tmp_path)
    report.code("x = 1")
    report.metrics([])
    report.samples([])
    report.table(["a"], [])
    assert "x = 1" in _page(report, tmp_path)
    with pytest.raises(ValueError, match="2 cells"):
        report.table(["a"], [[1, 2]])


def test_columns_of_numbers_align_right(tmp_path: Path) -> None:
    report = Report("t")
    report.table(["name", "value", "mixed"], [["7 days", 1.5, 1], ["b", "2.1 ± 0.3", "one"], ["c", None, 2]])
    page = _page(report, tmp_path)
    assert re.findall(r'<th scope="col"( class="n")?>', page) == ["", ' class="n"', ""]


# ---------------------------------------------------------------------------------------------- samples
def test_slider_data_of_a_small_sample(tmp_path: Path) -> None:
    report = Report("t")
    report.samples([Sample(["The", " food", " was", " <b>"], [0, 3, 1, 200], 200, "first")])
    page = _page(report, tmp_path)
    assert 'data-steps="0 3 1 200" data-window="4"' in page
    assert 'min="0" max="200" value="200"' in page
    body = re.search(r'data-window="4">(.*?)</div>', page, re.DOTALL)
    assert body
    spans = ['<span class="g">The</span>', "<span>food</span>", "<span>was</span>", "<span>&lt;b&gt;</span>"]
    assert body.group(1) == " ".join(spans)


def test_final_text_is_in_the_page_without_javascript(tmp_path: Path) -> None:
    tokens = ["a", "b", "\n", "\n  c", " ", "", "d "]
    sample = Sample(tokens, [1] * 7, 1)
    report = Report("t")
    report.samples([sample])
    body = re.search(r'class="page"[^>]*>(.*?)</div>', _page(report, tmp_path), re.DOTALL)
    assert body
    assert body.group(1).count("<span") == len(tokens)
    assert re.sub(r"<[^>]*>", "", body.group(1)) == "".join(tokens) == sample.text


def test_a_thousand_steps_stay_small(tmp_path: Path) -> None:
    report = Report("t")
    steps = np.random.default_rng(0).integers(1, 1001, 1024).tolist()
    report.samples([Sample([" token"] * 1024, steps, 1000)])
    assert len(_page(report, tmp_path)) < 75_000


@pytest.mark.parametrize(("steps", "message"), [([1], "2 tokens"), ([1, 5], "reveal step 5"), ([1, -1], "-1")])
def test_samples_that_contradict_themselves_are_refused(steps: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sample(["a", "b"], steps, 4)


# ---------------------------------------------------------------------------------------------- figures
NAN = float("nan")
FIGURES = {
    "loss": lambda: plots.loss_curve((range(1, 5000), 1 + 9 / np.arange(1, 5000)), ([9], [1.2], [0.1]), 0.9),
    "loss, one point": lambda: plots.loss_curve(([1], [2.0]), None, None),
    "loss, nothing": lambda: plots.loss_curve(([], []), ([], [], []), 1.0),
    "loss, all NaN": lambda: plots.loss_curve(([1, 2], [NAN, NAN]), ([1], [NAN], [NAN]), NAN),
    "loss, constant": lambda: plots.loss_curve((range(100), [1.0] * 100), ([5], [1.0], [0.0]), 1.0),
    "loss, unknown error": lambda: plots.loss_curve(([1, 2], [3, 2]), ([1, 2], [3, 2], [NAN, 0.1]), 1.0),
    "rows": lambda: plots.likelihood_against_truth([("a", 2.0, 0.1), ("$b_", 3.0, None)], 1.0),
    "rows, none": lambda: plots.likelihood_against_truth([]),
    "rows, NaN": lambda: plots.likelihood_against_truth([("a", NAN, NAN)], NAN),
    "rate": lambda: by_mask_rate([0.9, 0.1], [2, 1], [0.1, NAN], "loss"),
    "rate, one point": lambda: by_mask_rate([0.5], [1.0], [0.0], "loss"),
    "rate, nothing": lambda: by_mask_rate([], [], [], "loss"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_draws_and_touches_nothing_global(name: str, tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    report = Report("t")
    report.figure(FIGURES[name](), "caption", "alternative text")
    page = _page(report, tmp_path)
    assert page.count("<svg") == 1 and 'aria-label="alternative text"' in page
    drawing = page[page.index("<svg") : page.index("</svg>")]
    assert not any(colour in drawing for colour in THEME), "colours follow the scheme"
    assert dict(matplotlib.rcParams) == before
    assert not Gcf.figs, "pyplot manages no figure"


def test_figures_can_be_drawn_in_a_thread() -> None:
    figures: list[Figure] = []
    thread = threading.Thread(target=lambda: figures.extend(draw() for draw in FIGURES.values()))
    thread.start()
    thread.join()
    assert len(figures) == len(FIGURES)


def test_values_that_cannot_be_drawn_are_counted_aloud(tmp_path: Path) -> None:
    report = Report("t")
    report.figure(plots.loss_curve(([1, 2, 3], [2.0, NAN, math.inf])), "c", "a")
    assert "2 values are not finite and not drawn" in _page(report, tmp_path)


def test_every_curve_is_labelled_even_if_validation_stopped_early() -> None:
    steps = np.arange(1, 200)
    for last in (20, 190):
        figure = plots.loss_curve((steps, 1 + 9 / steps), ([10, last], [2.0, 1.5], [0.1, 0.1]), 0.9)
        texts = [text.get_text().split()[0] for axes in figure.axes for text in axes.texts]
        assert sorted(texts) == ["training", "true", "validation"]
        assert len(figure.axes) == (1 if last == 20 else 2)


def test_figures_of_others_keep_their_colours_on_a_white_card(tmp_path: Path) -> None:
    figure = Figure()
    figure.add_subplot().plot([0, 1], color=BLUE)
    report = Report("t")
    report.figure(figure, "c", "a")
    page = _page(report, tmp_path)
    assert 'class="plate card"' in page and f"stroke: {BLUE}" in page


def test_heavy_figures_become_png(tmp_path: Path) -> None:
    figure = Figure(figsize=(2, 2))
    figure.add_subplot().scatter(*np.random.default_rng(0).random((2, 20_000)), s=1)
    report = Report("t")
    report.figure(figure, "c", "many points")
    page = _page(report, tmp_path)
    assert '<img alt="many points"' in page and "data:image/png;base64," in page and len(page) < 500_000


# ------------------------------------------------------------------------------------------- how a training went
def test_vital_signs_draw_what_there_is(tmp_path: Path) -> None:
    steps = np.arange(1.0, 1001.0)
    logged = {name: np.c_[steps, 1 + steps % 7] for name in ("train/grad_norm", "train/tokens_per_s")}
    logged["train/grad_norm_max"] = np.c_[steps, 500 + steps]
    logged["train/mfu"] = np.c_[steps[:3], [0.1, 0.4, 0.9]]
    logged["memory/peak_gib"] = np.array([[1.0, np.nan]])
    figure = plots.vital_signs(logged)
    rate, norm, speed, memory = figure.axes
    assert "not logged" in {text.get_text() for axes in (rate, memory) for text in axes.texts}
    assert norm.get_yscale() == "log" and speed.get_ylim()[0] == 0 and "MFU 40 %" in speed.get_title("left")
    assert len(speed.lines[0].get_xdata()) <= 400
    assert plots.vital_signs({"train/nll": [[1, 2]]}) is None
    one = plots.vital_signs({"train/grad_norm": [[1, 2.0]]})
    report = Report("run")
    report.figure(figure, "signs", "signs")
    report.figure(one, "a single point", "signs")
    assert "<svg" in _page(report, tmp_path)


def test_the_loss_by_mask_rate_names_its_lines_in_their_order() -> None:
    series = [(f"{k}", np.c_[np.arange(9), np.full(9, 1.0 + k)]) for k in range(3)]
    axes = plots.losses_over_time([*series, ("nothing", np.empty((0, 2)))], "loss", smooth=True).axes[0]
    heights = {text.get_text(): text.get_position()[1] for text in axes.texts}
    assert heights["0"] < heights["1"] < heights["2"] < heights["share masked"] and "nothing" not in heights
    shades = [line.get_alpha() for line in axes.lines]
    assert shades == sorted(shades) and [line.get_ydata()[-1] for line in axes.lines] == [1.0, 2.0, 3.0]
    assert plots.losses_over_time([], "loss", smooth=True).axes
