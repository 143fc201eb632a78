"""Views of sampling: in the terminal during sampling, and afterwards as a page and a GIF."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated

from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console, Group
from rich.live import Live
from rich.style import Style
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from palimpsest.common.values import Needs, real
from palimpsest.dataloader import TextData
from palimpsest.diffusion import Diffusion
from palimpsest.evaluation.drawing import Drawing, SampledTokens
from palimpsest.report.denoising import Sample, denoising_page
from palimpsest.report.gif import write_gif
from palimpsest.report.history import Recorder, RowHistory, samples_of
from palimpsest.report.live import LiveToken, LiveView
from palimpsest.report.page import write_page
from palimpsest.report.palette import ink
from palimpsest.samplers.trace import Trace
from palimpsest.training.callbacks.progress import terminal

_FRAME_SECONDS = 0.05  # at most twenty pictures a second
_BOLD = 0.9  # confidence from which a token is bold
_AGES, _LEVELS = 31, 7  # distinguishable colours, by age and by confidence
_ANSI = ("blue", "cyan", "green", "yellow")  # where a terminal has no more


@dataclass(frozen=True)
class Views:
    """Settings of the views of the first texts."""

    show: bool = False  # in the terminal, during sampling
    show_delay: Annotated[float, real("[0, 3600]"), Needs("show")] = 0.0  # minimum seconds of a step there
    html: bool = True  # write denoising.html
    gif: bool = False  # write denoising.gif

    @contextmanager
    def watcher(self, num_texts: int, diffusion: Diffusion, data: TextData, drawing: Drawing) -> Iterator[TraceWatcher]:
        """Open an observer of the sampler."""
        recorder = Recorder(num_texts, diffusion.objective.process.blank_id)
        if self.show and rank_zero_only.rank == 0:
            with TerminalView(LiveView.of(num_texts, diffusion, data, drawing), self.show_delay) as show:
                yield TraceWatcher(recorder, show)
        else:
            yield TraceWatcher(recorder, None)

    def write(self, folder: Path, samples: Sequence[Sample], subtitle: str, command: str) -> list[Path]:
        """Write the requested views of `samples`; return their paths."""
        page, picture = folder / "denoising.html", folder / "denoising.gif"
        if self.html:
            write_page(page, denoising_page(samples, "Denoising", subtitle, command))
        if self.gif and samples:
            write_gif(picture, samples[0])
        return [path for path, asked in ((page, self.html), (picture, self.gif and samples)) if asked]


class TraceWatcher:
    """Records a batch, and shows it in the terminal if requested."""

    def __init__(self, recorder: Recorder, show: TerminalView | None) -> None:
        self._recorder, self._show = recorder, show

    def __call__(self, trace: Trace) -> None:
        self._recorder(trace)
        if self._show is not None:
            self._show(trace)

    @property
    def num_printed(self) -> int:
        """Number of texts already printed."""
        return self._show.num_printed if self._show is not None and sys.stdout.isatty() else 0

    def samples(self, sampled: Sequence[SampledTokens], tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
        """Return `sampled`, the first texts of the batch, with their recorded histories."""
        return samples_of(sampled, tokenizer, self._recorder.histories())


def described(protocol: Mapping[str, object]) -> str:
    """Return the sampler and its settings in a line."""
    settings: dict[str, object] = {}

    def visit(node: Mapping[str, object]) -> None:
        for key, value in node.items():
            if isinstance(value, Mapping):
                visit(value)
            elif not key.startswith("_") and key not in ("sampler", "prefix", "template"):
                settings[key] = value

    visit(protocol)
    defaults = {"temperature": 1, "nucleus_p": 1, "remask": "none"}
    shown = {key: value for key, value in settings.items()
            if value is not None and not isinstance(value, bool) and value != defaults.get(key)}  # fmt: skip
    hidden = {"remask_eta"} if shown.get("remask") != "remdm" else set()
    hidden |= set() if settings.get("var_length") else {"min_entropy"}
    hidden |= set() if settings.get("corrector_steps") else {"corrector_steps", "corrector_tokens", "corrector"}
    hidden |= set() if settings.get("self_correction_steps") else {"self_correction_steps"}
    hidden |= {"steps"} if settings.get("first_hitting") else set()
    hidden |= {"order"} if "threshold" in shown or shown.get("remask") == "low_confidence" else set()
    facts = [f"{key.replace('_', ' ')} {value}" for key, value in shown.items() if key not in hidden]
    facts = ["first hitting", *facts] if settings.get("first_hitting") else facts
    return " · ".join([str(protocol["sampler"]).split(".")[-2].replace("_", " "), *facts])


class TerminalView:
    """The first rows of a batch in the terminal, during sampling.

    The colour of a token shows the share of the text that was written when it appeared; it is greyer the less likely
    the model thought it, and bold if the model was sure. Dots are masks. Live if `console` is a terminal, else a few
    lines of plain text.
    """

    def __init__(self, texts: LiveView, delay: float, console: Console | None = None) -> None:
        self.texts, self._delay = texts, delay
        self._console = console or terminal()
        self._live: Live | None = None
        self._quarter = 0
        self._busy = self._drawn_at = self._waited_at = self._woke = 0.0
        self.num_printed = 0  # texts printed in full at the end

    def __enter__(self) -> TerminalView:
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.update(self.picture(whole=True) if self.texts.rows else Text(), refresh=True)
            self._live.stop()
            self._live, self.num_printed = None, len(self.texts.rows)

    def __call__(self, trace: Trace) -> None:
        """Update with `trace`, and show it unless the last picture was shown only just now."""
        now = time.monotonic()
        if self.texts.rows:
            self._busy += now - self._woke
        changed = self.texts.update(trace)
        if self._live is None:
            self._print_plainly()
        elif changed:
            wait = self._waited_at + self._delay - now if self.texts.step > 1 else 0.0
            if wait > 0:
                time.sleep(wait)
            self._waited_at = time.monotonic()
            if self._waited_at - self._drawn_at >= _FRAME_SECONDS:
                self._live.update(self.picture(), refresh=True)
                self._drawn_at = time.monotonic()
        self._woke = time.monotonic()

    def picture(self, whole: bool = False) -> Group:
        """Return the texts, as many as fit, and a status line; a `whole` picture may exceed the terminal's height."""
        room, blocks = max(6, self._console.height - 4), []
        for number, row in enumerate(self.texts.rows, 1):
            lines = self._text(row).wrap(self._console, self._console.width)
            if not whole and len(lines) > room - 2:
                if blocks:
                    break
                written = self._text(row, upto=row.last_written + 1).wrap(self._console, self._console.width)
                end = max(room - 2, min(len(lines), len(written) + 2))
                lines = lines[end - (room - 2) : end]
            title = Text(f"\n{number}" if len(self.texts.rows) > 1 else "", "dim")
            blocks += [title, *lines]
            room -= len(lines) + 2
        return Group(*blocks, Text(""), self._status())

    def _text(self, row: RowHistory, upto: int | None = None) -> Text:
        """Return a row, or its first `upto` places."""
        text, ansi = Text(), self._console.color_system == "standard"
        for token in self.texts.tokens(row, upto):
            text.append(token.text, _style(token, ansi))
        return text

    def _status(self) -> Text:
        done = 1 - self.texts.left / max(1, self.texts.total)
        width = max(8, min(32, self._console.width - 70))
        line = Text()
        for i in range(width):
            line.append("━", Style(color=ink(i / (width - 1)), dim=i >= round(done * width)))
        speed = (self.texts.total - self.texts.left) / self._busy if self._busy else 0.0
        line.append(f"  step {self.texts.step}", "bold")
        line.append(
            f"  {self.texts.left:,} masks left  {self.texts.evaluations:,} network evaluations  {speed:,.0f} tokens/s",
            "dim",
        )
        return line

    def _print_plainly(self) -> None:
        """Print whenever another quarter is written."""
        quarter = 4 * (self.texts.total - self.texts.left) // max(1, self.texts.total)
        if quarter < self._quarter:
            return
        self._quarter = quarter + 1
        line = f"step {self.texts.step}, {self.texts.left:,} masks left, {self.texts.evaluations:,} network evaluations"
        self._console.print(Text(line), soft_wrap=True)
        for row in self.texts.rows:
            self._console.print(Text("  " + " ".join(self._text(row).plain.split())), soft_wrap=True)


def _style(token: LiveToken, ansi: bool) -> Style:
    if token.masked:
        return Style(dim=True)
    if token.age is None:
        return Style()
    return _shade(round(_AGES * token.age), round(_LEVELS * token.confidence), token.confidence >= _BOLD, ansi)


@lru_cache(maxsize=1024)
def _shade(age: int, confidence: int, bold: bool, ansi: bool) -> Style:
    colour = _ANSI[age * len(_ANSI) // (_AGES + 1)] if ansi else ink(age / _AGES, confidence / _LEVELS)
    return Style(color=colour, bold=bold or None)
