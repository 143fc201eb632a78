"""mode=sample_eval: text out of masks, with the steps that wrote it."""

from __future__ import annotations

from functools import partial

from palimpsest.evaluation.directions import Directed, Outcome
from palimpsest.evaluation.drawing import Setting
from palimpsest.evaluation.free_texts import WriteFreely
from palimpsest.evaluation.generative_perplexity import CausalScorer
from palimpsest.evaluation.guidance import Guidance
from palimpsest.evaluation.requests import request
from palimpsest.report.directions import titled
from palimpsest.report.sampled import sampled_lines, sampled_report
from palimpsest.report.watching import Views, described
from palimpsest.tasks.base import Experiment, write_latents, write_report, write_results, write_rows


def sample_eval(
    experiment: Experiment, *, checkpoint_path: str, disable_ema: bool, num_batches: int | None,
    num_samples: int | None, num_shown: int, split: str | None, samples_per_prompt: int,
    compute_generative_perplexity: bool, scorer_name: str, perplexity_batch_size: int, views: Views, directed: Directed,
    guided: Guidance,
) -> dict[str, object]:  # fmt: skip
    """Draw texts; write samples.jsonl, results.json, report.html and what `views` asks for of the first `num_shown`.

    `num_samples` texts (None: `num_batches` batches) are held against as many real ones of `split` (None: against
    nothing). Where texts have prompts, as many of those of `split` (both None: all) are completed instead, and the
    completions judged.

    Args:
        directed: for texts with latents: what is drawn from what.
        guided: the class that free texts are guided to.
    """
    data, drawing = experiment.data(), experiment.drawing
    class_id = guided.number(data)
    scorer = partial(CausalScorer.load, scorer_name, perplexity_batch_size) if compute_generative_perplexity else None
    asked = request(
        data, drawing, experiment.judge, experiment.truth, directed, class_id, split=split, num_samples=num_samples,
        num_batches=num_batches, samples_per_prompt=samples_per_prompt, load_scorer=scorer,
    )  # fmt: skip
    diffusion = experiment.trained(data, checkpoint_path, disable_ema).eval()
    if isinstance(asked, WriteFreely) and class_id is not None:
        drawing, data = guided.of(drawing, diffusion, data), experiment.data(class_id)
    folder, shown = experiment.folder() / "sample_eval" / asked.folder, max(num_shown, 1)
    keep = partial(write_rows, folder / "samples.jsonl")
    with views.watcher(shown, diffusion, data, drawing) as watching:
        found = asked(
            Setting(experiment.trainer("sample_eval"), diffusion, data, drawing, experiment.seed, watching, keep)
        )
    known = {**experiment.protocol, **drawing.protocol, **found.protocol}
    write_results(folder, {**found.results, "protocol": known, "command": experiment.command})
    how, samples = described(drawing.protocol), titled(found, watching.samples(found.drawn[:shown], data.tokenizer))
    report = sampled_report(found, data, samples, how, experiment.command, experiment.facts)
    path, about = write_report(experiment, report, folder), how
    if isinstance(found, Outcome):
        about = f"{directed.direction} · {how}"
        if found.latent_MKD is not None:
            write_latents(folder / "latents.npy", data.latents.restore(found.latent_MKD))
    seen = views.write(folder, samples, about, experiment.command) if samples else []
    print(f"\n{sampled_lines(found, slice(watching.read, num_shown), how)}", path, *seen, sep="\n")
    return dict(found.results)
