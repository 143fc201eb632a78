"""Sample texts without prompts, and compare them with as many real texts."""

from dataclasses import dataclass

import numpy as np

from palimpsest.evaluation.drawing import SamplingContext, SamplingResult, decoded
from palimpsest.evaluation.generative_perplexity import CausalScorer
from palimpsest.evaluation.guidance import class_shares
from palimpsest.evaluation.likelihood import GroundTruth
from palimpsest.evaluation.sample_quality import Comparison, compare, real_texts
from palimpsest.evaluation.sampling_inputs import rows_to_fill


@dataclass(frozen=True)
class FreeTexts(SamplingResult):
    """Texts sampled without prompts."""

    texts: list[str]
    comparison: Comparison  # quality of these and of real texts


@dataclass(frozen=True)
class FreeTextRequest:
    """A request for `number` texts, to be compared with as many real ones."""

    number: int
    split: str | None  # of the real texts; None for no comparison
    scorer: CausalScorer | None  # of the generative perplexity, if wanted
    truth: GroundTruth | None  # the exact distribution of the corpus, if known
    class_id: int | None  # the class that the texts are guided to
    folder = ""

    def __call__(self, context: SamplingContext) -> FreeTexts:
        """Sample the texts and measure them."""
        data, drawing = context.data, context.drawing
        real = real_texts(data, self.split, self.number, context.seed, context.drawing.inputs.max_length)
        masked_rows = rows_to_fill(context.diffusion, data, drawing.inputs, self.number, context.seed)
        sampled = context.sample(masked_rows, np.arange(self.number))
        texts = [decoded(text, drawing.inputs, data.tokenizer) for text in sampled]
        rows = [{"sample": index, "text": text, **one.columns()}
                for index, (text, one) in enumerate(zip(texts, sampled, strict=True))]  # fmt: skip
        context.save_rows(rows)
        if self.scorer:
            self.scorer.to(context.diffusion.device)
        comparison = compare([text.ids for text in sampled], real, data, self.scorer)
        evaluations = float(np.mean([text.evaluations for text in sampled]))
        results = {**comparison.results(), "network_evaluations_per_sample": evaluations}
        if self.class_id is not None:
            results |= class_shares(self.truth, texts, self.class_id)
        return FreeTexts(results, rows, sampled, {}, texts, comparison)
