"""latents=synthetic: vectors of the known attributes of a text, for checks with a known answer.

Shape suffixes: N rows, A attributes, W numbers of a vector: one for each value of each attribute.
"""

import hashlib
from collections.abc import Sequence
from typing import Annotated

import numpy as np

from palimpsest.common.values import NAME, BelowOne, Seed, list_of
from palimpsest.corpora.review_attributes import ATTRIBUTES, UNREAD, read_attributes
from palimpsest.data.passages import Passages
from palimpsest.latents.encoder import Encoder

_CODE_VERSION = 1  # increase it whenever a change here or in corpora/review_attributes.py gives other vectors


class Attributes(Encoder):
    """The attributes of a text of the embedded corpus (corpora/review_attributes.py) as one-hot vectors, rotated by one
    random rotation, with a little noise.

    Args:
        attributes: some of ATTRIBUTES; None: all.
        noise: standard deviation of the noise, which depends on the text and `seed`, so that a text has one vector.
        seed: also of the rotation.
    """

    informed = True

    def __init__(
        self,
        attributes: Annotated[Sequence[str], list_of(NAME, 1, "[negative,positive]")] | None = None,
        noise: BelowOne = 0.05,
        seed: Seed = 0,
    ) -> None:
        self.names = tuple(ATTRIBUTES if attributes is None else attributes)
        unknown = [name for name in self.names if name not in ATTRIBUTES]
        if unknown or len(set(self.names)) < len(self.names):
            raise ValueError(
                f"latents.attributes=[{', '.join(self.names)}] must be some of {', '.join(ATTRIBUTES)}, each once"
            )
        self.noise, self.seed = float(noise), seed
        self.sizes = tuple(len(ATTRIBUTES[name]) for name in self.names)
        self.width = sum(self.sizes)
        self._starts = np.cumsum([0, *self.sizes])
        rotation_WW, upper_WW = np.linalg.qr(np.random.default_rng(seed).standard_normal((self.width, self.width)))
        self._rotation_WW = rotation_WW * np.sign(np.diag(upper_WW))  # uniform over all rotations (Mezzadri 2007)

    @property
    def identity(self) -> dict[str, object]:
        """Return everything that the vectors depend on."""
        return {"encoder": "synthetic", "code": _CODE_VERSION, **self._settings}

    @property
    def metadata(self) -> dict[str, object]:
        """Return the settings, for reports and files."""
        return {"encoder": "synthetic", "pooling": "attributes", "settings": self._settings}

    @property
    def _settings(self) -> dict[str, object]:
        return {"attributes": list(self.names), "noise": self.noise, "seed": self.seed}

    def encode(self, passages: Passages) -> np.ndarray:
        """Return vectors (N, W), float32. Raises ValueError if the grammar cannot write a text."""
        texts = known_texts(passages)
        attributes_NA = self.attributes(texts, passages.labels)
        unread = np.flatnonzero((attributes_NA == UNREAD).any(1))
        if len(unread):
            missing = [n for n, v in zip(self.names, attributes_NA[unread[0]], strict=True) if v == UNREAD]
            raise ValueError(
                "latents=synthetic knows the texts of data=reviews only, one to a row and whole: "
                f"{texts[unread[0]]!r:.200} shows no {', '.join(missing)}; choose another latents="
            )
        noise_NW = np.stack([self._noise(text) for text in texts])
        return (self.compose(attributes_NA) + noise_NW).astype(np.float32)

    def attributes(self, texts: Sequence[str], labels: Sequence[int] | None = None) -> np.ndarray:
        """Return the chosen attributes of each text, (N, A), UNREAD where one cannot be read."""
        return read_attributes(texts, labels)[:, [list(ATTRIBUTES).index(name) for name in self.names]]

    def compose(self, attributes_NA: np.ndarray) -> np.ndarray:
        """Return the vectors (N, W) of attributes, without noise: targets for editing."""
        one_hot_NW = np.zeros((len(attributes_NA), self.width))
        np.put_along_axis(one_hot_NW, attributes_NA + self._starts[:-1], 1.0, axis=1)
        return one_hot_NW @ self._rotation_WW.T

    def read(self, vectors_NW: np.ndarray) -> np.ndarray:
        """Return the attributes (N, A) of vectors from `compose` or `encode`: the value with the largest number."""
        turned_back_NW = np.asarray(vectors_NW, dtype=np.float64).reshape(-1, self.width) @ self._rotation_WW
        parts = np.split(turned_back_NW, self._starts[1:-1], axis=1)
        return np.stack([part.argmax(1) for part in parts], axis=1)

    def _noise(self, text: str) -> np.ndarray:
        key = hashlib.blake2b(f"{self.seed}:{text}".encode("utf-8", "surrogatepass"), digest_size=16).digest()
        rng = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
        return self.noise * rng.standard_normal(self.width)


def known_texts(passages: Passages) -> list[str]:
    """Return the source texts of whole rows, whose words a tokenizer may not know, and the decoded text of
    the others."""
    sources = passages.sources or [None] * len(passages)
    return [decoded if source is None else source for source, decoded in zip(sources, passages.texts, strict=True)]
