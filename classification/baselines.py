"""Baseline classifiers: four bag-of-words models, trained in minutes on the same split.

Shape suffixes: M texts, C classes, F features.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix, diags_array
from scipy.special import expit
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import MultinomialNB

from palimpsest.classification.measures import SMALLEST, log_loss
from palimpsest.evaluation.naive_bayes import NGrams, unigram_counts

_TFIDF_STRENGTHS = (1.0, 10.0, 100.0)
_NB_STRENGTHS = (0.1, 1.0, 10.0)
_TOLERANCE, _MAX_ITERATIONS = 1e-5, 500

Predict = Callable[[csr_matrix], np.ndarray]


@dataclass(frozen=True)
class Labelled:
    """Texts with their classes."""

    texts: Sequence[str]
    ids: Sequence[np.ndarray]  # token ids without padding
    label_M: np.ndarray  # classes 0 .. C-1


@dataclass(frozen=True)
class Baseline:
    """Predictions of a baseline."""

    name: str
    posterior_MC: np.ndarray  # p(class | text) of the test texts
    validation_MC: np.ndarray  # of the validation texts
    chosen: bool = False  # its regularisation, on the validation texts


def baselines(train: Labelled, validation: Labelled, test: Labelled, vocab_size: int) -> list[Baseline]:
    """Train every baseline on `train`, choose its regularisation on `validation`, and classify `test` and `validation`.

    Naive Bayes (add-one smoothing, training frequencies as prior) and the NB-weighted regression use the model's own
    tokens; TF-IDF uses the words of the texts.

    Raises:
        ValueError: a split has no text; a class has no training text; there is only one class; an id lies outside the
            vocabulary.
    """
    num_classes = _num_classes(train, validation, test)
    grams = NGrams.seen_in(train.ids, vocab_size)
    found = []

    def add(name: str, predict: Predict, test_MF: csr_matrix, validation_MF: csr_matrix, chosen: bool = False) -> None:
        found.append(Baseline(name, predict(test_MF), predict(validation_MF), chosen))

    unigrams = MultinomialNB().fit(unigram_counts(train.ids, vocab_size), train.label_M)
    counts = (unigram_counts(part.ids, vocab_size) for part in (test, validation))
    add("naive Bayes, unigrams", unigrams.predict_proba, *counts)
    train_MF, validation_MF, test_MF = (grams.counts(part.ids) for part in (train, validation, test))
    bigrams = MultinomialNB().fit(train_MF, train.label_M)
    add("naive Bayes, uni- and bigrams", bigrams.predict_proba, test_MF, validation_MF)
    add("TF-IDF logistic regression", *_tfidf(train, validation, test), chosen=True)
    for counts_MF in (train_MF, validation_MF, test_MF):
        counts_MF.data[:] = 1  # presence instead of counts from here on
    fits = (_nb_logistic(train_MF, train.label_M, num_classes, strength) for strength in _NB_STRENGTHS)
    best = _best(fits, validation_MF, validation.label_M)
    add("NB-weighted logistic regression", best, test_MF, validation_MF, chosen=True)
    return found


def _num_classes(train: Labelled, validation: Labelled, test: Labelled) -> int:
    for name, part in (("training", train), ("validation", validation), ("test", test)):
        if not len(part.label_M):
            raise ValueError(f"the {name} split has no text: the baselines need all three splits")
    num_classes = 1 + max(int(part.label_M.max()) for part in (train, validation, test))
    absent = np.flatnonzero(np.bincount(train.label_M, minlength=num_classes) == 0).tolist()
    if absent:
        raise ValueError(
            f"no training text of class {absent}: the baselines need some of each of {num_classes} classes"
        )
    if num_classes < 2:
        raise ValueError("all texts are of one class: there is nothing to classify")
    return num_classes


def _best(fits: Iterable[Predict], validation_MF: csr_matrix, label_M: np.ndarray) -> Predict:
    """Return the fit with the lowest log loss on the validation texts, finer than the accuracy of few texts."""
    return min(fits, key=lambda predict: log_loss(predict(validation_MF), label_M))


def _tfidf(train: Labelled, validation: Labelled, test: Labelled) -> tuple[Predict, csr_matrix, csr_matrix]:
    """Fit multinomial logistic regression to sublinear TF-IDF of word uni- and bigrams.

    Returns:
        its predictions for features, and the features of the test and of the validation texts.
    """
    # Punctuation marks are words too: "!" and ":)" tell opinions apart, and no text is left without any.
    vectorizer = TfidfVectorizer(
        ngram_range=(1, 2), sublinear_tf=True, min_df=2, token_pattern=r"\w+|[^\w\s]", dtype=np.float32
    )
    try:
        train_MF = vectorizer.fit_transform(train.texts)
    except ValueError:  # no word occurs in two texts of a tiny training set
        train_MF = vectorizer.set_params(min_df=1).fit_transform(train.texts)
    fits = (_logistic(strength).fit(train_MF, train.label_M).predict_proba for strength in _TFIDF_STRENGTHS)
    validation_MF = vectorizer.transform(validation.texts)
    return _best(fits, validation_MF, validation.label_M), vectorizer.transform(test.texts), validation_MF


def _logistic(strength: float) -> LogisticRegression:
    return LogisticRegression(C=strength, tol=_TOLERANCE, max_iter=_MAX_ITERATIONS)


def _nb_logistic(binary_MF: csr_matrix, label_M: np.ndarray, num_classes: int, strength: float) -> Predict:
    """Fit logistic regression to grams scaled by the naive Bayes log-count ratio (Wang & Manning 2012, eq. 2).

    It replaces their SVM, and `strength` their interpolation: each class against the rest, probabilities normalised.
    """
    weights, biases = [], []
    for k in [1] if num_classes == 2 else range(num_classes):
        inside_M = label_M == k
        p_F, q_F = (1 + np.asarray(binary_MF[part].sum(axis=0)).ravel() for part in (inside_M, ~inside_M))
        ratio_F = np.log(p_F / p_F.sum()) - np.log(q_F / q_F.sum())
        model = _logistic(strength).fit(binary_MF @ diags_array(ratio_F), inside_M)
        weights.append(ratio_F * model.coef_[0])
        biases.append(model.intercept_[0])
    weight_FC = np.stack(weights, axis=1)

    def predict(binary_MF: csr_matrix) -> np.ndarray:
        p_MC = expit(binary_MF @ weight_FC + np.array(biases))
        p_MC = np.concatenate([1 - p_MC, p_MC], axis=1) if num_classes == 2 else np.maximum(p_MC, SMALLEST)
        return p_MC / p_MC.sum(axis=1, keepdims=True)

    return predict
