"""latents=lsa: latent semantic analysis, the offline encoder. TF-IDF of token ids, projected onto the directions of
largest weight that the train split has (Deerwester et al., JASIS 1990).

Shape suffixes: N rows, V vocabulary, D numbers of a vector.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.sparse import csr_matrix, vstack
from sklearn.utils.extmath import randomized_svd

from palimpsest.common.values import AtLeastOne
from palimpsest.data.passages import PackedTexts, Passages
from palimpsest.data.tokenizers import Vocabulary

_CODE_VERSION = 1  # raise it whenever a change below gives other vectors
_RANK = 1e-6  # of the largest singular value: what lies below is rounding


class LSA:
    """Token ids -> (N, D). A token that a text has n times weighs (1 + log n) idf, idf = 1 + log((1 + N) / (1 + texts
    that have it)); a text's weights have norm 1. Special tokens count for nothing.

    dim: D. tokens: equal parts in which a vector is handed on. fit_rows: of so many rows of the train split, a random
    choice that is always the same, idf and directions are taken; all of its rows where it has no more.
    """

    fits, informed = True, False

    def __init__(self, dim: AtLeastOne = 64, tokens: AtLeastOne = 1, fit_rows: AtLeastOne = 100_000) -> None:
        self.width = dim
        self.dim = None
        self.tokens = tokens
        self.fit_rows = fit_rows
        self._idf_V: np.ndarray | None = None
        self._axes_VD: np.ndarray | None = None

    @property
    def identity(self) -> dict[str, object]:
        """What its vectors hang on, beside the texts that it was fitted on."""
        return {"encoder": "lsa", "code": _CODE_VERSION, "dim": self.width, "fit_rows": self.fit_rows}

    @property
    def metadata(self) -> dict[str, object]:
        """For reports and files."""
        return {"encoder": "lsa", "pooling": "tf-idf", "settings": {"dim": self.width, "fit_rows": self.fit_rows}}

    def check(self, vocabulary: Vocabulary, length: int) -> None:
        """Any vocabulary and any length will do."""
        self._size = vocabulary.size

    def fit(self, train: PackedTexts) -> None:
        """Take idf and directions from the train split.

        Raises:
            ValueError: its texts do not point in so many directions.
        """
        chosen = np.arange(len(train))
        if len(train) > self.fit_rows:
            chosen = np.sort(np.random.default_rng(0).permutation(len(train))[: self.fit_rows])
        counts_NV = vstack([self._log_counts(train[part]) for part in np.array_split(chosen, -(-len(chosen) // 1024))])
        having_V = np.bincount(counts_NV.indices, minlength=self._size)
        self._idf_V = 1 + np.log((1 + len(chosen)) / (1 + having_V))
        most = min(counts_NV.shape) - 1
        if self.width <= most:
            _, weight_D, axes_DV = randomized_svd(self._weighted(counts_NV), self.width, n_iter=7, random_state=0)
            most = int((weight_D > _RANK * weight_D[0]).sum())
        if self.width > most:
            raise ValueError(f"latents.dim={self.width}: the {len(chosen)} texts of train have at most {max(most, 0)} "
                             f"directions; lower it, or give more texts")  # fmt: skip
        # Of tokens that train does not have nothing is known; the solver leaves rounding there.
        self._axes_VD = np.where(having_V[:, None] > 0, axes_DV.T, 0).astype(np.float32)

    def arrays(self) -> dict[str, np.ndarray]:
        """What was fitted: idf (V,) and components (V, D)."""
        return {"idf": self._idf_V, "components": self._axes_VD}

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take over what `arrays` gave."""
        self._idf_V, self._axes_VD = arrays["idf"], arrays["components"]

    def encode(self, passages: Passages) -> np.ndarray:
        """(N, D) float32."""
        return (self._weighted(self._log_counts(passages)) @ self._axes_VD).astype(np.float32)

    def _log_counts(self, passages: Passages) -> csr_matrix:
        rows = passages.content
        ends_N = np.cumsum([0, *map(len, rows)])
        ids = np.concatenate([*rows, np.zeros(0, dtype=np.int32)])
        counts_NV = csr_matrix((np.ones(len(ids)), ids, ends_N), shape=(len(rows), self._size))
        counts_NV.sum_duplicates()
        counts_NV.data = 1 + np.log(counts_NV.data)
        return counts_NV

    def _weighted(self, counts_NV: csr_matrix) -> csr_matrix:
        weighted_NV = counts_NV.copy()
        weighted_NV.data = counts_NV.data * self._idf_V[counts_NV.indices]
        row_of = np.repeat(np.arange(counts_NV.shape[0]), np.diff(counts_NV.indptr))
        norm_N = np.sqrt(np.bincount(row_of, np.square(weighted_NV.data), minlength=counts_NV.shape[0]))
        weighted_NV.data /= norm_N[row_of]
        return weighted_NV
