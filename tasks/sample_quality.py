"""Sampled texts held against real ones: generative perplexity never without the diversity it may have been bought with.

Any of these numbers alone can be made as good as one likes by a sampler that repeats itself or rambles, so samples
and as many real texts go through the same measures, and both stand side by side wherever one is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from palimpsest.common.metrics import UNIT_COLUMNS, Units
from palimpsest.common.randomness import KeyedNoise
from palimpsest.data.tokenizers import Vocabulary, decode
from palimpsest.report.report import Metric, Report
from palimpsest.tasks.diversity import Diversity, diversity
from palimpsest.tasks.generative_perplexity import CausalScorer, GenerativePerplexity

_MOST_TEXTS = 50_000  # a split is read and tokenised whole; beyond this it takes minutes, for a reference alone


@dataclass(frozen=True)
class Quality:
    """What was measured of one set of texts. likelihood: None where no scorer was asked for."""

    diversity: Diversity
    likelihood: GenerativePerplexity | None
    texts: int

    def metrics(self) -> list[Metric]:
        """The numbers with their errors, as reports show them."""
        rows: list[Metric] = []
        if self.likelihood:
            perplexity, nats = self.likelihood.perplexity, self.likelihood.nats_per_token
            scorer = f"under {self.likelihood.protocol['scorer']}"
            rows.append(Metric("generative perplexity", perplexity.value, perplexity.se, "", scorer))
            rows.append(Metric("generative NLL", nats.value, nats.se, "nats/token", "the scorer's tokens"))
        entropy = self.diversity.unigram_entropy
        rows.append(Metric("unigram entropy", entropy.value, entropy.se, "nats", "within a text"))
        for n, share in self.diversity.distinct.items():
            rows.append(Metric(f"distinct-{n}", share.value, share.se, "", "over all texts"))
        return rows

    def counts(self) -> list[tuple[str, int]]:
        """How much text the numbers rest on."""
        if self.likelihood is None:
            return [("texts", self.texts)]
        scored = self.likelihood
        return [("texts", self.texts), ("texts scored", scored.texts), ("tokens scored", scored.tokens),
                ("left out, nothing to score", scored.left_out)]  # fmt: skip

    def results(self) -> dict[str, object]:
        """The same for results.json."""
        scored = self.likelihood
        return {
            "texts": self.texts,
            "unigram_entropy_nats": self.diversity.unigram_entropy,
            "distinct_n": {str(n): share for n, share in self.diversity.distinct.items()},
            "generative_perplexity": scored and scored.perplexity,
            "generative_nll_nats_per_token": scored and scored.nats_per_token,
            "generative_counts": scored and {
                "texts": scored.texts, "tokens": scored.tokens, "left_out": scored.left_out
            },
        }  # fmt: skip


@dataclass(frozen=True)
class RealTexts:
    """Token ids of real texts, as rows of `split`; `missing` says why there are none. units: what errors of
    theirs are over (None: each row is one)."""

    rows: list[list[int]]
    split: str | None
    missing: str = ""
    units: Units | None = field(default=None, compare=False)


def real_texts(data: object, split: str | None, num_texts: int, seed: int) -> RealTexts:
    """`num_texts` rows of a split (all, if it has fewer), a random choice that depends on the seed alone.

    Rows and not whole documents, since diversity depends on the length. They are only a reference: where the data are
    absent or large, the samples are measured without them.

    Raises:
        ValueError: the data are there, but not such a split or not as rows of the model's length.
    """
    if split is None:
        return RealTexts([], split, "eval.split=null")
    try:
        texts = len(data.texts(split))
        if texts > _MOST_TEXTS:
            key = "valid" if split == "validation" else split
            return RealTexts([], split, f"{split} has {texts:,} texts; data.max_{key}_texts= chooses some")
        rows = data.split(split)
    except OSError as error:
        return RealTexts([], split, str(error))
    except ValueError as error:
        raise ValueError(f"{error} (eval.split={split}; null samples without reading real texts)") from error
    order = KeyedNoise(seed, torch.arange(len(rows)), draw=-7).uniform().argsort()[:num_texts].numpy()
    known = {name: np.asarray(rows[name])[order] for name in ("sample_id", *UNIT_COLUMNS) if name in rows.column_names}
    ids = [list(map(int, rows[i]["input_ids"])) for i in order.tolist()]
    return RealTexts(ids, split, units=Units.of(known))


def text_of(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary) -> str:
    """The text a scorer reads: from the begin token in front, if there is one, to the first end token.

    Special tokens are left out. A mask that the sampler left is not: it stays a character, so that unfinished text
    does not pass for finished.
    """
    ids = list(ids)[1:] if len(ids) and ids[0] == vocabulary.bos_id else list(ids)
    end = ids.index(vocabulary.eos_id) if vocabulary.eos_id in ids else len(ids)
    return decode(tokenizer, ids[:end], skip_special=True)


def measure(
    rows: Sequence[Sequence[int]], data: object, scorer: CausalScorer | None, units: Units | None = None
) -> Quality:
    """Quality of texts given as token ids. Diversity is that of whole rows, special tokens included, as in published
    numbers; the likelihood that of `text_of` them. Errors are over `units` (None: each text is one)."""
    likelihood = scorer and scorer.perplexity([text_of(ids, data.tokenizer, data.vocabulary) for ids in rows], units)
    return Quality(diversity(rows, units), likelihood, len(rows))


@dataclass(frozen=True)
class Comparison:
    """Samples and, where they could be had, real texts under the same measures."""

    samples: Quality
    real: Quality | None
    reference: RealTexts

    @property
    def _title(self) -> str:
        return f"real ({self.reference.split})"

    @property
    def _units(self) -> Units:
        """What the errors of the real texts are over."""
        return Units.each(range(len(self.reference.rows))) if self.reference.units is None else self.reference.units

    def results(self) -> dict[str, object]:
        """For results.json: the samples' numbers, those of real texts below "real"."""
        units = self._units
        real = self.real and {"split": self.reference.split, "units": units.name, "num_units": len(units),
                              **self.real.results()}  # fmt: skip
        protocol = self.samples.likelihood and {**self.samples.likelihood.protocol, "text": _TEXT}
        own = self.samples.results()
        return {"samples": own.pop("texts"), **own, "generative_protocol": protocol, "real": real,
                "real_missing": self.reference.missing or None}  # fmt: skip

    def _rows(self) -> list[tuple[str | Metric | int, ...]]:
        """Name, samples, real texts if there are any."""
        sides = [self.samples] + [self.real] * (self.real is not None)
        names = [metric.name for metric in self.samples.metrics()] + [name for name, _ in self.samples.counts()]
        columns = [[*side.metrics(), *(count for _, count in side.counts())] for side in sides]
        return list(zip(names, *columns, strict=True))

    def __str__(self) -> str:
        """Lines for a terminal."""
        rows = [("", "samples", self._title)[: 3 if self.real else 2]]
        rows += [(name, *(getattr(v, "measurement", f"{v}") for v in values)) for name, *values in self._rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, *([f"no real texts beside them: {self.reference.missing}"] if not self.real else [])])

    def report(self, report: Report, more: Sequence[Metric]) -> None:
        """The section that shows the samples' numbers, `more` of them, and the comparison."""
        scored = self.samples.likelihood
        text = _ABOUT if scored is None else f"{_ABOUT}\n\n{_ABOUT_SCORER}"
        if self.real is None:
            text += f"\n\nThere are no real texts beside them: {self.reference.missing}."
        report.section("What was measured", text)
        report.metrics([*self.samples.metrics(), *more])
        if self.real:
            header = ["", "samples", self._title]
            report.table(header, self._rows(), 
                         f"The samples and as many real texts under the same measures; errors of real texts are over "
                         f"{self._units}.")  # fmt: skip
        if scored:
            report.code("\n".join(f"{k}: {v}" for k, v in {**scored.protocol, "text": _TEXT}.items()), "scorer")


def compare(samples: Sequence[Sequence[int]], real: RealTexts, data: object, scorer: CausalScorer | None) -> Comparison:
    """Measure the samples, and the real texts if there are any, by the same means."""
    beside = measure(real.rows, data, scorer, real.units) if real.rows else None
    return Comparison(measure(samples, data, scorer), beside, real)


_TEXT = "from the begin token to the first end token, special tokens left out"
_ABOUT = (
    "Unigram entropy and distinct-n (different n-grams / all n-grams) fall when texts repeat themselves. They depend "
    "on length and on the number of texts: compare them with those of as many real texts."
)
_ABOUT_SCORER = (
    "Generative perplexity is that of another language model on the samples. Repetition lowers it, so a low one says "
    "something only where the diversity is that of real text, and text that scores better than real text is not "
    "better text."
)
