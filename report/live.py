"""Texts that are still being written, as HTML for a page that shows one picture of them after another: in the looks of
the player of denoising.html, which shows them afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from palimpsest.report.page import render
from palimpsest.report.plain_text import split_lead


@dataclass(frozen=True)
class Piece:
    """What stands at a place of a text that is being written.

    text: with its own spacing; of a mask what it is drawn as wide as. age: how much of the text was written when it
    appeared, in [0, 1]; None where it was given. confidence: the model's probability of it, in [0, 1]. masked: nothing
    stands there. new: it came with the last step.
    """

    text: str
    age: float | None = None
    confidence: float = 1.0
    masked: bool = False
    new: bool = False


def live_texts(texts: Sequence[Sequence[Piece]]) -> str:
    """The texts as they stand, HTML that `live_style` gives its looks."""
    return render("live.html.j2", texts=[[_shown(piece) for piece in pieces] for pieces in texts])


def live_style() -> str:
    """CSS of `live_texts`, to be nested under whatever holds them; it needs `colours`."""
    return render("live.css.j2")


def colours() -> str:
    """CSS of the colours and typefaces of all pages, as custom properties of the root."""
    return render("colours.css")


def _shown(piece: Piece) -> dict[str, str]:
    lead, body = split_lead(piece.text)
    kind = "m" if piece.masked else "g" if piece.age is None else "new" if piece.new else ""
    drawn = not piece.masked and piece.age is not None
    style = f"--a:{piece.age:.3f};--c:{piece.confidence:.3f}" if drawn else ""
    return {"lead": lead, "body": body, "kind": kind, "style": style}
