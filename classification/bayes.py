"""Bayes' rule: what the classes are worth before a text is read, and after.

Shape suffixes: M texts, C classes, K draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import expit, logsumexp, softmax

_SUM_TOLERANCE = 1e-6
_Z95 = 1.959963984540054


def log_prior(prior: str | Sequence[float], label_counts_C: np.ndarray) -> np.ndarray:
    """log p(class), nats (C,).

    prior: "uniform"; "empirical", the shares of the training texts; or C positive numbers that sum to 1.
    label_counts_C: training texts of each class.

    Raises:
        ValueError: `prior` is none of these, or a class would have probability zero.
    """
    counts_C = np.asarray(label_counts_C, dtype=np.float64)
    num_classes = len(counts_C)
    if isinstance(prior, str):
        if prior == "uniform":
            return np.full(num_classes, -np.log(num_classes))
        if prior != "empirical":
            raise ValueError(
                f"classify.prior={prior} is unknown: write uniform, empirical (the shares of the training texts), "
                f"or {num_classes} positive numbers that sum to 1"
            )
        if (counts_C <= 0).any():
            empty = np.flatnonzero(counts_C <= 0).tolist()
            raise ValueError(
                f"classify.prior=empirical needs training texts of every class, but there are none of {empty}: "
                "write classify.prior=uniform, or the probabilities"
            )
        return np.log(counts_C / counts_C.sum())
    try:
        share_C = np.array(list(prior), dtype=np.float64)
    except (TypeError, ValueError):
        share_C = np.zeros(0)
    if share_C.shape != (num_classes,) or not (share_C > 0).all() or abs(share_C.sum() - 1) > _SUM_TOLERANCE:
        raise ValueError(
            f"classify.prior={prior} must be uniform, empirical, or {num_classes} positive numbers that sum to 1, "
            "one for each class in the order of the labels"
        )
    return np.log(share_C / share_C.sum())


def posterior(log_p_MC: np.ndarray, log_prior_C: np.ndarray) -> np.ndarray:
    """p(class | text) (M, C) from log p(text | class) and log p(class), both in nats."""
    return softmax(log_p_MC + log_prior_C, axis=1)


def posterior_interval(nats_CK: np.ndarray, log_prior_C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the 95 % interval that the draws leave for p(class | text) of one text, each (C,).

    nats_CK: estimates of -log p(text | class), draw k of every class with the same masks, as in `racing.certainty`. The
    interval is one of the log-odds of a class against all others, whose error is that of their linearisation in the
    log-likelihoods; of two classes it is the Monte Carlo error of their difference. From a single draw: 0 and 1.
    """
    nats_CK = nats_CK[:, np.isfinite(nats_CK).all(axis=0)]
    num_classes, num_draws = nats_CK.shape
    if num_draws < 2:
        return np.zeros(num_classes), np.ones(num_classes)
    joint_C = log_prior_C - nats_CK.mean(axis=1)
    low_C, high_C = np.empty(num_classes), np.empty(num_classes)
    for k in range(num_classes):
        others = np.arange(num_classes) != k
        share_O = softmax(joint_C[others])
        odds = joint_C[k] - logsumexp(joint_C[others])
        draws_K = share_O @ nats_CK[others] - nats_CK[k]
        half = _Z95 * draws_K.std(ddof=1) / np.sqrt(num_draws)
        low_C[k], high_C[k] = expit(odds - half), expit(odds + half)
    return low_C, high_C
