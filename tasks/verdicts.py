"""What classification found out about a split.

Shape suffixes: M texts, C classes, K draws, P network passes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from palimpsest.classification.measures import Measures, measure
from palimpsest.common.metrics import Estimate, ratio
from palimpsest.tasks.base import Likelihood
from palimpsest.tasks.class_scoring import ClassScores

_RATE_BINS = 10


@dataclass(frozen=True)
class Method:
    """One way to classify the split. posterior_MC: what it says. evaluations: of a network, per text and over all
    classes; None for what has no network."""

    name: str
    posterior_MC: np.ndarray
    measures: Measures
    evaluations: float | None = None


@dataclass(frozen=True)
class Verdicts:
    """All that was found out about a split: the plain rule first, then what is held beside it.

    own: likelihood of held-out texts of each class under its own model. untold: p(text) without a class, where the
    network can be asked for it. fitted: what calibration found, by name.
    """

    data: object
    split: str
    scores: ClassScores
    log_prior_C: np.ndarray
    plain: Method
    others: list[Method]
    own: list[Likelihood]
    untold: Likelihood | None
    fitted: dict[str, object] = field(default_factory=dict)

    @property
    def methods(self) -> list[Method]:
        return [self.plain, *self.others]

    def after_draws(self) -> tuple[np.ndarray, list[Estimate]]:
        """(network evaluations per class, accuracy) had no text been drawn more often; texts that were decided earlier
        keep their verdict."""
        passes = self.scores.passes
        counts = np.unique(np.geomspace(1, self.scores.nats_MCK.shape[2], 13).round().astype(int))
        found = [self.scores.posterior(self.log_prior_C, k) for k in counts]
        return counts * passes, [measure(p, self.scores.label_M).accuracy for p in found]

    def at_mask_rates(self) -> tuple[np.ndarray, list[Estimate]]:
        """(share of masked tokens, accuracy of a single pass there)."""
        nats_MCP, rate_MP = self.scores.nats_MCP, self.scores.rate_MP
        winner_MP = (-nats_MCP + self.log_prior_C[:, None]).argmax(axis=1)
        right_MP = winner_MP == self.scores.label_M[:, None]
        taken_MP = np.isfinite(rate_MP) & (rate_MP > 0)
        bin_MP = np.minimum(np.nan_to_num(rate_MP) * _RATE_BINS, _RATE_BINS - 1).astype(int)
        rates, found = [], []
        for index in range(_RATE_BINS):
            here_MP = taken_MP & (bin_MP == index)
            if here_MP.any():
                rates.append(float(rate_MP[here_MP].mean()))
                passes_M = here_MP.sum(axis=1)  # passes of one text are not independent: summed first
                taken_M = passes_M > 0
                found.append(ratio((right_MP & here_MP).sum(axis=1)[taken_M], passes_M[taken_M]))
        return np.array(rates), found
