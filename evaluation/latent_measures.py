"""Agreement of texts and latents: retrieval, cosine, word overlap, attributes.

Shape suffixes: M texts, K latent tokens, D numbers of each.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
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
    """Return another row for each row, (M,): a random cycle through all rows.

    Raises ValueError for fewer than two rows.
    """
    if num_rows < 2:
        raise ValueError(f"{num_rows} text has no other text to take a latent from; take two at least")
    order = np.random.default_rng(hash_seed(seed, num_rows)).permutation(num_rows)
    found = np.empty(num_rows, dtype=np.int64)
    found[order] = np.roll(order, -1)
    return found


def flat(latent_MKD: np.ndarray) -> np.ndarray:
    """Flatten latents to (M, K D)."""
    return np.asarray(latent_MKD).reshape(len(latent_MKD), -1)


def cosines(found_MKD: np.ndarray, wanted_MKD: np.ndarray) -> np.ndarray:
    """Return the cosine of each pair of latents, (M,); 0 if one is missing (zeros)."""
    return (unit(flat(found_MKD)) * unit(flat(wanted_MKD))).sum(1)


def retrieval(found_MKD: np.ndarray, wanted_MKD: np.ndarray) -> dict[int, Share]:
    """Return, for each k in RANKS, the share of texts whose wanted latent is among the k nearest by cosine.

    Ties count as the chance of winning them, so that constant latents score at chance, min(k, M) / M.
    """
    similar_MM = unit(flat(found_MKD)) @ unit(flat(wanted_MKD)).T
    own_M1 = np.diagonal(similar_MM)[:, None]
    same_MM = np.isclose(similar_MM, own_M1, rtol=0, atol=1e-12)
    above_M, tied_M = ((similar_MM > own_M1) & ~same_MM).sum(1), same_MM.sum(1)
    n = len(similar_MM)
    return {k: share(((k - above_M) / tied_M).clip(0, 1), min(k, n) / n) for k in RANKS}


def token_f1(found: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]) -> np.ndarray:
    """Return the F1 of found against wanted tokens, as multisets, (M,); 1 if both are empty."""
    scores = []
    for a, b in zip(found, wanted, strict=True):
        common = sum((Counter(a) & Counter(b)).values())
        scores.append(2 * common / (len(a) + len(b)) if len(a) + len(b) else 1.0)
    return np.array(scores)


def bleu(found: Sequence[str], wanted: Sequence[str]) -> float:
    """Return corpus BLEU in [0, 1] with the tokenisation of mteval-13a (Post, arXiv 1804.08771)."""
    return float(sacre_bleu_score(list(found), [[text] for text in wanted]))


def edits(found: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]) -> np.ndarray:
    """Return the Levenshtein distance in tokens, (M,)."""
    spelt = [["".join(chr(0x10000 + i) for i in row) for row in rows] for rows in (found, wanted)]
    return edit_distance(*spelt, reduction="none").numpy().astype(np.int64)


@dataclass(frozen=True)
class Reader:
    """Reads generated texts with the encoder of the latents."""

    data: TextData

    def content(self, ids: Sequence[int]) -> list[int]:
        """Return the token ids without special tokens."""
        special = self.data.tokenizer.all_special_ids
        return [int(i) for i in ids if i not in special and i != self.data.vocabulary.mask_id]

    def text(self, ids: Sequence[int]) -> str:
        """Decode a row without special tokens."""
        return decode(self.data.tokenizer, ids, skip_special=True)

    def latents(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Return the latents (M, K, D), zeros for texts without one, such as texts without words."""
        try:
            return self.data.latents.encode(rows)
        except ValueError:
            if len(rows) == 1:
                return np.zeros((1, *self.data.latents.shape), dtype=np.float32)
        middle = len(rows) // 2
        return np.concatenate([self.latents(rows[:middle]), self.latents(rows[middle:])])

    @cached_property
    def missing(self) -> str:
        """Why texts cannot be encoded; empty if they can."""
        first = [self.data.split(self.data.splits[0])[0]["input_ids"]]
        try:
            self.data.latents.encode(first)
        except ValueError as error:
            return str(error)
        return ""

    def attributes(self, rows: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
        """Return the attributes of texts by name, (M,) each; -1 for unreadable ones. Few encoders have any."""
        return self._named(lambda encoder: encoder.attributes([self.text(row) for row in rows]))

    def attributes_of(self, latent_MKD: np.ndarray) -> dict[str, np.ndarray]:
        """Return the attributes in latents by name, (M,) each."""
        return self._named(lambda encoder: encoder.read(self.data.latents.restore(latent_MKD)))

    def _named(self, read: Callable[[object], np.ndarray]) -> dict[str, np.ndarray]:
        encoder = self.data.latents.encoder
        return dict(zip(encoder.names, read(encoder).T, strict=True)) if hasattr(encoder, "attributes") else {}


@dataclass(frozen=True)
class Agreement:
    """Agreement of latents (encoded from texts, or sampled) with the wanted ones."""

    cosine: Estimate
    mse: Estimate  # of standardised numbers
    retrieval: dict[int, Share]
    unread: float  # share of texts without a latent
    attributes: Estimate | None = None  # share of right attributes, with its error over texts
    by_attribute: dict[str, float] | None = None


def agreement(
    found_MKD: np.ndarray, wanted_MKD: np.ndarray, found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]
) -> Agreement:
    """Compare latents. found, wanted: their attributes by name, (M,) each; unreadable ones count as wrong."""
    unread_M = ~np.asarray(found_MKD).any((1, 2))
    square_M = ((np.asarray(found_MKD, dtype=np.float64) - wanted_MKD) ** 2).mean((1, 2))
    plain = (mean(cosines(found_MKD, wanted_MKD)), mean(square_M), retrieval(found_MKD, wanted_MKD))
    right = {name: (found[name] == wanted_M) & (wanted_M >= 0) for name, wanted_M in wanted.items()}
    if not right:
        return Agreement(*plain, float(unread_M.mean()))
    by_name = {name: float(right_M.mean()) for name, right_M in right.items()}
    return Agreement(*plain, float(unread_M.mean()), mean(np.mean(list(right.values()), axis=0)), by_name)
