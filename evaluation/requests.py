"""Choose what is sampled: free texts, completions of prompts, or conditional generation with latents."""

from __future__ import annotations

from collections.abc import Callable

from palimpsest.corpora.judging import Judge
from palimpsest.dataloader import TextData
from palimpsest.evaluation.completions import CompletionRequest
from palimpsest.evaluation.conditional_generation import (
    ConditionalRequest,
    ConditionalSettings,
    generate_jointly,
    latent_to_text,
    text_to_latent,
)
from palimpsest.evaluation.editing import edit
from palimpsest.evaluation.free_texts import FreeTextRequest
from palimpsest.evaluation.generative_perplexity import CausalScorer
from palimpsest.evaluation.likelihood import GroundTruth
from palimpsest.evaluation.sampling_inputs import Template

_GENERATORS = {"joint": generate_jointly, "l2t": latent_to_text, "t2l": text_to_latent, "edit": edit}


def request(
    data: TextData,
    template: Template,
    judge: Judge,
    truth: GroundTruth | None,
    conditional: ConditionalSettings,
    class_id: int | None,
    *,
    split: str | None,
    num_samples: int | None,
    num_batches: int | None,
    samples_per_prompt: int,
    load_scorer: Callable[[], CausalScorer] | None,
) -> FreeTextRequest | CompletionRequest | ConditionalRequest:
    """Return the request for `num_samples` texts, or `num_batches` batches; called with a context it samples them.

    Settings are checked here, before sampling, which may take hours. load_scorer: None without generative perplexity.

    Raises:
        ValueError: these data do not allow what the settings ask for.
    """
    number = num_samples or (num_batches and num_batches * data.eval_batch_size)
    if data.prompted:
        completion = CompletionRequest(split, number, samples_per_prompt, judge)
        completion.check(data, template, load_scorer is not None)
        return completion
    if number is None or samples_per_prompt != 1:
        key = f"samples_per_prompt={samples_per_prompt}" if number else "num_sample_batches=null"
        raise ValueError(f"sampling.{key} is for texts with prompts, and those of data={data.name} have none")
    if conditional.direction:
        return ConditionalRequest(conditional, split, number, truth, _GENERATORS[conditional.direction])
    return FreeTextRequest(number, split, load_scorer and load_scorer(), truth, class_id)
