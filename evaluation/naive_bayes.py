"""Naive Bayes on the uni- and bigrams of token ids.

Shape suffixes: M texts, C classes, N tokens of all texts in one row, V vocabulary, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix, hstack
from sklearn.naive_bayes import MultinomialNB


def naive_bayes(
    ids: Sequence[np.ndarray], label_M: np.ndarray, vocab_size: int
) -> Callable[[Sequence[np.ndarray]], np.ndarray]:
    """Return the classifier that training texts give: token ids of texts -> p(class | text), (M, C).

    ids: token ids of each training text, without padding. label_M: their classes.
    """
    grams = NGrams.seen_in(ids, vocab_size)
    model = MultinomialNB().fit(grams.counts(ids), label_M)
    return lambda ids: model.predict_proba(grams.counts(ids))


@dataclass(frozen=True)
class NGrams:
    """Columns of uni- and bigram counts: 0 .. V-1 are the tokens, the rest the bigrams of the training texts.

    bigrams: a * V + b for tokens a, b that stand side by side in a training text, sorted.
    """

    vocab_size: int
    bigrams: np.ndarray

    @classmethod
    def seen_in(cls, ids: Sequence[np.ndarray], vocab_size: int) -> NGrams:
        """Return the columns for training texts."""
        return cls(vocab_size, np.unique(_bigrams(ids, vocab_size)[1]))

    def counts(self, ids: Sequence[np.ndarray]) -> csr_matrix:
        """Return uni- and bigram counts (M, F)."""
        text_N, bigram_N = _bigrams(ids, self.vocab_size)
        column_N = np.searchsorted(self.bigrams, bigram_N)
        column_N[column_N == len(self.bigrams)] = 0
        seen_N = self.bigrams[column_N] == bigram_N if len(self.bigrams) else np.zeros(len(bigram_N), dtype=bool)
        bigrams_MF = _counted(text_N[seen_N], column_N[seen_N], len(ids), len(self.bigrams))
        return hstack([unigram_counts(ids, self.vocab_size), bigrams_MF], format="csr")


def _in_one_row(ids: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    text_N = np.repeat(np.arange(len(ids)), [len(row) for row in ids])
    return text_N, np.concatenate([np.asarray(row, dtype=np.int64) for row in ids])


def _bigrams(ids: Sequence[np.ndarray], vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The text and the number a * V + b of every pair of adjacent tokens; none reaches into the next text."""
    text_N, token_N = _in_one_row(ids)
    inside_N = text_N[:-1] == text_N[1:]
    return text_N[:-1][inside_N], (token_N[:-1] * vocab_size + token_N[1:])[inside_N]


def unigram_counts(ids: Sequence[np.ndarray], vocab_size: int) -> csr_matrix:
    """Return how often each text has each token, (M, V)."""
    text_N, token_N = _in_one_row(ids)
    if token_N.size and not 0 <= token_N.min() <= token_N.max() < vocab_size:
        raise ValueError(f"a token id lies outside 0..{vocab_size - 1}, the vocabulary")
    return _counted(text_N, token_N, len(ids), vocab_size)


def _counted(text_N: np.ndarray, column_N: np.ndarray, num_texts: int, num_columns: int) -> csr_matrix:
    return csr_matrix((np.ones(len(text_N)), (text_N, column_N)), shape=(num_texts, num_columns))  # sums duplicates
