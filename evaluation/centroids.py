"""Geometry of the latents of a class: centroids, nearest neighbours, spherical interpolation.

Shape suffixes: M, N texts, C classes, D numbers of a latent (all of its tokens in one row).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.special import softmax


@dataclass(frozen=True)
class Centroids:
    """Means of the latents of each class, float64."""

    mean_CD: np.ndarray
    variance: float  # within the classes, per number
    norm: float  # mean length of a latent

    @property
    def rescaled_CD(self) -> np.ndarray:
        """Centroids rescaled to the mean length of a latent; a mean is shorter than its vectors."""
        length_C1 = np.linalg.norm(self.mean_CD, axis=1, keepdims=True)
        return self.mean_CD * self.norm / np.where(length_C1 > 0, length_C1, 1.0)

    def posterior(self, latent_MD: np.ndarray, log_prior_C: np.ndarray) -> np.ndarray:
        """Return p(class | latent), (M, C), under normal distributions around the centroids of common variance."""
        square_MC = ((latent_MD[:, None, :].astype(np.float64) - self.mean_CD) ** 2).sum(-1)
        return softmax(log_prior_C - square_MC / (2 * max(self.variance, np.finfo(float).tiny)), axis=1)


def fit_centroids(chunks: Iterable[tuple[np.ndarray, np.ndarray]], num_classes: int) -> Centroids:
    """Fit centroids to labelled latents that come in chunks ((M, D), (M,)).

    Raises ValueError if a class has no latents.
    """
    count_C = np.zeros(num_classes)
    sum_CD = squares = lengths = 0.0
    for latent_MD, label_M in chunks:
        latent_MD, one_hot_MC = latent_MD.astype(np.float64), np.eye(num_classes)[label_M]
        count_C, sum_CD = count_C + one_hot_MC.sum(0), sum_CD + one_hot_MC.T @ latent_MD
        squares, lengths = squares + (latent_MD**2).sum(), lengths + np.linalg.norm(latent_MD, axis=1).sum()
    if not (count_C > 0).all():
        raise ValueError(f"no training text of class {np.flatnonzero(count_C == 0).tolist()}, so it has no centroid")
    mean_CD = sum_CD / count_C[:, None]
    within = squares - (count_C[:, None] * mean_CD**2).sum()
    return Centroids(mean_CD, float(within / count_C.sum() / mean_CD.shape[1]), float(lengths / count_C.sum()))


def nearest_of_class(
    chunks: Iterable[tuple[np.ndarray, np.ndarray]], latent_MD: np.ndarray, wanted_M: np.ndarray
) -> np.ndarray:
    """Return for each latent the nearest by cosine among those of its wanted class in labelled chunks, (M, D). Raises
    ValueError for a class without any."""
    found_MD = np.zeros_like(latent_MD)
    best_M = np.full(len(latent_MD), -np.inf)
    for latent_ND, label_N in chunks:
        cosine_MN = unit(latent_MD) @ unit(latent_ND).T
        cosine_MN[wanted_M[:, None] != label_N] = -np.inf
        nearer_M = cosine_MN.max(1) > best_M
        found_MD[nearer_M] = latent_ND[cosine_MN.argmax(1)[nearer_M]]
        best_M = np.maximum(best_M, cosine_MN.max(1))
    if np.isneginf(best_M).any():
        absent = sorted(set(wanted_M[np.isneginf(best_M)].tolist()))
        raise ValueError(f"there is no training text of class {', '.join(map(str, absent))} to edit towards")
    return found_MD


def slerp(from_MD: np.ndarray, to_MD: np.ndarray, share: float) -> np.ndarray:
    """Interpolate along the great circle, lengths linearly, (M, D); (anti)parallel vectors on a straight line."""
    cosine_M1 = (unit(from_MD) * unit(to_MD)).sum(-1, keepdims=True).clip(-1, 1)
    angle_M1, sine_M1 = np.arccos(cosine_M1), np.sqrt(1 - cosine_M1**2)
    safe_M1 = np.where(sine_M1 > 1e-6, sine_M1, 1.0)
    first_M1 = np.where(sine_M1 > 1e-6, np.sin((1 - share) * angle_M1) / safe_M1, 1 - share)
    second_M1 = np.where(sine_M1 > 1e-6, np.sin(share * angle_M1) / safe_M1, share)
    lengths = (np.linalg.norm(x, axis=-1, keepdims=True) for x in (from_MD, to_MD))
    length_M1 = sum(w * x for w, x in zip((1 - share, share), lengths, strict=True))
    return length_M1 * (first_M1 * unit(from_MD) + second_M1 * unit(to_MD))


def unit(latent_MD: np.ndarray) -> np.ndarray:
    """Return vectors scaled to length 1, float64; zero vectors stay."""
    latent_MD = latent_MD.astype(np.float64)
    length_M1 = np.linalg.norm(latent_MD, axis=-1, keepdims=True)
    return latent_MD / np.where(length_M1 > 0, length_M1, 1.0)
