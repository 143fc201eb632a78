"""The sequential test: its error rate is as promised, and it stops only where draws carry information."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import t as student_t

from palimpsest.classification.sequential_test import certainty, undecided

LOOKS = (4, 6, 8, 12, 16, 24, 32, 48, 64)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def run_test(true_MC, noise_MCK, confidence):
    """Draw in rounds up to the looks; return errors among the stopped texts, their number, and mean draws."""
    nats_MCK, log_prior_C = true_MC[:, :, None] + noise_MCK, np.zeros(true_MC.shape[1])
    for here, there in zip(LOOKS, LOOKS[1:], strict=False):
        stopped_M = ~undecided(nats_MCK[:, :, :here], log_prior_C, confidence)
        nats_MCK[stopped_M, :, here:there] = np.nan
    stopped_M = ~undecided(nats_MCK, log_prior_C, confidence)
    wrong_M = np.nanmean(nats_MCK, axis=2).argmin(1) != true_MC.argmin(1)
    return int(wrong_M[stopped_M].sum()), int(stopped_M.sum()), float((~np.isnan(nats_MCK[:, 0])).sum(1).mean())


@pytest.mark.parametrize("draws", ["gauss", "t3", "lognormal"])
@pytest.mark.parametrize(("spread", "num_classes", "confidence"),
                         [(20, 2, 0.8), (20, 2, 0.95), (20, 2, 0.99), (10, 2, 0.95), (20, 4, 0.9)])  # fmt: skip
def test_it_stops_in_error_no_more_often_than_it_may(draws, spread, num_classes, confidence, rng):
    num_texts = 1500
    true_MC = np.concatenate([np.zeros((num_texts, 1)), rng.normal(size=(num_texts, num_classes - 1)) * spread], axis=1)
    shape = (num_texts, num_classes, LOOKS[-1])
    noise_MCK = {
        "gauss": lambda: rng.normal(size=shape),
        "t3": lambda: rng.standard_t(3, size=shape) / math.sqrt(3),
        "lognormal": lambda: (np.exp(rng.normal(size=shape)) - math.exp(0.5)) / math.sqrt(math.e * (math.e - 1)),
    }[draws]()
    noise_MCK[:, 0] = 0  # what is left of the noise once the common part is gone
    noise_MCK *= rng.uniform(15, 60, num_texts)[:, None, None]
    wrong, stopped, mean_draws = run_test(true_MC, noise_MCK, confidence)
    allowed = 1 - confidence
    assert wrong <= allowed * stopped + 3 * math.sqrt(allowed * confidence * stopped)
    assert stopped > 0.3 * num_texts and mean_draws < 0.92 * LOOKS[-1]


def test_certainty_is_a_probability_that_keeps_its_word(rng):
    """Of the leaders that are certain to c, a share of c or more leads in truth."""
    true_M = 20 * rng.normal(size=20_000)
    noise_MK = rng.normal(size=(20_000, 8)) * rng.uniform(15, 60, 20_000)[:, None]
    nats_MCK = np.stack([np.zeros_like(noise_MK), true_M[:, None] + noise_MK], axis=1)
    certainty_M = certainty(nats_MCK, np.zeros(2))
    right_M = nats_MCK.mean(2).argmin(1) == (true_M < 0)
    for low in np.arange(0.5, 1, 0.1):
        here = (certainty_M >= low) & (certainty_M < low + 0.1)
        assert low - 0.03 < certainty_M[here].mean() - 0.03 < right_M[here].mean()
    easy = student_t.cdf(np.abs(nats_MCK[:, 1].mean(1) / (nats_MCK[:, 1].std(1, ddof=1) / math.sqrt(8))), 7)
    assert certainty_M.mean() < easy.mean()


def test_only_differences_between_classes_matter(rng):
    nats_MCK = 20 * rng.normal(size=(40, 3, 6))
    common_MK = 1000 * rng.normal(size=(40, 1, 6))
    assert certainty(nats_MCK + common_MK, np.zeros(3)) == pytest.approx(certainty(nats_MCK, np.zeros(3)))


def test_the_prior_can_change_the_leader():
    nats_MCK = np.array([[[9.0, 11.0, 10.0, 10.0], [12.0, 10.0, 12.0, 10.0]]]).repeat(50, axis=0)
    even, against = certainty(nats_MCK, np.log([0.5, 0.5])), certainty(nats_MCK, np.log([1e-9, 1 - 1e-9]))
    assert (against > even).all()


def test_nothing_is_certain_after_one_draw(rng):
    nats_MCK = rng.normal(size=(5, 2, 3))
    assert (certainty(nats_MCK[:, :, :1], np.zeros(2)) == 0).all()
    nats_MCK[0, :, 1:] = np.nan
    found = certainty(nats_MCK, np.zeros(2))
    assert found[0] == 0 and (found[1:] > 0).all()
    still = np.zeros((20, 2, 3))
    still[10:, 1] = 5.0  # draws without noise: a difference is certain, a tie is not
    assert certainty(still, np.zeros(2)) == pytest.approx([0.5] * 10 + [1.0] * 10)


def test_confidence_one_never_stops_and_stopped_texts_stay_stopped(rng):
    nats_MCK = np.stack([np.zeros((30, 8)), 1e6 + rng.normal(size=(30, 8))], axis=1)
    assert undecided(nats_MCK, np.zeros(2), 1.0).all()
    assert not undecided(nats_MCK, np.zeros(2), 0.99).any()
    nats_MCK[:, 1] = rng.normal(size=(30, 8))
    nats_MCK[3, :, 6:] = np.nan
    active_M = undecided(nats_MCK, np.zeros(2), 0.999)
    assert not active_M[3] and active_M.sum() > 20
    for confidence in (0.5, 0.0, 1.01, math.nan):
        with pytest.raises(ValueError, match="classify.confidence"):
            undecided(nats_MCK, np.zeros(2), confidence)
    nats_MCK[4, 1, 2] = np.nan
    with pytest.raises(ValueError, match="each class"):
        undecided(nats_MCK, np.zeros(2), 0.9)
