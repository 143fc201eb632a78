"""Tests of whether latents are worth training on: text retrieval after dropping words, and a linear probe of
attributes.

Shape suffixes: N texts, K latent tokens, D numbers of each, A attributes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

WORDS_DROPPED = 0.2
LEAST_RETRIEVED, LEAST_PROBED = 0.9, 0.99


@dataclass(frozen=True)
class Retrieval:
    """Retrieval of texts by the latents of their shortened versions."""

    share: float  # of texts whose own latent is the nearest, by cosine, to that of the text with words dropped
    se: float  # standard error of `share`
    texts: int  # to choose from
    chance: float  # share of a random guess


def drop_words(text: str, share: float, rng: np.random.Generator) -> str:
    """Drop each word with probability `share`; one word is always kept."""
    words = text.split()
    kept = rng.random(len(words)) >= share
    if not kept.any():
        kept[rng.integers(len(words))] = True
    return " ".join(word for word, keep in zip(words, kept, strict=True) if keep)


def retrieval(
    latents: Callable[[Sequence[str]], np.ndarray], texts: Sequence[str], share: float = WORDS_DROPPED, seed: int = 0
) -> Retrieval:
    """Measure retrieval by `latents`, texts -> (N, K, D) standardised. Duplicate texts are removed, since nothing could
    distinguish them."""
    texts = [text for text in dict.fromkeys(texts) if text.split()]
    rng = np.random.default_rng(seed)
    whole_ND, part_ND = _unit(latents(texts)), _unit(latents([drop_words(text, share, rng) for text in texts]))
    found = (part_ND @ whole_ND.T).argmax(1) == np.arange(len(texts))
    mean = float(found.mean())
    return Retrieval(mean, float(np.sqrt(mean * (1 - mean) / len(texts))), len(texts), 1 / len(texts))


def _unit(latents_NKD: np.ndarray) -> np.ndarray:
    flat_ND = latents_NKD.reshape(len(latents_NKD), -1).astype(np.float64)
    return flat_ND / np.linalg.norm(flat_ND, axis=1, keepdims=True)


def probe(train_NKD: np.ndarray, train_NA: np.ndarray, test_NKD: np.ndarray, test_NA: np.ndarray) -> tuple[float, ...]:
    """Return the accuracy per attribute of the least-squares linear map from train latents to one-hot attributes, on
    test."""

    def design(latents_NKD: np.ndarray) -> np.ndarray:
        flat_ND = latents_NKD.reshape(len(latents_NKD), -1)
        return np.concatenate([flat_ND, np.ones((len(flat_ND), 1))], axis=1).astype(np.float64)

    accuracies = []
    for attribute in range(train_NA.shape[1]):
        values = np.unique(train_NA[:, attribute])
        one_hot = (train_NA[:, attribute, None] == values).astype(np.float64)
        map_, *_ = np.linalg.lstsq(design(train_NKD), one_hot, rcond=None)
        predicted = values[(design(test_NKD) @ map_).argmax(1)]
        accuracies.append(float((predicted == test_NA[:, attribute]).mean()))
    return tuple(accuracies)
