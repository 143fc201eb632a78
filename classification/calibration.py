"""Calibration on validation texts: a temperature, and one that grows with the length.

Estimated likelihoods are noisy bounds, so differences between classes come out too large or too small. Calibrated
results are no longer Bayes' rule and are reported separately. Nothing is fitted on the texts that are reported.

Shape suffixes: M texts, C classes.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

# Limits; validation texts without a single error would give temperature 0.
TEMPERATURES = (0.1, 1e4)
# Of the length. 1 makes the evidence a mean per token: more would say that longer texts tell less.
_EXPONENTS = (0.0, 1.0)
_LEAST_GAIN = 1e-9  # nats of log loss, below which an exponent is rounding error


def fit_temperature(log_p_MC: np.ndarray, label_M: np.ndarray, log_prior_C: np.ndarray) -> float:
    """Return the temperature T > 0 that maximises the likelihood of the labels under softmax(log prior + log p / T).

    Guo et al. 2017, sect. 4.2, with the prior unchanged. The log loss is convex in 1 / T. T is limited to [0.1, 10000].

    Raises:
        ValueError: there is no text, a number is not finite, or a label is no class.
    """
    log_p_MC = np.asarray(log_p_MC, dtype=np.float64)
    _check(log_p_MC, label_M)
    loss = lambda log_t: _log_loss(log_p_MC * np.exp(-log_t), label_M, log_prior_C)  # noqa: E731
    found = minimize_scalar(loss, bounds=np.log(TEMPERATURES), method="bounded", options={"xatol": 1e-6})
    if loss(np.log(TEMPERATURES[0])) <= found.fun:  # easy texts: no temperature down to the limit is worse
        return TEMPERATURES[0]
    return float(np.exp(found.x))


@dataclass(frozen=True)
class LengthTemperature:
    """A temperature that grows with the length of the text: T(n) = T0 · (n / n0)^gamma.

    Errors of the log-likelihoods of one text's tokens are correlated, so their sum grows faster with the length than
    the evidence does. With gamma 0 this is one temperature; with gamma 1 evidence is a mean per token.
    """

    temperature: float  # T0, of a text of mean length
    gamma: float
    mean_tokens: float  # n0

    def log_p(self, log_p_MC: np.ndarray, tokens_M: np.ndarray) -> np.ndarray:
        """Return log p(text | class) / T(tokens), (M, C).

        Raises:
            ValueError: the number of tokens of a text is missing or not positive.
        """
        tokens_M = np.asarray(tokens_M, dtype=np.float64)
        if tokens_M.shape != (len(log_p_MC),) or not (np.isfinite(tokens_M) & (tokens_M > 0)).all():
            raise ValueError(f"each of {len(log_p_MC)} texts needs a positive number of tokens")
        return log_p_MC / (self.temperature * (tokens_M / self.mean_tokens) ** self.gamma)[:, None]


def fit_length_temperature(
    log_p_MC: np.ndarray, tokens_M: np.ndarray, label_M: np.ndarray, log_prior_C: np.ndarray
) -> LengthTemperature:
    """Fit T0 and gamma in [0, 1] by the likelihood of the labels.

    At each gamma T0 is that of `fit_temperature`, whose problem is convex in 1 / T0; a search over gamma alone remains.
    Where lengths do not improve the log loss, gamma is 0 and T0 the temperature of `fit_temperature`.

    Raises:
        ValueError: as `LengthTemperature.log_p` and `fit_temperature`.
    """
    log_p_MC = np.asarray(log_p_MC, dtype=np.float64)
    _check(log_p_MC, label_M)
    mean_tokens = float(np.mean(tokens_M))

    def fitted(gamma: float) -> LengthTemperature:
        by_length_MC = LengthTemperature(1.0, gamma, mean_tokens).log_p(log_p_MC, tokens_M)
        return LengthTemperature(fit_temperature(by_length_MC, label_M, log_prior_C), gamma, mean_tokens)

    def loss(found: LengthTemperature) -> float:
        return _log_loss(found.log_p(log_p_MC, tokens_M), label_M, log_prior_C)

    plain = fitted(0.0)
    searched = minimize_scalar(
        lambda gamma: loss(fitted(float(gamma))), bounds=_EXPONENTS, method="bounded", options={"xatol": 1e-4}
    )
    best = fitted(float(searched.x))
    return best if loss(best) < loss(plain) - _LEAST_GAIN else plain


def _log_loss(log_p_MC: np.ndarray, label_M: np.ndarray, log_prior_C: np.ndarray) -> float:
    """Return the mean of -log p(true class | text), nats."""
    joint_MC = log_p_MC + log_prior_C
    return float((logsumexp(joint_MC, axis=1) - joint_MC[np.arange(len(label_M)), label_M]).mean())


def _check(log_p_MC: np.ndarray, label_M: np.ndarray) -> None:
    if not len(log_p_MC):
        raise ValueError("there is nothing to fit: calibration needs validation texts")
    if len(label_M) != len(log_p_MC) or not np.isin(label_M, np.arange(log_p_MC.shape[1])).all():
        raise ValueError(f"calibration needs a label in 0..{log_p_MC.shape[1] - 1} for each of {len(log_p_MC)} texts")
    if not np.isfinite(log_p_MC).all():
        raise ValueError("a likelihood is not finite: calibration is impossible")
