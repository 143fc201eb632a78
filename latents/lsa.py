"""latents=lsa: latent semantic analysis, an encoder without downloads. TF-IDF of token ids is projected onto the
directions of largest weight in the train split (Deerwester et al., JASIS 1990).

Shape suffixes: N rows, V vocabulary, D numbers of a vector.
"""

from collections.abc import Mapping

import numpy as np
from scipy.sparse import csr_matrix, vstack
from sklearn.utils.extmath import randomized_svd

from palimpsest.common.values import AtLeastOne
from palimpsest.data.passages import PackedTexts, Passages
from palimpsest.data.tokenizers import Vocabulary
from palimpsest.latents.encoder import Encoder

_CODE_VERSION = 1  # increase it whenever a change below gives other vectors
_RANK = 1e-6  # share of the largest singular value below which one is rounding


class LSA(Encoder):
    """Token ids -> (N, D). A token that occurs n times in a text has the weight (1 + log n) idf, where idf = 1 + log((1
    + N) / (1 + texts with the token)). The weights of a text have norm 1. Special tokens have weight 0.

    Args:
        dim: D.
        tokens: equal parts into which a vector is divided.
        fit_rows: largest number of train rows, in a fixed random choice, for idf and directions.
    """

    fits = True

    def __init__(self, dim: AtLeastOne = 64, tokens: AtLeastOne = 1, fit_rows: AtLeastOne = 100_000) -> None:
        self.width, self.tokens = dim, tokens
        self.fit_rows = fit_rows
        self._idf_V: np.ndarray | None = None
        self._axes_VD: np.ndarray | None = None

    @property
    def identity(self) -> dict[str, object]:
        """Return everything that the vectors depend on, except the texts that it was fitted on."""
        return {"encoder": "lsa", "code": _CODE_VERSION, "dim": self.width, "fit_rows": self.fit_rows}

    @property
    def metadata(self) -> dict[str, object]:
        """Return the settings, for reports and files."""
        return {"encoder": "lsa", "pooling": "tf-idf", "settings": {"dim": self.width, "fit_rows": self.fit_rows}}

    def check(self, vocabulary: Vocabulary, length: int) -> None:
        """Accept any vocabulary and any length."""
        self._size = vocabulary.size

    def fit(self, train: PackedTexts) -> None:
        """Fit idf and directions on the train split. Raises ValueError if its texts have fewer directions."""
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
            raise ValueError(
                f"latents.dim={self.width}: the {len(chosen)} texts of train have at most {max(most, 0)} "
                f"directions; lower it, or give more texts"
            )
        # The solver leaves rounding errors at tokens that train does not have.
        self._axes_VD = np.where(having_V[:, None] > 0, axes_DV.T, 0).astype(np.float32)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return idf (V,) and components (V, D)."""
        return {"idf": self._idf_V, "components": self._axes_VD}

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Load the result of `arrays`."""
        self._idf_V, self._axes_VD = arrays["idf"], arrays["components"]

    def encode(self, passages: Passages) -> np.ndarray:
        """Return vectors (N, D), float32."""
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
