"""Seeing texts being written: in the terminal as it happens, and afterwards as a page and a moving picture."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
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

from palimpsest.common.values import real
from palimpsest.dataloader import TextData
from palimpsest.diffusion import Diffusion
from palimpsest.evaluation.drawing import Drawing, Drawn
from palimpsest.report.denoising import Sample, write_denoising
from palimpsest.report.gif import write_gif
from palimpsest.report.history import Course, Recorder, samples_of
from palimpsest.report.live import Piece, Standing
from palimpsest.report.palette import ink
from palimpsest.samplers.trace import Trace
from palimpsest.training.callbacks.progress import terminal

_FRAME_SECONDS = 0.05  # at most twenty pictures a second
_BOLD = 0.9  # confidence from which a token is bold
_AGES, _SURES = 31, 7  # colours that can be told apart: by age, by confidence
_FEW = ("blue", "cyan", "green", "yellow")  # where a terminal has no more


@dataclass(frozen=True)
class Views:
    """How the denoising of the first texts is shown. show: in the terminal, as it happens. show_delay: seconds that a
    step takes there at least. html, gif: denoising.html and denoising.gif beside the report.
    """

    show: bool = False
    show_delay: Annotated[float, real("[0, 3600]")] = 0.0
    html: bool = True
    gif: bool = False

    def watcher(self, num_texts: int, diffusion: Diffusion, data: TextData, drawing: Drawing) -> Watching:
        """Who watches the sampler: a context, and a watcher inside it."""
        show = None
        if self.show and rank_zero_only.rank == 0:
            show = Show(Standing.of(num_texts, diffusion, data, drawing), self.show_delay)
        return Watching(Recorder(num_texts, diffusion.objective.process.blank_id), show)

    def write(self, folder: Path, samples: Sequence[Sample], subtitle: str, command: str) -> list[Path]:
        """Writes what is asked for of `samples`, and says where it lies."""
        page, picture = folder / "denoising.html", folder / "denoising.gif"
        if self.html:
            write_denoising(page, samples, subtitle=subtitle, command=command)
        if self.gif and samples:
            write_gif(picture, samples[0])
        return [path for path, asked in ((page, self.html), (picture, self.gif and samples)) if asked]


class Watching:
    """Watches a batch for as long as the context lasts: records it, and shows it where that is asked for."""

    def __init__(self, recorder: Recorder, show: Show | None) -> None:
        self._recorder, self._show, self._stack = recorder, show, ExitStack()

    def __enter__(self) -> Watching:
        if self._show is not None:
            self._stack.enter_context(self._show)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def __call__(self, trace: Trace) -> None:
        self._recorder(trace)
        if self._show is not None:
            self._show(trace)

    @property
    def read(self) -> int:
        """How many texts whoever reads the standard output has before his eyes already."""
        return self._show.on_screen if self._show is not None and sys.stdout.isatty() else 0

    def samples(self, drawn: Sequence[Drawn], tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
        """`drawn`, the first texts of the batch, with the courses of those that were recorded."""
        return samples_of(drawn, tokenizer, self._recorder.histories())


def described(protocol: Mapping[str, object]) -> str:
    """How texts were drawn, in a line: the sampler, and what was set of it."""
    settings: dict[str, object] = {}

    def visit(node: Mapping[str, object]) -> None:
        for key, value in node.items():
            if isinstance(value, Mapping):
                visit(value)
            elif not key.startswith("_") and key not in ("sampler", "prefix", "template"):
                settings[key] = value

    visit(protocol)
    as_it_is = {"temperature": 1, "nucleus_p": 1, "remask": "none"}
    said = {key: value for key, value in settings.items()
            if value is not None and not isinstance(value, bool) and value != as_it_is.get(key)}  # fmt: skip
    unread = {"remask_eta"} if said.get("remask") != "remdm" else set()
    unread |= {"order"} if "threshold" in said or said.get("remask") == "low_confidence" else set()
    facts = [f"{key.replace('_', ' ')} {value}" for key, value in said.items() if key not in unread]
    return " · ".join([str(protocol["sampler"]).split(".")[-2].replace("_", " "), *facts])


class Show:
    """The first rows of a batch in the terminal, as they are written: the colour of a token says how much
    was there already when it appeared, so that it follows the steps whatever the sampler; the greyer, the less likely
    the model thought it, and bold where it was sure; dots are masks.

    Live where `console` is a terminal, else a few lines of plain text.
    """

    def __init__(self, texts: Standing, delay: float, console: Console | None = None) -> None:
        self.texts, self._delay, self._console = texts, delay, console or terminal()
        self._live: Live | None = None
        self._quarter = 0
        self._busy = self._drawn_at = self._waited_at = self._woke = 0.0
        self.on_screen = 0  # texts that a terminal was left with

    def __enter__(self) -> Show:
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.update(self.picture(whole=True) if self.texts.rows else Text(), refresh=True)
            self._live.stop()
            self._live, self.on_screen = None, len(self.texts.rows)

    def __call__(self, trace: Trace) -> None:
        """Take in what `trace` holds, and show it unless something was shown only just now."""
        now = time.monotonic()
        if self.texts.rows:
            self._busy += now - self._woke
        changed = self.texts.take(trace)
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

    # ------------------------------------------------------------------------------ pictures

    def picture(self, whole: bool = False) -> Group:
        """The texts as they are, and a line on how far they are. As many as fit; a `whole` picture may be taller than
        the terminal."""
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

    def _text(self, row: Course, upto: int | None = None) -> Text:
        """A row, or its first `upto` places."""
        text, few = Text(), self._console.color_system == "standard"
        for piece in self.texts.pieces(row, upto):
            text.append(piece.text, _style(piece, few))
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
        """Whenever another quarter is written."""
        quarter = 4 * (self.texts.total - self.texts.left) // max(1, self.texts.total)
        if quarter < self._quarter:
            return
        self._quarter = quarter + 1
        said = f"step {self.texts.step}, {self.texts.left:,} masks left, {self.texts.evaluations:,} network evaluations"
        self._console.print(Text(said), soft_wrap=True)
        for row in self.texts.rows:
            self._console.print(Text("  " + " ".join(self._text(row).plain.split())), soft_wrap=True)


def _style(piece: Piece, few: bool) -> Style:
    if piece.masked:
        return Style(dim=True)
    if piece.age is None:
        return Style()
    return _shade(round(_AGES * piece.age), round(_SURES * piece.confidence), piece.confidence >= _BOLD, few)


@lru_cache(maxsize=1024)
def _shade(age: int, confidence: int, bold: bool, few: bool) -> Style:
    colour = _FEW[age * len(_FEW) // (_AGES + 1)] if few else ink(age / _AGES, confidence / _SURES)
    return Style(color=colour, bold=bold or None)
