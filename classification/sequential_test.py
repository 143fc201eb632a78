"""Sequential test: stop drawing masks for a text as soon as more draws would hardly change the prediction.

The draws of all classes use the same masks, so only differences between the leading class and the others matter. Each
such difference has a mean and a variance over its few draws:

1. The variance is moderated: a weighted mean of its own sample variance and that pooled over all texts, as if the pool
   had `PRIOR_DEGREES` degrees of freedom (Smyth 2004: an inverse-gamma prior). Otherwise four draws that happen to
   agree would look certain. The degrees are fixed and few: as many as a text's own after five draws.
2. The moderated t is converted to the normal deviate of the same tail probability, and so to a standard error (Lu &
   Stephens 2019).
3. The probability that the true difference has the other sign takes into account how large true differences are: a
   mixture of normal distributions centred at 0, with weights fitted to all texts (Stephens 2017, the local false sign
   rate). The t alone is not careful enough, because every look is a further chance to stop in error. With noise of 15
   to 60 nats per draw and nine looks after 4 to 64 draws, confidence 0.95 let it stop 4 % in error for true differences
   N(0, 20²), but 8 % for N(0, 10²); the rule with 3. stops 1 % in error for both (36 and 53 draws on average).

It cannot detect draws so skewed that the difference lies in masks not drawn yet. With more than two classes the error
probabilities of all rivals add up (Bonferroni's bound).

Shape suffixes: M texts, C classes, K draws, G members of the mixture.
"""

import numpy as np
from scipy.stats import norm
from scipy.stats import t as student_t

from palimpsest.classification.bayes import PRIOR_DEGREES

_EM_STEPS = 100
# Pseudo-texts whose classes hardly differ, so that few texts imply small differences.
_NULL_TEXTS = 10.0


def certainty(nats_MCK: np.ndarray, log_prior_C: np.ndarray, tokens_M: np.ndarray | None = None) -> np.ndarray:
    """Return the probability (M,) that the class that leads now would lead after infinitely many draws.

    A text with a single draw has certainty 0.

    Args:
        nats_MCK: estimates of -log p(x | c), draw k of every class with the same masks. Draws must be independent: if
            those of a round are stratified, use the mean of each round as one draw. nan, for all classes, for stopped
            texts; include them, because the mixture is fitted to all texts.
        tokens_M: lengths of the texts. The noise of a draw grows with their square root, the unit of comparison.

    Raises:
        ValueError: nan for some classes of a draw only, or a text without a draw.
    """
    nats_MCK = np.asarray(nats_MCK, dtype=np.float64)
    num_texts, num_classes, _ = nats_MCK.shape
    if num_texts == 0 or num_classes < 2:
        return np.ones(num_texts)
    missing_MK = np.isnan(nats_MCK).all(axis=1)
    if (np.isnan(nats_MCK) != missing_MK[:, None]).any() or missing_MK.all(axis=1).any():
        raise ValueError("every text needs a draw, and every draw a number for each class")
    draws_M = (~missing_MK).sum(axis=1)
    log_p_MC = -np.nanmean(nats_MCK, axis=2) + log_prior_C
    leader_M = log_p_MC.argmax(axis=1)
    root_length_M1 = np.sqrt(np.ones(num_texts) if tokens_M is None else np.maximum(tokens_M, 1))[:, None]
    margin_MC = (np.take_along_axis(log_p_MC, leader_M[:, None], axis=1) - log_p_MC) / root_length_M1
    of_leader_M1K = np.take_along_axis(nats_MCK, leader_M[:, None, None], axis=1)
    difference_MCK = (nats_MCK - of_leader_M1K) / root_length_M1[:, None]
    rival_MC = np.arange(num_classes) != leader_M[:, None]
    repeated_M = draws_M > 1
    certainty_M = np.zeros(num_texts)
    if repeated_M.any():
        se_MC = _standard_errors(
            difference_MCK[repeated_M], margin_MC[repeated_M], draws_M[repeated_M], rival_MC[repeated_M]
        )
        wrong_MC = _false_sign_rate(margin_MC[repeated_M], se_MC, rival_MC[repeated_M])
        certainty_M[repeated_M] = np.clip(1 - (wrong_MC * rival_MC[repeated_M]).sum(axis=1), 0, 1)
    return certainty_M


def undecided(
    nats_MCK: np.ndarray, log_prior_C: np.ndarray, confidence: float, tokens_M: np.ndarray | None = None
) -> np.ndarray:
    """Return which texts (M,) need further draws: those whose certainty is below `confidence`, or all if it is 1.

    A text that was stopped (its last draw is nan) stays stopped.

    Raises:
        ValueError: confidence is not in (0.5, 1]; as `certainty`.
    """
    if not 0.5 < confidence <= 1:
        raise ValueError(
            f"classify.confidence={confidence} must lie above 0.5 and not above 1: 0.95 stops a text when its "
            "prediction is 95 % certain, 1 takes every draw for every text"
        )
    active_M = ~np.isnan(nats_MCK[:, 0, -1])
    if confidence == 1:
        return active_M
    return active_M & (certainty(nats_MCK, log_prior_C, tokens_M=tokens_M) < confidence)


def _standard_errors(
    difference_MCK: np.ndarray, margin_MC: np.ndarray, draws_M: np.ndarray, rival_MC: np.ndarray
) -> np.ndarray:
    """Return standard errors (M, C), nats, with which margin / error has the tail probability of the moderated t."""
    sample_variance_MC = np.nanvar(difference_MCK, axis=2, ddof=1)
    sample_degrees_M1 = (draws_M - 1)[:, None]
    pooled_variance = np.average(sample_variance_MC, weights=sample_degrees_M1 * rival_MC)
    degrees_M1 = sample_degrees_M1 + PRIOR_DEGREES
    variance_MC = (PRIOR_DEGREES * pooled_variance + sample_degrees_M1 * sample_variance_MC) / degrees_M1
    moderated_se_MC = np.sqrt(variance_MC / draws_M[:, None])
    positive_MC = margin_MC > 1e-6 * moderated_se_MC  # below, the ratio of the two deviates is 0 / 0
    t_MC = np.ones_like(moderated_se_MC)
    np.divide(margin_MC, moderated_se_MC, out=t_MC, where=positive_MC & (moderated_se_MC > 0))
    z_MC = norm.isf(np.maximum(student_t.sf(t_MC, degrees_M1), 1e-300))
    return np.where(positive_MC, moderated_se_MC * t_MC / z_MC, moderated_se_MC)


def _false_sign_rate(margin_MC: np.ndarray, se_MC: np.ndarray, rival_MC: np.ndarray) -> np.ndarray:
    """Return the probability (M, C) that the true margin is negative.

    The mixture is fitted to the margins over the runner-up, the smallest ones, so it is conservative for other rivals.
    """
    largest = float(margin_MC[rival_MC].max())
    se_MC = np.maximum(se_MC, 1e-12 * max(largest, 1.0))  # noise-free draws
    smallest = float(se_MC[rival_MC].min()) / 2  # practically no difference
    num_scales = 2 + int(np.ceil(np.log2(max(2 * largest / smallest, 2))))
    scale_G = smallest * 2.0 ** np.arange(num_scales)
    runner_up_M = np.where(rival_MC, margin_MC, np.inf).argmin(axis=1)[:, None]
    margin_M, se_M = (np.take_along_axis(x_MC, runner_up_M, axis=1)[:, 0] for x_MC in (margin_MC, se_MC))
    likelihood_MG = _likelihood(margin_M, se_M, scale_G)
    weight_G = np.full(num_scales, 1 / num_scales)
    null_count_G = _NULL_TEXTS * (np.arange(num_scales) == 0)
    for _ in range(_EM_STEPS):
        responsibility_MG = _normalised(likelihood_MG * weight_G)
        weight_G = (responsibility_MG.sum(axis=0) + null_count_G) / (len(responsibility_MG) + _NULL_TEXTS)
    responsibility_MCG = _normalised(_likelihood(margin_MC, se_MC, scale_G) * weight_G)
    shrinkage_MCG = scale_G / np.hypot(scale_G, se_MC[..., None])
    return (responsibility_MCG * norm.cdf(-(margin_MC / se_MC)[..., None] * shrinkage_MCG)).sum(axis=-1)


def _likelihood(margin: np.ndarray, se: np.ndarray, scale_G: np.ndarray) -> np.ndarray:
    """Return the density of each margin under each member (..., G), up to a factor per margin."""
    log_density = norm.logpdf(margin[..., None], scale=np.hypot(scale_G, se[..., None]))
    return np.exp(log_density - log_density.max(axis=-1, keepdims=True))


def _normalised(weight: np.ndarray) -> np.ndarray:
    return weight / weight.sum(axis=-1, keepdims=True)
