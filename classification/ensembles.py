"""Ensembles: averages of the log-probabilities of several methods.

Shape suffixes: M texts, C classes.
"""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import softmax

from palimpsest.classification.baselines import Baseline
from palimpsest.classification.measures import SMALLEST, log_loss


def product_of_experts(posteriors: Sequence[np.ndarray], weights: Sequence[float] | None = None) -> np.ndarray:
    """Return the weighted average of log p(class | text), renormalised, (M, C) (Hinton 2002; a logarithmic opinion
    pool).

    weights: non-negative, with the sum 1, so that the prior counts once; None: equal.
    """
    logs = [np.log(np.maximum(posterior_MC, SMALLEST)) for posterior_MC in posteriors]
    return softmax(np.average(logs, axis=0, weights=weights), axis=1)


def fit_weight(first_MC: np.ndarray, second_MC: np.ndarray, label_M: np.ndarray) -> float:
    """Return the weight of the first method in [0, 1] with the lowest log loss; the second has the rest.

    The log loss is convex in the weight.
    """
    loss = lambda weight: log_loss(product_of_experts([first_MC, second_MC], [weight, 1 - weight]), label_M)  # noqa: E731
    return float(minimize_scalar(loss, bounds=(0, 1), method="bounded", options={"xatol": 1e-4}).x)


def best_baseline(baselines: Sequence[Baseline], validation_label_M: np.ndarray) -> Baseline:
    """Return the baseline with the lowest log loss on the validation texts."""
    return min(baselines, key=lambda baseline: log_loss(baseline.validation_MC, validation_label_M))
