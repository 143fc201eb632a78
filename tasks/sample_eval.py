"""mode=sample_eval: text out of masks, with the steps that wrote it."""

from __future__ import annotations

from functools import partial

from palimpsest.common.values import AtLeastOne, Count, FilePath, Name, Natural, PresentPath
from palimpsest.evaluation.directions import Directed, Outcome
from palimpsest.evaluation.drawing import Setting
from palimpsest.evaluation.experiment import Experiment
from palimpsest.evaluation.free_texts import WriteFreely
from palimpsest.evaluation.generative_perplexity import CausalScorer
from palimpsest.evaluation.guidance import Guidance
from palimpsest.evaluation.requests import request
from palimpsest.report.directions import titled
from palimpsest.report.sampled import sampled_lines, sampled_report
from palimpsest.report.watching import Views, described
from palimpsest.tasks.base import mode, write_latents, write_report, write_results, write_rows


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
    """Draw texts; write samples.jsonl, results.json, report.html and what `views` asks for of the first `num_shown`.

    `num_samples` texts (None: `num_batches` batches) are held against as many real ones of `split` (None: against
    nothing). Where texts have prompts, as many of those of `split` (both None: all) are completed instead, and the
    completions judged.

    Args:
        directed: for texts with latents: what is drawn from what.
        guided: the class that free texts are guided to.
    """
    data = experiment.build.data()
    class_id = guided.number(data)
    scorer = partial(CausalScorer.load, scorer_name, perplexity_batch_size) if compute_generative_perplexity else None
    asked = request(
        data,
        experiment.build.drawing().given,
        experiment.build.judge,
        experiment.build.truth,
        directed,
        class_id,
        split=split,
        num_samples=num_samples,
        num_batches=num_batches,
        samples_per_prompt=samples_per_prompt,
        load_scorer=scorer,
    )
    diffusion = experiment.weights.trained(data, checkpoint_path, disable_ema).eval()
    drawing = experiment.build.drawing(diffusion.provenance.length)
    if isinstance(asked, WriteFreely) and class_id is not None:
        drawing = guided.of(drawing, diffusion, data)
        data = experiment.build.data(class_id)
    folder = experiment.runs.folder() / "sample_eval" / asked.folder
    shown = max(num_shown, 1)
    trainer = experiment.trainer("sample_eval")
    keep = partial(write_rows, folder / "samples.jsonl")
    with views.watcher(shown, diffusion, data, drawing) as watching:
        found = asked(Setting(trainer, diffusion, data, drawing, experiment.seed, watching, keep))
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
