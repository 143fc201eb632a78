"""Calibration on validation texts: a temperature, one that grows with the length, and weights by the share of masks.

Estimated likelihoods are noisy bounds, so differences between classes come out too large or too small, and some mask
shares are more informative than others. Calibrated results are no longer Bayes' rule and are reported separately.
Nothing is fitted on the texts that are reported.

Shape suffixes: M texts, C classes, P network passes, B bins of the masked share.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize, minimize_scalar
from scipy.special import logsumexp, softmax

# Limits; validation texts without a single error would give temperature 0.
TEMPERATURES = (0.1, 1e4)
# Of the length. 1 makes the evidence a mean per token: more would say that longer texts tell less.
_EXPONENTS = (0.0, 1.0)
_LEAST_GAIN = 1e-9  # nats of log loss, below which an exponent is rounding error
_FOLDS = 5
_NUM_BINS = 5  # of the masked share
# Per text, for weights in units of the common value. inf: the common value only, which is a temperature.
_RIDGES = (np.inf, 10.0, 1.0, 0.1, 0.01, 0.001, 0.0001)


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


@dataclass(frozen=True)
class RateWeights:
    """Weights of the passes by the share of tokens that they masked."""

    weight_B: np.ndarray  # of equal-width bins [low, high) of the share in [0, 1]; the last includes 1
    ridge: float  # as cross-validation chose it; inf: one weight for all bins

    def log_p(self, nats_MCP: np.ndarray, rate_MP: np.ndarray) -> np.ndarray:
        """Return minus the mean over a text's passes of weight · nats, (M, C); weights 1 give the plain log p(x | c).

        Args:
            nats_MCP: each pass's estimate of -log p(x | c); nan, for all classes, for passes not taken.
            rate_MP: the share of masked tokens of each pass.

        Raises:
            ValueError: shapes do not agree; a text has no pass, or passes for some classes only; a share lies outside
                [0, 1].
        """
        nats_MCP, taken_MP = _passes(nats_MCP, rate_MP)
        weight_MP = self.weight_B[_bins(rate_MP, taken_MP, len(self.weight_B))]
        return -(weight_MP[:, None] * nats_MCP).sum(axis=2) / taken_MP.sum(axis=1)[:, None]


def fit_rate_weights(
    nats_MCP: np.ndarray, rate_MP: np.ndarray, label_M: np.ndarray, log_prior_C: np.ndarray
) -> RateWeights:
    """Fit non-negative weights by the likelihood of the labels, with a ridge towards their common value.

    The common value is 1 / T of `fit_temperature`; the penalty is ridge / 2 · Σ_b (w_b T - 1)² per text. The ridge is
    chosen by 5-fold cross-validation of the log loss within these texts; of equals, the strongest. A bin without passes
    keeps the common value. Arguments as for `RateWeights.log_p`.

    Raises:
        ValueError: as `RateWeights.log_p` and `fit_temperature`.
    """
    nats_MCP, taken_MP = _passes(nats_MCP, rate_MP)
    bin_MP = _bins(rate_MP, taken_MP, _NUM_BINS)
    in_bin_MPB = (bin_MP[:, :, None] == np.arange(_NUM_BINS)) / taken_MP.sum(axis=1)[:, None, None]
    evidence_MCB = -(nats_MCP @ in_bin_MPB)
    # The common part cancels in the posterior; numbers without it are small.
    evidence_MCB -= evidence_MCB.mean(axis=1, keepdims=True)
    label_M = np.asarray(label_M)
    fold_M = np.empty(len(label_M), dtype=int)
    fold_M[np.argsort(label_M, kind="stable")] = np.arange(len(label_M)) % _FOLDS  # every class in every fold
    _check(evidence_MCB.sum(axis=2), label_M)
    ridge = _RIDGES[0]
    if len(label_M) >= _FOLDS:
        losses = np.zeros(len(_RIDGES))
        for fold in range(_FOLDS):
            training_M, validation_M = fold_M != fold, fold_M == fold
            for i, candidate in enumerate(_RIDGES):
                weight_B = _fit(evidence_MCB[training_M], label_M[training_M], log_prior_C, candidate)
                loss = _log_loss(evidence_MCB[validation_M] @ weight_B, label_M[validation_M], log_prior_C)
                losses[i] += loss * validation_M.sum()
        ridge = _RIDGES[int(losses.argmin())]
    return RateWeights(_fit(evidence_MCB, label_M, log_prior_C, ridge), ridge)


def _fit(evidence_MCB: np.ndarray, label_M: np.ndarray, log_prior_C: np.ndarray, ridge: float) -> np.ndarray:
    common = 1 / fit_temperature(evidence_MCB.sum(axis=2), label_M, log_prior_C)
    num_bins = evidence_MCB.shape[2]
    if np.isinf(ridge):
        return np.full(num_bins, common)
    scaled_MCB = evidence_MCB * common
    truth_MC = np.eye(len(log_prior_C))[label_M]

    def objective(unit_B: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the penalised loss and its gradient; weights are in units of the common value."""
        log_odds_MC = scaled_MCB @ unit_B
        error_MC = softmax(log_odds_MC + log_prior_C, axis=1) - truth_MC
        slope_B = np.einsum("mc,mcb->b", error_MC, scaled_MCB) / len(label_M)
        loss = _log_loss(log_odds_MC, label_M, log_prior_C) + ridge / 2 * ((unit_B - 1) ** 2).sum()
        return loss, slope_B + ridge * (unit_B - 1)

    bounds = [(0, None)] * num_bins
    options = {"ftol": 1e-12, "gtol": 1e-8}
    found = minimize(objective, np.ones(num_bins), jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    return common * found.x


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


def _passes(nats_MCP: np.ndarray, rate_MP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the nats with 0 for the passes not taken, and which were taken (M, P)."""
    nats_MCP = np.asarray(nats_MCP, dtype=np.float64)
    if nats_MCP.ndim != 3 or np.shape(rate_MP) != nats_MCP[:, 0].shape:
        raise ValueError(f"passes {nats_MCP.shape} and masked shares {np.shape(rate_MP)} do not agree")
    absent_MCP = np.isnan(nats_MCP)
    absent_MP = absent_MCP.all(axis=1)
    if (absent_MCP != absent_MP[:, None]).any():
        raise ValueError("classes are compared over the same passes: a pass has a number for some classes only")
    if absent_MP.all(axis=1).any():
        raise ValueError("a text has no pass at all")
    return np.where(absent_MCP, 0.0, nats_MCP), ~absent_MP


def _bins(rate_MP: np.ndarray, taken_MP: np.ndarray, num_bins: int) -> np.ndarray:
    rate_MP = np.where(taken_MP, rate_MP, 0.0)
    if not ((rate_MP >= 0) & (rate_MP <= 1)).all():
        raise ValueError("the share of masked tokens of a pass must lie in [0, 1]")
    return np.digitize(rate_MP, np.linspace(0, 1, num_bins + 1)[1:-1])
