"""Rows of recorded denoising histories."""

import numpy as np

from palimpsest.report.history import RowHistory


def ids_at(history: RowHistory, step: int) -> list[int]:
    """The row after `step`."""
    length = max((int(change.places_N.max()) + 1 for change in history.changes), default=0)
    ids_L = np.full(length, history._blank_id)
    for change in history.changes:
        if change.step <= step:
            ids_L[change.places_N] = change.ids_N
    return ids_L.tolist()
