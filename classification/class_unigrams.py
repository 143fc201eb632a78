"""Unigram distributions of the classes that tell the classes apart best.

Logistic regression on token counts whose classes are probability distributions: p(token | class) is proportional to
p(token) exp(bias), and p(class | text) follows by Bayes' rule. Naive Bayes takes the biases from counts, which counts
correlated evidence several times; these biases minimise the log loss. They are the start of the output biases of a
class-conditional network that is trained to classify (objectives/contrast.py).

Shape suffixes: M texts, C classes, V vocabulary.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize
from scipy.sparse import csr_matrix
from scipy.special import log_softmax, logsumexp, softmax

# Strengths of the ridge on the biases, in texts. From strong to weak, each fit starts from the one before it.
_RIDGES = (1000.0, 300.0, 100.0, 30.0, 10.0, 3.0)


def class_biases(counts_MV: csr_matrix, label_M: np.ndarray, log_prior_C: np.ndarray) -> np.ndarray:
    """Return the bias of each token in each class, nats (C, V), relative to the token frequencies of all texts.

    counts_MV: how often each training text has each token. The ridge is chosen by the log loss on every tenth text.
    """
    frequency_V = np.asarray(counts_MV.sum(axis=0)).ravel() + 1.0
    log_p_V = np.log(frequency_V / frequency_V.sum())
    held_M = np.arange(len(label_M)) % 10 == 0
    fitted, held = (counts_MV[~held_M], label_M[~held_M]), (counts_MV[held_M], label_M[held_M])
    none_CV = bias_CV = np.zeros((len(log_prior_C), counts_MV.shape[1]))
    chosen, least = None, _log_loss(none_CV, log_p_V, *held, log_prior_C)
    for ridge in _RIDGES:
        bias_CV = _fit(bias_CV, log_p_V, *fitted, log_prior_C, ridge)
        loss = _log_loss(bias_CV, log_p_V, *held, log_prior_C)
        if loss > least:
            break
        chosen, least = ridge, loss
    return none_CV if chosen is None else _fit(bias_CV, log_p_V, counts_MV, label_M, log_prior_C, chosen)


def _log_joint(bias_CV: np.ndarray, log_p_V: np.ndarray, counts_MV: csr_matrix, log_prior_C: np.ndarray) -> np.ndarray:
    return counts_MV @ log_softmax(log_p_V + bias_CV, axis=1).T + log_prior_C


def _log_loss(
    bias_CV: np.ndarray, log_p_V: np.ndarray, counts_MV: csr_matrix, label_M: np.ndarray, log_prior_C: np.ndarray
) -> float:
    joint_MC = _log_joint(bias_CV, log_p_V, counts_MV, log_prior_C)
    return float((logsumexp(joint_MC, axis=1) - joint_MC[np.arange(len(label_M)), label_M]).mean())


def _fit(
    start_CV: np.ndarray,
    log_p_V: np.ndarray,
    counts_MV: csr_matrix,
    label_M: np.ndarray,
    log_prior_C: np.ndarray,
    ridge: float,
) -> np.ndarray:
    num_texts, transposed_VM = len(label_M), counts_MV.T.tocsr()
    truth_MC = np.eye(len(log_prior_C))[label_M]
    tokens_M = np.asarray(counts_MV.sum(axis=1)).ravel()

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        bias_CV = flat.reshape(start_CV.shape)
        joint_MC = _log_joint(bias_CV, log_p_V, counts_MV, log_prior_C)
        loss = (logsumexp(joint_MC, axis=1) - (joint_MC * truth_MC).sum(axis=1)).mean()
        error_MC = (softmax(joint_MC, axis=1) - truth_MC) / num_texts
        slope_CV = (transposed_VM @ error_MC).T - (tokens_M @ error_MC)[:, None] * softmax(log_p_V + bias_CV, axis=1)
        return loss + ridge / num_texts / 2 * (flat @ flat), (slope_CV + ridge / num_texts * bias_CV).ravel()

    found = minimize(objective, start_CV.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": 100, "ftol": 1e-6})
    return found.x.reshape(start_CV.shape)
