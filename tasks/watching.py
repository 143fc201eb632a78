"""Seeing texts being written: in the terminal as it happens, and afterwards as a page and a moving picture.

Shape suffixes: B batch, L length.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import median

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console, Group
from rich.live import Live
from rich.style import Style
from rich.text import Text

from callbacks.progress import terminal
from diffusion import Diffusion
from reporting.denoising import Sample, write_denoising
from reporting.gif import write_gif
from reporting.palette import ink
from reporting.plain_text import split_lead, visible
from samplers.base import Frame
from tasks.drawing import Drawing, Drawn
from tasks.history import Recorder, piece, samples_of
from text.tokenizers import token_strings, unshown

_FRAME_SECONDS = 0.05  # at most twenty pictures a second
_BOLD = 0.9  # confidence from which a token is bold
_AGES, _SURES = 31, 7  # colours that can be told apart: by age, by confidence
_FEW = ("blue", "cyan", "green", "yellow")  # where a terminal has no more


@dataclass(frozen=True)
class Views:
    """How the denoising of the first texts is shown. show: in the terminal, as it happens. show_delay: seconds that a
    step takes there at least. html, gif: denoising.html and denoising.gif beside the report.

    Raises:
        ValueError: a negative delay.
    """

    show: bool = False
    show_delay: float = 0.0
    html: bool = True
    gif: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.show_delay < math.inf:
            raise ValueError(f"sampling.show_delay={self.show_delay} must be 0 seconds or more")

    def watcher(self, num_texts: int, diffusion: Diffusion, data: object, drawing: Drawing) -> Watching:
        """Who watches the sampler: a context, and a watcher inside it."""
        show = None
        if self.show and rank_zero_only.rank == 0:
            ends = (diffusion.objective.causal and not data.wrap) or data.fill or drawing.var_length
            end_id = data.vocabulary.eos_id if ends and not data.segments else None
            show = Show(data.tokenizer, data.vocabulary.mask_id, num_texts, self.show_delay, blank_of(data), end_id)
        return Watching(Recorder(num_texts, data.vocabulary.mask_id), show)

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

    def __call__(self, frame: Frame) -> None:
        self._recorder(frame)
        if self._show is not None:
            self._show(frame)

    @property
    def read(self) -> int:
        """How many texts whoever reads the standard output has before his eyes already."""
        return self._show.on_screen if self._show is not None and sys.stdout.isatty() else 0

    def samples(self, drawn: Sequence[Drawn], tokenizer: object) -> list[Sample]:
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


def blank_of(data: object) -> str:
    """What stands for a mask in a terminal: dots, as many as a typical token of the data has letters."""
    rows = data.split("validation" if data.prompted else "train")
    hidden = unshown(data.tokenizer)
    ids = [token for token in rows[0]["input_ids"] if token not in hidden][:200]
    pieces = [split_lead(string) for string in token_strings(data.tokenizer, ids)]
    leads = sorted(lead for lead, _ in pieces[1:])
    lead = leads[len(leads) // 2] if leads else ""
    return (" " if lead else "") + "·" * max(1, round(median(len(body) for _, body in pieces) if pieces else 1))


class Show:
    """The first `num_texts` rows of a batch in the terminal, as they are written: the colour of a token says how much
    was there already when it appeared, so that it follows the steps whatever the sampler; the greyer, the less likely
    the model thought it, and bold where it was sure; dots are masks.

    Live where `console` is a terminal, else a few lines of plain text.
    """

    def __init__(
        self, tokenizer: object, mask_id: int, num_texts: int, delay: float, blank: str = " ····",
        end_id: int | None = None, console: Console | None = None,
    ) -> None:  # fmt: skip
        self._tokenizer, self._mask_id, self._num_texts, self._delay = tokenizer, mask_id, num_texts, delay
        self._blank, self._end_id, self._console = blank, end_id, console or terminal()
        self._hidden = unshown(tokenizer) - {mask_id}
        self._pieces = lru_cache(maxsize=None)(lambda token: visible(piece(tokenizer, token, mask_id)))
        self._live: Live | None = None
        self._rows: list[_Row] = []
        self._step, self._evaluations, self._left, self._total, self._quarter = 0, 0, 0, 0, 0
        self._busy = self._drawn_at = self._waited_at = self._woke = 0.0
        self.on_screen = 0  # texts that a terminal was left with

    def __enter__(self) -> Show:
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.update(self.picture(whole=True) if self._rows else Text(), refresh=True)
            self._live.stop()
            self._live, self.on_screen = None, len(self._rows)

    def __call__(self, frame: Frame) -> None:
        """Take in what `frame` holds, and show it unless something was shown only just now."""
        now = time.monotonic()
        if self._rows:
            self._busy += now - self._woke
        changed = self._take(frame)
        if self._live is None:
            self._print_plainly()
        elif changed:
            wait = self._waited_at + self._delay - now if self._step > 1 else 0.0
            if wait > 0:
                time.sleep(wait)
            self._waited_at = time.monotonic()
            if self._waited_at - self._drawn_at >= _FRAME_SECONDS:
                self._live.update(self.picture(), refresh=True)
                self._drawn_at = time.monotonic()
        self._woke = time.monotonic()

    def _take(self, frame: Frame) -> bool:
        seen = slice(self._num_texts)
        ids_BL, confidence_BL = frame.ids_BL[seen].cpu().numpy(), frame.confidence_BL[seen].cpu().numpy()
        if not self._rows:
            self._rows = [_Row(self._mask_id) for _ in ids_BL]
        self._step, self._evaluations = frame.step, int(frame.evaluations_B[seen].max())
        self._left = int((frame.ids_BL == self._mask_id).sum())
        self._total = max(self._total, self._left)
        return any([row.take(ids_L, sure_L)
                    for row, ids_L, sure_L in zip(self._rows, ids_BL, confidence_BL, strict=True)])  # fmt: skip

    # ------------------------------------------------------------------------------ pictures

    def picture(self, whole: bool = False) -> Group:
        """The texts as they are, and a line on how far they are. As many as fit; a `whole` picture may be taller than
        the terminal."""
        room, blocks = max(6, self._console.height - 4), []
        for number, row in enumerate(self._rows, 1):
            lines = self._text(row).wrap(self._console, self._console.width)
            if not whole and len(lines) > room - 2:
                if blocks:
                    break
                written = self._text(row, upto=row.last_written + 1).wrap(self._console, self._console.width)
                end = max(room - 2, min(len(lines), len(written) + 2))
                lines = lines[end - (room - 2) : end]
            title = Text(f"\n{number}" if len(self._rows) > 1 else "", "dim")
            blocks += [title, *lines]
            room -= len(lines) + 2
        return Group(*blocks, Text(""), self._status())

    def _text(self, row: _Row, upto: int | None = None) -> Text:
        """A row, or its first `upto` places, without special tokens and what is behind the end. A text without masks is
        read as a whole, since characters may be of several tokens."""
        ids, text = row.ids_L.tolist(), Text()
        whole = [visible(string) for string in token_strings(self._tokenizer, ids)] if row.left == 0 else None
        for place, token in enumerate(ids[:upto]):
            if token == self._end_id and not math.isnan(row.age_L[place]):
                break
            if token in self._hidden:
                continue
            string = self._blank if token == self._mask_id else whole[place] if whole else self._pieces(token)
            text.append(string if text.plain else string.lstrip(), self._style(row, place))
        return text

    def _style(self, row: _Row, place: int) -> Style:
        age, confidence = float(row.age_L[place]), float(row.confidence_L[place])
        if row.ids_L[place] == self._mask_id:
            return Style(dim=True)
        if math.isnan(age):
            return Style()
        few = self._console.color_system == "standard"
        return _shade(round(_AGES * age), round(_SURES * confidence), confidence >= _BOLD, few)

    def _status(self) -> Text:
        done = 1 - self._left / max(1, self._total)
        width = max(8, min(32, self._console.width - 70))
        line = Text()
        for i in range(width):
            line.append("━", Style(color=ink(i / (width - 1)), dim=i >= round(done * width)))
        speed = (self._total - self._left) / self._busy if self._busy else 0.0
        line.append(f"  step {self._step}", "bold")
        line.append(
            f"  {self._left:,} masks left  {self._evaluations:,} network evaluations  {speed:,.0f} tokens/s", "dim"
        )
        return line

    def _print_plainly(self) -> None:
        """Whenever another quarter is written."""
        quarter = 4 * (self._total - self._left) // max(1, self._total)
        if quarter < self._quarter:
            return
        self._quarter = quarter + 1
        said = f"step {self._step}, {self._left:,} masks left, {self._evaluations:,} network evaluations"
        self._console.print(Text(said), soft_wrap=True)
        for row in self._rows:
            self._console.print(Text("  " + " ".join(self._text(row).plain.split())), soft_wrap=True)


class _Row:
    """What is known of one text: tokens, when each appeared (0: with the first, 1: with the last; NaN: given), how sure
    the model was."""

    def __init__(self, mask_id: int) -> None:
        self._mask_id, self._most, self._age = mask_id, 0, math.nan
        self.ids_L, self.confidence_L, self.age_L = np.zeros(0, dtype=np.int64), np.zeros(0), np.zeros(0)

    @property
    def left(self) -> int:
        """How many masks there are."""
        return int((self.ids_L == self._mask_id).sum())

    @property
    def last_written(self) -> int:
        """The last place that was written; -1 where none was."""
        return int(np.flatnonzero(~np.isnan(self.age_L) & (self.ids_L != self._mask_id)).max(initial=-1))

    def take(self, ids_L: np.ndarray, confidence_L: np.ndarray) -> bool:
        """Take over what is there after a step; True if something has changed."""
        more = len(ids_L) - len(self.ids_L)
        before_L = np.pad(self.ids_L, (0, more), constant_values=self._mask_id)
        sure_L, age_L = np.pad(self.confidence_L, (0, more)), np.pad(self.age_L, (0, more), constant_values=math.nan)
        changed_L = (ids_L != before_L) | ((ids_L != self._mask_id) & (confidence_L != sure_L))
        if not changed_L.any() and not more:
            return False
        age_L[changed_L] = self._age
        self.ids_L, self.confidence_L, self.age_L = ids_L.copy(), confidence_L.copy(), age_L
        self._most = max(self._most, self.left)
        self._age = max(0.0 if math.isnan(self._age) else self._age, 1 - self.left / max(1, self._most))
        return True


@lru_cache(maxsize=1024)
def _shade(age: int, confidence: int, bold: bool, few: bool) -> Style:
    colour = _FEW[age * len(_FEW) // (_AGES + 1)] if few else ink(age / _AGES, confidence / _SURES)
    return Style(color=colour, bold=bold or None)
