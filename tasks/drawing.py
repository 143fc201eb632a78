"""Texts out of masks: any number of them drawn in batches, on one device or on all.

Shape suffixes: B batch, L length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise

import lightning
import numpy as np
import torch
import torch.distributed
from torch import Tensor
from torch.utils.data import DataLoader

from palimpsest.common.randomness import KeyedNoise
from palimpsest.data.tokenizers import decode, encode
from palimpsest.diffusion import Diffusion
from palimpsest.samplers.trace import Trace, Watcher
from palimpsest.tasks.blanks import Template, padded, rows_to_fill
from palimpsest.training.callbacks.progress import Meter


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
    rows = rows_to_fill(diffusion, data, drawing.given, num_samples, seed)
    return fill(diffusion, data, drawing, rows, np.arange(num_samples), batch_size, seed, class_id, watch)


def fill(
    diffusion: Diffusion, data: object, drawing: Drawing, rows: Sequence[np.ndarray], names_M: np.ndarray,
    batch_size: int, seed: int, class_id: int | None = None, watch: Watcher | None = None,
) -> list[Drawn]:  # fmt: skip
    """`rows` of ids with the masks filled in. A row's tokens depend on (seed, its name), whatever else is drawn.
    `watch` sees the first batch being written."""

    def draw_from(here: slice) -> list[Drawn]:
        seen_by = watch if here.start == 0 else None
        return draw_batch(diffusion, data, drawing, rows[here], names_M[here], seed, class_id, seen_by)

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
    seed: int, watch: Watcher | None = None,
) -> list[Drawn]:  # fmt: skip
    """As `draw`, shared out over all of the trainer's devices (`fill_on_all`)."""
    rows = rows_to_fill(diffusion, data, drawing.given, num_samples, seed)
    return fill_on_all(trainer, diffusion, data, drawing, rows, np.arange(num_samples), batch_size, seed, watch=watch)


def fill_on_all(
    trainer: lightning.Trainer, diffusion: Diffusion, data: object, drawing: Drawing, rows: Sequence[np.ndarray],
    names_M: np.ndarray, batch_size: int, seed: int, told: Mapping[str, Tensor] | None = None,
    watch: Watcher | None = None,
) -> list[Drawn]:  # fmt: skip
    """As `fill`, shared out over all of the trainer's devices. told: what the sampler is told of each row beside its
    tokens, (M, ...) each. `watch` is called in the first process, which draws the first batch."""

    def draw_from(here: slice) -> list[Drawn]:
        of_rows = {name: value[here] for name, value in (told or {}).items()}
        seen_by = watch if here.start == 0 else None
        return draw_batch(diffusion, data, drawing, rows[here], names_M[here], seed, watch=seen_by, told=of_rows)

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


def draw_batch(
    diffusion: Diffusion, data: object, drawing: Drawing, rows: Sequence[np.ndarray], names_B: np.ndarray, seed: int,
    class_id: int | None = None, watch: Watcher | None = None, told: Mapping[str, Tensor] | None = None,
) -> list[Drawn]:  # fmt: skip
    """One batch of `fill` and `fill_on_all`."""
    lengths = [len(row) for row in rows]
    x_BL, cond = padded(rows, data.vocabulary.pad_id)
    cond |= told or {}
    if class_id is not None:
        cond["class_id"] = torch.full((len(rows),), class_id)
    prompts_B = np.array([int((row == diffusion.objective.process.blank_id).argmax()) for row in rows])
    segment_ends = data.segment_ends(prompts_B) if data.segments else None
    if segment_ends is not None:
        cond["segment_ends"] = torch.from_numpy(segment_ends)
    noise = KeyedNoise(seed, torch.from_numpy(names_B).to(diffusion.device))
    ends_early = diffusion.objective.causal and not data.wrap
    stop = {"stop_id": data.vocabulary.eos_id} if ends_early or drawing.var_length else {}
    x_BL = x_BL.to(diffusion.device)
    if watch is not None:
        watch(Trace(x_BL, diffusion.objective.process))
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
