"""Typicality: log p(text) per token, to recognise texts unlike the data.

A classifier compares classes, but does not recognise texts that none of them could have produced; p(text) does. Shape
suffixes: M texts, C classes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import logsumexp

from palimpsest.classification.scoring import ClassScores

_TAIL = 0.999
UNLIKE = "unlike the texts of the data: less likely, per token, than 99.9 % of them; the interval covers the masks only"
KEY = "nats_per_token_quantiles"


def nats_per_token(scores: ClassScores, log_prior_C: np.ndarray) -> np.ndarray:
    """Return -log p(text) per token, (M,), where p(text) is the mixture of the classes.

    Most of the noise of a text's estimate is that its few masks weigh more or less than its tokens. That weight is
    known, so nats are divided by it (a ratio estimator).
    """
    tokens_M = np.maximum(scores.tokens_M, 1)
    weight_M = tokens_M if scores.weight_MP is None else np.nanmean(scores.weight_MP, axis=1)
    known_M = np.where(weight_M > 0, weight_M, tokens_M)  # a mask may leave every token visible
    log_p_MC = scores.log_p_MC * (tokens_M / known_M)[:, None]
    return -logsumexp(log_p_MC + log_prior_C, axis=1) / tokens_M


def quantiles(scores: ClassScores, log_prior_C: np.ndarray) -> dict[str, float]:
    """Return the quantiles of `nats_per_token` over the texts, for results.json."""
    values_M = nats_per_token(scores, log_prior_C)
    return {str(share): float(np.quantile(values_M, share)) for share in (0.5, 0.99, _TAIL)}


@dataclass(frozen=True)
class Typical:
    """The least likely of the texts that a classifier was evaluated on."""

    end: float  # nats per token that 99.9 % of these texts stay below

    @classmethod
    def read(cls, folder: Path) -> Typical | None:
        """Return the latest evaluation below `folder`; None if there is none."""
        files = sorted(folder.glob("*/results.json"), key=lambda path: path.stat().st_mtime)
        found = [json.loads(path.read_text(encoding="utf-8")).get(KEY) for path in files]
        known = [one for one in found if one and one[str(_TAIL)] is not None]
        return cls(known[-1][str(_TAIL)]) if known else None

    def unlike(self, scores: ClassScores, log_prior_C: np.ndarray) -> np.ndarray:
        """Return True for each text that is less likely, per token, than 99.9 % of the evaluated texts, (M,)."""
        return nats_per_token(scores, log_prior_C) > self.end
