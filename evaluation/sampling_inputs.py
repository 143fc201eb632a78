"""Inputs of samplers: rows of masks and observed tokens, from prefixes, templates and prompts.

Shape suffixes: B batch, L length.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from palimpsest.common.randomness import KeyedNoise
from palimpsest.data.tokenizers import encode, encode_after
from palimpsest.dataloader import TextData
from palimpsest.diffusion import Diffusion
from palimpsest.objectives.base import scored_mask

# Gaps of a template: [MASK] for one token, {{12}} for twelve, {{...}} for the remaining length.
_GAP = re.compile(r" ?(?:\[MASK\]|\{\{ *(\d+|…|\.\.\.) *\}\})")
_DIGITS = 12  # digits read of a gap's number; Python refuses to parse thousands of them
STRETCH = -2  # placeholder for a gap of free length among the ids of a template; Uniform has -1 for a blank
_MOST_TOKENS = 2**28

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Template:
    """The observed tokens of every text; they never change.

    A template has gaps: [MASK] for one token, {{n}} for n tokens, and at most once {{...}} or {{…}} for the remaining
    length.

    Raises ValueError if both prefix and template are set, or the template is malformed.
    """

    prefix: str | None = None  # the beginning of the text
    template: str | None = None  # the whole text; of wrapped rows the beginning
    max_length: int | None = None  # observed tokens included; None for the model's length

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
                f"sampling.template={self.template} has several gaps of free length; give all but one of them a "
                "number of tokens, such as {{12}}"
            )

    @classmethod
    def of(cls, text: str, max_length: int | None = None) -> Self:
        """Return `text` as a template if it has a gap, else as a prefix."""
        return cls(template=text, max_length=max_length) if _GAP.search(text) else cls(text or None, None, max_length)

    def ids(self, tokenizer: PreTrainedTokenizerBase, blank_id: int, limit: int) -> list[int]:
        """Return the token ids of the prefix or template: `blank_id` in gaps, STRETCH for a gap of free length.

        Raises ValueError if the gaps alone have more than `limit` tokens.
        """
        if self.prefix:
            return encode(tokenizer, [self.prefix])[0]
        ids, end = [], 0
        text = self.template or ""
        gaps = list(_GAP.finditer(text))
        wanted = sum(_size(gap) for gap in gaps)
        if wanted > limit:  # before a list of that many is made
            raise ValueError(
                f"sampling.template asks for {wanted:,} tokens in its gaps: too many for {self.limit_key}={limit}"
            )
        for gap in gaps:
            masks = [STRETCH] if gap[1] in ("…", "...") else [blank_id] * _size(gap)
            ids += _text_ids(tokenizer, text[end : gap.start()]) + masks
            end = gap.end()
        return ids + _text_ids(tokenizer, text[end:])

    @property
    def limit_key(self) -> str:
        """The key that limits the length of a text."""
        return "sampling.max_length" if self.max_length else "model.length"


def _size(gap: re.Match) -> int:
    """Return the number of tokens of a gap; at least one for a gap of free length."""
    digits = (gap[1] or "").lstrip("0")
    return int(digits[:_DIGITS]) if digits.isdigit() else 1


def _text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    if tokenizer.unk_token_id in encode(tokenizer, [" "])[0]:  # a tokenizer of words has no token for a space
        text = text.strip()
        if text and not text[0].isalnum():  # punctuation follows the gap without a space
            return encode_after(tokenizer, [text])[0]
    return encode(tokenizer, [text])[0] if text else []


def rows_to_fill(
    diffusion: Diffusion, data: TextData, inputs: Template, num_samples: int, seed: int
) -> list[np.ndarray]:
    """Return one row of ids per sample, masked where tokens are to be sampled, as long as a random training row."""
    blank_id, causal = diffusion.objective.process.blank_id, diffusion.objective.causal
    limit = inputs.max_length or data.length
    check_amount(num_samples, limit)
    fixed = inputs.ids(data.tokenizer, blank_id, limit)
    if data.prompted and (fixed or inputs.max_length):
        key = "template" if inputs.template else "prefix" if inputs.prefix else "max_length"
        raise ValueError(f"data={data.name} gives each text its own beginning; leave sampling.{key} out")
    _warn_of_unknown(fixed, inputs, data.tokenizer)
    builder = _RowBuilder(limit, data, blank_id, inputs)
    train = data.split("validation" if data.prompted or data.prefix_length else "train")
    u = KeyedNoise(seed, torch.arange(num_samples), draw=-3).uniform()
    rows = []
    for length_row in (u * len(train)).long().tolist():
        row_ids = builder.shortened(masked_row(data, train[[length_row]], blank_id, causal, keep_observed=not fixed))
        source_ids = train[length_row]["input_ids"]
        if diffusion.objective.first_given:
            row_ids[0] = source_ids[0]
        has_bos = data.vocabulary.bos_id is not None and int(source_ids[0]) == data.vocabulary.bos_id
        start = int(row_ids[0] != blank_id or (bool(fixed) and has_bos))
        row_ids[:start] = source_ids[:start]
        rows.append(builder.with_template(row_ids, fixed, start))
    return rows


def check_amount(num_rows: int, length: int) -> None:
    """Raise ValueError if the rows would take more than 2 GiB; they are all created before sampling."""
    if num_rows * length > _MOST_TOKENS:
        raise ValueError(
            f"{num_rows:,} samples of up to {length:,} tokens are too many for one run, which draws at most "
            f"{_MOST_TOKENS // length:,} of them; lower sampling.num_samples (or num_sample_batches, "
            "samples_per_prompt, num_sample_log), and use several runs with different seeds"
        )


def masked_row(
    data: TextData, columns: Mapping[str, list], blank_id: int, causal: bool, keep_observed: bool
) -> np.ndarray:
    """Mask a training row except its observed tokens if `keep_observed`, else except the tokens that frame it."""
    source_ids = columns["input_ids"][0]
    if causal:
        ids = np.full(data.length, blank_id)
        num_observed = columns["part_ends"][0][0] if "part_ends" in columns else 1
        if keep_observed:
            num_observed = max(num_observed, int(data.collate.leading(source_ids[:1])[0]))
        ids[: min(num_observed, len(source_ids))] = source_ids[:num_observed]
        return ids
    batch = data.collate(columns)
    row = torch.where(scored_mask(batch), blank_id, batch["input_ids"])[0]
    row = row.numpy() if data.fill else row[: int(columns["length"][0])].numpy()
    if not keep_observed:
        position = np.arange(len(row))
        ends = (position == 0) | (position == len(row) - 1)
        row[~(ends & np.isin(row, data.collate.frame_ids))] = blank_id
    return row


def _warn_of_unknown(fixed: Sequence[int], inputs: Template, tokenizer: PreTrainedTokenizerBase) -> None:
    if fixed and tokenizer.unk_token_id in fixed and tokenizer.unk_token_id != tokenizer.eos_token_id:
        key = "template" if inputs.template else "prefix"
        about = "sampling.%s has words that the tokenizer does not know; the network reads %s instead"
        log.warning(about, key, tokenizer.unk_token)


@dataclass(frozen=True)
class _RowBuilder:
    """Builds rows of at most `limit` tokens."""

    limit: int
    data: TextData
    blank_id: int
    inputs: Template

    def shortened(self, row_ids: np.ndarray) -> np.ndarray:
        """Shorten `row_ids` to `limit` tokens: masks are dropped, an observed ending stays."""
        if len(row_ids) <= self.limit:
            return row_ids
        ending = self._ending(row_ids)
        short = np.concatenate([row_ids[: max(self.limit - len(ending), 0)], ending])
        if self.blank_id not in short:
            raise ValueError(f"{self.inputs.limit_key}={self.limit} leaves no token to write; allow more")
        return short

    def with_template(self, row_ids: np.ndarray, fixed: list[int], start: int) -> np.ndarray:
        """Return `row_ids` with `fixed` from `start` on; a padded row gets the length of a template of fixed length."""
        if not fixed:
            return row_ids
        ending, whole = self._ending(row_ids), bool(self.inputs.template)
        if STRETCH in fixed:
            at, masks = fixed.index(STRETCH), len(row_ids) - start - len(ending) - len(fixed) + 1
            fixed = [*fixed[:at], *[self.blank_id] * max(masks, 1), *fixed[at + 1 :]]
        row = np.concatenate([row_ids[:start], np.asarray(fixed, dtype=row_ids.dtype)])
        tail = row_ids[len(row) :]
        if whole and self.data.fill:
            tail = np.full_like(tail, self.data.vocabulary.eos_id)
        elif whole and not self.data.wrap:
            tail = ending
        elif not whole and self.blank_id not in tail:  # the training row is too short for this prefix
            tail = np.concatenate([np.full(1, self.blank_id, dtype=row_ids.dtype), ending])
        row = np.concatenate([row, tail])
        if len(row) > self.limit:
            key = "template" if whole else "prefix"
            more = "with what frames it" if whole else "with what frames it and one to write"
            raise ValueError(
                f"sampling.{key} has {len(fixed)} tokens, {more} {len(row)}: too many for "
                f"{self.inputs.limit_key}={self.limit}"
            )
        return row

    def _ending(self, row_ids: np.ndarray) -> np.ndarray:
        return row_ids[-1:] if row_ids[-1] != self.blank_id else row_ids[:0]


def padded(rows: Sequence[np.ndarray], pad_id: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Pad rows of ids to one tensor (B, L); return it with the attention mask, if there is any padding."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = [torch.as_tensor(np.asarray(row, dtype=np.int64)) for row in rows]
    x_BL = pad_sequence(ids, batch_first=True, padding_value=pad_id)
    some = bool(lengths.min() < lengths.max())
    return x_BL, {"attention_mask": torch.arange(x_BL.shape[1]) < lengths[:, None]} if some else {}
