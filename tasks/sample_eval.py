"""mode=sample_eval: text out of masks, with the steps that wrote it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from palimpsest.common.values import AtLeastOne, Count, FilePath, Name, Natural, PresentPath
from palimpsest.report.denoising import Sample
from palimpsest.report.report import Metric, Report
from palimpsest.tasks.base import Experiment, mode, write_results
from palimpsest.tasks.blanks import Template
from palimpsest.tasks.directions import Directed, both, l2t, sample_direction, t2l
from palimpsest.tasks.drawing import Drawn, decoded, draw_on_all
from palimpsest.tasks.editing import edit
from palimpsest.tasks.generative_perplexity import CausalScorer
from palimpsest.tasks.guidance import Guidance, class_shares
from palimpsest.tasks.prompted import Asked, complete_prompts
from palimpsest.tasks.sample_quality import Comparison, compare, real_texts
from palimpsest.tasks.watching import Views, described


@rank_zero_only
def write_samples(path: Path, drawn: list[Drawn], given: Template, tokenizer: object) -> None:
    """`samples.jsonl`: one JSON object a line with text, ids, the step that wrote each token, its confidence, network
    evaluations."""
    with path.open("w", encoding="utf-8") as file:
        for index, text in enumerate(drawn):
            row = {"sample": index, "text": decoded(text, given, tokenizer), "ids": text.ids,
                   "steps": text.steps, "confidence": [round(p, 4) for p in text.confidence],
                   "evaluations": text.evaluations}  # fmt: skip
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


@mode(writes=True, measures=True)
def sample_eval(
    experiment: Experiment,
    *,
    checkpoint_path: FilePath | None,
    disable_ema: bool,
    num_batches: Count | None,
    num_samples: Count | None,
    num_shown: Natural,
    split: Name | None,
    samples_per_prompt: Count,
    compute_generative_perplexity: bool,
    scorer_name: PresentPath,
    perplexity_batch_size: AtLeastOne,
    views: Views,
    directed: Directed,
    guided: Guidance,
) -> dict[str, object]:
    """Draw `num_samples` texts (None: `num_batches` batches of `loader.eval_batch_size`), shared out over all devices;
    hold them against as many real ones of `split` (None: against nothing); write samples.jsonl, results.json,
    report.html and what `views` asks for of the first `num_shown`. Where texts have prompts, so many of those of
    `split` (both None: all) are completed instead and the completions judged (tasks/prompted.py). directed: of texts
    with latents, what is drawn from what (tasks/directions.py). guided: towards which class."""
    if num_batches is not None and num_batches < 1:
        raise ValueError(f"sampling.num_sample_batches={num_batches} must be at least 1")
    data = experiment.build.data()
    class_id = guided.number(data)
    number = num_samples or (num_batches and num_batches * data.eval_batch_size)
    if data.prompted:
        asked = Asked(split, number, samples_per_prompt, num_shown)
        return complete_prompts(experiment, asked, checkpoint_path, disable_ema, compute_generative_perplexity, views)
    if number is None or samples_per_prompt != 1:
        key = f"samples_per_prompt={samples_per_prompt}" if number else "num_sample_batches=null"
        raise ValueError(f"sampling.{key} is for texts with prompts, and those of data={data.name} have none")
    if directed.direction:
        return sample_direction(
            experiment, directed, {"joint": both, "l2t": l2t, "t2l": t2l, "edit": edit},
            checkpoint_path=checkpoint_path, disable_ema=disable_ema, split=split, num_shown=num_shown,
            num_texts=number, views=views,
        )  # fmt: skip
    # What can be missing is looked for before the sampling, which may take hours.
    scorer = CausalScorer.load(scorer_name, perplexity_batch_size) if compute_generative_perplexity else None
    diffusion = experiment.weights.trained(data, checkpoint_path, disable_ema).eval()
    drawing = guided.of(experiment.build.drawing(diffusion.provenance.length), diffusion, data)
    data = data if class_id is None else experiment.build.data(class_id)
    real = real_texts(data, split, number, experiment.seed)
    with views.watcher(max(num_shown, 1), diffusion, data, drawing) as watching:
        drawn = draw_on_all(
            experiment.trainer("sample_eval"), diffusion, data, drawing, number, data.eval_batch_size,
            experiment.seed, watching,
        )  # fmt: skip
    folder = experiment.runs.folder() / "sample_eval"
    folder.mkdir(parents=True, exist_ok=True)
    write_samples(folder / "samples.jsonl", drawn, drawing.given, data.tokenizer)
    if scorer:
        scorer.to(diffusion.device)
    comparison = compare([text.ids for text in drawn], real, data, scorer)
    evaluations = float(np.mean([text.evaluations for text in drawn]))
    results = {**comparison.results(), "network_evaluations_per_sample": evaluations}
    texts = [decoded(text, drawing.given, data.tokenizer) for text in drawn]
    results |= {} if class_id is None else class_shares(experiment.build.truth, texts, class_id)
    known = {**experiment.protocol, **drawing.protocol}
    write_results(folder, {**results, "protocol": known, "command": experiment.command})
    how, samples = described(drawing.protocol), watching.samples(drawn[: max(num_shown, 1)], data.tokenizer)
    _report(experiment, results, comparison, samples, how).write(folder / "report.html")
    seen = views.write(folder, samples, how, experiment.command)
    for text in texts[watching.read : num_shown]:
        print(f"\n{text}")
    print(f"\n{comparison}\ndrawn by {how}, {evaluations:.1f} network evaluations per sample")
    if "possible" in results:
        print(f"{results['possible']:.1%} are possible texts, of these {results['of_the_class']:.1%} of the class")
    print(*[folder / "report.html", *seen], sep="\n")
    return results


def _report(
    experiment: Experiment, results: dict[str, object], comparison: Comparison, samples: list[Sample], how: str
) -> Report:
    evaluations = results["network_evaluations_per_sample"]
    beside = [Metric("network evaluations", evaluations, None, "per sample")]
    if "possible" in results:
        beside.append(Metric("possible texts", 100 * results["possible"], None, "%", "by the corpus itself"))
        beside.append(Metric("of the class", 100 * results["of_the_class"], None, "%", "of these, by exact posterior"))
    report = Report("Samples", f"{len(samples)} of the texts out of masks", experiment.command, experiment.facts)
    comparison.report(report, beside)
    report.section("Texts", f"Drawn by {how}.")
    report.samples(samples)
    report.code(experiment.build.settings, "configuration")
    return report
