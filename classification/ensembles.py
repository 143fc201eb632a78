"""Ensembles: averages of the log-probabilities of several methods.

Shape suffixes: M texts, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import softmax

from palimpsest.classification.baselines import Baseline

_SMALLEST = np.nextafter(0.0, 1.0)


def product_of_experts(posteriors: Sequence[np.ndarray], weights: Sequence[float] | None = None) -> np.ndarray:
    """Return the weighted average of log p(class | text), renormalised, (M, C) (Hinton 2002; a logarithmic opinion
    pool).

    weights: non-negative, with the sum 1, so that the prior counts once; None: equal.
    """
    logs = [np.log(np.maximum(posterior_MC, _SMALLEST)) for posterior_MC in posteriors]
    return softmax(np.average(logs, axis=0, weights=weights), axis=1)


def fit_weight(first_MC: np.ndarray, second_MC: np.ndarray, label_M: np.ndarray) -> float:
    """Return the weight of the first method in [0, 1] with the lowest log loss; the second has the rest.

    The log loss is convex in the weight.
    """
    found = minimize_scalar(
        lambda weight: log_loss(product_of_experts([first_MC, second_MC], [weight, 1 - weight]), label_M),
        bounds=(0, 1),
        method="bounded",
        options={"xatol": 1e-4},
    )
    return float(found.x)


def best_baseline(baselines: Sequence[Baseline], validation_label_M: np.ndarray) -> Baseline:
    """Return the baseline with the lowest log loss on the validation texts."""
    return min(baselines, key=lambda baseline: log_loss(baseline.validation_MC, validation_label_M))


def log_loss(posterior_MC: np.ndarray, label_M: np.ndarray) -> float:
    """Return the mean of -log p(true class | text), nats."""
    return float(-np.log(np.maximum(posterior_MC[np.arange(len(label_M)), label_M], _SMALLEST)).mean())
