"""Denoising histories: recordings replay to the samples, and page, player and GIF show them."""

from __future__ import annotations

import html
import json
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

from palimpsest.evaluation.drawing import draw
from palimpsest.report.denoising import PastToken, Sample, denoising_page
from palimpsest.report.gif import _layout, _picture, write_gif
from palimpsest.report.history import Recorder, sample_of
from palimpsest.report.page import write_page
from palimpsest.report.palette import ink
from palimpsest.report.report import Report
from palimpsest.samplers.trace import Trace
from tests.helpers import exact
from tests.helpers.commands import CHROMIUM
from tests.helpers.histories import ids_at

HOSTILE = " <script>alert(1)</script>'\"&"
TOKENS = ["Once", " upon", HOSTILE, " a", " time", ",", " there", " was", "\n\nan", " end", "."]
SAMPLE = Sample(
    TOKENS, [0, 0, 3, 8, 1, 9, 12, 5, 5, 7, 12], 12, "A <b>title</b>",
    [1, 1, 0.31, 0.9, 0.99, 0.5, 0.05, 0.8, 0.7, 1e-9, 1.0],
    (PastToken(6, " where", 2, 4, 0.25), PastToken(6, HOSTILE, 6, 12, 0.5), PastToken(3, " the", 1, 8, 0.125)),
    "12 evaluations",
)  # fmt: skip


# ------------------------------------------------------------------------------------------- what is recorded
def _frames(rows: int, length: int, steps: int, mask_id: int, seed: int) -> list[Trace]:
    """Return a run in which tokens are written, masked again, replaced, and rewritten."""
    draw, frames = np.random.default_rng(seed), []
    ids, sure = np.full((rows, length), mask_id), np.zeros((rows, length), dtype=np.float32)
    ids[:, 0], sure[:, 0] = 1, 1.0
    for step in range(steps + 1):
        if step:
            hit = draw.random((rows, length)) < 0.3
            hit[:, 0] = False
            ids = np.where(hit, draw.integers(0, mask_id + (step < steps), (rows, length)), ids)
            ids = np.where((ids == mask_id) & (step == steps), 2, ids)
            sure = np.where(ids == mask_id, 0, np.where(hit, draw.random((rows, length)), sure)).astype(np.float32)
        live = (torch.from_numpy(part).clone() for part in (ids, sure))
        frames.append(exact.frame(step, *live))
    return frames


@pytest.mark.parametrize("steps", [5, 300], ids=["fetched once", "fetched on the way"])
def test_a_history_holds_every_frame(steps):
    frames = _frames(3, 7, steps, mask_id=4, seed=steps)
    recorder = Recorder(2, blank_id=4)
    for frame in frames:
        live = exact.frame(frame.num_steps, frame.ids_BL.clone(), frame.confidence_BL.clone())
        recorder(live)
        live.ids_BL.zero_()  # a sampler goes on writing on its tensors
    histories = recorder.histories()
    assert len(histories) == 2
    for row, history in enumerate(histories):
        assert all(ids_at(history, frame.num_steps) == frame.ids_BL[row].tolist() for frame in frames)


def test_a_row_that_grows_is_recorded():
    recorder = Recorder(1, blank_id=9)
    for step, ids in enumerate([[1, 9], [1, 9, 9, 9], [1, 2, 9, 9], [1, 2, 3, 4]]):
        recorder(exact.frame(step, torch.tensor([ids]), torch.ones(1, len(ids))))
    assert [ids_at(recorder.histories()[0], step) for step in (0, 2, 3)] == [[1, 9, 9, 9], [1, 2, 9, 9], [1, 2, 3, 4]]


@pytest.mark.parametrize("overrides", [
    ["sampling.predictor=unmask", "sampling.remask=remdm", "sampling.remask_eta=0.5"],
    ["parameterization=ar"], ["algo=bd3lm", "block_size=8"],
    ["data.wrap=true", "model.length=16", "sampling.semi_ar=true", "sampling.stride_length=8",
     "sampling.num_strides=2"],
], ids=["remdm", "ar", "block", "semi_ar"])  # fmt: skip
def test_frames_replay_to_what_was_drawn(untrained, overrides):
    experiment, data, diffusion = untrained("sampling.steps=9", *overrides)
    recorder, spent = Recorder(3, data.vocabulary.mask_id), []

    def watch(frame):
        recorder(frame)
        spent.append(frame.evaluations_B.tolist())

    sampled = draw(diffusion, data, experiment.build.drawing(), 4, 4, seed=1, watch=watch)
    histories = recorder.histories()
    assert len(histories) == 3
    assert all(
        a <= b for before, after in zip(spent, spent[1:], strict=False) for a, b in zip(before, after, strict=True)
    )
    assert spent[-1] == [text.evaluations for text in sampled]
    taken_back = 0
    for text, history in zip(sampled, histories, strict=False):
        last = ids_at(history, 10**9)
        assert [last[place] for place in text.places] == text.ids
        sample = sample_of(text, data.tokenizer, "", history)
        assert [now and now.token for now in sample.at(text.num_steps)] == sample.tokens
        given = ids_at(history, 0)
        assert all(
            (step == 0) == (given[place] != data.vocabulary.mask_id)
            for place, step in zip(text.places, text.steps, strict=True)
        )
        taken_back += len(sample.past)
        for step in range(0, text.num_steps + 1, 3):
            there = ids_at(history, step)
            kept = [place for place, token in zip(text.places, text.ids, strict=True)
                    if token not in data.tokenizer.all_special_ids or token == data.tokenizer.unk_token_id]  # fmt: skip
            masked = [now is None for now in sample.at(step)]
            assert masked == [there[place] == data.vocabulary.mask_id for place in kept]
    assert bool(taken_back) == ("sampling.remask=remdm" in overrides)


# ------------------------------------------------------------------------------------------------ samples
def test_the_tokens_after_a_step():
    def said(step: int) -> list[str | None]:
        return [now and now.token for now in SAMPLE.at(step)]

    assert said(0) == ["Once", " upon", *[None] * 9]
    assert said(3)[2:7] == [HOSTILE, " the", " time", None, " where"]
    assert said(4)[6] is None and said(6)[6] == said(11)[6] == HOSTILE
    assert said(12) == TOKENS and SAMPLE.text == "".join(TOKENS)
    assert SAMPLE.at(7)[3].confidence == 0.125 and SAMPLE.at(8)[3].confidence == 0.9


@pytest.mark.parametrize("past", [
    [PastToken(2, "x", 1, 5, 0.5)], [PastToken(2, "x", 2, 1, 0.5)], [PastToken(0, "x", 1, 2, 0.5)],
    [PastToken(11, "x", 1, 2, 0.5)],
    [PastToken(6, "x", 1, 5, 0.5), PastToken(6, "y", 4, 6, 0.5)],
])  # fmt: skip
def test_a_past_out_of_order_is_refused(past):
    with pytest.raises(ValueError, match="the past of place"):
        Sample(TOKENS, SAMPLE.reveal_step, 12, past=past)


# ------------------------------------------------------------------------------------------------ the page
class _Tree(HTMLParser):
    """The page's elements; refuses tags that are not closed in the order in which they were opened."""

    VOID = {"meta", "input", "br", "link", "img"}

    def __init__(self) -> None:
        super().__init__()
        self.open, self.tags, self.pages, self.spans = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append((tag, dict(attrs)))
        if tag == "div" and "page" in (dict(attrs).get("class") or "").split():
            self.pages.append(dict(attrs))
            self.spans.append([])
        elif tag == "span" and len(self.open) > 1 and "data-steps" in self.open[-2][1]:
            self.spans[-1].append([dict(attrs), ""])

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop()[0] == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if self.open and self.open[-1][0] == "span" and len(self.open) > 1 and "data-steps" in self.open[-2][1]:
            self.spans[-1][-1][1] += data


def _parsed(page: str) -> _Tree:
    tree = _Tree()
    tree.feed(page)
    tree.close()
    assert not tree.open, f"not closed: {tree.open}"
    return tree


def _page(tmp_path: Path, *samples: Sample) -> str:
    page = denoising_page(samples, "Denoising " + HOSTILE, f"`{HOSTILE}`", HOSTILE)
    write_page(tmp_path / "denoising.html", page)
    return (tmp_path / "denoising.html").read_text(encoding="utf-8")


def test_the_page_is_whole_loads_nothing_and_runs_its_own_script_alone(tmp_path):
    page = _page(tmp_path, SAMPLE, Sample([], [], 0), Sample(["only\x1b[2J", " given"], [0, 0], 0))
    tree = _parsed(page)
    assert [tag for tag, _ in tree.tags].count("script") == 1 and "<script>alert" not in page
    assert not any(name.startswith("on") or name in ("src", "href") for _, attrs in tree.tags for name in attrs)
    assert not re.search(r"url\(|@import|https?://|\x1b", page)
    policy = next(attrs["content"] for tag, attrs in tree.tags if "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'") and "script-src 'sha256-" in policy


def test_the_page_holds_the_whole_history(tmp_path):
    tree = _parsed(_page(tmp_path, SAMPLE))
    told = tree.pages[0]
    assert list(map(int, told["data-steps"].split())) == SAMPLE.reveal_step
    np.testing.assert_allclose(list(map(float, told["data-confidence"].split())), SAMPLE.confidence, atol=5e-4)
    assert json.loads(told["data-past"]) == [
        [v.place, v.written, v.erased, v.token.strip(), v.confidence] for v in SAMPLE.past
    ]
    assert [text for _, text in tree.spans[0]] == [token.lstrip() for token in TOKENS], "readable without a script"
    assert [attrs.get("class") for attrs, _ in tree.spans[0]].count("g") == 2


def test_the_report_has_the_same_player(tmp_path):
    report = Report("t")
    report.samples([SAMPLE])
    inside = _parsed(report.render()).pages[0]
    assert {k: v for k, v in inside.items() if k != "class"} == {
        k: v for k, v in _parsed(_page(tmp_path, SAMPLE)).pages[0].items() if k != "class"
    }


# ------------------------------------------------------------------------------------------------ the player
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: chromium or google-chrome on the PATH")

# Actions of a user, and what the page then shows. Runs after the page's own script.
SOMEBODY = """
window.requestAnimationFrame = draw => setTimeout(() => draw(performance.now()), 16);  // without a screen, few frames
const seen = [], output = document.querySelector('output'), page = document.querySelector('.page');
const said = what => seen.push([what, output.firstChild.textContent, page.querySelectorAll('.m').length]);
const press = key => { document.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true})); said(key); };
said('start');
for (const key of ['Home', 'ArrowRight', 'ArrowRight', 'ArrowLeft', 'End', 'Home']) press(key);
const slider = document.querySelector('input');
slider.value = 6; slider.dispatchEvent(new Event('input')); said('slider');
page.children[6].dispatchEvent(new PointerEvent('pointerover', {bubbles: true, pointerType: 'mouse'}));
const tip = document.querySelector('.tip').innerText;
press('+');
const pace = document.querySelector('.pace').textContent;
press('Home');
press(' ');
const playing = document.querySelector('.sample').classList.contains('playing');
const end = tries => {
  if (tries && !output.firstChild.textContent.startsWith('step 12')) return setTimeout(end, 100, tries - 1);
  said('played');
  document.body.dataset.seen = JSON.stringify({seen, tip, pace, playing});
};
end(250);
"""


def _dom(page: Path, fragment: str, budget: int = 500) -> str:
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--virtual-time-budget={budget}", "--dump-dom",
               f"--user-data-dir={page.parent / 'browser'}", f"{page.as_uri()}{fragment}"]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@needs_browser
def test_the_player_shows_a_step(tmp_path):
    _page(tmp_path, SAMPLE)
    spans = _parsed(_dom(tmp_path / "denoising.html", "#step=7")).spans[0]
    for (attrs, _), now, final in zip(spans, SAMPLE.at(7), TOKENS, strict=True):
        classes = (attrs.get("class") or "").split()
        assert ("m" in classes) == (now is None)
        assert ("was" in classes) == (now is not None and now.token != final)
        if now is not None and now.token != final:
            assert attrs["data-was"] == now.token.strip()
        assert ("new" in classes) == (now is not None and now.written == 7)


@needs_browser
def test_the_player_obeys(tmp_path):
    page = _page(tmp_path, SAMPLE)
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    page = page.replace("</body>", f"<script>{{ {SOMEBODY} }}</script></body>")
    (tmp_path / "played.html").write_text(page, encoding="utf-8")
    found = re.search(r'data-seen="([^"]*)"', _dom(tmp_path / "played.html", "#step=3", 30_000))
    told = json.loads(html.unescape(found[1]))
    masks = [sum(now is None for now in SAMPLE.at(step)) for step in range(13)]
    steps = {"start": [3], "Home": [0, 0, 0], "ArrowRight": [1, 2], "ArrowLeft": [1], "End": [12], "slider": [6],
             "+": [6], " ": [0], "played": [12]}  # fmt: skip
    for what, label, count in told["seen"]:
        step = steps[what].pop(0)
        assert (label, count) == (f"step {step} of 12", masks[step]), what
    assert told["pace"] == "2×" and told["playing"]
    assert "alert(1)" in told["tip"] and "confidence 50 %" in told["tip"]
    assert "before that" in told["tip"] and "“where” steps 2 to 3 · confidence 25 %" in told["tip"]


# ------------------------------------------------------------------------------------------------ the picture
@pytest.mark.parametrize("asked", [2, 5, 60])
def test_a_gif_ends_with_the_text_and_holds_it(tmp_path, asked):
    write_gif(tmp_path / "a.gif", SAMPLE, asked)
    changes = {0, *SAMPLE.reveal_step, *(t for v in SAMPLE.past for t in (v.written, v.erased))}
    with Image.open(tmp_path / "a.gif") as picture:
        assert picture.n_frames == min(asked, len(changes)) and picture.info["loop"] == 0
        first = picture.convert("RGB")
        picture.seek(picture.n_frames - 1)
        assert picture.info["duration"] >= 3000
        final = _picture(SAMPLE, _layout(SAMPLE), 12, 0)
        off = np.asarray(ImageChops.difference(picture.convert("RGB"), final)).astype(int)
        assert off.mean() < 1.5
        assert np.asarray(ImageChops.difference(first, final)).astype(int).mean() > 3 * off.mean()


def test_a_long_text_is_a_small_file(tmp_path):
    draw = np.random.default_rng(0)
    words = [f" {'abcdefgh'[: int(n)]}" for n in draw.integers(2, 8, 128)]
    write_gif(tmp_path / "a.gif", Sample(words, draw.integers(1, 65, 128).tolist(), 64, "", draw.random(128).tolist()))
    assert 0 < (tmp_path / "a.gif").stat().st_size < 400_000


def test_every_token_has_room_and_nothing_overlaps():
    text = Sample(["a" * 150, " b", "\n", " c", "d" * 10, ""], [1] * 6, 1)
    layout = _layout(text)
    taken = [
        (piece.line, piece.column + i) for pieces in layout.pieces for piece in pieces for i in range(len(piece.text))
    ]
    assert len(set(taken)) == len(taken) == 150 + 1 + 1 + 10
    assert max(column for _, column in taken) < layout.columns


# ------------------------------------------------------------------------------------------------ the colours
def test_colours_read_on_white_and_on_black_and_are_evenly_spread():
    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    for sure in (0.0, 0.5, 1.0):
        lights = [light(ink(at, sure)) for at in np.linspace(0, 1, 32)]
        assert all(1.05 / (y + 0.05) > 3.6 and (y + 0.05) / 0.05 > 4.5 for y in lights)
    assert len({ink(at) for at in np.linspace(0, 1, 32)}) == 32
