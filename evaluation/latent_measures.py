"""How well texts and latents find each other again: retrieval, cosine, overlap of words, attributes.

Shape suffixes: M texts, K latent tokens, D numbers of each, A attributes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torchmetrics.functional.text import edit_distance, sacre_bleu_score

from palimpsest.common.metrics import Estimate, Share, mean, share
from palimpsest.common.randomness import hash_seed
from palimpsest.data.tokenizers import decode
from palimpsest.dataloader import TextData
from palimpsest.evaluation.centroids import unit

RANKS = (1, 10)


def partners(num_rows: int, seed: int) -> np.ndarray:
    """For each of several rows another one, at random, (M,): one cycle through all, so that nobody is its own and each
    is somebody's.

    Raises:
        ValueError: there is one row, or none.
    """
    if num_rows < 2:
        raise ValueError(f"{num_rows} text has no other whose latent it could be given; take two at least")
    order = np.random.default_rng(hash_seed(seed, num_rows)).permutation(num_rows)
    found = np.empty(num_rows, dtype=np.int64)
    found[order] = np.roll(order, -1)
    return found


def flat(latent_MKD: np.ndarray) -> np.ndarray:
    """(M, K D)."""
    return np.asarray(latent_MKD).reshape(len(latent_MKD), -1)


def cosines(found_MKD: np.ndarray, wanted_MKD: np.ndarray) -> np.ndarray:
    """(M,) of all numbers of a latent; 0 with a latent of zeros, which stands for a text that has none."""
    return (unit(flat(found_MKD)) * unit(flat(wanted_MKD))).sum(1)


def retrieval(found_MKD: np.ndarray, wanted_MKD: np.ndarray) -> dict[int, Share]:
    """k -> the share of texts whose wanted latent is among the k nearest, by cosine, of all the wanted ones to the
    latent that was found. A tie counts as the chance of winning it, so that a latent which says nothing finds at
    chance, min(k, M) / M."""
    similar_MM = unit(flat(found_MKD)) @ unit(flat(wanted_MKD)).T
    own_M1 = np.diagonal(similar_MM)[:, None]
    same_MM = np.isclose(similar_MM, own_M1, rtol=0, atol=1e-12)
    above_M, tied_M = ((similar_MM > own_M1) & ~same_MM).sum(1), same_MM.sum(1)
    n = len(similar_MM)
    return {k: share(((k - above_M) / tied_M).clip(0, 1), min(k, n) / n) for k in RANKS}


def token_f1(found: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]) -> np.ndarray:
    """(M,) harmonic mean of the shares of found tokens that are wanted and of wanted ones that are found, as multisets;
    1 where both are empty."""
    scores = []
    for a, b in zip(found, wanted, strict=True):
        common = sum((Counter(a) & Counter(b)).values())
        scores.append(2 * common / (len(a) + len(b)) if len(a) + len(b) else 1.0)
    return np.array(scores)


def bleu(found: Sequence[str], wanted: Sequence[str]) -> float:
    """Corpus BLEU in [0, 1] with the tokenisation of mteval-13a (Post, arXiv 1804.08771)."""
    return float(sacre_bleu_score(list(found), [[text] for text in wanted]))


def edits(found: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]) -> np.ndarray:
    """(M,) Levenshtein distance in tokens."""
    spelt = [["".join(chr(0x10000 + i) for i in row) for row in rows] for rows in (found, wanted)]
    return edit_distance(*spelt, reduction="none").numpy().astype(np.int64)


@dataclass(frozen=True)
class Reader:
    """The latents' own encoder, for texts that a model wrote. data: has `latents`, a tokenizer, a vocabulary."""

    data: TextData

    def content(self, ids: Sequence[int]) -> list[int]:
        """Token ids without the special ones."""
        special = self.data.tokenizer.all_special_ids
        return [int(i) for i in ids if i not in special and i != self.data.vocabulary.mask_id]

    def text(self, ids: Sequence[int]) -> str:
        """What the row spells."""
        return decode(self.data.tokenizer, ids, skip_special=True)

    def latents(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """(M, K, D), zeros for a text that the encoder has no latent for, such as one without words."""
        try:
            return self.data.latents.encode(rows)
        except ValueError:
            if len(rows) == 1:
                return np.zeros((1, *self.data.latents.shape), dtype=np.float32)
        middle = len(rows) // 2
        return np.concatenate([self.latents(rows[:middle]), self.latents(rows[middle:])])

    @cached_property
    def missing(self) -> str:
        """Why no text can be encoded; empty where they can."""
        first = [self.data.split(self.data.splits[0])[0]["input_ids"]]
        try:
            self.data.latents.encode(first)
        except ValueError as error:
            return str(error)
        return ""

    @property
    def attribute_names(self) -> tuple[str, ...]:
        """What the latents are known to say; empty for encoders that do not know."""
        encoder = self.data.latents.encoder
        return tuple(encoder.names) if hasattr(encoder, "attributes") else ()

    def attributes(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """(M, A) what texts show, -1 where that can not be read."""
        return self.data.latents.encoder.attributes([self.text(row) for row in rows])

    def attributes_of(self, latent_MKD: np.ndarray) -> np.ndarray:
        """(M, A) what latents say."""
        return self.data.latents.encoder.read(self.data.latents.restore(latent_MKD))


@dataclass(frozen=True)
class Agreement:
    """How well latents that were found (read off written texts, or drawn) are those that were wanted. mse: of
    standardised numbers. unread: share of texts that have none. attributes: share of all that are right, with its error
    over texts; by_attribute: one by one."""

    cosine: Estimate
    mse: Estimate
    retrieval: dict[int, Share]
    unread: float
    attributes: Estimate | None = None
    by_attribute: dict[str, float] | None = None


def agreement(
    found_MKD: np.ndarray, wanted_MKD: np.ndarray, attributes: tuple[tuple[str, ...], np.ndarray, np.ndarray] | None
) -> Agreement:
    """attributes: their names, those found and those wanted, (M, A) each; what can not be read is wrong."""
    unread_M = ~np.asarray(found_MKD).any((1, 2))
    square_M = ((np.asarray(found_MKD, dtype=np.float64) - wanted_MKD) ** 2).mean((1, 2))
    plain = (mean(cosines(found_MKD, wanted_MKD)), mean(square_M), retrieval(found_MKD, wanted_MKD))
    if attributes is None:
        return Agreement(*plain, float(unread_M.mean()))
    names, found_MA, wanted_MA = attributes
    right_MA = (found_MA == wanted_MA) & (wanted_MA >= 0)
    by_name = dict(zip(names, right_MA.mean(0).tolist(), strict=True))
    return Agreement(*plain, float(unread_M.mean()), mean(right_MA.mean(1)), by_name)
