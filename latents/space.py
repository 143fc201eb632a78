"""Vectors of texts on disk, and the space of latents that a model sees: vectors, optionally projected, and
standardised.

Shape suffixes: N rows, W numbers of an encoder's vector, C of them that are kept, or its principal components, K latent
tokens, D numbers of each (K * D = C).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import Tensor, as_tensor

log = logging.getLogger(__name__)

CHUNK = 4096  # rows read at once
_CONSTANT = 1e-6  # share of the largest standard deviation below which a variation is rounding


class Mapped:
    """(N, W) float32 vectors in a .npy file, memory-mapped by each process at its first read."""

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
        return {"path": self.path}  # pickling a memory map would send all of its content to a worker


class Sharded:
    """(N, W) float32 vectors in several .npy files of shape (n, W) or (n, K, D) with K * D = W. Row i is row `place[i]`
    of file `shard[i]`, both arrays int64 (N,)."""

    def __init__(self, paths: Sequence[Path], width: int, shard_N: np.ndarray, place_N: np.ndarray) -> None:
        self.paths, self.width = tuple(paths), width
        self.shard_N, self.place_N = shard_N, place_N
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


Store = Mapped | Sharded


def chunks(store: Store) -> Iterator[np.ndarray]:
    """Yield all vectors in order, CHUNK at a time, in float64."""
    for start in range(0, len(store), CHUNK):
        yield store[np.arange(start, min(start + CHUNK, len(store)))].astype(np.float64)


def faults(vectors_NW: np.ndarray) -> dict[int, str]:
    """Return the rows without a valid vector and what is wrong: numbers that are not finite, or only zeros, which come
    from a failure of the encoder."""
    found = {int(row): "its vector is not finite" for row in np.flatnonzero(~np.isfinite(vectors_NW).all(1))}
    return found | {int(row): "its vector is all zeros" for row in np.flatnonzero(~vectors_NW.any(1))}


@dataclass(frozen=True, eq=False)
class Space:
    """The map from an encoder's vectors to latents: the numbers that vary, or principal components, standardised by the
    mean and scale of the train split. All arrays are float64."""

    mean_KD: np.ndarray  # of the kept numbers over the train split
    std_KD: np.ndarray
    center_W: np.ndarray  # mean of the vectors themselves
    axes_WC: np.ndarray | None = None  # principal axes of the vectors, or None
    kept_C: np.ndarray | None = None  # without axes: the numbers that vary

    @property
    def shape(self) -> tuple[int, int]:
        """(K, D)."""
        return self.mean_KD.shape

    def standardise(self, vectors_NW: np.ndarray) -> np.ndarray:
        """Return latents (N, K, D), float32, with mean 0 and standard deviation 1 over the train split."""
        projected_NC = self._projected(vectors_NW.astype(np.float64))
        return ((projected_NC.reshape(-1, *self.shape) - self.mean_KD) / self.std_KD).astype(np.float32)

    def restore(self, latent: np.ndarray | Tensor) -> np.ndarray | Tensor:
        """Return standardised latents (..., K, D) with the mean and scale of the train split put back; arrays as
        arrays, tensors as tensors on their device."""
        if isinstance(latent, Tensor):
            mean, std = (as_tensor(x, dtype=latent.dtype, device=latent.device) for x in (self.mean_KD, self.std_KD))
            return latent * std + mean
        return (latent * self.std_KD + self.mean_KD).astype(np.float32)

    def vectors(self, latent_NKD: np.ndarray) -> np.ndarray:
        """Return the encoder's vectors (N, W), float32, of latents. Numbers or directions that were left out are at
        their mean."""
        numbers_NC = (latent_NKD * self.std_KD + self.mean_KD).reshape(len(latent_NKD), -1)
        if self.axes_WC is not None:
            return (numbers_NC @ self.axes_WC.T + self.center_W).astype(np.float32)
        out_NW = np.tile(self.center_W, (len(latent_NKD), 1))
        out_NW[:, self.kept_C] = numbers_NC
        return out_NW.astype(np.float32)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays for a file; `from_arrays` reads them."""
        return {name: value for name, value in self.__dict__.items() if value is not None}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Space:
        """Build the space from the result of `arrays`, which may contain other arrays too."""
        return cls(**{name: arrays[name] for name in cls.__dataclass_fields__ if name in arrays})

    def _projected(self, vectors_NW: np.ndarray) -> np.ndarray:
        return vectors_NW[:, self.kept_C] if self.axes_WC is None else (vectors_NW - self.center_W) @ self.axes_WC


def fit_space(train: Store, dim: int | None, tokens: int, origin: str) -> Space:
    """Fit the space to the vectors of the train split: the `dim` principal components (None: all numbers that vary), in
    `tokens` equal parts. Raises ValueError if there are too few numbers, they do not divide into the parts, or some
    components do not vary."""
    if dim and dim > min(train.width, len(train) - 1):
        raise ValueError(
            f"latents.dim={dim} is more than {len(train)} vectors of {train.width} numbers give ({origin}); lower it"
        )
    center_W, spread_W = moments(train)
    varies_W = spread_W > _CONSTANT * spread_W.max()
    if dim is None:
        if not varies_W.all():
            constant = int((~varies_W).sum())
            log.warning(
                "%s: %d of %d numbers are the same for all of them, and are left out", origin, constant, train.width
            )
        if tokens > 1 and (not varies_W.all() or train.width % tokens):
            raise ValueError(
                f"latents.tokens={tokens} does not divide the {int(varies_W.sum())} numbers that vary of "
                f"{train.width} ({origin}); set latents.dim to a multiple of it, or with latents=file to any number, "
                "which makes one latent token; or set latents.tokens=1"
            )
        kept_C = np.flatnonzero(varies_W)
        parts = (x_W[kept_C].reshape(tokens, -1) for x_W in (center_W, spread_W))
        return Space(*parts, center_W, kept_C=kept_C)
    if dim % tokens:
        raise ValueError(f"latents.tokens={tokens} does not divide latents.dim={dim}; choose a divisor")
    variance_C, axes_WC = _principal(train, center_W, dim)
    std_C = np.sqrt(np.clip(variance_C, 0, None))
    if (std_C <= _CONSTANT * std_C[0]).any():
        directions = int((std_C > _CONSTANT * std_C[0]).sum())
        raise ValueError(f"latents.dim={dim}: {origin} vary in {directions} directions only; lower it")
    return Space(np.zeros((tokens, dim // tokens)), std_C.reshape(tokens, -1), center_W, axes_WC)


def moments(train: Store) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of each number, (W,) float64, in two passes, since the difference of two large
    sums would lose the digits of a small spread."""
    mean_W = sum(x_NW.sum(0) for x_NW in chunks(train)) / len(train)
    squares_W = sum(np.square(x_NW - mean_W).sum(0) for x_NW in chunks(train))
    return mean_W, np.sqrt(squares_W / len(train))


def _principal(train: Store, center_W: np.ndarray, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the `dim` largest variances (C,) and their axes (W, C), each with its largest number positive, so that
    they do not depend on the machine."""
    covariance_WW = sum((x_NW - center_W).T @ (x_NW - center_W) for x_NW in chunks(train)) / len(train)
    variance_C, axes_WC = (x[..., ::-1][..., :dim] for x in np.linalg.eigh(covariance_WW))
    signs_C = np.sign(axes_WC[np.abs(axes_WC).argmax(0), np.arange(dim)])
    return variance_C, axes_WC * signs_C
