"""Quality of sampled and real texts: generative perplexity and diversity.

A sampler can improve each of these numbers alone by repetition or rambling. So samples and as many real texts are
always measured in the same way and reported side by side.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from palimpsest.common.metrics import UNIT_COLUMNS, Units
from palimpsest.common.randomness import KeyedNoise
from palimpsest.data.tokenizers import Vocabulary, decode
from palimpsest.dataloader import TextData
from palimpsest.evaluation.diversity import Diversity, diversity
from palimpsest.evaluation.generative_perplexity import CausalScorer, GenerativePerplexity

_TEXT = "from the begin token to the first end token, special tokens left out"
_MOST_TEXTS = 50_000  # larger splits take minutes to tokenise, for a reference only


@dataclass(frozen=True)
class Quality:
    """Quality of a set of texts."""

    diversity: Diversity
    likelihood: GenerativePerplexity | None  # None without a scorer
    texts: int

    def results(self) -> dict[str, object]:
        """Return the numbers for results.json."""
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
    """Token ids of real texts, as rows of `split`."""

    rows: list[list[int]]
    split: str | None
    missing: str = ""  # why there are none
    units: Units | None = field(default=None, compare=False)  # of errors; None: each row


def real_texts(
    data: TextData, split: str | None, num_texts: int, seed: int, max_length: int | None = None
) -> RealTexts:
    """Choose `num_texts` random rows of a split (at most all); the choice depends on the seed only.

    Rows are used instead of whole documents, and no more than `max_length` tokens of them, because diversity depends on
    the length. If the data are absent or large, there is no reference.

    Raises ValueError if the data exist, but not this split, or not as rows of the model's length.
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
    columns = {
        name: np.asarray(rows[name])[order] for name in ("sample_id", *UNIT_COLUMNS) if name in rows.column_names
    }
    ids = [list(map(int, rows[i]["input_ids"][:max_length])) for i in order.tolist()]
    return RealTexts(ids, split, units=Units.of(columns))


def text_of(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary) -> str:
    """Return the text a scorer reads: from the begin token, if there is one, to the first end token.

    Special tokens are left out, except masks, so that unfinished text does not pass for finished.
    """
    ids = list(ids)[1:] if len(ids) and ids[0] == vocabulary.bos_id else list(ids)
    end = ids.index(vocabulary.eos_id) if vocabulary.eos_id in ids else len(ids)
    return decode(tokenizer, ids[:end], skip_special=True)


def measure(
    rows: Sequence[Sequence[int]], data: TextData, scorer: CausalScorer | None, units: Units | None = None
) -> Quality:
    """Measure texts given as token ids; errors are over `units` (None: each text).

    Diversity is that of whole rows with special tokens, as in published numbers; the likelihood is that of `text_of`.
    """
    likelihood = scorer and scorer.perplexity([text_of(ids, data.tokenizer, data.vocabulary) for ids in rows], units)
    return Quality(diversity(rows, units), likelihood, len(rows))


@dataclass(frozen=True)
class Comparison:
    """Quality of samples, and of real texts if there are any."""

    samples: Quality
    real: Quality | None
    reference: RealTexts

    @property
    def units(self) -> Units:
        """Independent units that errors of the real texts are over."""
        return Units.each(range(len(self.reference.rows))) if self.reference.units is None else self.reference.units

    @property
    def protocol(self) -> dict[str, object] | None:
        """The protocol of the generative perplexity; None without a scorer."""
        return self.samples.likelihood and {**self.samples.likelihood.protocol, "text": _TEXT}

    def results(self) -> dict[str, object]:
        """Return the numbers for results.json, those of real texts under "real"."""
        counted = {"split": self.reference.split, "units": self.units.name, "num_units": len(self.units)}
        real = self.real and {**counted, **self.real.results()}
        samples = self.samples.results()
        return {"samples": samples.pop("texts"), **samples, "generative_protocol": self.protocol, "real": real,
                "real_missing": self.reference.missing or None}  # fmt: skip


def compare(
    samples: Sequence[Sequence[int]], real: RealTexts, data: TextData, scorer: CausalScorer | None
) -> Comparison:
    """Measure the samples, and the real texts if there are any."""
    real_quality = measure(real.rows, data, scorer, real.units) if real.rows else None
    return Comparison(measure(samples, data, scorer), real_quality, real)
