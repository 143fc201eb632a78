"""mode=sample_eval: sample texts, evaluate them, and show their denoising."""

from collections.abc import Callable
from functools import partial

from palimpsest.common.values import AtLeastOne, Count, FilePath, Name, Natural, PresentPath
from palimpsest.dataloader import TextData
from palimpsest.evaluation.completions import CompletionRequest
from palimpsest.evaluation.conditional_generation import (
    ConditionalRequest,
    ConditionalResult,
    ConditionalSettings,
    generate_jointly,
    latent_to_text,
    text_to_latent,
)
from palimpsest.evaluation.drawing import SamplingContext
from palimpsest.evaluation.editing import edit
from palimpsest.evaluation.experiment import Experiment
from palimpsest.evaluation.free_texts import FreeTextRequest
from palimpsest.evaluation.generative_perplexity import CausalScorer
from palimpsest.evaluation.guidance import Guidance
from palimpsest.report.conditional_generation import titled
from palimpsest.report.sampled import sampled_lines, sampled_report
from palimpsest.report.views import Views, described
from palimpsest.tasks.base import mode, write_latents, write_report, write_results, write_rows

_GENERATORS = {"joint": generate_jointly, "l2t": latent_to_text, "t2l": text_to_latent, "edit": edit}


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
    directed: ConditionalSettings,
    guided: Guidance,
) -> dict[str, object]:
    """Sample texts; write samples.jsonl, results.json, report.html and the `views` of the first `num_shown`.

    `num_samples` texts (None: `num_batches` batches) are compared with as many real ones of `split` (None: no
    comparison). If texts have prompts, as many prompts of `split` (both None: all) are completed and the answers
    checked instead.

    Args:
        directed: settings of conditional generation, for texts with latents.
        guided: the class that free texts are guided to.
    """
    data = experiment.build.data()
    class_id = guided.number(data)
    number = num_samples or (num_batches and num_batches * data.eval_batch_size)
    scorer = partial(CausalScorer.load, scorer_name, perplexity_batch_size) if compute_generative_perplexity else None
    request = _request(experiment, data, directed, class_id, split, number, samples_per_prompt, scorer)
    diffusion = experiment.weights.trained(data, checkpoint_path, disable_ema).eval()
    drawing = experiment.build.drawing(diffusion.provenance.length)
    if isinstance(request, FreeTextRequest) and class_id is not None:
        drawing = guided.of(drawing, diffusion, data)
        data = experiment.build.data(class_id)
    folder = experiment.runs.folder() / "sample_eval" / request.folder
    shown = max(num_shown, 1)
    trainer = experiment.trainer("sample_eval")
    keep = partial(write_rows, folder / "samples.jsonl")
    with views.watcher(shown, diffusion, data, drawing) as watcher:
        result = request(SamplingContext(trainer, diffusion, data, drawing, experiment.seed, watcher, keep))
    known = {**experiment.protocol, **drawing.protocol, **result.protocol}
    write_results(folder, {**result.results, "protocol": known, "command": experiment.command})
    how = described(drawing.protocol)
    samples = titled(result, watcher.samples(result.sampled[:shown], data.tokenizer))
    report = sampled_report(result, data, samples, how, experiment.command, experiment.facts)
    path, about = write_report(experiment, report, folder), how
    if isinstance(result, ConditionalResult):
        about = f"{directed.direction} · {how}"
        if result.latent_MKD is not None:
            write_latents(folder / "latents.npy", data.latents.restore(result.latent_MKD))
    seen = views.write(folder, samples, about, experiment.command) if samples else []
    print(f"\n{sampled_lines(result, slice(watcher.num_printed, num_shown), how)}", path, *seen, sep="\n")
    return dict(result.results)


def _request(
    experiment: Experiment,
    data: TextData,
    directed: ConditionalSettings,
    class_id: int | None,
    split: str | None,
    number: int | None,
    samples_per_prompt: int,
    load_scorer: Callable[[], CausalScorer] | None,
) -> CompletionRequest | FreeTextRequest | ConditionalRequest:
    """Return the request for `number` texts; called with a context it samples them.

    Settings are checked here, before sampling, which may take hours.

    Raises ValueError if these data do not allow what the settings ask for.
    """
    if data.prompted:
        completion = CompletionRequest(split, number, samples_per_prompt, experiment.build.judge)
        completion.check(data, experiment.build.drawing().inputs, load_scorer is not None)
        return completion
    if number is None or samples_per_prompt != 1:
        key = f"samples_per_prompt={samples_per_prompt}" if number else "num_sample_batches=null"
        raise ValueError(f"sampling.{key} is for texts with prompts, and those of data={data.name} have none")
    truth = experiment.build.truth
    if directed.direction:
        return ConditionalRequest(directed, split, number, truth, _GENERATORS[directed.direction])
    return FreeTextRequest(number, split, load_scorer and load_scorer(), truth, class_id)
