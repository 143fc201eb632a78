"""Biases of tokens and of token pairs that tell classes apart: their fit, and the pairs that get one."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from scipy.special import log_softmax

from palimpsest.classification.class_ngrams import PairCounts, _LogLoss, class_biases

PRIOR_C = np.log([0.5, 0.5])


def unigrams(counts_MV: np.ndarray, label_M: np.ndarray) -> PairCounts:
    size = counts_MV.shape[1]
    return PairCounts(np.full(size, size), np.arange(size), csr_matrix(counts_MV), label_M, size)


def pair_counts(texts: np.ndarray, label_M: np.ndarray, size: int) -> PairCounts:
    """Count the pairs of texts of one length."""
    first_ML = np.concatenate([np.full((len(texts), 1), size), texts[:, :-1]], axis=1)
    key_P, pair_N = np.unique(first_ML * size + texts, return_inverse=True)
    text_N = np.repeat(np.arange(len(texts)), texts.shape[1])
    count_MP = csr_matrix((np.ones(texts.size), (text_N, pair_N.ravel())), shape=(len(texts), len(key_P)))
    return PairCounts(*np.divmod(key_P, size), count_MP, label_M, size)


def test_the_classes_start_where_unigrams_classify_best():
    """The biases are the true log-ratios of independent tokens; if each stands n times, they are n times smaller."""
    rng = np.random.default_rng(0)
    p_CV = rng.dirichlet(np.full(6, 2.0), size=2)
    label_M = rng.integers(2, size=8000)
    counts_MV = np.stack([rng.multinomial(12, p_CV[k]) for k in label_M])
    for copies in (1, 3):  # every token stands `copies` times
        bias_CV, _ = class_biases(unigrams(copies * counts_MV, label_M), PRIOR_C)
        log_p_V = np.log((copies * counts_MV.sum(0) + 1) / (copies * counts_MV.sum() + 6))
        found_V = np.subtract(*log_softmax(log_p_V + bias_CV, axis=1))
        true_V = np.subtract(*np.log(p_CV)) / copies
        slope = found_V @ true_V / (true_V @ true_V)  # the ridge shrinks them a little
        assert 0.8 < slope < 1.05 and found_V == pytest.approx(slope * true_V, abs=0.15 / copies)


def test_a_token_that_all_classes_use_alike_keeps_no_bias():
    """The ridge is in units of the biases of naive Bayes, so no accident of few texts speaks for a class."""
    label_M = np.arange(300) % 3
    counts_MV = np.stack([1 + (np.arange(3) == k) for k in label_M])  # token c stands twice in texts of class c
    shared_M = np.arange(300) // 3 % 3  # a fourth token, as often in every class
    bias_CV, _ = class_biases(unigrams(np.column_stack([counts_MV, shared_M]), label_M), np.log(np.full(3, 1 / 3)))
    assert np.all(bias_CV[:, 3] == 0), "its naive Bayes bias is 0"
    assert np.all(np.diag(bias_CV) > 0.1) and np.all(bias_CV[:, :3].argmax(1) == np.arange(3))


@pytest.mark.parametrize("classes", [2, 5, 10])
def test_the_order_of_the_texts_does_not_matter(classes):
    """Every tenth text is held out: with interleaved classes these must not all be of one class."""
    rng = np.random.default_rng(0)
    p_CV = rng.dirichlet(np.full(20, 0.5), size=classes)
    label_M = np.arange(400) % classes
    counts_MV = np.stack([rng.multinomial(10, p_CV[k]) for k in label_M])
    log_prior_C = np.full(classes, -np.log(classes))
    bias_CV, _ = class_biases(unigrams(counts_MV, label_M), log_prior_C)
    log_p_CV = log_softmax(np.log(counts_MV.sum(0) + 1) + bias_CV, axis=1)
    assert ((counts_MV @ log_p_CV.T).argmax(1) == label_M).mean() > 0.8


def chains(texts: int, rng: np.random.Generator) -> tuple[PairCounts, np.ndarray]:
    """Texts of two Markov chains with the same token frequencies, and the true log-odds of each text."""
    size, length = 4, 12
    noise = rng.uniform(0.0, 1.0, (size, size))
    noise -= noise.mean(0) + noise.mean(1)[:, None] - noise.mean()  # rows and columns of p sum to 1
    p_CVV = 1 / size + 0.4 / size / np.abs(noise).max() * np.stack([noise, -noise])
    label_M = rng.integers(2, size=texts)
    x_ML = np.empty((texts, length), dtype=np.int64)
    x_ML[:, 0] = rng.integers(size, size=texts)
    for i in range(1, length):
        cumulative = p_CVV[label_M, x_ML[:, i - 1]].cumsum(1)
        x_ML[:, i] = (rng.random((texts, 1)) > cumulative).sum(1).clip(max=size - 1)
    odds_M = np.log(p_CVV[0] / p_CVV[1])[x_ML[:, :-1], x_ML[:, 1:]].sum(1)
    return pair_counts(x_ML, label_M, size), odds_M


def test_pairs_tell_apart_what_tokens_cannot():
    rng = np.random.default_rng(1)
    pairs, odds_M = chains(12000, rng)
    held_M = np.arange(12000) >= 8000
    fitted = PairCounts(pairs.first_P, pairs.second_P, pairs.count_MP[~held_M], pairs.label_M[~held_M], 4)
    biased_F = np.flatnonzero(pairs.first_P < 4)
    assert biased_F.tolist() == fitted.most_frequent(len(biased_F)).tolist()
    losses = []
    for chosen in ((), biased_F):
        bias = class_biases(fitted, PRIOR_C, chosen)
        losses.append(_LogLoss(pairs, PRIOR_C, np.asarray(chosen, int), held_M).loss(np.concatenate(bias, 1))[0])
    sign_M = np.where(pairs.label_M == 0, 1, -1)
    exact = np.logaddexp(0, -(sign_M * odds_M)[held_M]).mean()
    assert losses[0] == pytest.approx(np.log(2), abs=0.01), "tokens alone say nothing"
    assert exact < 0.6 and losses[1] == pytest.approx(exact, abs=0.01)


def test_the_slope_is_that_of_the_loss():
    rng = np.random.default_rng(2)
    pairs, _ = chains(50, rng)
    log_loss = _LogLoss(pairs, PRIOR_C, pairs.most_frequent(5), np.arange(50) % 3 > 0)
    bias_CX = rng.normal(size=(2, 4 + 5))
    slope_CX, step = log_loss.loss(bias_CX)[1], 1e-5
    for place in np.ndindex(bias_CX.shape):
        ends = []
        for sign in (1, -1):
            moved_CX = bias_CX.copy()
            moved_CX[place] += sign * step
            ends.append(log_loss.loss(moved_CX)[0])
        assert slope_CX[place] == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-8)


def test_biases_of_any_size_have_a_loss():
    """A line search tries biases of thousands of nats, whose exponentials overflow."""
    rng = np.random.default_rng(3)
    pairs, _ = chains(50, rng)
    log_loss = _LogLoss(pairs, PRIOR_C, pairs.most_frequent(5), np.arange(50) > 0)
    bias_CX = rng.normal(size=(2, 4 + 5))
    loss, slope_CX = log_loss.loss(bias_CX)
    bias_CX[:, :4] += [[2000.0], [-2000.0]]  # of all tokens alike, so that no probability changes
    with np.errstate(over="raise", divide="raise", invalid="raise"):
        moved, moved_slope_CX = log_loss.loss(bias_CX)
        assert np.isfinite(log_loss.loss(1000 * rng.normal(size=(2, 4 + 5)))[0])
    assert moved == pytest.approx(loss, rel=1e-9) and moved_slope_CX == pytest.approx(slope_CX, abs=1e-9)


def test_pairs_are_those_of_most_texts():
    texts = np.array([[0, 1, 1, 1], [1, 1, 2, 1], [0, 1, 2, 2], [0, 0, 0, 1]])
    pairs = pair_counts(texts, np.zeros(4, int), 3)
    chosen = [(int(pairs.first_P[p]), int(pairs.second_P[p])) for p in pairs.most_frequent(3)]
    assert chosen == [(0, 1), (1, 1), (1, 2)], "in the order of the pairs, and none at the beginning of a row"
    with pytest.raises(ValueError, match="classify.bigrams=4: only 3 pairs"):
        pairs.most_frequent(4)


def test_the_same_texts_without_order():
    texts = np.array([[0, 1, 1, 1], [1, 1, 2, 1]])
    tokens = pair_counts(texts, np.zeros(2, int), 3).tokens
    assert tokens.count_MP.toarray().tolist() == [[1, 3, 0], [0, 3, 1]] and set(tokens.first_P) == {3}
