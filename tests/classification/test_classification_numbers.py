"""Classification in numbers: Bayes' rule, measures against scikit-learn and by hand, planted calibration."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from scipy.special import log_softmax, softmax
from sklearn import metrics as sk

from palimpsest.classification import bayes
from palimpsest.classification.bayes import averaged_posterior, log_prior, posterior, posterior_interval
from palimpsest.classification.calibration import (
    LengthTemperature,
    fit_length_temperature,
    fit_temperature,
)
from palimpsest.classification.measures import abstention, auroc, macro_f1, measure, reliability, top_log_odds
from palimpsest.classification.sequential_test import undecided
from palimpsest.common.metrics import wilson_interval


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


# ------------------------------------------------------------------------------------------------ Bayes
def test_priors_by_hand():
    assert np.exp(log_prior("uniform", np.array([1, 3]))) == pytest.approx([0.5, 0.5])
    assert np.exp(log_prior("empirical", np.array([1, 3]))) == pytest.approx([0.25, 0.75])
    assert np.exp(log_prior((0.1, 0.9), np.array([0, 0]))) == pytest.approx([0.1, 0.9])
    log_p_MC = np.log([[0.2, 0.1], [0.5, 0.5]])
    assert posterior(log_p_MC, np.log([0.25, 0.75])) == pytest.approx(np.array([[0.4, 0.6], [0.25, 0.75]]))


@pytest.mark.parametrize("prior", ["flat", "empirical", (0.5, 0.6), (1.0, 0.0), (0.2, 0.3, 0.5), None, ("a", "b"),
                                   (math.nan, 1.0)])  # fmt: skip
def test_an_invalid_prior_is_refused(prior):
    with pytest.raises(ValueError, match="classify.prior"):
        log_prior(prior, np.array([0, 4]))


def excess(nats_MCK: np.ndarray, true_MC: np.ndarray) -> tuple[float, float]:
    """Mean Kullback-Leibler divergences of the averaged and the plain posterior from the exact one, nats: by how much
    their log losses exceed its own."""
    exact_MC, even_C = log_softmax(true_MC, axis=1), np.full(true_MC.shape[1], -np.log(true_MC.shape[1]))
    found = averaged_posterior(nats_MCK, even_C), posterior(-np.nanmean(nats_MCK, axis=2), even_C)
    return tuple(float((np.exp(exact_MC) * (exact_MC - np.log(np.maximum(p, 1e-300)))).sum(1).mean()) for p in found)


def sequentially_drawn(nats_MCK: np.ndarray, confidence: float) -> np.ndarray:
    """What the sequential test draws of these draws."""
    looks, even_C = (4, 6, 8, 12, 16, 24, 32, 48, 64), np.zeros(nats_MCK.shape[1])
    for here, there in pairwise(looks):
        nats_MCK[~undecided(nats_MCK[:, :, :here], even_C, confidence), :, here:there] = np.nan
    return nats_MCK


@pytest.mark.parametrize(("spread", "num_classes"), [(20, 2), (5, 2), (20, 4)])
def test_the_averaged_posterior_is_nearer_to_the_exact_one(spread, num_classes, rng):
    """Nats of true likelihoods, with the noise that draws have."""
    true_MC = np.concatenate([np.zeros((300, 1)), rng.normal(size=(300, num_classes - 1)) * spread], axis=1)
    noise_MCK = rng.normal(size=(300, num_classes, 64)) * rng.uniform(15, 60, 300)[:, None, None]
    noise_MCK[:, 0] = 0
    for confidence in (0.9, 1):
        nats_MCK = sequentially_drawn(noise_MCK - true_MC[:, :, None], confidence)
        averaged, plain = excess(nats_MCK, true_MC)
        assert averaged < 0.7 * plain and averaged < 0.32
        same_M = averaged_posterior(nats_MCK, np.zeros(num_classes)).argmax(1) == np.nanmean(nats_MCK, 2).argmin(1)
        assert same_M.all() if num_classes == 2 else same_M.mean() > 0.99


def test_exact_models_lose_little_by_the_draws(rng):
    """Texts of independent tokens: the exact denoiser says of a masked token what it would say of any text."""
    length, base_V = 40, rng.normal(size=30)
    p_CV = softmax(base_V + 0.4 * rng.normal(size=(2, 30)), axis=1)
    label_M = rng.integers(2, size=300)
    token_ML = np.stack([rng.choice(30, length, p=p_CV[label]) for label in label_M])
    nats_MCL = -np.log(p_CV)[:, token_ML].swapaxes(0, 1)
    masked_MK = rng.integers(1, length + 1, size=(300, 64))
    rank_MKL = rng.random((300, 64, length)).argsort(-1)
    nats_MCK = np.einsum("mcl,mkl->mck", nats_MCL, rank_MKL < masked_MK[..., None], optimize=True)
    nats_MCK *= (length / masked_MK)[:, None]
    all_draws, _ = excess(nats_MCK, -nats_MCL.sum(-1))
    drawn_MCK = sequentially_drawn(nats_MCK.copy(), 0.9)
    same_number, _ = excess(nats_MCK[:, :, : round((~np.isnan(drawn_MCK[:, 0])).sum(1).mean())], -nats_MCL.sum(-1))
    averaged, plain = excess(drawn_MCK, -nats_MCL.sum(-1))
    assert averaged < 0.03 and averaged < 0.75 * plain
    assert averaged < same_number and averaged < all_draws + 0.02


@pytest.mark.parametrize(("draws", "spread"), [("gauss", 5), ("gauss", 20), ("lognormal", 10), ("lognormal", 20)])
def test_stopping_early_loses_nothing_against_as_many_draws_for_every_text(draws, spread, rng):
    """Averages over two data sets, so that the allowance of 0.02 nats is three standard errors."""
    lost = []
    for _ in range(2):
        true_MC = np.stack([np.zeros(800), spread * rng.normal(size=800)], axis=1)
        noise_MCK = rng.normal(size=(800, 2, 64))
        if draws == "lognormal":
            noise_MCK = (np.exp(noise_MCK) - math.exp(0.5)) / math.sqrt(math.e * (math.e - 1))
        noise_MCK[:, 0] = 0
        nats_MCK = noise_MCK * rng.uniform(15, 60, 800)[:, None, None] - true_MC[:, :, None]
        drawn_MCK = sequentially_drawn(nats_MCK.copy(), 0.9)
        number = round((~np.isnan(drawn_MCK[:, 0])).sum(1).mean())
        lost.append(excess(drawn_MCK, true_MC)[0] - excess(nats_MCK[:, :, :number], true_MC)[0])
    assert np.mean(lost) < 0.02


def test_without_an_error_the_average_is_bayes_rule(rng):
    nats_MC, even_C = 5 * rng.normal(size=(50, 3)), np.log([0.2, 0.3, 0.5])
    plain_MC = posterior(-nats_MC, even_C)
    for draws in (1, 4):
        np.testing.assert_allclose(averaged_posterior(nats_MC[..., None].repeat(draws, 2), even_C), plain_MC, atol=1e-9)
    nats_MCK = nats_MC[..., None] + rng.normal(size=(50, 3, 4))
    nats_MCK[7, 1], nats_MCK[8, :, 1:] = np.inf, np.nan  # a class cannot have written it; a text with a single draw
    found_MC = averaged_posterior(nats_MCK, even_C)
    assert found_MC[7, 1] == 0 and found_MC.sum(1) == pytest.approx(1) and found_MC[8].max() < plain_MC[8].max()
    assert averaged_posterior(nats_MCK[7:8], even_C) == pytest.approx(posterior(-nats_MCK[7:8].mean(2), even_C))


@pytest.mark.parametrize("num_classes", [2, 4])
def test_the_density_of_log_odds_is_that_of_all_classes(num_classes, rng, monkeypatch):
    """It is estimated from some of many texts: an even step through (text, class) would skip classes."""
    label_M = np.minimum(rng.geometric(0.8, size=2000) - 1, num_classes - 1)
    true_MC = 2 * np.eye(num_classes)[label_M] + rng.normal(size=(2000, num_classes))
    nats_MCK = 2 * rng.normal(size=(2000, num_classes, 4)) - true_MC[..., None]
    even_C = np.full(num_classes, -np.log(num_classes))
    full_MC = averaged_posterior(nats_MCK, even_C)
    monkeypatch.setattr(bayes, "_MOST_ODDS", 2000 * num_classes // (num_classes - 1) - 1)  # every C-th
    assert np.abs(averaged_posterior(nats_MCK, even_C) - full_MC).max() < 0.02


@pytest.mark.parametrize("num_classes", [2, 3])
def test_intervals_cover_the_truth_as_often_as_they_say(num_classes, rng):
    """False alarms: 4 binomial standard deviations, once in 16,000 (two-sided), and for three classes 2 % more, since
    the interval is that of a linearisation."""
    times, true_C = 4000, np.array([0.0, 0.6, 1.1])[:num_classes]
    exact_C = softmax(-true_C)
    for draws in (2, 4, 8):
        common_M1K = 9 * rng.normal(size=(times, 1, draws))
        nats_MCK = true_C[:, None] + rng.normal(size=(times, num_classes, draws)) + common_M1K
        low_MC, high_MC = posterior_interval(nats_MCK, np.zeros(num_classes))
        covered = ((low_MC <= exact_C) & (exact_C <= high_MC)).mean(axis=0)[0]
        allowed = 4 * math.sqrt(0.95 * 0.05 / times) + (0.02 if num_classes > 2 else 0)
        assert abs(covered - 0.95) < allowed, (draws, covered)


# --------------------------------------------------------------------------------------------- measures
@pytest.mark.parametrize("num_classes", [2, 4])
def test_measures_are_those_of_scikit_learn(num_classes, rng):
    label_M = rng.integers(num_classes, size=400)
    posterior_MC = softmax(rng.normal(size=(400, num_classes)) + np.eye(num_classes)[label_M], axis=1)
    verdict_M, found = posterior_MC.argmax(1), measure(posterior_MC, label_M)
    assert found.accuracy.value == sk.accuracy_score(label_M, verdict_M)
    assert found.macro_f1.value == pytest.approx(sk.f1_score(label_M, verdict_M, average="macro"))
    assert found.precision_C == pytest.approx(sk.precision_score(label_M, verdict_M, average=None))
    assert found.recall_C == pytest.approx(sk.recall_score(label_M, verdict_M, average=None))
    assert found.f1_C == pytest.approx(sk.f1_score(label_M, verdict_M, average=None))
    assert (found.confusion_CC == sk.confusion_matrix(label_M, verdict_M)).all()
    assert (found.support_C == np.bincount(label_M)).all()
    auc = sk.roc_auc_score(label_M, posterior_MC[:, 1] if num_classes == 2 else posterior_MC, multi_class="ovr")
    assert found.roc_auc == pytest.approx(auc)
    assert found.log_loss.value == pytest.approx(sk.log_loss(label_M, posterior_MC))
    assert found.brier.value == pytest.approx(sk.brier_score_loss(label_M, posterior_MC, scale_by_half=False))


def test_errors_are_the_spread_over_data_sets(rng):
    """The standard errors of one data set against the spread of the values over 150."""
    found = []
    for _ in range(150):
        label_M = rng.integers(3, size=150)
        found.append((softmax(rng.normal(size=(150, 3)) + np.eye(3)[label_M], axis=1), label_M))
    found = [measure(*one) for one in found]
    for name in ("accuracy", "macro_f1", "log_loss", "brier"):
        values = [getattr(one, name).value for one in found]
        assert np.mean([getattr(one, name).se for one in found]) == pytest.approx(np.std(values), rel=0.15), name


def test_the_perfect_and_the_clueless():
    label_M = np.repeat([0, 1], 50)
    perfect = measure(np.eye(2)[label_M], label_M)
    assert perfect.accuracy.value == perfect.macro_f1.value == perfect.roc_auc == 1
    assert perfect.log_loss.value == perfect.brier.value == perfect.ece == perfect.accuracy.se == 0
    assert perfect.accuracy_interval.low == pytest.approx(1 / (1 + 1.959964**2 / 100))
    chance = measure(np.full((100, 2), 0.5), label_M)
    assert chance.accuracy.value == chance.roc_auc == chance.brier.value == 0.5
    assert chance.accuracy.se == pytest.approx(0.05)
    assert chance.log_loss.value == pytest.approx(math.log(2)) and chance.ece == 0
    wrong = measure(np.eye(2)[1 - label_M], label_M)
    assert wrong.brier.value == 2 and wrong.ece == 1 and wrong.log_loss.value == pytest.approx(744.44, abs=0.01)


def test_probabilities_that_round_to_one_are_still_ranked():
    log_odds_M = np.array([50.0, 60.0, 70.0, 80.0])
    posterior_MC = softmax(np.stack([np.zeros(4), log_odds_M], 1), axis=1)
    assert (posterior_MC[:, 1] == 1).all() and measure(posterior_MC, np.array([0, 0, 1, 1])).roc_auc == 1


def test_absent_classes_and_single_texts():
    found = measure(np.full((1, 3), 1 / 3), np.array([0]))
    assert found.roc_auc is None and math.isnan(found.log_loss.se) and math.isnan(found.macro_f1.se)
    assert found.macro_f1.value == 1 and found.support_C.tolist() == [1, 0, 0]
    posterior_MC = np.array([[0.5, 0.3, 0.2], [0.3, 0.6, 0.1], [0.6, 0.3, 0.1]])
    assert measure(posterior_MC, np.array([0, 1, 1])).roc_auc == pytest.approx((1 / 2 + 3 / 4) / 2)
    # class 2 has neither text nor prediction: the mean is over the other two, 2/3 and 1/2 of whose F1 are hits
    assert macro_f1(np.array([[1, 1, 0], [0, 2, 0], [0, 0, 0]])).value == pytest.approx((2 / 3 + 4 / 5) / 2)


@pytest.mark.parametrize(
    ("posterior_MC", "label_M", "message"),
    [([[0.5, 0.6]], [0], "sum 1"), ([[math.nan, 1.0]], [0], "sum 1"), ([[0.5, 0.5]], [2], "label"),
     ([[0.5, 0.5]], [0, 1], "agree"), (np.zeros((0, 2)), [], "nothing")],
)  # fmt: skip
def test_invalid_predictions_are_refused(posterior_MC, label_M, message):
    with pytest.raises(ValueError, match=message):
        measure(np.array(posterior_MC), np.array(label_M))


def test_reliability_of_a_case_computed_by_hand():
    # bin (0.6, 0.7]: mean confidence 0.65, share right 1/2; bin (0.8, 0.9]: 0.9, 1; bin (0.9, 1]: 1.0, 1/2
    confidence = np.array([0.6 + 1e-9, 0.7 - 1e-9, 0.9, 0.9, 0.9, 1.0, 1.0, 1.0, 1.0])
    bins = reliability(confidence, np.array([1, 0, 1, 1, 1, 1, 0, 0, 1]))
    assert bins.counts_B.tolist() == [0, 0, 0, 0, 0, 0, 2, 0, 3, 4]
    assert bins.ece == pytest.approx((2 * 0.15 + 3 * 0.1 + 4 * 0.5) / 9)
    assert np.isnan(bins.accuracy_B[0]) and math.isnan(reliability(np.zeros(0), np.zeros(0)).ece)


def test_wilson_interval_against_published_values():
    # Newcombe (1998), table I, method 3
    found = [wilson_interval(k, n) for k, n in ((81, 263), (15, 148), (0, 20))]
    assert [i.low for i in found] == pytest.approx([0.2553, 0.0624, 0.0], abs=5e-5)
    assert [i.high for i in found] == pytest.approx([0.3662, 0.1605, 0.1611], abs=5e-5)


# ------------------------------------------------------------------------------------------ abstention
def test_the_surest_predictions_by_hand():
    found = abstention(np.array([0.1, 0.9, 0.5, 0.7]), np.array([False, True, False, True]))
    assert found.right_M.tolist() == [1, 2, 2, 2]
    assert found.aurc.value == pytest.approx((0 + 0 + 1 / 3 + 2 / 4) / 4)
    assert [found.at(share).value for share in (0.5, 0.75, 1.0)] == pytest.approx([1, 2 / 3, 1 / 2])
    assert found.at(1.0).se == pytest.approx(0.25) and found.at(0.01).value == 1


def test_texts_of_equal_confidence_share_their_errors(rng):
    right_M = rng.random(200) < 0.7
    equal = abstention(np.ones(200), right_M)
    assert equal.aurc.value == pytest.approx(1 - right_M.mean()), "no ranking: the error rate at every coverage"
    assert equal.aurc.se == pytest.approx(np.std(right_M, ddof=1) / math.sqrt(200))
    sure_M, sorted_M = np.array([2.0, 2, 2, 1]), np.array([True, False, True, False])
    orders = [abstention(sure_M - 1e-6 * rng.permutation(4), sorted_M).aurc.value for _ in range(2_000)]
    assert abstention(sure_M, sorted_M).aurc.value == pytest.approx(np.mean(orders), abs=0.01)


def test_a_calibrated_classifier_has_the_risk_that_it_states(rng):
    """Confidence p uniform on [1/2, 1] and right with probability p: at coverage c the risk is c / 4."""
    p_M = rng.uniform(0.5, 1, 40_000)
    posterior_MC = np.stack([p_M, 1 - p_M], axis=1)
    found = measure(posterior_MC, (rng.random(40_000) > p_M).astype(int)).abstention
    for coverage in (0.2, 0.5, 1.0):
        assert found.at(coverage).value == pytest.approx(1 - coverage / 4, abs=4 * found.at(coverage).se)
    assert found.aurc.value == pytest.approx(1 / 8, abs=4 * found.aurc.se) and found.aurc.se < 0.002


def test_the_errors_of_areas_are_their_spread(rng):
    def areas():
        p_M = rng.uniform(0.5, 1, 200).round(int(rng.integers(2, 9)))
        yield abstention(p_M, rng.random(200) < p_M).aurc
        yield auroc(rng.normal(1, 1, 60).round(1), rng.normal(size=90).round(1))

    found = np.array([[(one.value, one.se) for one in areas()] for _ in range(500)])
    assert found[:, :, 1].mean(0) == pytest.approx(found[:, :, 0].std(0), rel=0.12)


def test_an_area_under_the_roc_curve_is_that_of_scikit_learn(rng):
    positive, negative = rng.normal(0.5, 1, 30).round(1), rng.normal(size=50).round(1)
    expected = sk.roc_auc_score(np.repeat([1, 0], [30, 50]), np.concatenate([positive, negative]))
    assert auroc(positive, negative).value == pytest.approx(expected)
    assert auroc(negative, positive).value == pytest.approx(1 - expected)
    assert auroc([2, 3], [0, 1]).value == 1 and auroc([2, 3], [0, 1]).se == 0
    assert math.isnan(auroc([2], [0, 1]).se)
    for bad in (([], [1.0]), ([math.nan], [1.0])):
        with pytest.raises(ValueError, match="both kinds"):
            auroc(*bad)


def test_log_odds_rank_probabilities_that_round_to_one():
    log_odds_M = np.array([70.0, 50.0, 80.0, 60.0])
    posterior_MC = softmax(np.stack([np.zeros(4), log_odds_M], 1), axis=1)
    assert top_log_odds(posterior_MC) == pytest.approx(log_odds_M)


# ------------------------------------------------------------------------------------------ calibration
def planted_labels(log_p_MC, log_prior_C, rng):
    return (log_softmax(log_p_MC + log_prior_C, axis=1) + rng.gumbel(size=log_p_MC.shape)).argmax(1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 12.0])
def test_a_planted_temperature_is_found(temperature, rng):
    log_prior_C = np.log([0.2, 0.3, 0.5])
    log_p_MC = -1000 + temperature * rng.normal(size=(20_000, 3))
    label_M = planted_labels(log_p_MC / temperature, log_prior_C, rng)
    assert fit_temperature(log_p_MC, label_M, log_prior_C) == pytest.approx(temperature, rel=0.04)


def test_the_ends_of_the_temperature():
    log_p_MC, label_M = np.array([[0.0, -1.0], [-1.0, 0.0]]), np.array([0, 1])
    assert fit_temperature(log_p_MC, label_M, np.log([0.5, 0.5])) == pytest.approx(0.1, rel=1e-3)
    assert fit_temperature(log_p_MC, 1 - label_M, np.log([0.5, 0.5])) == pytest.approx(1e4, rel=1e-3)
    for gap in (3.0, 50.0, 1e5):  # the log loss is 0 in float64 for many temperatures
        assert fit_temperature(gap * log_p_MC, label_M, np.log([0.5, 0.5])) == 0.1
    with pytest.raises(ValueError, match="validation texts"):
        fit_temperature(log_p_MC[:0], label_M[:0], np.log([0.5, 0.5]))


def test_correlated_tokens_make_the_evidence_a_mean_per_token(rng):
    """Each token is evidence ±mu with noise that is common to the text, but the model takes its tokens for
    independent: the sum of n tokens says as much as one token does, so T is proportional to n."""
    mu, sigma, num_texts = 0.2, 0.3, 20_000
    tokens_M, label_M = rng.integers(20, 400, num_texts), rng.integers(2, size=num_texts)
    evidence_M = mu * (2 * label_M - 1) + sigma * rng.normal(size=num_texts)
    log_p_MC = np.stack([np.zeros(num_texts), tokens_M * 2 * mu * evidence_M], axis=1)  # as if of variance 1
    found = fit_length_temperature(log_p_MC, tokens_M, label_M, np.log([0.5, 0.5]))
    assert found.gamma == pytest.approx(1, abs=0.1)
    assert found.temperature == pytest.approx(tokens_M.mean() * sigma**2, rel=0.1)


def loss_of(log_p_MC, label_M, log_prior_C):
    return -log_softmax(log_p_MC + log_prior_C, axis=1)[np.arange(len(label_M)), label_M].mean()


def test_gamma_zero_is_the_plain_temperature(rng):
    log_prior_C, log_p_MC = np.log([0.5, 0.5]), 5 * rng.normal(size=(300, 2))
    label_M, tokens_M = planted_labels(log_p_MC / 3, log_prior_C, rng), rng.integers(10, 200, 300)
    temperature = fit_temperature(log_p_MC, label_M, log_prior_C)
    same = LengthTemperature(temperature, 0.0, 50.0).log_p(log_p_MC, tokens_M)
    np.testing.assert_array_equal(same, log_p_MC / temperature)
    equal = fit_length_temperature(log_p_MC, np.full(300, 64), label_M, log_prior_C)
    assert equal == LengthTemperature(temperature, 0.0, 64.0), "texts of one length do not determine gamma"
    found = fit_length_temperature(log_p_MC, tokens_M, label_M, log_prior_C)
    by_length = loss_of(found.log_p(log_p_MC, tokens_M), label_M, log_prior_C)
    assert by_length <= loss_of(log_p_MC / temperature, label_M, log_prior_C)


def test_the_fitted_growth_is_the_only_optimum(rng):
    """The log loss, at the best temperature of each gamma, falls to the fitted gamma and rises from there."""
    log_prior_C, tokens_M = np.log([0.5, 0.5]), rng.integers(10, 1000, 1_500)
    planted = LengthTemperature(6.0, 0.7, float(tokens_M.mean()))
    log_p_MC = 10 * rng.normal(size=(1_500, 2)) * (tokens_M / tokens_M.mean())[:, None] ** 0.7
    label_M = planted_labels(planted.log_p(log_p_MC, tokens_M), log_prior_C, rng)
    found = fit_length_temperature(log_p_MC, tokens_M, label_M, log_prior_C)

    def loss(gamma):
        scaled_MC = LengthTemperature(1.0, gamma, found.mean_tokens).log_p(log_p_MC, tokens_M)
        return loss_of(scaled_MC / fit_temperature(scaled_MC, label_M, log_prior_C), label_M, log_prior_C)

    below = [loss(gamma) for gamma in np.linspace(0, found.gamma, 8)]
    above = [loss(gamma) for gamma in np.linspace(found.gamma, 1, 8)]
    assert (np.diff(below) < 0).all() and (np.diff(above) > 0).all()


@pytest.mark.parametrize("tokens", [[10, 0], [10, -3], [10, math.nan], [10], [[10, 20]]])
def test_invalid_lengths_are_refused(tokens):
    log_p_MC, even_C = np.array([[0.0, -1.0], [-1.0, 0.0]]), np.log([0.5, 0.5])
    with pytest.raises(ValueError, match="positive number of tokens"):
        fit_length_temperature(log_p_MC, np.array(tokens), np.array([0, 1]), even_C)
    with pytest.raises(ValueError, match="validation texts"):
        fit_length_temperature(log_p_MC[:0], np.zeros(0), np.zeros(0, dtype=int), even_C)
    with pytest.raises(ValueError, match="not finite"):
        fit_length_temperature(log_p_MC - math.inf, np.array([1, 2]), np.array([0, 1]), even_C)
