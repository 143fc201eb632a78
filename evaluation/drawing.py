"""Sampling of texts in batches, on one device or on several.

Shape suffixes: B batch, L length, M texts.
"""

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
class SampledTokens:
    """One sampled text."""

    ids: list[int]  # without padding
    steps: list[int]  # the step that wrote each token; 0 for prompt tokens
    confidence: list[float]  # probability of each token when it was written; 1 for prompt tokens
    places: list[int]  # position of each token in the sampler's row
    num_steps: int
    evaluations: int  # of the network

    def columns(self) -> dict[str, object]:
        """Return the fields of one line of samples.jsonl: ids, steps, confidence, evaluations."""
        confidence = [round(p, 4) for p in self.confidence]
        return {"ids": self.ids, "steps": self.steps, "confidence": confidence, "evaluations": self.evaluations}


def decoded(sampled: SampledTokens, inputs: Template, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of a sample without special tokens; a prefix is exactly as typed, whatever the tokenizer."""
    text, prefix = decode(tokenizer, sampled.ids, skip_special=True), inputs.prefix or ""
    if text.startswith(prefix):
        return text
    ids = encode(tokenizer, [prefix])[0]
    decoded_prefix = decode(tokenizer, ids, skip_special=True)
    if text.startswith(decoded_prefix):
        return prefix + text[len(decoded_prefix) :]
    start = next(k for k in range(len(sampled.ids)) if sampled.ids[k : k + len(ids)] == ids)
    return f"{prefix} {decode(tokenizer, sampled.ids[start + len(ids) :], skip_special=True)}"


@dataclass(frozen=True)
class Drawing:
    """Sampler, observed tokens and protocol of a sampling run."""

    sampler: Callable
    inputs: Template = Template()  # the observed tokens of each text
    protocol: Mapping[str, object] = field(default_factory=dict)  # the settings of the sampler, for the results
    var_length: bool = False  # the sampler decides where a text ends


@dataclass(frozen=True)
class SamplingContext:
    """Inputs of sampling.

    The tokens of a row depend on the seed and the row's key only, not on the batch or the number of devices.
    """

    trainer: lightning.Trainer | None  # provides the devices; None for this process alone
    diffusion: Diffusion
    data: TextData
    drawing: Drawing
    seed: int
    watch: Watcher | None = None  # observes the first batch in the first process
    save_rows: Callable[[Sequence[Mapping[str, object]]], None] = lambda rows: None  # writes samples.jsonl
    batch_size: int | None = None  # None for the evaluation batch size of the data

    @property
    def blank_id(self) -> int:
        """The token that marks positions to be sampled."""
        return self.diffusion.objective.process.blank_id

    def sample(
        self, rows: Sequence[np.ndarray], key_M: np.ndarray, conditioning: Mapping[str, Tensor] | None = None
    ) -> list[SampledTokens]:
        """Sample the masked tokens of `rows`. conditioning: further inputs of the network, (M, ...) each."""

        def sample_slice(rows_slice: slice) -> list[SampledTokens]:
            of_rows = {name: value[rows_slice] for name, value in (conditioning or {}).items()}
            return self.sample_batch(
                rows[rows_slice], key_M[rows_slice], self.watch if rows_slice.start == 0 else None, of_rows
            )

        return self.in_batches(sample_slice, len(rows))

    def in_batches(self, sample: Callable[[slice], list], number: int) -> list:
        """Return the results of `sample` (slice of rows -> result of each) for `number` rows, in every process."""
        trainer, size = self.trainer, self.batch_size or self.data.eval_batch_size
        distributed = trainer is not None and trainer.world_size > 1
        all_starts = list(range(0, number, size))
        starts = all_starts[trainer.global_rank :: trainer.world_size] if distributed else all_starts
        meter = Meter("sample (first process)" if distributed else "sample", sum(min(size, number - s) for s in starts))

        def sample_batch(start: int) -> list:  # in full precision, as without a trainer
            with torch.inference_mode(), torch.autocast(self.diffusion.device.type, enabled=False):
                sampled = sample(slice(int(start), int(start) + size))
            meter.update(meter.done + len(sampled))
            return sampled

        if distributed:
            loader = DataLoader(starts, batch_size=None)
            run = lambda module: trainer.predict(module, loader, return_predictions=False)
            parts = gather(trainer, self.diffusion, sample_batch, run)
            batches = [parts[k % len(parts)][k // len(parts)] for k in range(len(all_starts))]
        else:
            batches = [sample_batch(start) for start in all_starts]
        meter.close()
        return [text for batch in batches for text in batch]

    def sample_batch(
        self, rows: Sequence[np.ndarray], key_B: np.ndarray, watch: Watcher | None, conditioning: Mapping[str, Tensor]
    ) -> list[SampledTokens]:
        """Sample the masked tokens of one batch."""
        lengths = [len(row) for row in rows]
        x_BL, cond = padded(rows, self.data.vocabulary.pad_id)
        cond |= conditioning
        prompts_B = np.array([int((row == self.blank_id).argmax()) for row in rows])
        segment_ends = self.data.segment_ends(prompts_B) if self.data.segments else None
        if segment_ends is not None:
            cond["segment_ends"] = torch.from_numpy(segment_ends)
        noise = KeyedNoise(self.seed, torch.from_numpy(key_B).to(self.diffusion.device))
        ends_early = self.diffusion.objective.causal and not self.data.wrap
        stop_args = {"stop_id": self.data.vocabulary.eos_id} if ends_early or self.drawing.var_length else {}
        x_BL = x_BL.to(self.diffusion.device)
        cond = {name: value.to(self.diffusion.device) for name, value in cond.items()}
        if watch is not None:
            watch(Trace(x_BL, self.diffusion.objective.process))
        out = self.drawing.sampler(self.diffusion.model, x_BL, noise, watch=watch, **cond, **stop_args)
        extra = out.ids_BL.shape[1] - x_BL.shape[1]  # semi-autoregressive samplers continue beyond the window
        sampled = []
        for i, length in enumerate(lengths):
            length = length + extra if out.length_B is None else min(length + extra, int(out.length_B[i]))
            columns = [column_BL[i, :length].tolist() for column_BL in (out.ids_BL, out.step_BL, out.confidence_BL)]
            columns.append(list(range(len(columns[0]))))
            if ends_early or self.data.fill:
                starts = [1] if segment_ends is None else segment_ends[i].tolist()
                places = _unpadded_places(columns[0], self.data.vocabulary.eos_id, starts)
                columns = [[column[place] for place in places] for column in columns]
            sampled.append(SampledTokens(*columns, out.num_steps, int(out.evaluations_B[i])))
        return sampled


@dataclass(frozen=True)
class SamplingResult:
    """Sampled texts and the measurements on them."""

    results: Mapping[str, object]  # the numbers for results.json
    rows: Sequence[Mapping[str, object]]  # the lines of samples.jsonl
    sampled: Sequence[SampledTokens]  # the texts to show
    protocol: Mapping[str, object]  # identifies the result, with those of the experiment and the sampler

    @property
    def evaluations(self) -> float:
        """Network evaluations per text."""
        return self.results["network_evaluations_per_sample"]


def draw(
    diffusion: Diffusion,
    data: TextData,
    drawing: Drawing,
    num_samples: int,
    batch_size: int,
    seed: int,
    class_id: int | None = None,
    watch: Watcher | None = None,
) -> list[SampledTokens]:
    """Sample `num_samples` texts. The i-th depends on (seed, i) and on the weights, not on its batch.

    Models of padded rows learn p(text | length), so a text gets the length of a random training row. Causal models and
    models of EOS-padded rows choose the end of a text. Prompts and given prefixes come from validation texts.
    """
    rows = rows_to_fill(diffusion, data, drawing.inputs, num_samples, seed)
    conditioning = {} if class_id is None else {"class_id": torch.full((num_samples,), class_id)}
    context = SamplingContext(None, diffusion, data, drawing, seed, watch, batch_size=batch_size)
    return context.sample(rows, np.arange(num_samples), conditioning)


def _unpadded_places(ids: list[int], eos_id: int | None, starts: Sequence[int]) -> list[int]:
    """Return the positions of a text without EOS padding: of each part from `starts` on, those up to the first EOS.

    Positions before the first part are observed; BOS among them may have the id of EOS.
    """
    places = list(range(min(starts[0], len(ids))))
    for start, stop in pairwise([*starts, len(ids)]):
        places += range(start, ids.index(eos_id, start, stop) + 1 if eos_id in ids[start:stop] else stop)
    return places
