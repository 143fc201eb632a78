"""Texts out of masks: any number of them drawn in batches, on one device or on all.

Shape suffixes: B batch, L length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import lightning
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from palimpsest.common.randomness import KeyedNoise
from palimpsest.data.tokenizers import decode, encode
from palimpsest.dataloader import TextData
from palimpsest.diffusion import Diffusion
from palimpsest.evaluation.devices import gather
from palimpsest.evaluation.sampling_inputs import Template, padded, rows_to_fill
from palimpsest.samplers.trace import Trace, Watcher
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


def decoded(drawn: Drawn, given: Template, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of `drawn` without special tokens.

    A given prefix stands letter by letter as it was typed, also if the tokenizer does not keep it so (capitals, spaces,
    words that it does not know).
    """
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


@dataclass(frozen=True)
class Setting:
    """What texts are drawn with.

    A row's tokens depend on (seed, its name), whatever else is drawn, on however many devices.

    Attributes:
        trainer: on whose devices batches are drawn; None for this process alone.
        watch: sees the first batch being written, in the first process.
        keep: saves the rows of samples.jsonl as soon as the texts are there.
        batch_size: rows of a batch; None for that of the data's evaluation.
    """

    trainer: lightning.Trainer | None
    diffusion: Diffusion
    data: TextData
    drawing: Drawing
    seed: int
    watch: Watcher | None = None
    keep: Callable[[Sequence[Mapping[str, object]]], None] = lambda rows: None
    batch_size: int | None = None

    @property
    def blank_id(self) -> int:
        """The token that stands where text is wanted."""
        return self.diffusion.objective.process.blank_id

    def fill(
        self, rows: Sequence[np.ndarray], names_M: np.ndarray, told: Mapping[str, Tensor] | None = None
    ) -> list[Drawn]:
        """Fill the masks of `rows` of ids. told: the conditioning of each row beside its tokens, (M, ...) each."""

        def draw_from(here: slice) -> list[Drawn]:
            of_rows = {name: value[here] for name, value in (told or {}).items()}
            return self.draw_batch(rows[here], names_M[here], self.watch if here.start == 0 else None, of_rows)

        return self.in_batches(draw_from, len(rows))

    def in_batches(self, draw_from: Callable[[slice], list], number: int) -> list:
        """Return the results of `draw_from` for batches of `number` rows, in their order, from all devices.

        Every process gets all of them, the same as one process alone would have drawn. draw_from: some rows -> one
        result for each of them.
        """
        trainer, size = self.trainer, self.batch_size or self.data.eval_batch_size
        several = trainer is not None and trainer.world_size > 1
        starts = list(range(0, number, size))
        mine = starts[trainer.global_rank :: trainer.world_size] if several else starts
        meter = Meter("sample (first process)" if several else "sample", sum(min(size, number - s) for s in mine))

        def step(start: int) -> list:  # in full precision, as without a trainer
            with (
                torch.inference_mode(),
                torch.autocast(self.diffusion.device.type, enabled=False),
            ):
                drawn = draw_from(slice(int(start), int(start) + size))
            meter.update(meter.done + len(drawn))
            return drawn

        if several:
            loader = DataLoader(mine, batch_size=None)
            parts = gather(trainer, self.diffusion, step,
                           lambda module: trainer.predict(module, loader, return_predictions=False))  # fmt: skip
            batches = [parts[k % len(parts)][k // len(parts)] for k in range(len(starts))]
        else:
            batches = [step(start) for start in starts]
        meter.close()
        return [text for batch in batches for text in batch]

    def draw_batch(
        self, rows: Sequence[np.ndarray], names_B: np.ndarray, watch: Watcher | None, told: Mapping[str, Tensor]
    ) -> list[Drawn]:
        """Fill the masks of one batch."""
        lengths = [len(row) for row in rows]
        x_BL, cond = padded(rows, self.data.vocabulary.pad_id)
        cond |= told or {}
        prompts_B = np.array([int((row == self.blank_id).argmax()) for row in rows])
        segment_ends = self.data.segment_ends(prompts_B) if self.data.segments else None
        if segment_ends is not None:
            cond["segment_ends"] = torch.from_numpy(segment_ends)
        noise = KeyedNoise(self.seed, torch.from_numpy(names_B).to(self.diffusion.device))
        ends_early = self.diffusion.objective.causal and not self.data.wrap
        stop = {"stop_id": self.data.vocabulary.eos_id} if ends_early or self.drawing.var_length else {}
        x_BL = x_BL.to(self.diffusion.device)
        cond = {name: value.to(self.diffusion.device) for name, value in cond.items()}
        if watch is not None:
            watch(Trace(x_BL, self.diffusion.objective.process))
        out = self.drawing.sampler(self.diffusion.model, x_BL, noise, watch=watch, **cond, **stop)
        extra = out.ids_BL.shape[1] - x_BL.shape[1]  # semi-autoregressive samplers go on behind the window
        drawn = []
        for i, length in enumerate(lengths):
            length = length + extra if out.length_B is None else min(length + extra, int(out.length_B[i]))
            columns = [part_BL[i, :length].tolist() for part_BL in (out.ids_BL, out.step_BL, out.confidence_BL)]
            columns.append(list(range(len(columns[0]))))
            if ends_early or self.data.fill:
                starts = [1] if segment_ends is None else segment_ends[i].tolist()
                kept = _own(columns[0], self.data.vocabulary.eos_id, starts)
                columns = [[column[place] for place in kept] for column in columns]
            drawn.append(Drawn(*columns, out.num_steps, int(out.evaluations_B[i])))
        return drawn


@dataclass(frozen=True)
class Sampled:
    """Texts that were drawn, and what was measured of them.

    results: the numbers for results.json. rows: the lines of samples.jsonl. drawn: the texts to show, in their order.
    protocol: what identifies the result, beside the experiment and how texts are drawn.
    """

    results: Mapping[str, object]
    rows: Sequence[Mapping[str, object]]
    drawn: Sequence[Drawn]
    protocol: Mapping[str, object]

    @property
    def evaluations(self) -> float:
        """Network evaluations per text."""
        return self.results["network_evaluations_per_sample"]


def draw(
    diffusion: Diffusion, data: TextData, drawing: Drawing, num_samples: int, batch_size: int, seed: int,
    class_id: int | None = None, watch: Watcher | None = None,
) -> list[Drawn]:  # fmt: skip
    """Draw `num_samples` texts. The i-th depends on (seed, i) and on the weights, not on the batch it is drawn in.

    A text gets the length of a training row picked at random, since a model of padded rows is a model of
    p(text | length); wrapped and filled rows all have the model's length, and causal models and models of filled rows
    decide themselves where to end. Where texts have prompts, or a prefix of them is given, these are validation texts'.
    class_id: the class that a conditional network is conditioned on. The rest is as for `Setting`.
    """
    rows = rows_to_fill(diffusion, data, drawing.given, num_samples, seed)
    told = {} if class_id is None else {"class_id": torch.full((num_samples,), class_id)}
    setting = Setting(None, diffusion, data, drawing, seed, watch, batch_size=batch_size)
    return setting.fill(rows, np.arange(num_samples), told)


def _own(ids: list[int], eos_id: int | None, starts: Sequence[int]) -> list[int]:
    """The places of a text without its fill: of each part that begins at one of `starts` those up to its first EOS.
    What stands before the first of them is given, BOS among it, which may have the id of EOS."""
    own = list(range(min(starts[0], len(ids))))
    for start, stop in pairwise([*starts, len(ids)]):
        own += range(start, ids.index(eos_id, start, stop) + 1 if eos_id in ids[start:stop] else stop)
    return own
