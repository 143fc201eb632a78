"""Ensembles: identities of the product of experts, and weights that are found."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from palimpsest.classification.baselines import Baseline
from palimpsest.classification.ensembles import best_baseline, fit_weight, log_loss, product_of_experts


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_a_product_of_equals_is_each_of_them(rng):
    posterior_MC = softmax(3 * rng.normal(size=(20, 4)), axis=1)
    np.testing.assert_allclose(product_of_experts([posterior_MC] * 3), posterior_MC)
    other_MC = softmax(rng.normal(size=(20, 4)), axis=1)
    np.testing.assert_allclose(product_of_experts([posterior_MC, other_MC], [1, 0]), posterior_MC)
    both_MC = product_of_experts([posterior_MC, other_MC])
    np.testing.assert_allclose(both_MC.sum(axis=1), 1)
    np.testing.assert_allclose(both_MC, product_of_experts([other_MC, posterior_MC]))
    expected = np.sqrt(posterior_MC * other_MC)
    np.testing.assert_allclose(both_MC, expected / expected.sum(axis=1, keepdims=True))


def test_probabilities_of_zero_are_averaged_too():
    sure, torn = np.array([[1.0, 0.0]]), np.array([[0.4, 0.6]])
    found = product_of_experts([sure, torn])
    assert np.isfinite(found).all() and found[0, 0] > 0.999
    np.testing.assert_allclose(product_of_experts([sure, sure[:, ::-1]]), [[0.5, 0.5]])


def test_a_planted_weight_is_found(rng):
    first_MC, second_MC = (softmax(2 * rng.normal(size=(20_000, 3)), axis=1) for _ in range(2))
    truth_MC = np.log(product_of_experts([first_MC, second_MC], [0.7, 0.3]))
    label_M = (truth_MC + rng.gumbel(size=truth_MC.shape)).argmax(axis=1)
    assert fit_weight(first_MC, second_MC, label_M) == pytest.approx(0.7, abs=0.04)


def test_a_method_that_knows_nothing_has_no_weight(rng):
    log_odds_MC = 2 * rng.normal(size=(5_000, 2))
    label_M = (log_softmax(log_odds_MC, axis=1) + rng.gumbel(size=(5_000, 2))).argmax(axis=1)
    good_MC, noise_MC = softmax(log_odds_MC, axis=1), softmax(5 * rng.normal(size=(5_000, 2)), axis=1)
    assert fit_weight(good_MC, noise_MC, label_M) > 0.95 and fit_weight(noise_MC, good_MC, label_M) < 0.05


def test_the_best_baseline_is_chosen_on_the_validation_texts():
    right, wrong = np.array([[0.9, 0.1]]), np.array([[0.1, 0.9]])
    found = [Baseline("a", right, wrong), Baseline("b", wrong, right)]
    assert best_baseline(found, np.array([0])).name == "b"
    assert log_loss(right, np.array([0])) == pytest.approx(-np.log(0.9))
