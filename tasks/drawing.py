"""Texts out of masks: the rows a sampler is given to fill, and the drawing of any number of them in batches.

Shape suffixes: B batch, L length.
"""

from __future__ import annotations

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
from text.tokenizers import encode

# What stands for masks in a template: [MASK] for one, {{12}} for twelve.
_GAP = re.compile(r" ?(?:\[MASK\]|\{\{(\d+)\}\})")


@dataclass(frozen=True)
class Drawn:
    """One sampled text: its ids without padding, the step that wrote each (0: given), and what it cost."""

    ids: list[int]
    steps: list[int]
    num_steps: int
    evaluations: int


@dataclass(frozen=True)
class Template:
    """What is given of every text. prefix: its beginning. template: all of it, with [MASK] for a token and {{n}} for n
    tokens to be filled in. Given tokens never change.

    Raises:
        ValueError: both are set, or a template without a gap.
    """

    prefix: str | None = None
    template: str | None = None

    def __post_init__(self) -> None:
        if self.prefix and self.template:
            raise ValueError(f"sampling.prefix={self.prefix} and sampling.template={self.template}: give one of them")
        if self.template and not _GAP.search(self.template):
            raise ValueError(
                f"sampling.template={self.template} has no gap: write [MASK] or {{{{12}}}} where text is wanted"
            )

    def ids(self, tokenizer: object, mask_id: int) -> list[int]:
        """Token ids of what is given, `mask_id` in the gaps; empty if nothing is."""
        if self.prefix:
            return encode(tokenizer, [self.prefix])[0]
        ids, end, text = [], 0, self.template or ""
        for gap in _GAP.finditer(text):
            ids += _pieces(tokenizer, text[end : gap.start()]) + [mask_id] * int(gap[1] or 1)
            end = gap.end()
        return ids + _pieces(tokenizer, text[end:])


def _pieces(tokenizer: object, text: str) -> list[int]:
    if tokenizer.unk_token_id in encode(tokenizer, [" "])[0]:  # a tokenizer of words has no token for a space
        text = text.strip()
    return encode(tokenizer, [text])[0] if text else []


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
    class_id: int | None = None,
) -> list[Drawn]:  # fmt: skip
    """`num_samples` texts. The i-th depends on (seed, i) and on the weights, not on the batch it is drawn in.

    A text gets the length of a training row picked at random, since a model of padded rows is a model of
    p(text | length); wrapped and filled rows all have the model's length, and causal models and models of filled rows
    decide themselves where to end. Where texts have prompts, they are those of validation texts.
    `class_id` is the class that a conditional network is told.
    """
    rows = rows_to_fill(diffusion, data, drawing.given, num_samples, seed)
    return fill(diffusion, data, drawing, rows, np.arange(num_samples), batch_size, seed, class_id)


def fill(
    diffusion: Diffusion, data: object, drawing: Drawing, rows: Sequence[np.ndarray], names_M: np.ndarray,
    batch_size: int, seed: int, class_id: int | None = None,
) -> list[Drawn]:  # fmt: skip
    """`rows` of ids with the masks filled in. A row's tokens depend on (seed, its name), whatever else is drawn."""

    def draw_from(here: slice) -> list[Drawn]:
        return draw_batch(diffusion, data, drawing, rows[here], names_M[here], seed, class_id)

    return _in_batches(draw_from, len(rows), batch_size)


def _in_batches(draw_from: Callable[[slice], list], number: int, batch_size: int) -> list:
    drawn, meter = [], Meter("sample", number)
    with torch.inference_mode():
        for start in range(0, number, batch_size):
            drawn += draw_from(slice(start, start + batch_size))
            meter.update(len(drawn))
    meter.close()
    return drawn


class _Drawer(lightning.LightningModule):
    """Lets a Lightning Trainer draw, on each of its devices the batches that it is given the first samples of."""

    def __init__(self, diffusion: Diffusion, draw_from: Callable[[int], list], meter: Meter) -> None:
        super().__init__()
        self.diffusion, self.draw_from, self.meter = diffusion, draw_from, meter
        self.drawn: list = []

    def predict_step(self, start: int, batch_idx: int) -> None:
        with torch.autocast(self.device.type, enabled=False):  # as without a trainer
            self.drawn += self.draw_from(int(start))
        self.meter.update(len(self.drawn))


def draw_on_all(
    trainer: lightning.Trainer, diffusion: Diffusion, data: object, drawing: Drawing, num_samples: int, batch_size: int,
    seed: int,
) -> list[Drawn]:  # fmt: skip
    """As `draw`, shared out over all of the trainer's devices (`fill_on_all`)."""
    rows = rows_to_fill(diffusion, data, drawing.given, num_samples, seed)
    return fill_on_all(trainer, diffusion, data, drawing, rows, np.arange(num_samples), batch_size, seed)


def fill_on_all(
    trainer: lightning.Trainer, diffusion: Diffusion, data: object, drawing: Drawing, rows: Sequence[np.ndarray],
    names_M: np.ndarray, batch_size: int, seed: int, told: Mapping[str, Tensor] | None = None,
) -> list[Drawn]:  # fmt: skip
    """As `fill`, shared out over all of the trainer's devices. told: what the sampler is told of each row beside its
    tokens, (M, ...) each."""

    def draw_from(here: slice) -> list[Drawn]:
        of_rows = {name: value[here] for name, value in (told or {}).items()}
        return draw_batch(diffusion, data, drawing, rows[here], names_M[here], seed, told=of_rows)

    return on_all(trainer, diffusion, draw_from, len(rows), batch_size)


def on_all(
    trainer: lightning.Trainer, diffusion: Diffusion, draw_from: Callable[[slice], list], number: int, batch_size: int
) -> list:
    """What `draw_from` gives for batches of `number` rows, in their order, shared out over all devices of the trainer;
    every process gets all of it, the same as one process alone would have drawn. draw_from: some rows -> one thing for
    each of them."""
    if trainer.world_size == 1:
        return _in_batches(draw_from, number, batch_size)
    device, starts = diffusion.device, list(range(0, number, batch_size))
    mine = starts[trainer.global_rank :: trainer.world_size]
    meter = Meter("sample (first process)", sum(min(batch_size, number - start) for start in mine))
    drawer = _Drawer(diffusion, lambda start: draw_from(slice(start, start + batch_size)), meter)
    trainer.predict(drawer, DataLoader(mine, batch_size=None), return_predictions=False)
    meter.close()
    diffusion.to(device)  # a trainer leaves a model on the CPU
    gathered: list = [None] * trainer.world_size
    torch.distributed.all_gather_object(gathered, drawer.drawn)
    shares = [iter(share) for share in gathered]
    return [text for index, start in enumerate(starts)
            for text in islice(shares[index % len(shares)], min(batch_size, number - start))]  # fmt: skip


def rows_to_fill(diffusion: Diffusion, data: object, given: Template, num_samples: int, seed: int) -> list[np.ndarray]:
    """One row of ids per sample, the mask where a token is wanted, as long as a training row picked at random."""
    mask_id, causal = diffusion.objective.mask_id, diffusion.objective.causal
    fixed = given.ids(data.tokenizer, mask_id)
    if fixed and data.prompted:
        key = "template" if given.template else "prefix"
        raise ValueError(f"data={data.name} gives each text a beginning of its own; leave sampling.{key} out")
    train = data.split("validation" if data.prompted else "train")
    u = KeyedNoise(seed, torch.arange(num_samples), draw=-3).uniform()
    rows = []
    for lender in (u * len(train)).long().tolist():
        blank = masked_row(data, train[[lender]], mask_id, causal)
        if diffusion.objective.first_given:
            blank[0] = train[lender]["input_ids"][0]
        start = int(blank[0] != mask_id or (bool(fixed) and _begins_with_bos(data, train[lender])))
        blank[:start] = train[lender]["input_ids"][:start]
        rows.append(_filled(blank, fixed, start, mask_id, data, whole=bool(given.template)))
    return rows


def masked_row(data: object, columns: Mapping[str, list], mask_id: int, causal: bool) -> np.ndarray:
    """A training row with every token masked that a model would have to write."""
    if causal:
        ids, given = np.full(data.length, mask_id), columns["part_ends"][0][0] if "part_ends" in columns else 1
        ids[:given] = columns["input_ids"][0][:given]
        return ids
    batch = data.collate(columns)
    row = torch.where(scored_mask(batch), mask_id, batch["input_ids"])[0]
    return row.numpy() if data.fill else row[: int(columns["length"][0])].numpy()


def _begins_with_bos(data: object, row: Mapping[str, list]) -> bool:
    return data.vocabulary.bos_id is not None and int(row["input_ids"][0]) == data.vocabulary.bos_id


def _filled(blank: np.ndarray, fixed: list[int], start: int, mask_id: int, data: object, whole: bool) -> np.ndarray:
    """`blank` with `fixed` from `start` on; a padded row becomes exactly as long as a `whole` template."""
    if not fixed:
        return blank
    head = np.concatenate([blank[:start], np.asarray(fixed, dtype=blank.dtype)])
    ending = blank[-1:] if blank[-1] != mask_id else blank[:0]
    tail = blank[len(head) :]
    if whole and data.fill:
        tail = np.full_like(tail, data.vocabulary.eos_id)
    elif whole and not data.wrap:
        tail = ending
    elif mask_id not in tail:  # the lender is too short for this prefix
        tail = np.concatenate([np.full(1, mask_id, dtype=blank.dtype), ending])
    if len(head) + len(tail) > data.length:
        key = "template" if whole else "prefix"
        raise ValueError(f"sampling.{key} has {len(fixed)} tokens, too many for model.length={data.length}")
    return np.concatenate([head, tail])


def padded(rows: Sequence[np.ndarray], pad_id: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Rows of ids as one tensor (B, L), and what the network is told of their padding where there is any."""
    lengths = torch.tensor([len(row) for row in rows])
    x_BL = torch.full((len(rows), int(lengths.max())), pad_id)
    for i, row in enumerate(rows):
        x_BL[i, : len(row)] = torch.as_tensor(np.asarray(row))
    some = bool(lengths.min() < lengths.max())
    return x_BL, {"attention_mask": torch.arange(x_BL.shape[1]) < lengths[:, None]} if some else {}


def draw_batch(
    diffusion: Diffusion, data: object, drawing: Drawing, rows: Sequence[np.ndarray], names_B: np.ndarray, seed: int,
    class_id: int | None = None, told: Mapping[str, Tensor] | None = None,
) -> list[Drawn]:  # fmt: skip
    """One batch of `fill` and `fill_on_all`."""
    lengths = [len(row) for row in rows]
    x_BL, cond = padded(rows, data.vocabulary.pad_id)
    cond |= told or {}
    if class_id is not None:
        cond["class_id"] = torch.full((len(rows),), class_id)
    prompts_B = np.array([int((row == diffusion.objective.mask_id).argmax()) for row in rows])
    segment_ends = data.segment_ends(prompts_B) if data.segments else None
    if segment_ends is not None:
        cond["segment_ends"] = torch.from_numpy(segment_ends)
    noise = KeyedNoise(seed, torch.from_numpy(names_B).to(diffusion.device))
    ends_early = diffusion.objective.causal and not data.wrap
    stop = {"stop_id": data.vocabulary.eos_id} if ends_early or drawing.var_length else {}
    out = drawing.sampler(diffusion.model, x_BL.to(diffusion.device), noise, **_moved(cond, diffusion.device), **stop)
    extra = out.ids_BL.shape[1] - x_BL.shape[1]  # semi-autoregressive samplers go on behind the window
    drawn = []
    for i, length in enumerate(lengths):
        length = length + extra if out.length_B is None else min(length + extra, int(out.length_B[i]))
        ids, steps = out.ids_BL[i, :length].tolist(), out.step_BL[i, :length].tolist()
        if ends_early or data.fill:
            starts = [1] if segment_ends is None else segment_ends[i].tolist()
            kept = _own(ids, data.vocabulary.eos_id, starts)
            ids, steps = [ids[place] for place in kept], [steps[place] for place in kept]
        drawn.append(Drawn(ids, steps, out.num_steps, int(out.evaluations_B[i])))
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
