"""Token attributions of a text for one class against another, as the report shows them.

Shape suffixes: L tokens, C classes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from palimpsest.data.tokenizers import token_strings
from palimpsest.dataloader import TextData
from palimpsest.report.formatting import format_number
from palimpsest.report.plain_text import inline, split_lead

_LISTED_PER_SIDE = 6
_LIGHTEST_LISTED = 0.1  # of the heaviest token of the text
_LONGEST_UNFOLDED = 1200
# Ends of the scale whose quarter is a short number too: the square root puts it in the middle of the legend.
_ROUND_ENDS = (1.0, 1.2, 1.6, 2.0, 2.4, 3.2, 4.0, 6.0, 8.0, 10.0)


@dataclass(frozen=True)
class Evidence:
    """A text of L tokens with its token attributions for two classes.

    nats[l] is the share of token l in log p(text | classes[0]) − log p(text | classes[1]); the shares add up to the
    log-likelihood ratio. An unscored token may have NaN: it is not coloured, is counted, and left out of the sum.
    Tokens carry their own spacing. With two classes, use the same order in every text to keep the meaning of the
    colours.

    Raises ValueError unless there are as many numbers as tokens and two different classes.
    """

    title: str
    tokens: tuple[str, ...]
    nats: tuple[float, ...]
    classes: tuple[str, ...]
    caption: str = ""

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.nats):
            raise ValueError(f"evidence has {len(self.tokens)} tokens but {len(self.nats)} numbers")
        if len(self.classes) != 2 or self.classes[0] == self.classes[1]:
            raise ValueError(f"evidence weighs two different classes, not {list(self.classes)}: name the first two")

    @property
    def total(self) -> float:
        """The log-likelihood ratio of the text, nats: the sum of all finite parts."""
        return math.fsum(self._finite)

    @property
    def largest(self) -> float:
        """The largest |nats| of a token; 0 without scored tokens."""
        return max(map(abs, self._finite), default=0.0)

    @property
    def _finite(self) -> list[float]:
        return [value for value in self.nats if math.isfinite(value)]


@dataclass(frozen=True)
class _Word:
    """A token as it is listed, with its occurrences summed."""

    body: str
    nats: float
    count: int


def shown_evidence(
    data: TextData, split: str, chosen: Mapping[int, tuple[str, int, int]], nats: Sequence[np.ndarray]
) -> list[Evidence]:
    """Return texts as the report colours them.

    chosen: row number in the split -> (title, first class, second class). nats: of `token_attributions`.
    """
    shown = []
    for (row, (title, winner, rival)), nats_CL in zip(chosen.items(), nats, strict=True):
        ids = [int(i) for i in data.split(split)[row]["input_ids"]]
        ratio_L = nats_CL[rival, : len(ids)] - nats_CL[winner, : len(ids)]
        names = (data.label_names[winner], data.label_names[rival])
        shown.append(Evidence(title, tuple(token_strings(data.tokenizer, ids)), tuple(ratio_L.tolist()), names))
    return shown


def evidence_block(evidence: Sequence[Evidence]) -> dict[str, Any]:
    """Return the content of the template for the texts, with one scale for all.

    The strength of a token's colour is sqrt(|nats| / end of the scale), in [0, 1], so that weak attributions are
    visible and one outlier does not fade all others.
    """
    end = _round_up(max((item.largest for item in evidence), default=0.0))
    pairs = {item.classes for item in evidence}
    return {
        "texts": [_text(item, end) for item in evidence],
        "classes": next(iter(pairs)) if len(pairs) == 1 else ("the class named first", "the one named second"),
        "ticks": [_tick(share * end) for share in (-1, -0.25, 0, 0.25, 1)] if end else [],
    }


def signed(nats: float, decimals: int = 2) -> str:
    """Return `nats` with its sign, or without if all digits shown are zero: +1.25, −0.40, 0.00."""
    text = f"{nats:+,.{decimals}f}"
    return text.replace("-", "−") if any(digit in "123456789" for digit in text) else text[1:]


def _tick(nats: float) -> str:
    return f"+{format_number(nats)}" if nats > 0 else format_number(nats)


def _text(item: Evidence, end: float) -> dict[str, Any]:
    words = _words(item)
    sides = [_heaviest(words, sign) for sign in (1, -1)]
    listed = {word.body for side in sides for word in side}
    weights = [math.fsum(sign * value for value in item._finite if sign * value > 0) for sign in (1, -1)]
    return {
        "title": item.title,
        "caption": inline(item.caption),
        "pieces": [_piece(*pair, end, listed) for pair in zip(item.tokens, item.nats, strict=True)],
        "classes": item.classes,
        "sum": signed(abs(item.total), 1),
        "winner": int(item.total < 0),
        "weights": [{"share": round(weight / (sum(weights) or 1), 4), "nats": signed(s * weight, 1)}
                    for weight, s in zip(weights, (1, -1), strict=True)],
        "sides": [[_listing(word) for word in side] for side in sides],
        "unweighed": len(item.nats) - len(item._finite),
        "long": sum(map(len, item.tokens)) > _LONGEST_UNFOLDED,
        "num_tokens": len(item.tokens),
    }  # fmt: skip


def _piece(token: str, nats: float, end: float, listed: set[str]) -> dict[str, str]:
    """Return one token: its leading space, itself, and its colour."""
    lead, body = split_lead(token)
    if not math.isfinite(nats):
        return {"lead": lead, "body": body, "side": "", "strength": "", "nats": "not weighed"}
    strength = f"{math.sqrt(min(1.0, abs(nats) / end)) if end else 0.0:.2f}".rstrip("0").rstrip(".")
    side = "" if strength == "0" else ("p" if nats > 0 else "n") + (" top" if body in listed else "")
    return {"lead": lead, "body": body, "side": side, "strength": strength, "nats": f"{signed(nats)} nats"}


def _words(item: Evidence) -> list[_Word]:
    values: dict[str, list[float]] = {}
    for token, nats in zip(item.tokens, item.nats, strict=True):
        if math.isfinite(nats):
            values.setdefault(split_lead(token)[1], []).append(nats)
    return [_Word(body, math.fsum(nats), len(nats)) for body, nats in values.items()]


def _heaviest(words: Sequence[_Word], sign: int) -> list[_Word]:
    """Return the words with the largest attributions of `sign`, largest first, without negligible ones."""
    lightest = _LIGHTEST_LISTED * max((abs(word.nats) for word in words), default=0.0)
    kept = [word for word in words if sign * word.nats > 0 and abs(word.nats) >= lightest]
    return sorted(kept, key=lambda word: -abs(word.nats))[:_LISTED_PER_SIDE]


def _listing(word: _Word) -> dict[str, str]:
    body = word.body.replace("\n", "⏎").replace(" ", "␣") if not word.body.strip() else word.body.strip()
    times = f"({word.count} ×)" if word.count > 1 else ""
    return {"body": body or "(empty)", "nats": signed(word.nats), "times": times}


def _round_up(largest: float) -> float:
    """Return the end of the scale: the next round number at or above `largest`; 0 for 0."""
    if not largest:
        return 0.0
    power = 10.0 ** math.floor(math.log10(largest))
    return next((end * power for end in _ROUND_ENDS if largest <= end * power), 10 * power)
