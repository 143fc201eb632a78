"""Quality of predictions and calibration of their probabilities, with errors.

Shape suffixes: M texts, C classes, B bins of the confidence, R resamples, N cells of the confusion matrix with a text;
for areas under the ROC curve P positive and N negative texts.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support, roc_auc_score

from palimpsest.common.metrics import Estimate, Interval, mean, wilson_interval

_NUM_BINS = 10
_RESAMPLES = 1000
_BOOTSTRAP_SEED = 0  # fixed, so that the same predictions always have the same error
SMALLEST = np.nextafter(0.0, 1.0)  # 4.9e-324, whose log is -744.4


@dataclass(frozen=True)
class Reliability:
    """Accuracy by confidence, in equal-width bins (low, high] of [0, 1]; values of empty bins are nan."""

    counts_B: np.ndarray  # texts
    confidence_B: np.ndarray  # mean
    accuracy_B: np.ndarray

    @property
    def ece(self) -> float:
        """Expected calibration error, weighted by texts (Guo et al. 2017, eq. 3); nan without texts."""
        gaps_B = np.nan_to_num(np.abs(self.accuracy_B - self.confidence_B))
        total = self.counts_B.sum()
        return float(self.counts_B @ gaps_B / total) if total else math.nan


@dataclass(frozen=True)
class Abstention:
    """Accuracy if only the most confident texts are predicted (selective classification; El-Yaniv & Wiener 2010).

    Texts of equal confidence are taken in random order, so they share their errors.
    """

    right_M: np.ndarray  # expected number of right predictions among the 1, 2, ..., M most confident texts
    aurc: Estimate  # area under the risk-coverage curve (Geifman & El-Yaniv 2017): the mean error rate over coverages

    def at(self, coverage: float) -> Estimate:
        """Return the accuracy at a coverage in (0, 1], with its binomial standard error."""
        number = max(1, round(coverage * len(self.right_M)))
        share = min(float(self.right_M[number - 1]) / number, 1.0)
        return Estimate(share, math.sqrt(share * (1 - share) / number))


@dataclass(frozen=True)
class Measures:
    """Quality of M predictions."""

    accuracy: Estimate  # with its binomial standard error
    accuracy_interval: Interval  # Wilson's, 95 %
    macro_f1: Estimate  # over the classes with a text or a prediction; its error by the bootstrap over texts
    precision_C: np.ndarray  # 0 if the denominator is 0, as the next two
    recall_C: np.ndarray
    f1_C: np.ndarray
    support_C: np.ndarray  # texts of each class
    confusion_CC: np.ndarray  # true class in rows, prediction in columns
    roc_auc: float | None  # of class 1 of two, else the mean of one against the rest; None if only one class has texts
    log_loss: Estimate  # mean of -log p(true class | text), nats; at most 744 for a text
    brier: Estimate  # squared error summed over ALL classes, in [0, 2] (Brier 1950; twice the one-sided score of two)
    reliability: Reliability  # of the top class's probability
    abstention: Abstention  # by the top class's probability

    @property
    def ece(self) -> float:
        """Expected calibration error of the top class's probability, in 10 bins."""
        return self.reliability.ece


def measure(posterior_MC: np.ndarray, label_M: np.ndarray) -> Measures:
    """Measure predictions (the most probable class, the first of equals) and probabilities against the true classes.

    Raises:
        ValueError: there is no text; shapes do not agree; a label is no class; rows are no probabilities.
    """
    posterior_MC, label_M = _checked(posterior_MC, label_M)
    num_texts, num_classes = posterior_MC.shape
    prediction_M = posterior_MC.argmax(axis=1)
    right_M = prediction_M == label_M
    confusion_CC = confusion_matrix(label_M, prediction_M, labels=range(num_classes))
    precision_C, recall_C, f1_C, support_C = precision_recall_fscore_support(
        label_M, prediction_M, labels=range(num_classes), zero_division=0
    )
    share = float(right_M.mean())
    p_true_M = posterior_MC[np.arange(num_texts), label_M]
    squares_M = ((posterior_MC - np.eye(num_classes)[label_M]) ** 2).sum(axis=1)
    return Measures(
        accuracy=Estimate(share, math.sqrt(share * (1 - share) / num_texts)),
        accuracy_interval=wilson_interval(int(right_M.sum()), num_texts),
        macro_f1=macro_f1(confusion_CC),
        precision_C=precision_C,
        recall_C=recall_C,
        f1_C=f1_C,
        support_C=support_C,
        confusion_CC=confusion_CC,
        roc_auc=_roc_auc(posterior_MC, label_M) if (support_C > 0).sum() > 1 else None,
        # scikit-learn's log_loss clips at 2e-16: a confident error would cost 36 nats at most.
        log_loss=mean(-np.log(np.maximum(p_true_M, SMALLEST))),
        brier=mean(squares_M),
        reliability=reliability(posterior_MC.max(axis=1), right_M),
        abstention=abstention(top_log_odds(posterior_MC), right_M),
    )


def log_loss(posterior_MC: np.ndarray, label_M: np.ndarray) -> float:
    """Return the mean of -log p(true class | text), nats."""
    return float(-np.log(np.maximum(posterior_MC[np.arange(len(label_M)), label_M], SMALLEST)).mean())


def _checked(posterior_MC: np.ndarray, label_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    posterior_MC, label_M = np.asarray(posterior_MC, dtype=np.float64), np.asarray(label_M)
    if posterior_MC.ndim != 2 or label_M.shape != posterior_MC.shape[:1]:
        raise ValueError(f"posterior {posterior_MC.shape} and labels {label_M.shape} do not agree")
    if not posterior_MC.size:
        raise ValueError("there is nothing to measure: no text was classified")
    if not (np.isin(label_M, np.arange(posterior_MC.shape[1]))).all():
        raise ValueError(f"a label lies outside 0..{posterior_MC.shape[1] - 1}")
    if not (posterior_MC >= 0).all() or not np.allclose(posterior_MC.sum(axis=1), 1, atol=1e-6):
        raise ValueError("the rows of the posterior must be probabilities: no nan, none negative, sum 1")
    return posterior_MC, label_M.astype(np.int64)


def top_log_odds(posterior_MC: np.ndarray) -> np.ndarray:
    """Return the log-odds of the most probable class, (M,), which rank texts where the probability rounds to 1."""
    sorted_MC = np.sort(posterior_MC, axis=1)
    top_M, others_M = sorted_MC[:, -1], sorted_MC[:, :-1].sum(axis=1)
    return np.log(np.maximum(top_M, SMALLEST)) - np.log(np.maximum(others_M, SMALLEST))


def abstention(confidence_M: np.ndarray, right_M: np.ndarray) -> Abstention:
    """Compute the accuracy of the most confident predictions at every coverage, and the area AURC.

    The error of AURC is that of its influence function, which also covers that the texts determine the thresholds.
    """
    total, order_M = len(right_M), np.argsort(-confidence_M, kind="stable")
    wrong_M = 1.0 - np.asarray(right_M)[order_M]
    _, group_M, size = np.unique(-confidence_M[order_M], return_inverse=True, return_counts=True)

    def shared(value_M: np.ndarray) -> np.ndarray:
        """Return the means over texts of equal confidence."""
        return (np.bincount(group_M, value_M) / size)[group_M]

    number_M = np.arange(1, total + 1)
    # AURC is the mean over i of wrong_i · Σ_{n ≥ i} 1 / n, which is about -log(coverage of text i).
    depth_M = shared(np.cumsum(1 / number_M[::-1])[::-1])
    area = float(wrong_M @ depth_M) / total
    ahead_M = shared(np.cumsum((shared(wrong_M) / number_M)[::-1])[::-1])  # a text raises the coverage of later ones
    influence_M = wrong_M * depth_M - ahead_M + wrong_M.mean() - area
    se = float(influence_M.std(ddof=1) / math.sqrt(total)) if total > 1 else math.nan
    return Abstention(number_M - np.cumsum(shared(wrong_M)), Estimate(area, se))


def auroc(positive_P: np.ndarray, negative_N: np.ndarray) -> Estimate:
    """Return the probability that a positive text has a higher score than a negative one; equal scores count half.

    The error is that of DeLong et al. (Biometrics 44, 1988), nan for a single text of either kind.

    Raises:
        ValueError: there are no scores of one kind, or a score is nan.
    """
    positive_P, negative_N = np.asarray(positive_P, dtype=np.float64), np.asarray(negative_N, dtype=np.float64)
    scores = np.concatenate([positive_P, negative_N])
    num_positive, num_negative = len(positive_P), len(negative_N)
    if not num_positive or not num_negative or np.isnan(scores).any():
        raise ValueError("an area under the ROC curve needs scores of both kinds of texts, none of them nan")
    rank = rankdata(scores)
    # Share of the other kind that each text is on the right side of: its rank among all minus that among its own.
    above_P = (rank[:num_positive] - rankdata(positive_P)) / num_negative
    below_N = 1 - (rank[num_positive:] - rankdata(negative_N)) / num_positive
    area = float(above_P.mean())
    if min(num_positive, num_negative) < 2:
        return Estimate(area, math.nan)
    return Estimate(area, math.sqrt(above_P.var(ddof=1) / num_positive + below_N.var(ddof=1) / num_negative))


def _roc_auc(posterior_MC: np.ndarray, label_M: np.ndarray) -> float:
    """Rank texts by log-odds: the probability itself rounds to 1 from 37 nats on, which would make ties."""
    num_classes = posterior_MC.shape[1]
    areas = []
    for k in [1] if num_classes == 2 else np.unique(label_M):
        others_M = np.delete(posterior_MC, k, axis=1).sum(axis=1)
        odds_M = np.log(np.maximum(posterior_MC[:, k], SMALLEST)) - np.log(np.maximum(others_M, SMALLEST))
        areas.append(roc_auc_score(label_M == k, odds_M))
    return float(np.mean(areas))


def macro_f1(confusion_CC: np.ndarray) -> Estimate:
    """Return the mean F1 of the classes with a text or a prediction; its error by 1,000 bootstrap resamples of the
    texts.

    Resampling texts means drawing the cells of the confusion matrix from a multinomial. The error is nan for one text.
    """
    row_N, column_N = np.nonzero(confusion_CC)
    count_N = confusion_CC[row_N, column_N]
    total = int(count_N.sum())
    eye_CC = np.eye(len(confusion_CC))
    true_NC, prediction_NC = eye_CC[row_N], eye_CC[column_N]

    def score_R(count_RN: np.ndarray) -> np.ndarray:
        hits_RC = count_RN @ (true_NC * prediction_NC)
        either_RC = count_RN @ (true_NC + prediction_NC)
        f1_RC = 2 * hits_RC / np.maximum(either_RC, 1)
        return f1_RC.sum(axis=1) / (either_RC > 0).sum(axis=1)

    resampled_RN = np.random.default_rng(_BOOTSTRAP_SEED).multinomial(total, count_N / total, size=_RESAMPLES)
    se = float(score_R(resampled_RN).std(ddof=1)) if total > 1 else math.nan
    return Estimate(float(score_R(count_N[None])[0]), se)


def reliability(confidence_M: np.ndarray, right_M: np.ndarray) -> Reliability:
    """Compute the reliability of M predictions with `confidence_M` in [0, 1], of which `right_M` are right."""
    bin_M = np.digitize(confidence_M, np.linspace(0, 1, _NUM_BINS + 1)[1:-1], right=True)
    counts_B, right_B = (np.bincount(bin_M, weight, _NUM_BINS).astype(np.int64) for weight in (None, right_M))
    with np.errstate(invalid="ignore"):
        mean_B = np.bincount(bin_M, confidence_M, _NUM_BINS) / counts_B
        accuracy_B = right_B / counts_B
    return Reliability(counts_B, mean_B, accuracy_B)
