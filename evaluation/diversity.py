"""Diversity of a set of texts, which low generative perplexity may come at the expense of.

Shape suffixes: M texts.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from palimpsest.common.metrics import Estimate, Units, mean
from palimpsest.samplers.block import unigram_entropy as text_entropy

ORDERS = (1, 2, 3)


@dataclass(frozen=True)
class Diversity:
    """unigram_entropy: nats per text. distinct: n -> distinct-n of all texts together, for n in ORDERS."""

    unigram_entropy: Estimate
    distinct: dict[int, Estimate]


def diversity(rows: Sequence[Sequence[int]], units: Units | None = None) -> Diversity:
    """Measure the diversity of M texts given as token ids, with errors over `units` (None: each text is one).

    The measures depend on the lengths, and distinct-n also on M: compare sets of equally many texts of similar length.
    """
    return Diversity(unigram_entropy(rows, units), {n: distinct(rows, n, units) for n in ORDERS})


def unigram_entropy(rows: Sequence[Sequence[int]], units: Units | None = None) -> Estimate:
    """Return the entropy of the token frequencies within a text, in nats, averaged over the texts."""
    return mean([text_entropy(torch.as_tensor(ids)) for ids in rows], units)


def distinct(rows: Sequence[Sequence[int]], n: int, units: Units | None = None) -> Estimate:
    """Return distinct-n: different n-grams / all n-grams, over all texts together (Li et al., arXiv 1510.03055, section
    5).

    Repetition within or between texts lowers it. The standard error is the jackknife over texts (Efron & Stein, Ann.
    Statist. 9, 1981); a bootstrap would count the n-grams of a text drawn twice as repeated. nan unless at least two
    texts have an n-gram.
    """
    grams_M = [set(zip(*(ids[k:] for k in range(n)), strict=False)) for ids in rows]
    total_M = np.array([max(len(ids) - n + 1, 0) for ids in rows])
    texts_with = Counter(gram for grams in grams_M for gram in grams)
    only_here_M = np.array([sum(texts_with[gram] == 1 for gram in grams) for grams in grams_M])
    unique, total = len(texts_with), int(total_M.sum())
    if total == 0:
        return Estimate(float("nan"), float("nan"))
    if (total_M == total).any():
        return Estimate(unique / total, float("nan"))
    without_M = (unique - only_here_M) / (total - total_M)
    influence_M = (without_M.mean() - without_M) * (len(rows) - 1) / len(rows)
    units = Units.each(np.arange(len(rows))) if units is None else units
    return Estimate(unique / total, math.sqrt(units.variance(influence_M)))
