"""Token attributions: numbers are kept, words are readable, and colour is never the only sign."""

from __future__ import annotations

import html
import math
import re

import numpy as np
import pytest

from palimpsest.report import Interval
from palimpsest.report.evidence import Evidence, evidence_block, signed
from palimpsest.report.report import Report
from palimpsest.report.style import spread

CLASSES = ("positive", "negative")
NAN = float("nan")


def page_of(*evidence: Evidence) -> str:
    report = Report("t")
    report.evidence(evidence)
    return report.render()


def words_of(page: str) -> list[str]:
    """The inside of every text box of a page."""
    return re.findall(r'<div class="words[^>]*>(.*?)</div>', page, re.DOTALL)


def strengths(markup: str) -> list[tuple[str, float]]:
    return [(side, float(s)) for side, s in re.findall(r'class="([pn])[ a-z]*" style="--s:([\d.]+)"', markup)]


def test_sign_and_square_root_of_the_numbers_become_the_colours() -> None:
    one = Evidence("a", ("The", " food", " was", " grim"), (0.0, 1.0, 0.25, -4.0), CLASSES)
    two = Evidence("b", ("Fine",), (0.01,), CLASSES)
    first, second = words_of(page_of(one, two))
    assert strengths(first) == [("p", 0.5), ("p", 0.25), ("n", 1.0)], "four nats are the end of the scale"
    assert strengths(second) == [("p", 0.05)], "one scale for all texts of a block"
    assert re.findall(r'title="([^"]*)"', first) == ["0.00 nats", "+1.00 nats", "+0.25 nats", "−4.00 nats"]
    assert '<span title="0.00 nats">The</span> <span' in first, "no colour for nothing; the space stays outside"


@pytest.mark.parametrize("scale", [1e-5, 0.013, 1.0, 7.77, 4e5])
def test_no_token_is_stronger_than_the_end_of_the_scale(scale: float) -> None:
    nats = tuple(scale * np.random.default_rng(0).normal(size=50))
    block = evidence_block([Evidence("", ("x",) * 50, nats, CLASSES)])
    shown = [float(piece["strength"]) for piece in block["texts"][0]["pieces"]]
    assert 0.6 < max(shown) <= 1 and min(shown) >= 0
    assert len(block["ticks"]) == len(set(block["ticks"])) == 5 and block["ticks"][2] == "0"


def test_the_sum_names_the_class_it_speaks_for() -> None:
    item = Evidence("", ("a", "b", "c"), (1.5, -4.25, 0.5), CLASSES)
    assert item.total == -2.25 and item.largest == 4.25
    page = page_of(item)
    assert re.search(r'<b>\+2\.2</b> nats for <span class="chip n">negative</span>', page)
    assert re.findall(r"flex-grow:([\d.]+)", page) == ["0.32", "0.68"]
    assert '<span class="chip p">positive</span> +2.0' in page and '<span class="chip n">negative</span> −4.2' in page


def test_the_heaviest_tokens_are_listed_in_words_with_their_occurrences_summed() -> None:
    tokens = ("bad", " bad", " good", " so", "\n", " meh")
    text = evidence_block([Evidence("", tokens, (-1.0, -2.0, 2.5, 0.1, 0.5, -0.2), CLASSES)])["texts"][0]
    assert text["sides"] == [
        [{"body": "good", "nats": "+2.50", "times": ""}, {"body": "⏎", "nats": "+0.50", "times": ""}],
        [{"body": "bad", "nats": "−3.00", "times": "(2 ×)"}],
    ]
    assert [piece["side"] for piece in text["pieces"]] == ["n top", "n top", "p top", "p", "p top", "n"]
    many = evidence_block([Evidence("", tuple(map(str, range(99))), tuple(range(99)), CLASSES)])["texts"][0]
    assert [word["body"] for word in many["sides"][0]] == ["98", "97", "96", "95", "94", "93"] and not many["sides"][1]


def test_tokens_that_are_not_weighed_stay_plain_and_are_counted() -> None:
    item = Evidence("", ("[CLS]", " fine", " it"), (NAN, 1.0, math.inf), CLASSES)
    assert item.total == 1.0
    page = page_of(item)
    assert "2 of 3 tokens are not weighed and not in the sum" in page
    assert '<span title="not weighed">[CLS]</span>' in page
    assert "not weighed" not in page_of(Evidence("", ("a",), (1.0,), CLASSES))


@pytest.mark.parametrize("nats", [(), (0.0, 0.0), (NAN, NAN)])
def test_nothing_to_weigh_is_no_accident(nats: tuple[float, ...]) -> None:
    page = page_of(Evidence("", (" a",) * len(nats), nats, CLASSES))
    assert not strengths(page) and "<b>0.0</b> nats" in page and "ramp" not in page.partition("<main>")[2]
    assert page_of()


def test_tokens_are_text_and_joined_they_are_the_text() -> None:
    hostile = "<script>alert(1)</script>\" onclick='x' & `code`"
    item = Evidence(
        hostile, (hostile, " b\x00\ud800", "\n", " ", "", "c "), (1.0, -1, 2, 0, 0, 1), ("<b>", "&"), hostile
    )
    page = page_of(item)
    assert page.count("<script") == 1 and "<b>&" not in page and "onclick='" not in page
    (words,) = words_of(page)
    assert html.unescape(re.sub(r"<[^>]*>", "", words)) == "".join(item.tokens).replace("\x00", "\ufffd")
    page.encode("utf-8", errors="replace")


def test_long_texts_are_folded_where_the_keyboard_reaches_them() -> None:
    page = page_of(
        *(Evidence(name, (" word",) * n, (0.1,) * n, CLASSES) for name, n in (("short", 100), ("long", 1000)))
    )
    opened = re.findall(r'<div class="(words[^>]*)>', page)
    assert opened == ['words"', 'words long" role="region" tabindex="0" aria-label="long"']
    assert re.search(r"@media print.*\.words\.long \{ max-height: none", page, re.DOTALL)


def test_the_legend_names_the_classes_where_all_texts_share_them() -> None:
    a, b = Evidence("", ("x",), (1.0,), ("Sports", "World")), Evidence("", ("x",), (1.0,), ("World", "Business"))
    assert evidence_block([a, a])["classes"] == ("Sports", "World")
    assert evidence_block([a, b])["classes"] == ("the class named first", "the one named second")


def test_contradictions_are_refused() -> None:
    with pytest.raises(ValueError, match="2 tokens but 1 numbers"):
        Evidence("", ("a", "b"), (1.0,), CLASSES)
    for classes in (("a",), ("a", "a"), ("a", "b", "c")):
        with pytest.raises(ValueError, match="two different classes"):
            Evidence("", (), (), classes)


@pytest.mark.parametrize(
    ("nats", "text"), [(1.25, "+1.25"), (-0.001, "0.00"), (-12.345, "−12.35"), (1234.5, "+1,234.50")]
)
def test_signs_are_written_where_the_digits_support_them(nats: float, text: str) -> None:
    assert signed(nats) == text


# --------------------------------------------------------------------------------------- the eyes of readers
def schemes() -> list[dict[str, np.ndarray | float]]:
    """The light and the dark scheme of the page: colours as sRGB in [0, 1], the strength of a full tint."""
    found = []
    for rules in re.findall(r":root \{(.*?)\}", page_of(), re.DOTALL):
        colours = re.findall(r"--([a-z]+): #([0-9a-f]{6});", rules)
        values = {name: np.frombuffer(bytes.fromhex(value), np.uint8) / 255 for name, value in colours}
        found.append({**values, "tint": int(re.search(r"--tint: (\d+)%", rules).group(1)) / 100})
    return found


def linear(srgb: np.ndarray) -> np.ndarray:
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def luminance(srgb: np.ndarray) -> float:
    return float(linear(srgb) @ [0.2126, 0.7152, 0.0722])


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB (D65) of linear RGB."""
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ np.clip(rgb, 0, 1)
    f = np.cbrt(np.maximum(xyz / [0.9505, 1.0, 1.089], 1e-9))
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


# Machado, Oliveira and Fernandes (2009), table 1, severity 1
BLINDNESS = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_the_strongest_colours_can_be_read_on_and_told_apart(scheme: int) -> None:
    colours = schemes()[scheme]
    tinted = [colours[hue] * colours["tint"] + colours["paper"] * (1 - colours["tint"]) for hue in ("blue", "orange")]
    for background in tinted:
        low, high = sorted([luminance(colours["ink"]), luminance(background)])
        assert (high + 0.05) / (low + 0.05) >= 4.5, "WCAG 2.1, contrast of text"
    for name, matrix in {"none": np.eye(3), **BLINDNESS}.items():
        one, other = (lab(np.array(matrix) @ linear(background)) for background in tinted)
        assert np.linalg.norm(one - other) > 20, name


# --------------------------------------------------------------------------------------------- its neighbours
@pytest.mark.parametrize(
    ("interval", "text"),
    [
        (Interval(95.833, 94.513, 96.821), "95.8 [94.5, 96.8]"),
        (Interval(50.0, 12.0, 88.0), "50 [10, 90]"),
        (Interval(0.0, 0.0, 0.1611), "0.00 [0.00, 0.16]"),
        (Interval(1.0, 1.0, 1.0), "1 [1, 1]"),
        (Interval(-2.5, -3.0, math.inf), "−2.5 [−3, ∞]"),
        (Interval(NAN, NAN, NAN), "NaN [NaN, NaN]"),
    ],
)
def test_intervals_share_the_digits_that_mean_something(interval: Interval, text: str) -> None:
    assert str(interval) == text


def test_a_ladder_of_methods_is_a_table_of_numbers() -> None:
    report = Report("t")
    report.table(
        ["method", "accuracy (%)", "draws", "seconds"],
        [["chance", Interval(50.8, 48.0, 53.6), None, None], ["ours", Interval(95.8, 94.5, 96.8), 32, 1.9]],
    )
    page = report.render()
    assert re.findall(r'<th scope="col"( class="n")?>', page) == ["", ' class="n"', ' class="n"', ' class="n"']
    assert '<td class="n">95.8 [94.5, 96.8]</td>' in page
    with pytest.raises(ValueError, match="before it begins"):
        Interval(1.0, 2.0, 0.0)


@pytest.mark.parametrize("seed", range(5))
def test_labels_move_only_where_they_touch(seed: int) -> None:
    assert spread([0.9, 0.1], 0.2) == pytest.approx([0.9, 0.1])
    assert spread([0.5, 0.1, 0.5], 0.2) == pytest.approx([0.4, 0.1, 0.6])
    positions = np.random.default_rng(seed).random(8)
    placed = np.array(spread(positions.tolist(), 0.1))
    assert np.diff(np.sort(placed)).min() >= 0.1 - 1e-12
    assert (np.argsort(placed) == np.argsort(positions)).all()
    assert placed.mean() == pytest.approx(positions.mean()), "a group stays centred on its own"
