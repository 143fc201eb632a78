"""Vectors of texts on disk, and the space in which a model meets them: projected if asked for, and standardised.

Shape suffixes: N rows, W numbers of an encoder's vector, C components kept of them (W without a projection), K latent
tokens, D numbers of each (K * D = C).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor, as_tensor

CHUNK = 4096  # rows read at once
_CONSTANT = 1e-6  # of the largest standard deviation: what varies less is taken to be rounding


class Store(Protocol):
    """(N, W) float32 vectors that lie on disk."""

    width: int

    def __len__(self) -> int: ...

    def __getitem__(self, rows: np.ndarray) -> np.ndarray: ...


class Mapped:
    """(N, W) float32 vectors in a .npy file, memory-mapped by each process when it first reads them."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @cached_property
    def _vectors_NW(self) -> np.ndarray:
        return np.load(self.path, mmap_mode="r")

    @property
    def width(self) -> int:
        return self._vectors_NW.shape[1]

    def __len__(self) -> int:
        return len(self._vectors_NW)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray(self._vectors_NW[rows])

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path}  # a memory map would be sent to a worker as its whole content


class Sharded:
    """(N, W) float32 vectors that lie in several .npy files, of shape (n, W) or (n, K, D) with K * D = W, which other
    rows may share. Row i is row `place[i]` of file `shard[i]`, both arrays int64 (N,)."""

    def __init__(self, paths: Sequence[Path], width: int, shard_N: np.ndarray, place_N: np.ndarray) -> None:
        self.paths, self.width, self.shard_N, self.place_N = tuple(paths), width, shard_N, place_N
        self._open: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.place_N)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        shard_n, place_n = self.shard_N[rows], self.place_N[rows]
        out_nW = np.empty((len(shard_n), self.width), dtype=np.float32)
        for shard in np.unique(shard_n):
            of_it = shard_n == shard
            out_nW[of_it] = self._vectors(int(shard))[place_n[of_it]].reshape(-1, self.width)
        return out_nW

    def _vectors(self, shard: int) -> np.ndarray:
        if shard not in self._open:
            self._open[shard] = np.load(self.paths[shard], mmap_mode="r")
        return self._open[shard]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": {}}


def chunks(store: Store) -> Iterator[np.ndarray]:
    """All vectors in their order, some at a time, float64."""
    for start in range(0, len(store), CHUNK):
        yield store[np.arange(start, min(start + CHUNK, len(store)))].astype(np.float64)


def faults(vectors_NW: np.ndarray) -> dict[int, str]:
    """What is wrong with which rows: numbers that are not finite, and vectors of zeros, which are what a failure leaves
    behind and no text's meaning."""
    finite_N = np.isfinite(vectors_NW).all(1)
    zero_N = ~vectors_NW.any(1)
    found = {int(row): "its vector is not finite" for row in np.flatnonzero(~finite_N)}
    return found | {int(row): "its vector is all zeros" for row in np.flatnonzero(zero_N)}


@dataclass(frozen=True, eq=False)
class Space:
    """What training sees of an encoder's vectors: their projection onto principal components if there is one, with the
    mean and the scale of the train split taken out. All float64.

    mean_KD, std_KD: of the (projected) vectors of the train split. center_W, axes_WC: the projection, None without.
    """

    mean_KD: np.ndarray
    std_KD: np.ndarray
    center_W: np.ndarray | None = None
    axes_WC: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(K, D)."""
        return self.mean_KD.shape

    def standardise(self, vectors_NW: np.ndarray) -> np.ndarray:
        """(N, K, D) float32 with mean 0 and standard deviation 1 over the train split."""
        projected_NC = self._projected(vectors_NW.astype(np.float64))
        return ((projected_NC.reshape(-1, *self.shape) - self.mean_KD) / self.std_KD).astype(np.float32)

    def restore(self, latent: np.ndarray | Tensor) -> np.ndarray | Tensor:
        """(..., K, D) standardised -> the same with the train split's mean and scale, as the encoder (and the
        projection, where there is one) gave it; arrays as arrays, tensors as tensors on their device."""
        if isinstance(latent, Tensor):
            mean, std = (as_tensor(x, dtype=latent.dtype, device=latent.device) for x in (self.mean_KD, self.std_KD))
            return latent * std + mean
        return (latent * self.std_KD + self.mean_KD).astype(np.float32)

    def arrays(self) -> dict[str, np.ndarray]:
        """For a file; `from_arrays` reads them."""
        return {name: value for name, value in self.__dict__.items() if value is not None}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Space:
        """What `arrays` gave, among other arrays or alone."""
        return cls(**{name: arrays[name] for name in cls.__dataclass_fields__ if name in arrays})

    def _projected(self, vectors_NW: np.ndarray) -> np.ndarray:
        return vectors_NW if self.axes_WC is None else (vectors_NW - self.center_W) @ self.axes_WC


def fit_space(train: Store, dim: int | None, tokens: int, origin: str) -> Space:
    """The space of these vectors of the train split: its `dim` principal components (None: all numbers as they are), in
    `tokens` equal parts.

    Raises:
        ValueError: the numbers do not suffice, do not divide into the parts, or some do not vary.
    """
    width = dim or train.width
    for key, value in (("dim", dim), ("tokens", tokens)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"latents.{key}={value} must be a whole number, at least 1")
    if width > train.width or (dim and len(train) <= dim):
        have = f"{train.width} numbers" if width > train.width else f"{len(train)} texts of train"
        raise ValueError(f"latents.dim={dim} is more than {have} can give ({origin}); lower it")
    if width % tokens:
        raise ValueError(f"latents.tokens={tokens} does not divide the {width} numbers of a latent; choose a divisor")
    center_W, axes_WC = _principal(train, dim) if dim and dim < train.width else (None, None)
    plain = Space(np.zeros((1, width)), np.ones((1, width)), center_W, axes_WC)
    mean_C, std_C = _moments(train, plain)
    constant_C = std_C <= _CONSTANT * std_C.max()
    if constant_C.any():
        some = ", ".join(map(str, np.flatnonzero(constant_C)[:5]))
        raise ValueError(f"{origin}: {int(constant_C.sum())} of the {width} numbers of a latent ({some}, ...) are the "
                         f"same for all texts of train, so that they have no scale; set latents.dim to "
                         f"{int((~constant_C).sum())} or less")  # fmt: skip
    return Space(mean_C.reshape(tokens, -1), std_C.reshape(tokens, -1), center_W, axes_WC)


def moments(train: Store) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each number, (W,) float64 each."""
    return _moments(train, Space(np.zeros((1, train.width)), np.ones((1, train.width))))


def _moments(train: Store, plain: Space) -> tuple[np.ndarray, np.ndarray]:
    """In two passes: the difference of two large sums would lose the digits of a small spread."""
    mean_C = sum(plain._projected(x_NW).sum(0) for x_NW in chunks(train)) / len(train)
    squares_C = sum(np.square(plain._projected(x_NW) - mean_C).sum(0) for x_NW in chunks(train))
    return mean_C, np.sqrt(squares_C / len(train))


def _principal(train: Store, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean (W,) and the `dim` axes of largest variance (W, C), each with its largest number positive, so that they are
    the same wherever they are computed."""
    center_W = sum(x_NW.sum(0) for x_NW in chunks(train)) / len(train)
    covariance_WW = sum((x_NW - center_W).T @ (x_NW - center_W) for x_NW in chunks(train)) / len(train)
    axes_WC = np.linalg.eigh(covariance_WW)[1][:, ::-1][:, :dim]
    signs_C = np.sign(axes_WC[np.abs(axes_WC).argmax(0), np.arange(dim)])
    return center_W, axes_WC * signs_C
