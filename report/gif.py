"""The denoising of a text as an animated GIF, for slides, messages or a README."""

import io
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from PIL import Image, ImageDraw, ImageFont

from palimpsest.common.files import write_atomically
from palimpsest.report.denoising import Sample, TokenState
from palimpsest.report.palette import age, ink, wash
from palimpsest.report.plain_text import split_lead

_PAPER, _INK, _MUTED, _MASK, _AGAIN = (255, 254, 252), (31, 35, 40), (106, 111, 118), (232, 228, 218), (245, 220, 206)
_MARGIN, _LEADING = 30, 1.75  # pixels; lines of text per font size
_MOST_LINES = 36
_SECONDS, _HOLD = 7.0, 4.0  # of the whole animation, and of the text at its end
_AGES, _LEVELS = 23, 4  # shades in a picture: all pictures share 256 colours


@dataclass(frozen=True)
class _TokenPart:
    """A token, or a part of one broken over lines, from `column` of `line` on."""

    line: int
    column: int
    text: str


@dataclass(frozen=True)
class _Layout:
    """Positions of the final tokens; lines never jump."""

    pieces: list[list[_TokenPart]]  # of each token; none if it has no width or lies below the last line
    lines: int
    columns: int
    size: int  # of the font, pixels


@rank_zero_only
def write_gif(path: Path, sample: Sample, num_frames: int = 60) -> None:
    """Write `sample` from masks to text in at most `num_frames` pictures, at most one for each step.

    The last picture is the final text and stays for some seconds. Texts of more than about thirty lines are cut.
    """
    steps = _steps(sample, num_frames)
    layout = _layout(sample)
    pictures = [_picture(sample, layout, step, step - before) for before, step in pairwise([0, *steps])]
    pictures[-1] = _picture(sample, layout, steps[-1], 0)
    typical = np.concatenate([pictures[0], pictures[len(pictures) // 2], pictures[-1]])
    palette = Image.fromarray(typical).quantize(256, dither=0)
    frames = [picture.quantize(palette=palette, dither=0) for picture in pictures]
    each = max(40, min(250, round(1000 * _SECONDS / len(frames))))
    data = io.BytesIO()
    duration = [each] * (len(frames) - 1) + [round(1000 * _HOLD)]
    frames[0].save(data, "GIF", save_all=True, append_images=frames[1:], loop=0, disposal=1, duration=duration)
    write_atomically(path, data.getvalue())


def _steps(sample: Sample, num_frames: int) -> list[int]:
    """Return the steps to draw: 0, the last, and evenly between them those with a change."""
    if num_frames < 2:
        raise ValueError(f"num_frames={num_frames} must be at least 2: masks and the text")
    changes = {*sample.reveal_step, *(time for old in sample.past for time in (old.written, old.erased))}
    steps = sorted({0, *changes})
    count = min(num_frames, len(steps))
    return sorted({steps[round(i * (len(steps) - 1) / max(1, count - 1))] for i in range(count)})


def _layout(sample: Sample) -> _Layout:
    characters = len(sample.text)
    columns, size = (60, 20) if characters <= 60 * 14 else (92, 14)
    pieces: list[list[_TokenPart]] = []
    line, column = 0, 0
    for index, token in enumerate(sample.tokens):
        lead, body = split_lead(token)
        if not body.strip():  # nothing but white space
            lead, body = lead + body, ""
        line += lead.count("\n")
        column = 0 if "\n" in lead else column + (len(lead) if column else 0)
        if column + len(body) + _joined_letters(sample, index) > columns and column and lead:
            line, column = line + 1, 0
        parts = []
        while body:
            if column >= columns:
                line, column = line + 1, 0
            parts.append(_TokenPart(line, column, body[: columns - column].expandtabs(1)))
            column, body = column + len(parts[-1].text), body[columns - column :]
        pieces.append([part for part in parts if part.line < _MOST_LINES])
    return _Layout(pieces, min(line + 1, _MOST_LINES), columns, size)


def _joined_letters(sample: Sample, index: int) -> int:
    """Return how many letters follow token `index` without a space; they stay on its line."""
    letters = 0
    for token in sample.tokens[index + 1 : index + 12]:
        lead, body = split_lead(token)
        if lead or not body.strip():
            break
        letters += len(body)
    return letters


@lru_cache(maxsize=4)
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSansMono.ttf", size)


def _picture(sample: Sample, layout: _Layout, step: int, fresh: int) -> Image.Image:
    """Draw the text after `step`; tokens of the last `fresh` steps have a frame."""
    font, height = _font(layout.size), round(layout.size * _LEADING)
    width = font.getlength("m")
    size = (round(layout.columns * width) + 2 * _MARGIN, layout.lines * height + 2 * _MARGIN + 30)
    picture = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(picture)
    begun = {old.place for old in sample.past if old.written <= step}
    for place, (now, pieces) in enumerate(zip(sample.at(step), layout.pieces, strict=True)):
        for piece in pieces:
            x, y = _MARGIN + piece.column * width, _MARGIN + piece.line * height
            box = (round(x), y, round(x + len(piece.text) * width) - 1, y + height - 6)
            new = now is not None and 0 < step - fresh < now.written
            ground = _ground(now, sample.num_steps) if now else _AGAIN if place in begun else _MASK
            if ground != _PAPER:
                draw.rounded_rectangle(box, 3, ground, _INK if new else None)
            if now is not None:
                text = piece.text if now.token == sample.tokens[place] else _cut(now.token, len(piece.text))
                draw.text((x, y + (height - 6) / 2), text, _INK, font, anchor="lm")
                if now.written == 0:
                    draw.line((box[0], box[3], box[2], box[3]), _MUTED)
    _progress_bar(draw, size, sample, step)
    return picture


def _ground(now: TokenState, num_steps: int) -> tuple[int, int, int]:
    if now.written == 0:
        return _PAPER
    sure = 1.0 if now.confidence is None else now.confidence
    return wash(round(_AGES * age(now.written, num_steps)) / _AGES, round(_LEVELS * sure) / _LEVELS, _PAPER)


def _cut(token: str, room: int) -> str:
    body = " ".join(split_lead(token)[1].split())
    return body if len(body) <= room else body[: room - 1] + "…"


def _progress_bar(draw: ImageDraw.ImageDraw, size: tuple[int, int], sample: Sample, step: int) -> None:
    """Draw a progress bar and "step 3 of 8". Each part of the bar has the colour of the tokens written then."""
    label = f"step {step} of {sample.num_steps}"
    font, y = _font(14), size[1] - _MARGIN
    left, right = _MARGIN, size[0] - _MARGIN - font.getlength(f"step {sample.num_steps} of {sample.num_steps}") - 16
    for i in range(_AGES + 1):
        begin, end = (left + (right - left) * edge / (_AGES + 1) for edge in (i, i + 1))
        done = left + (right - left) * step / max(1, sample.num_steps)
        draw.rectangle((begin, y - 3, end, y + 2), _MASK)
        if done > begin:
            draw.rectangle((begin, y - 3, min(end, done), y + 2), ink(i / _AGES))
    draw.text((size[0] - _MARGIN, y), label, _MUTED, font, anchor="rm")
