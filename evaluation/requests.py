"""Choose what is to be sampled: free texts, completions of prompts, or a direction between texts and latents."""

from __future__ import annotations

from collections.abc import Callable

from palimpsest.corpora.answer_checking import AnswerChecker
from palimpsest.dataloader import TextData
from palimpsest.evaluation.completions import Asked
from palimpsest.evaluation.directions import Directed, Direction, both, l2t, t2l
from palimpsest.evaluation.editing import edit
from palimpsest.evaluation.free_texts import WriteFreely
from palimpsest.evaluation.generative_perplexity import CausalScorer
from palimpsest.evaluation.likelihood import GroundTruth
from palimpsest.evaluation.sampling_inputs import Template

_FIND = {"joint": both, "l2t": l2t, "t2l": t2l, "edit": edit}


def request(
    data: TextData,
    given: Template,
    judge: AnswerChecker,
    truth: GroundTruth | None,
    directed: Directed,
    class_id: int | None,
    *,
    split: str | None,
    num_samples: int | None,
    num_batches: int | None,
    samples_per_prompt: int,
    load_scorer: Callable[[], CausalScorer] | None,
) -> WriteFreely | Asked | Direction:
    """Return the request for `num_samples` texts, or `num_batches` batches; called with a `Setting` it draws them.

    What can be missing is looked for here, before the sampling, which may take hours.

    Args:
        truth: the exact distribution of the corpus, if it is known.
        load_scorer: loads the scorer of the generative perplexity; None if that is not wanted.

    Raises:
        ValueError: something is asked for that these data cannot give.
    """
    number = num_samples or (num_batches and num_batches * data.eval_batch_size)
    if data.prompted:
        asked = Asked(split, number, samples_per_prompt, judge)
        asked.check(data, given, load_scorer is not None)
        return asked
    if number is None or samples_per_prompt != 1:
        key = f"samples_per_prompt={samples_per_prompt}" if number else "num_sample_batches=null"
        raise ValueError(f"sampling.{key} is for texts with prompts, and those of data={data.name} have none")
    if directed.direction:
        return Direction(directed, split, number, truth, _FIND[directed.direction])
    return WriteFreely(number, split, load_scorer and load_scorer(), truth, class_id)
