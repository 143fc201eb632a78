"""mode=sample_eval: text out of masks, with the steps that wrote it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np

from metrics import Estimate
from reporting.report import Metric, Report, Sample
from tasks.base import Experiment, write_results
from tasks.drawing import Drawn, draw
from text.tokenizers import decode, token_strings


def shown(drawn: list[Drawn], tokenizer: object) -> list[Sample]:
    """Samples as the report shows them, special tokens left out."""
    samples = []
    for index, text in enumerate(drawn):
        kept = [i for i, token in enumerate(text.ids) if token not in tokenizer.all_special_ids]
        strings = token_strings(tokenizer, [text.ids[i] for i in kept])
        title = f"sample {index} · {text.evaluations} network evaluations"
        samples.append(Sample(strings, [text.steps[i] for i in kept], text.num_steps, title))
    return samples


def unigram_entropy(drawn: list[Drawn]) -> Estimate:
    """Entropy of the token frequencies within one text, in nats, averaged over the texts: low where texts repeat."""
    values = []
    for text in drawn:
        p = np.array(list(Counter(text.ids).values())) / len(text.ids)
        values.append(-(p * np.log(p)).sum())
    se = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return Estimate(float(np.mean(values)), float(se))


def write_samples(path: Path, drawn: list[Drawn], tokenizer: object) -> None:
    """`samples.jsonl`: one JSON object a line with text, ids, the step that wrote each token, network evaluations."""
    with path.open("w") as file:
        for index, text in enumerate(drawn):
            row = {"sample": index, "text": decode(tokenizer, text.ids, skip_special=True), "ids": text.ids,
                   "steps": text.steps,
                   "evaluations": text.evaluations}  # fmt: skip
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def sample_eval(
    experiment: Experiment, *, checkpoint_path: str, disable_ema: bool, num_batches: int, num_shown: int
) -> dict[str, object]:
    """Draw `num_batches` batches of `loader.eval_batch_size` texts; write samples.jsonl, results.json, report.html."""
    if num_batches < 1:
        raise ValueError(f"sampling.num_sample_batches={num_batches} must be at least 1")
    data = experiment.data()
    diffusion = experiment.trained(data, checkpoint_path, disable_ema).eval()
    drawn = draw(
        diffusion, data, experiment.drawing, num_batches * data.eval_batch_size, data.eval_batch_size, experiment.seed
    )
    folder = experiment.folder() / "sample_eval"
    folder.mkdir(parents=True, exist_ok=True)
    write_samples(folder / "samples.jsonl", drawn, data.tokenizer)
    entropy = unigram_entropy(drawn)
    evaluations = float(np.mean([text.evaluations for text in drawn]))
    results = {"unigram_entropy_nats": entropy, "network_evaluations_per_sample": evaluations, "samples": len(drawn)}
    write_results(folder, {**results, "command": experiment.command})
    report = Report("Samples", f"{len(drawn)} texts out of masks", experiment.command, experiment.facts)
    report.section(
        "What was measured", "Unigram entropy falls when texts repeat themselves; compare it with real text."
    )
    report.metrics(
        [
            Metric("unigram entropy", entropy.value, entropy.se, "nats"),
            Metric("network evaluations", evaluations, None, "per sample"),
        ]
    )
    report.section("Texts")
    report.samples(shown(drawn[: max(num_shown, 1)], data.tokenizer))
    report.code(experiment.settings, "configuration")
    report.write(folder / "report.html")
    for text in drawn[:num_shown]:
        print(f"\n{decode(data.tokenizer, text.ids, skip_special=True)}")
    print(
        f"\nunigram entropy {entropy} nats, {evaluations:.1f} network evaluations per sample\n{folder / 'report.html'}"
    )
    return results
