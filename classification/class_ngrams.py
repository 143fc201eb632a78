"""Token distributions of the classes that tell the classes apart best: unigrams, or unigrams and bigrams.

Logistic regression on token counts whose classes are probability distributions. After a token `first`, a class has
p(token | first) proportional to its frequency in all texts times exp(bias of the token + bias of the pair); p(class |
text) follows by Bayes' rule. Naive Bayes takes such biases from counts, which counts correlated evidence several times;
these biases minimise the log loss. They are the start of a class-conditional network that is trained to classify
(objectives/contrast.py).

Shape suffixes: M texts, C classes, V vocabulary, P pairs, F pairs with a bias, U first tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import minimize
from scipy.sparse import csr_matrix
from scipy.special import logsumexp, softmax

# Strengths of the ridge, in texts. From strong to weak, each fit starts from the one before it.
_RIDGES = (100.0, 30.0, 10.0, 3.0, 1.0, 0.3)


@dataclass(frozen=True)
class PairCounts:
    """The tokens of texts and what stands before them.

    Attributes:
        first_P, second_P: the pairs, sorted by `first_P`; a first token of V marks the beginning of a row.
        count_MP: how often each text has each pair.
        label_M: the class of each text.
        vocab_size: V.
    """

    first_P: np.ndarray
    second_P: np.ndarray
    count_MP: csr_matrix
    label_M: np.ndarray
    vocab_size: int

    @property
    def tokens(self) -> PairCounts:
        """The same texts without order: every token stands at the beginning."""
        pairs = len(self.second_P)
        to_token_PV = csr_matrix((np.ones(pairs), (np.arange(pairs), self.second_P)), shape=(pairs, self.vocab_size))
        first_V = np.full(self.vocab_size, self.vocab_size)
        count_MV = (self.count_MP @ to_token_PV).tocsr()
        return replace(self, first_P=first_V, second_P=np.arange(self.vocab_size), count_MP=count_MV)

    def most_frequent(self, number: int) -> np.ndarray:
        """Return the places of the pairs that most texts have, (F,), in order; none of a single text or a beginning.

        Raises:
            ValueError: there are fewer than `number`.
        """
        texts_P = self.count_MP.astype(bool).astype(np.int64).sum(axis=0).A1 * (self.first_P < self.vocab_size)
        several = int((texts_P > 1).sum())
        if several < number:
            raise ValueError(
                f"classify.bigrams={number}: only {several} pairs of tokens stand in more than one training text; use "
                "at most that number"
            )
        return np.sort(np.argsort(-texts_P, kind="stable")[:number])


def class_biases(
    pairs: PairCounts, log_prior_C: np.ndarray, biased_F: Sequence[int] | np.ndarray = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Return the bias of each token (C, V) and of the pairs `biased_F` (C, F) in each class, nats.

    The ridge is on the biases in units of those of naive Bayes, so that a token that all classes share keeps none (Wang
    and Manning, ACL 2012, eq. 2, do so for linear classifiers). Its strength is chosen by the log loss on every tenth
    text, sorted by class.
    """
    biased_F = np.asarray(biased_F, dtype=np.int64)
    held_M = np.zeros(len(pairs.label_M), dtype=bool)
    held_M[np.argsort(pairs.label_M, kind="stable")[::10]] = True
    fitted, held = (_LogLoss(pairs, log_prior_C, biased_F, kept_M) for kept_M in (~held_M, held_M))
    best_CX = bias_CX = np.zeros((len(log_prior_C), pairs.vocab_size + len(biased_F)))
    chosen = None
    least = held.loss(best_CX)[0]
    for ridge in _RIDGES:
        bias_CX = _fit(fitted, bias_CX, ridge)
        loss = held.loss(bias_CX)[0]
        if loss > least:
            break
        chosen = ridge
        least = loss
        best_CX = bias_CX
    if chosen is not None:
        everything = _LogLoss(pairs, log_prior_C, biased_F, np.ones(len(held_M), dtype=bool))
        best_CX = _fit(everything, best_CX, chosen)
    return best_CX[:, : pairs.vocab_size], best_CX[:, pairs.vocab_size :]


class _LogLoss:
    """The mean log loss of some of the texts as a function of the biases."""

    def __init__(self, pairs: PairCounts, log_prior_C: np.ndarray, biased_F: np.ndarray, kept_M: np.ndarray) -> None:
        frequency_P = np.asarray(pairs.count_MP.sum(axis=0)).ravel() + 1.0
        _, self.start_U, self.group_P = np.unique(pairs.first_P, return_index=True, return_inverse=True)
        self.log_p_P = np.log(frequency_P / np.add.reduceat(frequency_P, self.start_U)[self.group_P])
        self.second_P = pairs.second_P
        self.biased_F = biased_F
        self.log_prior_C = log_prior_C
        self.count_MP = pairs.count_MP[kept_M]
        self.transposed_PM = self.count_MP.T.tocsr()
        self.truth_MC = np.eye(len(log_prior_C))[pairs.label_M[kept_M]]
        self.vocab_size = pairs.vocab_size
        count_CP = self.truth_MC.T @ self.count_MP
        count_CV = np.stack([np.bincount(self.second_P, count_P, minlength=self.vocab_size) for count_P in count_CP])
        self.unit_CX = np.concatenate([_log_ratio(count_CV), _log_ratio(count_CP)[:, biased_F]], axis=1)

    def loss(self, bias_CX: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the mean log loss, nats, and its slope."""
        bias_CP = bias_CX[:, self.second_P]
        bias_CP[:, self.biased_F] += bias_CX[:, self.vocab_size :]
        log_p_CP = self.log_p_P + bias_CP
        most_CU = np.maximum.reduceat(log_p_CP, self.start_U, axis=1)  # a line search tries biases of thousands of nats
        p_CP = np.exp(log_p_CP - most_CU[:, self.group_P])
        sum_CU = np.add.reduceat(p_CP, self.start_U, axis=1)
        joint_MC = self.count_MP @ (bias_CP - (most_CU + np.log(sum_CU))[:, self.group_P]).T + self.log_prior_C
        loss = (logsumexp(joint_MC, axis=1) - (joint_MC * self.truth_MC).sum(axis=1)).mean()
        error_MC = (softmax(joint_MC, axis=1) - self.truth_MC) / len(self.truth_MC)
        slope_CP = np.ascontiguousarray((self.transposed_PM @ error_MC).T)
        of_first_CU = np.add.reduceat(slope_CP, self.start_U, axis=1)
        slope_CP -= p_CP * (of_first_CU / sum_CU)[:, self.group_P]
        of_tokens = [np.bincount(self.second_P, slope_P, minlength=self.vocab_size) for slope_P in slope_CP]
        return float(loss), np.concatenate([np.stack(of_tokens), slope_CP[:, self.biased_F]], axis=1)


def _log_ratio(count_CX: np.ndarray) -> np.ndarray:
    """Return by how much the log-frequency of each feature differs from its mean over the classes, nats (C, X)."""
    smoothed_CX = count_CX + 1
    log_p_CX = np.log(smoothed_CX / smoothed_CX.sum(axis=1, keepdims=True))
    return np.abs(log_p_CX - log_p_CX.mean(axis=0))


def _fit(log_loss: _LogLoss, start_CX: np.ndarray, ridge: float) -> np.ndarray:
    strength, unit_CX = ridge / len(log_loss.truth_MC), log_loss.unit_CX

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        loss, slope_CX = log_loss.loss(flat.reshape(start_CX.shape) * unit_CX)
        return loss + strength / 2 * (flat @ flat), (slope_CX * unit_CX).ravel() + strength * flat

    start = np.divide(start_CX, unit_CX, out=np.zeros_like(start_CX), where=unit_CX > 0).ravel()
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 100, "ftol": 1e-6})
    return found.x.reshape(start_CX.shape) * unit_CX
