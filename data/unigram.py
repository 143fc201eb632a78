"""Token frequencies of the training split, and the likelihood of texts under them.

Shape suffixes: M texts of a split, V vocabulary, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import datasets
import numpy as np
import pyarrow.compute as pc
from scipy.sparse import csr_matrix


def unigram_nll(data: object, split: str, causal: bool = False) -> np.ndarray:
    """Return nats per row under the token frequencies (add-one smoothed) of the training split, (M,).

    Observed tokens are left out: the beginning for a `causal` model, else BOS and EOS too. EOS padding does not count.
    """
    context = _Context.of(data, causal)
    counts_V = 1.0 + token_counts(data, causal)[0]
    counts_V[context.ids] = 0
    nats_V = np.log(counts_V.sum()) - np.log(counts_V, where=counts_V > 0, out=np.zeros_like(counts_V))
    nats_V[context.ids] = 0.0
    rows = data.split(split)
    leading_M = context.leading(rows)
    return np.array([nats_V[np.asarray(ids)[n:]].sum() for ids, n in zip(rows["input_ids"], leading_M, strict=True)])


@dataclass(frozen=True)
class _Context:
    """The observed tokens of a row.

    Attributes:
        ids: tokens that are observed anywhere: BOS and EOS of padded rows.
        first_ids: tokens that are observed at the beginning of a row only; None: the first token always is.
        prefix: length of the observed prefix as a function of the first tokens.
    """

    ids: np.ndarray
    first_ids: np.ndarray | None
    prefix: Callable[[np.ndarray], np.ndarray]

    @classmethod
    def of(cls, data: object, causal: bool) -> _Context:
        """Return the context of a causal model, which has the first token, or of a model that uses the batches'
        `given`."""
        collate, none = data.collate, np.zeros(0, dtype=np.int64)
        if causal or data.fill:  # the end is scored; BOS may have the id of EOS, so its position decides
            return cls(none, None if causal else collate.frame_ids, collate.leading)
        return cls(collate.frame_ids, none, collate.leading)

    def leading(self, rows: datasets.Dataset) -> np.ndarray:
        """Return the number of observed tokens at the beginning of each row, (M,)."""
        first_M = first_tokens(rows)
        observed_M = np.ones_like(first_M) if self.first_ids is None else np.isin(first_M, self.first_ids)
        prefix_M = np.maximum(self.prefix(first_M), observed_M)
        if "part_ends" in rows.column_names:
            return np.maximum(np.array([ends[0] for ends in rows["part_ends"][:]]), prefix_M)
        return prefix_M


def first_tokens(rows: datasets.Dataset) -> np.ndarray:
    """Return the first token of each row, (M,)."""
    return pc.list_element(rows.select_columns("input_ids").with_format("arrow")[:]["input_ids"], 0).to_numpy()


def token_counts(data: object, causal: bool = False, by_class: bool = False) -> np.ndarray:
    """Return the count of each token in the training rows, (1, V), or `by_class` in each class, (C, V).

    Observed tokens (see `unigram_nll`) are left out. The first token of a causal model's row counts unless it is BOS or
    the row has a prompt.
    """
    rows, size = data.split("train"), data.vocabulary.size
    column = rows.select_columns("input_ids").with_format("arrow")[:]["input_ids"]
    counts_CV = np.zeros((len(data.label_names) if by_class else 1, size), dtype=np.int64)
    labels = np.asarray(rows["label"][:]) if by_class else np.zeros(len(rows), dtype=np.int64)
    context = _Context.of(data, causal)
    everything = causal and "part_ends" not in rows.column_names
    if everything:
        packing = data.packings["train"]
        leading_M = (first_tokens(rows) == data.vocabulary.bos_id) * (packing.bos or packing.chunk_special)
    else:
        leading_M = context.leading(rows)
    start = 0
    for chunk in column.chunks:  # one at a time, because the ids of a large split may not fit into memory
        here, lengths = slice(start, start + len(chunk)), chunk.value_lengths().to_numpy()
        place = np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)
        counted = place >= np.repeat(leading_M[here], lengths)
        flat = chunk.flatten().to_numpy() + size * np.repeat(labels[here], lengths)
        flat = np.bincount(flat[counted], minlength=counts_CV.size)
        counts_CV, start = counts_CV + flat.reshape(counts_CV.shape), start + len(chunk)
    counts_CV[:, context.ids] = 0
    return counts_CV


def pairs_by_text(data: object, split: str, causal: bool = False) -> tuple[np.ndarray, csr_matrix, np.ndarray]:
    """Return the pairs of adjacent tokens in the rows of texts, all windows of a text together.

    The second token of a pair is not observed (see `unigram_nll`). The first token of a row, and one after BOS, follows
    a token V.

    Returns:
        first and second token of each pair that occurs, sorted, (2, P); the count of each pair in each text, (M, P);
        the texts' labels, (M,).
    """
    context, rows = _Context.of(data, causal), data.split(split)
    size = data.vocabulary.size
    text_id_M, first_M, text_R = np.unique(rows["text_id"], return_index=True, return_inverse=True)
    texts, keys = [], []
    for ids, text, n in zip(rows["input_ids"], text_R, context.leading(rows), strict=True):
        second = np.asarray(ids, dtype=np.int64)
        first = np.concatenate([[size], second[:-1]])
        kept = (np.arange(len(second)) >= n) & ~np.isin(second, context.ids)
        first = np.where(np.isin(first, context.ids), size, first)
        keys.append((first * size + second)[kept])
        texts.append(np.full(kept.sum(), text))
    key_P, pair_N = np.unique(np.concatenate(keys), return_inverse=True)
    entries = (np.ones(len(pair_N)), (np.concatenate(texts), pair_N))
    count_MP = csr_matrix(entries, shape=(len(text_id_M), len(key_P)))
    return np.stack(np.divmod(key_P, size)), count_MP, np.asarray(rows["label"])[first_M]
