"""Few labels and wrong labels: a choice of training texts, and other labels for some of them.

The texts of each class have a fixed random order, which depends on their numbers alone. All models, baselines and seeds
therefore see the same texts and the same wrong labels.

Shape suffixes: M texts.
"""

import math
from collections.abc import Sequence

import datasets
import numpy as np
import pyarrow as pa
import torch

from palimpsest.common.randomness import KeyedNoise
from palimpsest.data.rows import from_table, take_rows, to_table

_ROUNDING = 1e-9  # so that 0.29 of 100 texts are 29


def first_of_each_class(
    rows: datasets.Dataset, number: int | None, label_names: Sequence[str] | None
) -> datasets.Dataset:
    """Return the first `number` texts of each class in its random order; None returns all.

    A smaller choice is part of every larger one. Raises ValueError if the texts have no labels, or a class has fewer
    texts.
    """
    if number is None:
        return rows
    _check_labels(rows, f"data.texts_per_class={number}", "data.texts_per_class=null", label_names)
    label_M = np.asarray(rows["label"][:])
    for label, name in enumerate(label_names):
        found = np.count_nonzero(label_M == label)
        if found < number:
            raise ValueError(
                f"data.texts_per_class={number}: the train split has {found} texts of class {label} ({name}); lower it"
            )
    return take_rows(rows, np.flatnonzero(_place_in_class(rows) < number))


def with_wrong_labels(rows: datasets.Dataset, share: float, label_names: Sequence[str] | None) -> datasets.Dataset:
    """Return the texts with a share of the labels replaced by another class, drawn uniformly.

    Of the first n texts of each class exactly floor(share * n) have a wrong label, for every n, so a class keeps one
    text at least. A text has the same label in every choice of `first_of_each_class`. Raises ValueError if the texts
    have no labels, or all one class, or if no label would be wrong.
    """
    if not share:
        return rows
    _check_labels(rows, f"data.label_noise={share}", "data.label_noise=0", label_names)
    num_classes = len(label_names)
    if num_classes < 2:
        raise ValueError(f"data.label_noise={share}: there is only one class; set data.label_noise=0")
    place_M, label_M = _place_in_class(rows), np.asarray(rows["label"][:])
    wrong_M = np.floor(share * (place_M + 1) + _ROUNDING) > np.floor(share * place_M + _ROUNDING)
    if not wrong_M.any():
        raise ValueError(
            f"data.label_noise={share}: no class has the {math.ceil(1 / share - _ROUNDING)} texts of which one label "
            "is wrong; raise it, or use more texts per class"
        )
    step_M = 1 + np.floor(_uniform(rows, draw=-10) * (num_classes - 1)).astype(np.int64)
    noisy_M = np.where(wrong_M, (label_M + step_M) % num_classes, label_M)
    table = to_table(rows)
    return from_table(table.set_column(table.column_names.index("label"), "label", pa.array(noisy_M, pa.int64())))


def _place_in_class(rows: datasets.Dataset) -> np.ndarray:
    """Return the place of each text in the order of its class, (M,)."""
    label_M = np.asarray(rows["label"][:])
    order_M = np.lexsort((_uniform(rows, draw=-9), label_M))
    _, first, number = np.unique(label_M[order_M], return_index=True, return_counts=True)
    place_M = np.empty(len(label_M), dtype=np.int64)
    place_M[order_M] = np.arange(len(label_M)) - np.repeat(first, number)
    return place_M


def _uniform(rows: datasets.Dataset, draw: int) -> np.ndarray:
    return KeyedNoise(0, torch.from_numpy(np.array(rows["text_id"][:], dtype=np.int64)), draw=draw).uniform().numpy()


def _check_labels(rows: datasets.Dataset, setting: str, remedy: str, label_names: Sequence[str] | None) -> None:
    if label_names is None or "label" not in rows.column_names:
        raise ValueError(f"{setting}: these texts have no labels; set {remedy}")
