"""Bayes' rule: priors, posteriors, and their Monte Carlo errors.

Shape suffixes: M texts, C classes, K draws; N log-odds of all texts and classes, G grid points, Q nodes.
"""

from collections.abc import Sequence

import numpy as np
from scipy.special import expit, logsumexp, softmax
from scipy.stats import t as student_t

_SUM_TOLERANCE = 1e-6
# Degrees of freedom of the pooled variance, which a text's own variance is averaged with.
PRIOR_DEGREES = 4.0
_NODES = np.linspace(-6, 6, 97)  # standard deviations
_GRID_POINTS, _EM_STEPS, _FLAT_ODDS, _MOST_ODDS = 201, 30, 10.0, 20_000


def log_prior(prior: str | Sequence[float], label_counts_C: np.ndarray) -> np.ndarray:
    """Return log p(class), nats (C,).

    Args:
        prior: "uniform"; "empirical", the training frequencies; or C positive numbers that sum to 1.
        label_counts_C: training texts of each class.

    Raises:
        ValueError: `prior` is invalid, or a class would have probability zero.
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
    """Return p(class | text) (M, C) from log p(text | class) and log p(class), both in nats."""
    return softmax(log_p_MC + log_prior_C, axis=1)


def averaged_posterior(nats_MCK: np.ndarray, log_prior_C: np.ndarray) -> np.ndarray:
    """Return p(class | text) (M, C), averaged over the Monte Carlo error of the log-odds of each class against all
    others.

    Bayes' rule on noisy log-likelihoods is overconfident. So for each class the probability expit(log-odds) is averaged
    over a normal distribution of the true log-odds around their estimate, weighted by the density of log-odds among
    these texts and classes (`_density_of_odds`). Variances are moderated as in classification/sequential_test.py. The C
    probabilities are scaled to sum to 1. Of two classes, the more probable one stays the same.

    nats_MCK: estimates of -log p(text | class), draw k of every class with the same masks; nan for draws not taken. If
    no text has two draws, or a class cannot have produced a text, this is `posterior` of the mean.
    """
    plain_MC = posterior(-np.nanmean(nats_MCK, axis=2), log_prior_C)
    draws_M = (~np.isnan(nats_MCK).all(axis=1)).sum(axis=1)
    finite_M = ~np.isinf(nats_MCK).any(axis=(1, 2))
    if draws_M[finite_M].max(initial=0) < 2:
        return plain_MC
    odds_MC, squares_MC, draws_M1 = log_odds(nats_MCK[finite_M], log_prior_C)
    pooled = squares_MC.sum() / ((draws_M1 - 1).sum() * odds_MC.shape[1])
    variance_MC = (PRIOR_DEGREES * pooled + squares_MC) / (PRIOR_DEGREES + draws_M1 - 1)
    found_MC = _averaged(odds_MC, np.sqrt(variance_MC / draws_M1))
    plain_MC[finite_M] = found_MC / found_MC.sum(axis=1, keepdims=True)
    return plain_MC


def log_odds(nats_MCK: np.ndarray, log_prior_C: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the log-odds of each class against all others, and the spread of the draws.

    The deviations are linearised in the log-likelihoods, which is exact for two classes.

    Returns:
        log-odds (M, C), sums of the squared deviations of a text's draws from them (M, C), numbers of draws (M, 1).
    """
    joint_MC = log_prior_C - np.nanmean(nats_MCK, axis=2)
    odds_MC, squares_MC = np.empty_like(joint_MC), np.empty_like(joint_MC)
    for k in range(len(log_prior_C)):
        others = np.arange(len(log_prior_C)) != k
        share_MO = softmax(joint_MC[:, others], axis=1)
        odds_MC[:, k] = joint_MC[:, k] - logsumexp(joint_MC[:, others], axis=1)
        draws_MK = np.einsum("mo,mok->mk", share_MO, nats_MCK[:, others]) - nats_MCK[:, k]
        squares_MC[:, k] = np.nansum((draws_MK - np.nanmean(draws_MK, axis=1, keepdims=True)) ** 2, axis=1)
    return odds_MC, squares_MC, (~np.isnan(nats_MCK).all(axis=1)).sum(axis=1)[:, None]


def _averaged(odds_MC: np.ndarray, error_MC: np.ndarray) -> np.ndarray:
    """Return the means of expit over the normal distributions, weighted by the density of true log-odds, (M, C)."""
    some = slice(None, None, 1 + odds_MC.size // _MOST_ODDS)  # texts, with all their classes
    grid_G, density_G = _density_of_odds(odds_MC[some].ravel(), error_MC[some].ravel())
    true_MCQ = odds_MC[..., None] + error_MC[..., None] * _NODES
    weight_MCQ = np.exp(-0.5 * _NODES**2) * np.interp(true_MCQ, grid_G, density_G)
    return (weight_MCQ * expit(true_MCQ)).sum(axis=-1) / weight_MCQ.sum(axis=-1)


def _density_of_odds(odds_N: np.ndarray, error_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a grid (G,) and the estimated density of the true log-odds there (G,).

    Nonparametric maximum likelihood by expectation-maximisation (Kiefer & Wolfowitz 1956; Laird 1978), regularised by
    early stopping and pseudo-counts of a flat density.
    """
    widest = np.abs(odds_N).max() + 1
    grid_G = np.sinh(np.linspace(-1, 1, _GRID_POINTS) * np.arcsinh(widest))  # finest where probabilities change
    width_G = np.gradient(grid_G)
    error_N1 = np.maximum(error_N, np.interp(odds_N, grid_G, width_G))[:, None]
    likelihood_NG = np.exp(-0.5 * ((odds_N[:, None] - grid_G) / error_N1) ** 2)
    flat_G = width_G / width_G.sum()
    share_G = flat_G
    for _ in range(_EM_STEPS):
        member_NG = likelihood_NG * share_G
        member_G = (member_NG / member_NG.sum(axis=1, keepdims=True)).sum(axis=0)
        share_G = (member_G + _FLAT_ODDS * flat_G) / (len(likelihood_NG) + _FLAT_ODDS)
    return grid_G, share_G / width_G


def posterior_interval(nats_MCK: np.ndarray, log_prior_C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends of the 95 % interval that the draws leave for p(class | text), each (M, C).

    The interval is Student's, for the log-odds of a class against all others (`log_odds`). From a single draw: 0 and 1.

    nats_MCK: as in `averaged_posterior`, finite or nan.
    """
    odds_MC, squares_MC, draws_M1 = log_odds(nats_MCK, log_prior_C)
    degrees_M1 = np.maximum(draws_M1 - 1, 1)
    half_MC = student_t.ppf(0.975, degrees_M1) * np.sqrt(squares_MC / degrees_M1 / draws_M1)
    several_M1 = draws_M1 > 1
    return np.where(several_M1, expit(odds_MC - half_MC), 0.0), np.where(several_M1, expit(odds_MC + half_MC), 1.0)
