"""mode=sample_eval: text out of masks, with the steps that wrote it.

Shape suffixes: B batch, L length.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from callbacks.progress import Meter
from diffusion import Diffusion
from objectives.base import scored_mask
from randomness import KeyedNoise
from reporting.report import Metric, Report, Sample
from tasks.base import Experiment, write_results
from tasks.generative_perplexity import CausalScorer
from tasks.sample_quality import compare, real_texts
from text.tokenizers import decode, token_strings


@dataclass(frozen=True)
class Drawn:
    """One sampled text: its ids without padding, the step that wrote each (0: given), and what it cost."""

    ids: list[int]
    steps: list[int]
    num_steps: int
    evaluations: int


def draw(
    diffusion: Diffusion, data: object, sampler: Callable, num_samples: int, batch_size: int, seed: int
) -> list[Drawn]:
    """`num_samples` texts. The i-th depends on (seed, i) and on the weights, not on the batch it is drawn in.

    A text gets the length of a training row picked at random, since a model of padded rows is a model of
    p(text | length); wrapped rows all have the model's length.
    """
    rows = _template_rows(data, num_samples, seed)
    drawn: list[Drawn] = []
    meter = Meter("sample", num_samples)
    with torch.inference_mode():
        for start in range(0, num_samples, batch_size):
            drawn += _draw_batch(diffusion, data, sampler, rows[start : start + batch_size], start, seed)
            meter.update(len(drawn))
    meter.close()
    return drawn


def _template_rows(data: object, num_samples: int, seed: int) -> list[int]:
    """Training rows that lend their length and given tokens to the samples."""
    u = KeyedNoise(seed, torch.arange(num_samples), draw=-3).uniform()
    return (u * len(data.split("train"))).long().tolist()


def _draw_batch(
    diffusion: Diffusion, data: object, sampler: Callable, rows: list[int], first: int, seed: int
) -> list[Drawn]:
    batch = {k: v.to(diffusion.device) for k, v in data.collate(data.split("train")[rows]).items()}
    mask_id = diffusion.objective.mask_id
    x_BL = torch.where(scored_mask(batch), mask_id, batch["input_ids"])
    cond = {k: batch[k] for k in ("attention_mask",) if k in batch}
    noise = KeyedNoise(seed, torch.arange(first, first + len(rows), device=diffusion.device))
    out = sampler(diffusion.denoise, diffusion.objective.schedule, x_BL, mask_id, noise, **cond)
    length_B = cond["attention_mask"].sum(-1).tolist() if cond else [x_BL.shape[1]] * len(rows)
    return [
        Drawn(out.ids_BL[i, :n].tolist(), out.step_BL[i, :n].tolist(), out.num_steps, int(out.evaluations_B[i]))
        for i, n in enumerate(length_B)
    ]


def shown(drawn: list[Drawn], tokenizer: object) -> list[Sample]:
    """Samples as the report shows them, special tokens left out."""
    samples = []
    for index, text in enumerate(drawn):
        kept = [i for i, token in enumerate(text.ids) if token not in tokenizer.all_special_ids]
        strings = token_strings(tokenizer, [text.ids[i] for i in kept])
        title = f"sample {index} · {text.evaluations} network evaluations"
        samples.append(Sample(strings, [text.steps[i] for i in kept], text.num_steps, title))
    return samples


def write_samples(path: Path, drawn: list[Drawn], tokenizer: object) -> None:
    """`samples.jsonl`: one JSON object a line with text, ids, the step that wrote each token, network evaluations."""
    with path.open("w") as file:
        for index, text in enumerate(drawn):
            row = {"sample": index, "text": decode(tokenizer, text.ids, skip_special=True), "ids": text.ids,
                   "steps": text.steps,
                   "evaluations": text.evaluations}  # fmt: skip
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def sample_eval(
    experiment: Experiment, *, checkpoint_path: str, disable_ema: bool, num_batches: int, num_shown: int,
    split: str | None, compute_generative_perplexity: bool, scorer_name: str, perplexity_batch_size: int,
) -> dict[str, object]:  # fmt: skip
    """Draw `num_batches` batches of `loader.eval_batch_size` texts; hold them against as many real ones of `split`
    (None: against nothing); write samples.jsonl, results.json, report.html."""
    if num_batches < 1:
        raise ValueError(f"sampling.num_sample_batches={num_batches} must be at least 1")
    # What can be missing is looked for before the sampling, which may take hours.
    scorer = CausalScorer.load(scorer_name, perplexity_batch_size) if compute_generative_perplexity else None
    data = experiment.data()
    diffusion = experiment.trained(data, checkpoint_path, disable_ema).eval()
    num_samples = num_batches * data.eval_batch_size
    real = real_texts(data, split, num_samples, experiment.seed)
    drawn = draw(diffusion, data, experiment.sampler, num_samples, data.eval_batch_size, experiment.seed)
    folder = experiment.folder() / "sample_eval"
    folder.mkdir(parents=True, exist_ok=True)
    write_samples(folder / "samples.jsonl", drawn, data.tokenizer)
    if scorer:
        scorer.to(diffusion.device)
    comparison = compare([text.ids for text in drawn], real, data, scorer)
    evaluations = float(np.mean([text.evaluations for text in drawn]))
    results = {**comparison.results(), "network_evaluations_per_sample": evaluations}
    write_results(folder, {**results, "command": experiment.command})
    report = Report("Samples", f"{len(drawn)} texts out of masks", experiment.command, experiment.facts)
    comparison.report(report, [Metric("network evaluations", evaluations, None, "per sample")])
    report.section("Texts")
    report.samples(shown(drawn[: max(num_shown, 1)], data.tokenizer))
    report.code(experiment.settings, "configuration")
    report.write(folder / "report.html")
    for text in drawn[:num_shown]:
        print(f"\n{decode(data.tokenizer, text.ids, skip_special=True)}")
    print(f"\n{comparison}\n{evaluations:.1f} network evaluations per sample\n{folder / 'report.html'}")
    return results
