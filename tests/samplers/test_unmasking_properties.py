"""Iterative unmasking whatever the rows, the budget and the decoder."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("hypothesis", reason="needs hypothesis: pip install hypothesis")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from palimpsest.samplers.unmasking import ORDERS, REMASKS, SCHEDULES, Unmasking  # noqa: E402
from tests.helpers.decoders import CHOICES, Toy, Watched, assert_sound, unmask


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_any_rows_any_budget(data):
    pick = lambda *options: data.draw(st.sampled_from(options))  # noqa: E731
    toy, mask, length, steps = Toy(2, 5), 2, 5, data.draw(st.integers(1, 9))
    token = st.sampled_from([0, 1, mask, mask])
    x = torch.tensor(data.draw(st.lists(st.lists(token, min_size=length, max_size=length), min_size=1, max_size=4)))
    remask, threshold = pick(*REMASKS), pick(None, 0.6, 0.9)
    threshold = None if remask == "remdm" else threshold
    orders = ORDERS if threshold is None and remask != "low_confidence" else ("confidence", "margin")
    schedules = SCHEDULES if threshold is None else ("linear",)
    how = Unmasking(pick(*schedules), pick(*orders), threshold, remask, pick(0.1, 1.0))
    seed, choice, frames, untouched = data.draw(st.integers(0, 99)), pick(*CHOICES), Watched(), x.clone()
    out = unmask(toy, x, how, steps, seed=seed, choice=choice, watch=frames)
    assert torch.equal(x, untouched)
    assert_sound(toy, x, out, frames, steps)
    for row in range(len(x)):
        alone = unmask(toy, x[row : row + 1], how, steps, first=row, seed=seed, choice=choice)
        for part in ("ids_BL", "step_BL", "confidence_BL", "evaluations_B"):
            assert torch.equal(getattr(alone, part)[0], getattr(out, part)[row]), f"{part} of a row alone"
