"""Draw texts out of masks, and hold them against as many real ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from palimpsest.evaluation.drawing import Sampled, Setting, decoded
from palimpsest.evaluation.generative_perplexity import CausalScorer
from palimpsest.evaluation.guidance import class_shares
from palimpsest.evaluation.likelihood import GroundTruth
from palimpsest.evaluation.sample_quality import Comparison, compare, real_texts
from palimpsest.evaluation.sampling_inputs import rows_to_fill


@dataclass(frozen=True)
class FreeTexts(Sampled):
    """Texts out of masks. texts: as strings. comparison: their quality beside that of real texts."""

    texts: list[str]
    comparison: Comparison


@dataclass(frozen=True)
class WriteFreely:
    """The request for `number` texts, to be held against as many real ones of `split` (None: against nothing).

    scorer: of their generative perplexity, if that is wanted. truth: the exact distribution of the corpus, if it is
    known. class_id: the class that the texts are guided to.
    """

    number: int
    split: str | None
    scorer: CausalScorer | None
    truth: GroundTruth | None
    class_id: int | None
    folder = ""

    def __call__(self, setting: Setting) -> FreeTexts:
        """Draw the texts and measure them."""
        data, drawing = setting.data, setting.drawing
        real = real_texts(data, self.split, self.number, setting.seed)
        blanks = rows_to_fill(setting.diffusion, data, drawing.given, self.number, setting.seed)
        drawn = setting.fill(blanks, np.arange(self.number))
        texts = [decoded(text, drawing.given, data.tokenizer) for text in drawn]
        rows = [{"sample": index, "text": text, "ids": one.ids, "steps": one.steps,
                 "confidence": [round(p, 4) for p in one.confidence], "evaluations": one.evaluations}
                for index, (text, one) in enumerate(zip(texts, drawn, strict=True))]  # fmt: skip
        setting.keep(rows)
        if self.scorer:
            self.scorer.to(setting.diffusion.device)
        comparison = compare([text.ids for text in drawn], real, data, self.scorer)
        evaluations = float(np.mean([text.evaluations for text in drawn]))
        results = {**comparison.results(), "network_evaluations_per_sample": evaluations}
        if self.class_id is not None:
            results |= class_shares(self.truth, texts, self.class_id)
        return FreeTexts(results, rows, drawn, {}, texts, comparison)
