"""The rows that a sampler is given to fill: masks where text is wanted, and between them what is given.

Shape suffixes: B batch, L length.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from palimpsest.common.randomness import KeyedNoise
from palimpsest.data.tokenizers import encode, encode_after
from palimpsest.dataloader import TextData
from palimpsest.diffusion import Diffusion
from palimpsest.objectives.base import scored_mask

# What stands for masks in a template: [MASK] for one, {{12}} for twelve, {{...}} for as many as there is room for.
_GAP = re.compile(r" ?(?:\[MASK\]|\{\{ *(\d+|…|\.\.\.) *\}\})")
_DIGITS = 12  # of a gap's number that are read: Python refuses to read thousands of them, and no text is that long
ROOM = -1  # among the ids of a template: masks that take what room there is
_MOST_TOKENS = 2**28

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Template:
    """What is given of every text. prefix: its beginning. template: all of it (of wrapped rows, which have no end,
    the beginning), with [MASK] for a token, {{n}} for n tokens and once {{...}} or {{…}} for as many as there is room
    for, to be filled in. max_length: tokens of a text at most, given ones included; None for as many as the model's.
    Given tokens never change.

    Raises:
        ValueError: prefix and template are set; or a template has no gap, an empty one, two that stretch, or {{ where
            none follows.
    """

    prefix: str | None = None
    template: str | None = None
    max_length: int | None = None

    def __post_init__(self) -> None:
        if self.prefix and self.template:
            raise ValueError(f"sampling.prefix={self.prefix} and sampling.template={self.template}: give one of them")
        gaps = [gap[1] for gap in _GAP.finditer(self.template or "")]
        if self.template and (not gaps or any(gap and not gap.strip("0") for gap in gaps)):
            raise ValueError(
                f"sampling.template={self.template} has no gap, or one of no tokens: write [MASK], {{{{12}}}} or "
                "{{...}} where text is wanted"
            )
        if self.template and "{{" in _GAP.sub("", self.template):
            raise ValueError(
                f"sampling.template={self.template} has {{{{ where no gap follows; a gap is [MASK], {{{{12}}}} or "
                "{{...}}"
            )
        if sum(gap in ("…", "...") for gap in gaps) > 1:
            raise ValueError(
                f"sampling.template={self.template} has several gaps that take what room there is; give all but one of "
                "them a number of tokens, such as {{12}}"
            )

    @classmethod
    def of(cls, text: str, max_length: int | None = None) -> Template:
        """A text with a gap is a template, one without is how texts begin."""
        return cls(template=text, max_length=max_length) if _GAP.search(text) else cls(text or None, None, max_length)

    def ids(self, tokenizer: PreTrainedTokenizerBase, blank_id: int, limit: int) -> list[int]:
        """Return the token ids of the prefix or template, `blank_id` in the gaps, ROOM once for one that stretches.

        Raises ValueError if the gaps alone have more than `limit` tokens.
        """
        if self.prefix:
            return encode(tokenizer, [self.prefix])[0]
        ids, end, text = [], 0, self.template or ""
        gaps = list(_GAP.finditer(text))
        wanted = sum(_size(gap) for gap in gaps)
        if wanted > limit:  # before a list of that many is made
            raise ValueError(f"sampling.template asks for {wanted:,} tokens in its gaps: too many for {self.limit_key}="
                             f"{limit}")  # fmt: skip
        for gap in gaps:
            masks = [ROOM] if gap[1] in ("…", "...") else [blank_id] * _size(gap)
            ids += _pieces(tokenizer, text[end : gap.start()]) + masks
            end = gap.end()
        return ids + _pieces(tokenizer, text[end:])

    @property
    def limit_key(self) -> str:
        """The key that limits how many tokens a text has."""
        return "sampling.max_length" if self.max_length else "model.length"


def _size(gap: re.Match) -> int:
    """Return how many tokens a gap asks for; one that stretches has one at least."""
    digits = (gap[1] or "").lstrip("0")
    return int(digits[:_DIGITS]) if digits.isdigit() else 1


def _pieces(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    if tokenizer.unk_token_id in encode(tokenizer, [" "])[0]:  # a tokenizer of words has no token for a space
        text = text.strip()
        if text and not text[0].isalnum():  # a full stop stands behind what fills the gap, without a space
            return encode_after(tokenizer, [text])[0]
    return encode(tokenizer, [text])[0] if text else []


def rows_to_fill(
    diffusion: Diffusion, data: TextData, given: Template, num_samples: int, seed: int
) -> list[np.ndarray]:
    """One row of ids per sample, the mask where a token is wanted, as long as a training row picked at random."""
    blank_id, causal = diffusion.objective.process.blank_id, diffusion.objective.causal
    limit = given.max_length or data.length
    check_amount(num_samples, limit)
    fixed = given.ids(data.tokenizer, blank_id, limit)
    if data.prompted and (fixed or given.max_length):
        key = "template" if given.template else "prefix" if given.prefix else "max_length"
        raise ValueError(f"data={data.name} gives each text a beginning of its own; leave sampling.{key} out")
    _warn_of_unknown(fixed, given, data.tokenizer)
    room = _Room(limit, data, blank_id, given)
    train = data.split("validation" if data.prompted or data.prefix_length else "train")
    u = KeyedNoise(seed, torch.arange(num_samples), draw=-3).uniform()
    rows = []
    for lender in (u * len(train)).long().tolist():
        blank = room.cut(masked_row(data, train[[lender]], blank_id, causal, lends=not fixed))
        if diffusion.objective.first_given:
            blank[0] = train[lender]["input_ids"][0]
        start = int(blank[0] != blank_id or (bool(fixed) and _begins_with_bos(data, train[lender])))
        blank[:start] = train[lender]["input_ids"][:start]
        rows.append(room.filled(blank, fixed, start))
    return rows


def check_amount(num_rows: int, length: int) -> None:
    """Raise ValueError if rows to fill would take more than 2 GiB. They are all made before the first is filled."""
    if num_rows * length > _MOST_TOKENS:
        raise ValueError(
            f"{num_rows:,} samples of up to {length:,} tokens are too many for one run, which draws at most "
            f"{_MOST_TOKENS // length:,} of them; lower sampling.num_samples (or num_sample_batches, "
            "samples_per_prompt, num_sample_log), and use several runs with different seeds"
        )


def masked_row(data: TextData, columns: Mapping[str, list], blank_id: int, causal: bool, lends: bool) -> np.ndarray:
    """A training row with every token masked that a model would have to write; one that `lends` nothing but its length
    keeps only the tokens that frame it."""
    lent = columns["input_ids"][0]
    if causal:
        ids, given = np.full(data.length, blank_id), columns["part_ends"][0][0] if "part_ends" in columns else 1
        given = max(given, int(data.collate.leading(lent[:1])[0])) if lends else given
        ids[: min(given, len(lent))] = lent[:given]
        return ids
    batch = data.collate(columns)
    row = torch.where(scored_mask(batch), blank_id, batch["input_ids"])[0]
    row = row.numpy() if data.fill else row[: int(columns["length"][0])].numpy()
    if not lends:
        place = np.arange(len(row))
        ends = (place == 0) | (place == len(row) - 1)
        row[~(ends & np.isin(row, data.collate.frame_ids))] = blank_id
    return row


def _begins_with_bos(data: TextData, row: Mapping[str, list]) -> bool:
    return data.vocabulary.bos_id is not None and int(row["input_ids"][0]) == data.vocabulary.bos_id


def _warn_of_unknown(fixed: Sequence[int], given: Template, tokenizer: PreTrainedTokenizerBase) -> None:
    if fixed and tokenizer.unk_token_id in fixed and tokenizer.unk_token_id != tokenizer.eos_token_id:
        key = "template" if given.template else "prefix"
        log.warning("sampling.%s has words that the tokenizer does not know; the network reads %s in their place",
                    key, tokenizer.unk_token)  # fmt: skip


@dataclass(frozen=True)
class _Room:
    """limit: tokens of a row at most."""

    limit: int
    data: TextData
    blank_id: int
    given: Template

    def cut(self, blank: np.ndarray) -> np.ndarray:
        """`blank` of at most `limit` tokens: masks are left out, a given end stays."""
        if len(blank) <= self.limit:
            return blank
        ending = self._ending(blank)
        short = np.concatenate([blank[: max(self.limit - len(ending), 0)], ending])
        if self.blank_id not in short:
            raise ValueError(f"{self.given.limit_key}={self.limit} leaves no token to write; allow more")
        return short

    def filled(self, blank: np.ndarray, fixed: list[int], start: int) -> np.ndarray:
        """`blank` with `fixed` from `start` on; a padded row becomes exactly as long as a whole template without a gap
        that stretches."""
        if not fixed:
            return blank
        ending, whole = self._ending(blank), bool(self.given.template)
        if ROOM in fixed:
            at, masks = fixed.index(ROOM), len(blank) - start - len(ending) - len(fixed) + 1
            fixed = [*fixed[:at], *[self.blank_id] * max(masks, 1), *fixed[at + 1 :]]
        row = np.concatenate([blank[:start], np.asarray(fixed, dtype=blank.dtype)])
        tail = blank[len(row) :]
        if whole and self.data.fill:
            tail = np.full_like(tail, self.data.vocabulary.eos_id)
        elif whole and not self.data.wrap:
            tail = ending
        elif not whole and self.blank_id not in tail:  # the lender is too short for this prefix
            tail = np.concatenate([np.full(1, self.blank_id, dtype=blank.dtype), ending])
        row = np.concatenate([row, tail])
        if len(row) > self.limit:
            key = "template" if whole else "prefix"
            more = "with what frames it" if whole else "with what frames it and one to write"
            raise ValueError(f"sampling.{key} has {len(fixed)} tokens, {more} {len(row)}: too many for "
                             f"{self.given.limit_key}={self.limit}")  # fmt: skip
        return row

    def _ending(self, blank: np.ndarray) -> np.ndarray:
        return blank[-1:] if blank[-1] != self.blank_id else blank[:0]


def padded(rows: Sequence[np.ndarray], pad_id: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Rows of ids as one tensor (B, L), and what the network is told of their padding where there is any."""
    lengths = torch.tensor([len(row) for row in rows])
    x_BL = torch.full((len(rows), int(lengths.max())), pad_id)
    for i, row in enumerate(rows):
        x_BL[i, : len(row)] = torch.as_tensor(np.asarray(row))
    some = bool(lengths.min() < lengths.max())
    return x_BL, {"attention_mask": torch.arange(x_BL.shape[1]) < lengths[:, None]} if some else {}
