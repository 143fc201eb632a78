"""Texts out of masks: the rows a sampler is given to fill, and the drawing of any number of them in batches.

Shape suffixes: B batch, L length.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise

import lightning
import numpy as np
import torch
import torch.distributed
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.progress import Meter
from diffusion import Diffusion
from objectives.base import scored_mask
from randomness import KeyedNoise
from samplers.base import Frame, Watcher
from text.tokenizers import decode, encode, encode_after

# What stands for masks in a template: [MASK] for one, {{12}} for twelve, {{...}} for as many as there is room for.
_GAP = re.compile(r" ?(?:\[MASK\]|\{\{(\d+|…|\.\.\.)\}\})")
ROOM = -1  # among the ids of a template: masks that take what room there is

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Drawn:
    """One sampled text: its ids without padding, the step that wrote each (0: given), the model's probability of each
    when it was written (1: given), where each stands in the row that the sampler was given, and what it cost."""

    ids: list[int]
    steps: list[int]
    confidence: list[float]
    places: list[int]
    num_steps: int
    evaluations: int


@dataclass(frozen=True)
class Template:
    """What is given of every text. prefix: its beginning. template: all of it, with [MASK] for a token, {{n}} for n
    tokens and once {{...}} or {{…}} for as many as there is room for, to be filled in. max_length: tokens of a text at
    most, given ones included; None for as many as the model's. Given tokens never change.

    Raises:
        ValueError: prefix and template are set, or a template without a gap, with an empty one or two that stretch.
    """

    prefix: str | None = None
    template: str | None = None
    max_length: int | None = None

    def __post_init__(self) -> None:
        if self.prefix and self.template:
            raise ValueError(f"sampling.prefix={self.prefix} and sampling.template={self.template}: give one of them")
        gaps = [gap[1] for gap in _GAP.finditer(self.template or "")]
        if self.template and (not gaps or any(gap and gap.isdigit() and int(gap) == 0 for gap in gaps)):
            raise ValueError(
                f"sampling.template={self.template} has no gap, or one of no tokens: write [MASK], {{{{12}}}} or "
                "{{...}} where text is wanted"
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

    def ids(self, tokenizer: object, mask_id: int) -> list[int]:
        """Token ids of what is given, `mask_id` in the gaps, ROOM once for one that stretches; empty if nothing is."""
        if self.prefix:
            return encode(tokenizer, [self.prefix])[0]
        ids, end, text = [], 0, self.template or ""
        for gap in _GAP.finditer(text):
            masks = [ROOM] if gap[1] in ("…", "...") else [mask_id] * int(gap[1] or 1)
            ids += _pieces(tokenizer, text[end : gap.start()]) + masks
            end = gap.end()
        return ids + _pieces(tokenizer, text[end:])


def _pieces(tokenizer: object, text: str) -> list[int]:
    if tokenizer.unk_token_id in encode(tokenizer, [" "])[0]:  # a tokenizer of words has no token for a space
        text = text.strip()
        if text and not text[0].isalnum():  # a full stop stands behind what fills the gap, without a space
            return encode_after(tokenizer, [text])[0]
    return encode(tokenizer, [text])[0] if text else []


def decoded(drawn: Drawn, given: Template, tokenizer: object) -> str:
    """The text of `drawn`, special tokens left out, where a given prefix stands letter by letter as it was typed, also
    if the tokenizer does not keep it so (capitals, spaces, words that it does not know)."""
    text, prefix = decode(tokenizer, drawn.ids, skip_special=True), given.prefix or ""
    if text.startswith(prefix):
        return text
    ids = encode(tokenizer, [prefix])[0]
    own = decode(tokenizer, ids, skip_special=True)
    if text.startswith(own):
        return prefix + text[len(own) :]
    start = next(k for k in range(len(drawn.ids)) if drawn.ids[k : k + len(ids)] == ids)
    return f"{prefix} {decode(tokenizer, drawn.ids[start + len(ids) :], skip_special=True)}"


@dataclass(frozen=True)
class Drawing:
    """How texts are drawn: the sampler, with what is given of each text. protocol: the same, for a result to carry.
    var_length: the sampler decides where a text ends."""

    sampler: Callable
    given: Template = Template()
    protocol: Mapping[str, object] = field(default_factory=dict)
    var_length: bool = False


def draw(
    diffusion: Diffusion, data: object, drawing: Drawing, num_samples: int, batch_size: int, seed: int,
    class_id: int | None = None, watch: Watcher | None = None,
) -> list[Drawn]:  # fmt: skip
    """`num_samples` texts. The i-th depends on (seed, i) and on the weights, not on the batch it is drawn in.

    A text gets the length of a training row picked at random, since a model of padded rows is a model of
    p(text | length); wrapped and filled rows all have the model's length, and causal models and models of filled rows
    decide themselves where to end. Where texts have prompts, or a prefix of them is given, these are validation texts'.
    `class_id` is the class that a conditional network is told. `watch` sees the first batch being written.
    """
    rows = _rows(diffusion, data, drawing.given, num_samples, seed)
    return fill(diffusion, data, drawing, rows, np.arange(num_samples), batch_size, seed, class_id, watch)


def fill(
    diffusion: Diffusion, data: object, drawing: Drawing, rows: Sequence[np.ndarray], names_M: np.ndarray,
    batch_size: int, seed: int, class_id: int | None = None, watch: Watcher | None = None,
) -> list[Drawn]:  # fmt: skip
    """`rows` of ids with the masks filled in. A row's tokens depend on (seed, its name), whatever else is drawn.
    `watch` sees the first batch being written."""
    drawn: list[Drawn] = []
    meter = Meter("sample", len(rows))
    with torch.inference_mode():
        for start in range(0, len(rows), batch_size):
            here = slice(start, start + batch_size)
            seen_by = watch if start == 0 else None
            drawn += _draw_batch(diffusion, data, drawing, rows[here], names_M[here], seed, class_id, seen_by)
            meter.update(len(drawn))
    meter.close()
    return drawn


class _Drawer(lightning.LightningModule):
    """Lets a Lightning Trainer draw, on each of its devices the batches that it is given the first samples of."""

    def __init__(self, diffusion: Diffusion, draw_from: Callable[[int], list[Drawn]], meter: Meter) -> None:
        super().__init__()
        self.diffusion, self.draw_from, self.meter = diffusion, draw_from, meter
        self.drawn: list[Drawn] = []

    def predict_step(self, start: int, batch_idx: int) -> None:
        with torch.autocast(self.device.type, enabled=False):  # as without a trainer
            self.drawn += self.draw_from(int(start))
        self.meter.update(len(self.drawn))


def draw_on_all(
    trainer: lightning.Trainer, diffusion: Diffusion, data: object, drawing: Drawing, num_samples: int, batch_size: int,
    seed: int, watch: Watcher | None = None,
) -> list[Drawn]:  # fmt: skip
    """As `draw`, shared out over all of the trainer's devices (`fill_on_all`)."""
    rows = _rows(diffusion, data, drawing.given, num_samples, seed)
    return fill_on_all(trainer, diffusion, data, drawing, rows, np.arange(num_samples), batch_size, seed, watch)


def fill_on_all(
    trainer: lightning.Trainer, diffusion: Diffusion, data: object, drawing: Drawing, rows: Sequence[np.ndarray],
    names_M: np.ndarray, batch_size: int, seed: int, watch: Watcher | None = None,
) -> list[Drawn]:  # fmt: skip
    """As `fill`, shared out over all of the trainer's devices; every process gets all of the texts, the same as one
    process alone would have drawn. `watch` is called in the first process, which draws the first batch."""
    if trainer.world_size == 1:
        return fill(diffusion, data, drawing, rows, names_M, batch_size, seed, None, watch)
    device = diffusion.device

    def draw_from(start: int) -> list[Drawn]:
        here = slice(start, start + batch_size)
        seen_by = watch if start == 0 else None
        return _draw_batch(diffusion, data, drawing, rows[here], names_M[here], seed, None, seen_by)

    starts = list(range(0, len(rows), batch_size))
    mine = starts[trainer.global_rank :: trainer.world_size]
    meter = Meter("sample (first process)", sum(min(batch_size, len(rows) - start) for start in mine))
    drawer = _Drawer(diffusion, draw_from, meter)
    trainer.predict(drawer, DataLoader(mine, batch_size=None), return_predictions=False)
    meter.close()
    diffusion.to(device)  # a trainer leaves a model on the CPU
    gathered: list = [None] * trainer.world_size
    torch.distributed.all_gather_object(gathered, drawer.drawn)
    shares = [iter(share) for share in gathered]
    return [text for number, start in enumerate(starts)
            for text in islice(shares[number % len(shares)], min(batch_size, len(rows) - start))]  # fmt: skip


def _rows(diffusion: Diffusion, data: object, given: Template, num_samples: int, seed: int) -> list[np.ndarray]:
    """One row of ids per sample, the mask where a token is wanted."""
    mask_id, causal = diffusion.objective.mask_id, diffusion.objective.causal
    fixed = given.ids(data.tokenizer, mask_id)
    if data.prompted and (fixed or given.max_length):
        key = "template" if given.template else "prefix" if given.prefix else "max_length"
        raise ValueError(f"data={data.name} gives each text a beginning of its own; leave sampling.{key} out")
    _warn_of_unknown(fixed, given, data.tokenizer)
    room = _Room(given.max_length or data.length, data, mask_id, given)
    train = data.split("validation" if data.prompted or data.prefix_length else "train")
    u = KeyedNoise(seed, torch.arange(num_samples), draw=-3).uniform()
    rows = []
    for lender in (u * len(train)).long().tolist():
        blank = room.cut(_blank(data, train[[lender]], mask_id, causal, lends=not fixed))
        if diffusion.objective.first_given:
            blank[0] = train[lender]["input_ids"][0]
        start = int(blank[0] != mask_id or (bool(fixed) and _begins_with_bos(data, train[lender])))
        blank[:start] = train[lender]["input_ids"][:start]
        rows.append(room.filled(blank, fixed, start))
    return rows


def _blank(data: object, columns: Mapping[str, list], mask_id: int, causal: bool, lends: bool) -> np.ndarray:
    """A training row with every token masked that a model would have to write; one that `lends` nothing but its length
    keeps only the tokens that frame it."""
    lent = columns["input_ids"][0]
    if causal:
        ids, given = np.full(data.length, mask_id), columns["part_ends"][0][0] if "part_ends" in columns else 1
        given = max(given, int(data.collate.leading(lent[:1])[0])) if lends else given
        ids[: min(given, len(lent))] = lent[:given]
        return ids
    batch = data.collate(columns)
    row = torch.where(scored_mask(batch), mask_id, batch["input_ids"])[0]
    row = row.numpy() if data.fill else row[: int(columns["length"][0])].numpy()
    if not lends:
        place = np.arange(len(row))
        ends = (place == 0) | (place == len(row) - 1)
        row[~(ends & np.isin(row, data.collate.frame_ids))] = mask_id
    return row


def _begins_with_bos(data: object, row: Mapping[str, list]) -> bool:
    return data.vocabulary.bos_id is not None and int(row["input_ids"][0]) == data.vocabulary.bos_id


def _warn_of_unknown(fixed: Sequence[int], given: Template, tokenizer: object) -> None:
    if fixed and tokenizer.unk_token_id in fixed and tokenizer.unk_token_id != tokenizer.eos_token_id:
        key = "template" if given.template else "prefix"
        log.warning("sampling.%s has words that the tokenizer does not know; the network reads %s in their place",
                    key, tokenizer.unk_token)  # fmt: skip


@dataclass(frozen=True)
class _Room:
    """limit: tokens of a row at most."""

    limit: int
    data: object
    mask_id: int
    given: Template

    def cut(self, blank: np.ndarray) -> np.ndarray:
        """`blank` of at most `limit` tokens: masks are left out, a given end stays."""
        if len(blank) <= self.limit:
            return blank
        ending = self._ending(blank)
        short = np.concatenate([blank[: max(self.limit - len(ending), 0)], ending])
        if self.mask_id not in short:
            raise ValueError(f"{self._key}={self.limit} leaves no token to write; allow more")
        return short

    def filled(self, blank: np.ndarray, fixed: list[int], start: int) -> np.ndarray:
        """`blank` with `fixed` from `start` on; a padded row becomes exactly as long as a whole template without a gap
        that stretches."""
        if not fixed:
            return blank
        ending, whole = self._ending(blank), bool(self.given.template)
        if ROOM in fixed:
            at, masks = fixed.index(ROOM), len(blank) - start - len(ending) - len(fixed) + 1
            fixed = [*fixed[:at], *[self.mask_id] * max(masks, 1), *fixed[at + 1 :]]
        row = np.concatenate([blank[:start], np.asarray(fixed, dtype=blank.dtype)])
        tail = blank[len(row) :]
        if whole and self.data.fill:
            tail = np.full_like(tail, self.data.vocabulary.eos_id)
        elif whole and not self.data.wrap:
            tail = ending
        elif not whole and self.mask_id not in tail:  # the lender is too short for this prefix
            tail = np.concatenate([np.full(1, self.mask_id, dtype=blank.dtype), ending])
        row = np.concatenate([row, tail])
        if len(row) > self.limit:
            key = "template" if whole else "prefix"
            raise ValueError(f"sampling.{key} has {len(fixed)} tokens, too many for {self._key}={self.limit}")
        return row

    def _ending(self, blank: np.ndarray) -> np.ndarray:
        return blank[-1:] if blank[-1] != self.mask_id else blank[:0]

    @property
    def _key(self) -> str:
        return "sampling.max_length" if self.given.max_length else "model.length"


def _draw_batch(
    diffusion: Diffusion, data: object, drawing: Drawing, rows: Sequence[np.ndarray], names_B: np.ndarray, seed: int,
    class_id: int | None, watch: Watcher | None,
) -> list[Drawn]:  # fmt: skip
    lengths = [len(row) for row in rows]
    x_BL = torch.full((len(rows), max(lengths)), data.vocabulary.pad_id)
    for i, row in enumerate(rows):
        x_BL[i, : len(row)] = torch.from_numpy(row)
    padded = min(lengths) < max(lengths)
    cond = {"attention_mask": torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]} if padded else {}
    if class_id is not None:
        cond["class_id"] = torch.full((len(rows),), class_id)
    prompts_B = np.array([int((row == diffusion.objective.mask_id).argmax()) for row in rows])
    segment_ends = data.segment_ends(prompts_B) if data.segments else None
    if segment_ends is not None:
        cond["segment_ends"] = torch.from_numpy(segment_ends)
    noise = KeyedNoise(seed, torch.from_numpy(names_B).to(diffusion.device))
    ends_early = diffusion.objective.causal and not data.wrap
    stop = {"stop_id": data.vocabulary.eos_id} if ends_early or drawing.var_length else {}
    x_BL = x_BL.to(diffusion.device)
    if watch is not None:
        given_BL = (x_BL != diffusion.objective.mask_id).float()
        watch(Frame(0, x_BL, given_BL, torch.zeros(len(rows), dtype=torch.long, device=x_BL.device)))
    out = drawing.sampler(diffusion.model, x_BL, noise, watch=watch, **_moved(cond, diffusion.device), **stop)
    extra = out.ids_BL.shape[1] - x_BL.shape[1]  # semi-autoregressive samplers go on behind the window
    drawn = []
    for i, length in enumerate(lengths):
        length = length + extra if out.length_B is None else min(length + extra, int(out.length_B[i]))
        columns = [part_BL[i, :length].tolist() for part_BL in (out.ids_BL, out.step_BL, out.confidence_BL)]
        columns.append(list(range(len(columns[0]))))
        if ends_early or data.fill:
            starts = [1] if segment_ends is None else segment_ends[i].tolist()
            kept = _own(columns[0], data.vocabulary.eos_id, starts)
            columns = [[column[place] for place in kept] for column in columns]
        drawn.append(Drawn(*columns, out.num_steps, int(out.evaluations_B[i])))
    return drawn


def _moved(cond: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in cond.items()}


def _own(ids: list[int], eos_id: int | None, starts: Sequence[int]) -> list[int]:
    """The places of a text without its fill: of each part that begins at one of `starts` those up to its first EOS.
    What stands before the first of them is given, BOS among it, which may have the id of EOS."""
    own = list(range(min(starts[0], len(ids))))
    for start, stop in pairwise([*starts, len(ids)]):
        own += range(start, ids.index(eos_id, start, stop) + 1 if eos_id in ids[start:stop] else stop)
    return own
