"""Naive Bayes on the uni- and bigrams of token ids.

Shape suffixes: M texts, C classes, N tokens of all texts in one row, V vocabulary, F features.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike
from scipy.sparse import csr_matrix, hstack
from sklearn.naive_bayes import MultinomialNB


def naive_bayes(
    ids: Sequence[ArrayLike], label_M: np.ndarray, vocab_size: int
) -> Callable[[Sequence[ArrayLike]], np.ndarray]:
    """Train naive Bayes on token ids without padding; return the classifier: token ids -> p(class | text), (M, C)."""
    grams = NGrams.seen_in(ids, vocab_size)
    model = MultinomialNB().fit(grams.counts(ids), label_M)
    return lambda ids: model.predict_proba(grams.counts(ids))


@dataclass(frozen=True)
class NGrams:
    """Columns of uni- and bigram counts: 0 .. V-1 are the tokens, the others are the bigrams of the training texts."""

    vocab_size: int
    bigrams: np.ndarray  # a * V + b for adjacent tokens a, b of training texts, sorted

    @classmethod
    def seen_in(cls, ids: Sequence[ArrayLike], vocab_size: int) -> Self:
        """Return the columns for training texts."""
        return cls(vocab_size, np.unique(_bigrams(ids, vocab_size)[1]))

    def counts(self, ids: Sequence[ArrayLike]) -> csr_matrix:
        """Return uni- and bigram counts (M, F)."""
        text_N, bigram_N = _bigrams(ids, self.vocab_size)
        column_N = np.searchsorted(self.bigrams, bigram_N)
        column_N[column_N == len(self.bigrams)] = 0
        seen_N = self.bigrams[column_N] == bigram_N if len(self.bigrams) else np.zeros(len(bigram_N), dtype=bool)
        bigrams_MF = _count_matrix(text_N[seen_N], column_N[seen_N], len(ids), len(self.bigrams))
        return hstack([unigram_counts(ids, self.vocab_size), bigrams_MF], format="csr")


def _concatenated(ids: Sequence[ArrayLike]) -> tuple[np.ndarray, np.ndarray]:
    text_N = np.repeat(np.arange(len(ids)), [len(row) for row in ids])
    return text_N, np.concatenate([np.asarray(row, dtype=np.int64) for row in ids])


def _bigrams(ids: Sequence[ArrayLike], vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the text and the number a * V + b of each pair of adjacent tokens of a text."""
    text_N, token_N = _concatenated(ids)
    inside_N = text_N[:-1] == text_N[1:]
    return text_N[:-1][inside_N], (token_N[:-1] * vocab_size + token_N[1:])[inside_N]


def unigram_counts(ids: Sequence[ArrayLike], vocab_size: int) -> csr_matrix:
    """Return how often each text has each token, (M, V)."""
    text_N, token_N = _concatenated(ids)
    if token_N.size and not 0 <= token_N.min() <= token_N.max() < vocab_size:
        raise ValueError(f"a token id lies outside 0..{vocab_size - 1}, the vocabulary")
    return _count_matrix(text_N, token_N, len(ids), vocab_size)


def _count_matrix(text_N: np.ndarray, column_N: np.ndarray, num_texts: int, num_columns: int) -> csr_matrix:
    return csr_matrix((np.ones(len(text_N)), (text_N, column_N)), shape=(num_texts, num_columns))  # sums duplicates
