"""Stopping early costs little log loss under exact models, and less than equally many draws for every text."""

from __future__ import annotations

from palimpsest.benchmarks.exact_classification import compared
from palimpsest.corpora.reviews import ReviewGrammar


def test_stopping_early_is_better_than_the_same_number_of_draws_and_near_all_draws(monkeypatch):
    monkeypatch.setattr("palimpsest.benchmarks.exact_classification.CONFIDENCES", (0.9,))
    found = {name: values_M.mean() for name, values_M in compared(ReviewGrammar(), 60, 3)[0.9].items()}
    assert found["draws"] < 24
    assert found["minus the same number of draws"] < 0.0
    assert found["minus all draws"] < 0.02
    assert abs(found["stopped early"] - found["informed"]) < 0.01
    assert found["same prediction as the exact posterior"] >= found["same prediction, the same number of draws"]
