"""The interface of encoders, which make vectors of texts, with the defaults of those that have nothing to fit."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np

from palimpsest.data.passages import PackedTexts, Passages
from palimpsest.data.tokenizers import Vocabulary


class Encoder(ABC):
    """A map from rows to vectors."""

    fits = False  # it is fitted on train
    informed = False  # it reads labels and source texts
    dim: int | None = None  # number of principal components that are kept; None: all numbers
    tokens = 1  # latent tokens K, equal parts into which a vector is divided
    identity: Mapping[str, object]  # everything that its vectors depend on, except the texts that it was fitted on
    metadata: Mapping[str, object]  # the same for reports and files: encoder, pooling, settings

    def check(self, vocabulary: Vocabulary, length: int) -> None:  # noqa: B027 - some read any rows
        """Raise ValueError if it cannot read rows of such tokens. Called first."""

    def fit(self, train: PackedTexts) -> None:  # noqa: B027 - some have nothing to fit
        """Fit the encoder on the train split."""

    def arrays(self) -> dict[str, np.ndarray]:
        """Return what was fitted."""
        return {}

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:  # noqa: B027 - the same
        """Load the result of `arrays`."""

    @abstractmethod
    def encode(self, passages: Passages) -> np.ndarray:
        """Return vectors (N, W), float32. Raises ValueError if a text cannot be encoded."""
