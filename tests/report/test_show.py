"""The live view of sampling, in a terminal and without one."""

from __future__ import annotations

import io
import re
import time

import torch
from rich.console import Console

from palimpsest.report.history import Recorder
from palimpsest.report.live import LiveView
from palimpsest.report.views import TerminalView, TraceWatcher, described
from palimpsest.samplers.trace import Trace
from tests.helpers import exact
from tests.helpers.histories import ids_at

MASK = 9
WORDS = ["[PAD]", "[EOS]", " red", " green", " blue", " \x1b[2J\x9b1m", "", "", "", "▢"]


class Words:
    """A tokenizer of ten ids."""

    unk_token_id = mask_token_id = None
    bos_token_id = eos_token_id = 1
    all_special_ids = [0, 1]

    def get_vocab(self):
        return {word or f"unused{i}": i for i, word in enumerate(WORDS)}

    def __call__(self, texts, **kwargs):
        return {"input_ids": [[2] for _ in texts]}

    def decode(self, ids):
        return "".join(WORDS[i] for i in ids)

    def convert_ids_to_tokens(self, i):
        return WORDS[i]


def frame(step: int, *rows: list[tuple[int, float]]) -> Trace:
    ids, sure = (torch.tensor([[cell[k] for cell in row] for row in rows]) for k in (0, 1))
    return exact.frame(step, ids, sure, torch.full((len(rows),), step))


M, GIVEN = (MASK, 0.0), (2, 1.0)
WALK = [
    frame(0, [GIVEN, M, M, M, (0, 1.0)]),
    frame(1, [GIVEN, (3, 0.95), M, M, (0, 1.0)]),
    frame(2, [GIVEN, (3, 0.95), M, (5, 0.05), (0, 1.0)]),
    frame(3, [GIVEN, M, (4, 0.5), (5, 0.05), (0, 1.0)]),
    frame(4, [GIVEN, (3, 0.99), (4, 0.5), (5, 0.05), (0, 1.0)]),
]


def watched(walk: list[Trace], terminal: bool = True, **settings: object) -> tuple[TerminalView, str]:
    """Return the display after `walk`, and its output."""
    colours = "truecolor" if terminal else None
    console = Console(file=io.StringIO(), force_terminal=terminal, width=80, height=24, color_system=colours)
    with TerminalView(LiveView(Words(), MASK, 2, **settings), 0.0, console) as show:
        for one in walk:
            show(one)
    return show, console.file.getvalue()


def plain(show: TerminalView) -> str:
    """The first text."""
    return show._text(show.texts.rows[0]).plain


def styles(show: TerminalView) -> dict[str, str]:
    """How each word of the first text looks."""
    text = show._text(show.texts.rows[0])
    return {text.plain[span.start : span.end].strip(): str(span.style) for span in text.spans}


def test_the_words_of_a_picture_look_as_they_were_written():
    early, late = (styles(watched(WALK[: n + 1])[0]) for n in (2, 4))
    assert "red" not in early, "given: as the terminal writes"
    assert early["····"] == "dim"
    assert early["green"].startswith("bold #") and late["green"].startswith("bold #"), "sure"
    assert early["green"] != late["green"], "the colour follows the step"
    unsure = next(style for word, style in late.items() if "2J" in word)
    assert unsure.startswith("#"), "unsure"
    red, green, blue = (int(unsure[i : i + 2], 16) for i in (1, 3, 5))
    assert max(red, green, blue) - min(red, green, blue) < 80, "greyer"
    assert "[PAD]" not in late


def test_tokens_go_and_come_back():
    texts = [plain(watched(WALK[: n + 1])[0]) for n in (1, 2, 3, 4)]
    assert [text.count("····") for text in texts] == [2, 1, 1, 0]
    assert [texts[n][:14] for n in (1, 2, 3)] == ["red green ····", "red ···· blue ", "red green blue"]


def test_a_token_cannot_command_the_terminal():
    _, written = watched(WALK)
    assert "\x1b[2J" not in written and "\x9b" not in written and "\ufffd[2J" in written


def test_the_status_counts():
    show, written = watched(WALK)
    assert show.num_printed == 1
    last = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", written).splitlines()[-1]
    assert re.search(r"step 4 +0 masks left +4 network evaluations +[\d,]+ tokens/s", last)
    assert "\x1b[?25h" in written, "the cursor is back"


def test_nothing_is_shown_after_the_end():
    ended = [frame(0, [GIVEN, M, M, M]), frame(1, [GIVEN, (3, 0.5), M, M]), frame(2, [GIVEN, (3, 0.5), (1, 0.5), M])]
    assert plain(watched(ended, end_id=1)[0]) == "red green"
    assert plain(watched(ended)[0]) == "red green ····"


def test_a_text_taller_than_the_terminal_is_followed():
    tall = [frame(0, [GIVEN] + [M] * 999), frame(1, [GIVEN] + [(3, 0.5)] * 900 + [M] * 99)]
    show, _ = watched(tall)
    console = Console(file=io.StringIO(), width=80, height=24, record=True)
    console.print(show.picture())
    lines = console.export_text().splitlines()
    assert len(lines) <= 24 and any("green ····" in line for line in lines) and "step 1" in lines[-1]


def test_without_a_terminal_a_few_plain_frames():
    many = [frame(step, [GIVEN] + [(3, 0.5)] * step + [M] * (80 - step)) for step in range(81)]
    _, written = watched(many, terminal=False)
    assert "\x1b" not in written and written.count("network evaluations") == 5
    assert written.splitlines()[0] == "step 0, 80 masks left, 0 network evaluations"
    assert written.splitlines()[-1].split() == ["red", *["green"] * 80]


def test_a_step_takes_its_time_and_pictures_are_not_too_many(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))

    def pictures(delay: float) -> int:
        console = Console(file=io.StringIO(), force_terminal=True, width=80, height=24)
        with TerminalView(LiveView(Words(), MASK, 1), delay, console) as show:
            drawn = []
            show.picture = lambda whole=False, made=show.picture: drawn.append(clock[0]) or made(whole)
            for step in range(40):
                clock[0] += 0.01
                show(frame(step, [GIVEN] + [(3, 0.5)] * step + [M] * (40 - step)))
        return len(drawn)

    clock[0] = 100.0
    assert pictures(0.0) < 40 * 0.01 / 0.05 + 3
    before = clock[0]
    assert pictures(0.2) >= 39 and clock[0] - before >= 38 * 0.2


def test_what_watches_records_too():
    recorder = Recorder(1, MASK)
    watching = TraceWatcher(recorder, None)
    for one in WALK:
        watching(one)
    assert watching.num_printed == 0 and ids_at(recorder.histories()[0], 2) == [2, 3, MASK, 5, 0]


def test_the_sampler_is_described_in_a_line():
    how = {"schedule": "cosine", "order": "margin", "threshold": None, "remask": "none", "remask_eta": 0.02}
    protocol = {"sampler": "palimpsest.samplers.unmasking.sample", "_partial_": True, "steps": 8, "how": how,
                "choice": {"_target_": "x", "temperature": 0.7, "top_k": None, "nucleus_p": 1.0},
                "prefix": "a"}  # fmt: skip
    assert described(protocol) == "unmasking · steps 8 · schedule cosine · order margin · temperature 0.7"
    assert "order" not in described({**protocol, "how": {**how, "remask": "low_confidence"}})
    block = {"sampler": "palimpsest.samplers.block.sample", "first_hitting": True, "steps": 128, "var_length": False,
             "min_entropy": 4.0, "context": 8}  # fmt: skip
    assert described(block) == "block · first hitting · context 8"
    assert "steps 128 · min entropy 4.0" in described({**block, "first_hitting": False, "var_length": True})
    corrector = {"corrector_steps": 0, "corrector_tokens": 1, "corrector": "random", "self_correction_steps": 0}
    noise = {"sampler": "palimpsest.samplers.uniform.sample", "steps": 16, **corrector}
    assert described(noise) == "uniform · steps 16"
    assert "corrector steps 2 · corrector tokens 1 · corrector random" in described({**noise, "corrector_steps": 2})
