"""Replications of every reported error: estimates from many data sets of one distribution.

The root mean square of the reported errors must be the true deviation, within 10 %. False-alarm rates: with R
replications of a normal estimate the ratio of a right error has a spread of at most sqrt((1 + 1 / u) / (2 R)), where
the error is worth that of u independent units. For R = 800 and u >= 20 the 10 % are 3.9 times that: 1e-4, two-sided.
Seeds are fixed, so a failure repeats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from palimpsest.classification import measures
from palimpsest.classification.measures import measure
from palimpsest.classification.results import ClassificationResult
from palimpsest.classification.scoring import ClassScores
from palimpsest.common.metrics import Estimate, Units, mean, ratio, share
from palimpsest.evaluation.diversity import distinct, unigram_entropy
from palimpsest.evaluation.generative_perplexity import TextScores
from palimpsest.evaluation.latent_gain import ShuffledLatents, shuffled_nats_per_token
from palimpsest.evaluation.likelihood import Scores

REPLICATIONS = 800


def calibration(estimate: Callable[[np.random.Generator], Estimate], replications: int = REPLICATIONS) -> float:
    """Root mean square of the reported errors over the deviation of the values."""
    rng = np.random.default_rng(0)
    found = np.array([(one.value, one.se) for one in (estimate(rng) for _ in range(replications))])
    return float(np.sqrt((found[:, 1] ** 2).mean()) / found[:, 0].std(ddof=1))


def wrapped(rng: np.random.Generator, documents: int, row: int, spread: float = 0.3) -> tuple[np.ndarray, ...]:
    """Return nats, tokens and document ends of rows; documents of 20 to 300 tokens have their own rates."""
    tokens_D = rng.integers(20, 300, documents)
    of_token = np.repeat(np.arange(documents), tokens_D)
    nats = np.repeat(rng.normal(3.0, spread, documents), tokens_D) + rng.normal(0, 1.0, len(of_token))
    count = len(of_token) // row
    of_row, nats = of_token[: count * row].reshape(count, row), nats[: count * row].reshape(count, row)
    return nats.sum(1), np.full(count, row), of_row[:, 0], of_row[:, -1]


def scores(nll_MK: np.ndarray, units: Units, tokens_M: np.ndarray | None = None, **more: np.ndarray) -> Scores:
    rows = len(nll_MK)
    tokens_M = np.full(rows, 10) if tokens_M is None else tokens_M
    known = {"cross_entropy_MP": np.zeros((rows, 0)), "num_masked_MP": np.zeros((rows, 0)), **more}
    return Scores(
        "NELBO",
        "",
        False,
        False,
        np.arange(rows),
        nll_MK,
        np.zeros(nll_MK.shape[1], dtype=int),
        tokens_M,
        tokens_M,
        np.full(rows, nll_MK.shape[1]),
        units=units,
        **known,
    )


def test_rows_of_one_document_are_not_independent():
    """A look-alike of 198 documents of source text, whose unigram rates differ strongly: the error by row is several
    times too small, that by documents right, and so is that by runs of rows, where documents are shorter than a run."""

    def by_row(rng: np.random.Generator) -> Estimate:
        nats_M, tokens_M, *_ = wrapped(rng, 198, 16)
        return ratio(nats_M, tokens_M)

    def by_document(rng: np.random.Generator) -> Estimate:
        nats_M, tokens_M, first_M, last_M = wrapped(rng, 198, 16)
        return ratio(nats_M, tokens_M, Units.of({"first_document": first_M, "last_document": last_M}))

    def by_run(rng: np.random.Generator) -> Estimate:
        nats_M, tokens_M, *_ = wrapped(rng, 198, 16)
        return ratio(nats_M, tokens_M, Units.of({"sample_id": np.arange(len(nats_M))}))

    assert calibration(by_row, 200) < 0.5
    assert 0.9 < calibration(by_document) < 1.1
    assert 0.85 < calibration(by_run) < 1.1, "a document that two runs share counts in each: a little too small"


@pytest.mark.parametrize("row", [40, 128, 400])
def test_the_error_over_documents_holds_for_rows_of_any_length(row):
    """Shorter than documents, about as long, and longer; with noise that all of a row shares, as masks bring it."""

    def one(rng: np.random.Generator) -> Estimate:
        nats_M, tokens_M, first_M, last_M = wrapped(rng, 150, row)
        nats_M = nats_M + rng.normal(0, 0.1 * row, len(nats_M))
        return ratio(nats_M, tokens_M, Units.of({"first_document": first_M, "last_document": last_M}))

    assert 0.9 < calibration(one) < 1.1


def test_windows_are_parts_of_their_text():
    """Nats per token with texts of one to five windows; the order of the rows plays no part."""

    def one(rng: np.random.Generator) -> Estimate:
        windows_T = rng.integers(1, 6, 100)
        text_M = np.repeat(np.arange(100), windows_T)
        tokens_M = rng.integers(10, 60, len(text_M))
        nats_M = tokens_M * (np.repeat(rng.normal(3, 0.4, 100), windows_T) + rng.normal(0, 0.2, len(text_M)))
        order_M = rng.permutation(len(text_M))
        units = Units.of({"text_id": text_M[order_M], "sample_id": order_M})
        assert units.name == "texts" and len(units) == 100
        return ratio(nats_M[order_M], tokens_M[order_M], units)

    assert 0.9 < calibration(one) < 1.1


def test_texts_and_paired_differences():
    """Nats per token over independent texts, the difference of two models on them, and accuracy."""

    def one(rng: np.random.Generator, paired: bool) -> Estimate:
        tokens_M = rng.integers(5, 80, 120)
        own = tokens_M * rng.normal(3.0, 0.5, 120)
        return ratio(own * rng.normal(0.1, 0.02, 120) if paired else own, tokens_M)

    assert 0.9 < calibration(lambda rng: one(rng, False)) < 1.1
    assert 0.9 < calibration(lambda rng: one(rng, True)) < 1.1


def test_the_loss_by_mask_rate_sums_a_text_first():
    """32 passes of each of 60 texts, which have rates of their own: by passes the error is far too small."""

    def one(rng: np.random.Generator, together: bool) -> Estimate:
        masked_MP = rng.integers(1, 101, (60, 32))
        nats_MP = masked_MP * (rng.normal(3.0, 0.5, 60)[:, None] + rng.normal(0, 0.2, (60, 32)))
        if not together:
            masked_MP, nats_MP = masked_MP.reshape(-1, 1), nats_MP.reshape(-1, 1)
        rows = len(masked_MP)
        found = scores(
            np.zeros((rows, 1)),
            Units.each(np.arange(rows)),
            np.full(rows, 100),
            cross_entropy_MP=nats_MP,
            num_masked_MP=masked_MP,
        )
        rate, nats = found.by_mask_rate()
        assert len(rate) == 10
        return nats[4]

    assert 0.9 < calibration(lambda rng: one(rng, True)) < 1.1
    assert calibration(lambda rng: one(rng, False), 200) < 0.7


def test_the_monte_carlo_error_sums_the_windows_of_a_text_first():
    """Windows share their times, so their draws err together. Texts are fixed, only the draws are new."""
    texts = np.repeat(np.arange(40), 3)

    def one(rng: np.random.Generator) -> Estimate:
        common, own = rng.normal(0, 1, (40, 8))[texts], rng.normal(0, 0.5, (120, 8))
        found = scores(30 + common + own, Units("documents", texts // 2, texts // 2), text_id_M=texts)
        return Estimate(found.per_token().value, found.monte_carlo_se)

    assert 0.9 < calibration(one) < 1.1


@pytest.mark.parametrize("draws", [1, 4, 16])
@pytest.mark.parametrize("giving", [-1.0, 0.0, 1.0])
def test_the_latent_gain_counts_each_text_as_scored_and_as_donor(draws, giving):
    """Effects of a text as scored text and as donor: opposite, unrelated, or alike."""
    shuffling = ShuffledLatents(_Estimator(), range(150), None, 0)
    donor_MK = np.stack([shuffling.donor_M(k) for k in range(draws)], axis=1)
    tokens_M, units = np.full(150, 10), Units.each(np.arange(150))

    def one(rng: np.random.Generator) -> Estimate:
        scored_M, other_M = rng.normal(0, 1, (2, 150))
        given_M = giving * scored_M if giving else other_M
        nats_MK = 20 + scored_M[:, None] + given_M[donor_MK] + rng.normal(0, 1.0, (150, draws))
        return shuffled_nats_per_token(nats_MK, donor_MK, tokens_M, units)

    assert 0.9 < calibration(one) < 1.1


def test_over_scored_texts_alone_the_error_of_the_latent_gain_was_several_times_too_wide():
    """Seen before: one partner for each text, effects that cancel but for a fifth."""
    donor_M = ShuffledLatents(_Estimator(), range(150), None, 0).donor_M(0)

    def one(rng: np.random.Generator) -> Estimate:
        scored_M = rng.normal(0, 1, 150)
        return mean(20 + scored_M - scored_M[donor_M] + rng.normal(0, 0.25, 150))

    assert calibration(one, 200) > 4


def test_partners_never_get_each_others_latents():
    for rows in (2, 3, 7, 50):
        shuffling = ShuffledLatents(_Estimator(), range(rows), None, 0)
        givers = [shuffling.donor_M(k) for k in range(40)]
        assert all(sorted(g) == list(range(rows)) and (g != np.arange(rows)).all() for g in givers)
        pairs = {pair for g in givers for pair in enumerate(g.tolist())}
        assert rows < 3 or not pairs & {(b, a) for a, b in pairs}


class _Estimator:
    """As little of an estimator as `Shuffling` reads."""

    kind, in_parts, label, exact, passes = "", True, None, None, None


def test_accuracy_log_loss_brier_and_f1(monkeypatch):
    monkeypatch.setattr(measures, "_RESAMPLES", 200)
    monkeypatch.setattr(measures, "_roc_auc", lambda *_: None)  # has no error, and costs most of the time

    def measured(rng: np.random.Generator) -> tuple[Estimate, ...]:
        odds_M, label_M = rng.normal(0, 2, 200), rng.random(200)
        label_M = (label_M < 1 / (1 + np.exp(-odds_M))).astype(int)
        p_M = 1 / (1 + np.exp(-odds_M))
        found = measure(np.stack([1 - p_M, p_M], axis=1), label_M)
        return found.accuracy, found.log_loss, found.brier, found.macro_f1

    rng = np.random.default_rng(0)
    found = np.array([[(one.value, one.se) for one in measured(rng)] for _ in range(REPLICATIONS)])
    of = np.sqrt((found[..., 1] ** 2).mean(0)) / found[..., 0].std(0, ddof=1)
    assert (of > 0.9).all() and (of < 1.1).all(), of


def test_shares_of_prompts_and_accuracy_by_mask_rate():
    """Several completions of each prompt, and several passes of each text, which agree with one another in part."""

    def prompts(rng: np.random.Generator) -> Estimate:
        found = share(rng.random((150, 4)) < rng.beta(2, 2, 150)[:, None])
        return Estimate(found.value, found.se)

    def passes(rng: np.random.Generator) -> Estimate:
        right_MP = rng.random((150, 8)) < rng.beta(3, 1, 150)[:, None]
        nats_MCP = np.stack([np.where(right_MP, 0.0, 2.0), np.ones((150, 8))], axis=1)
        label_M, rate_MP = np.zeros(150, dtype=int), np.where(rng.random((150, 8)) < 0.5, 0.15, 0.55)
        known = ClassScores(np.arange(150), label_M, nats_MCP, rate_MP, 1, label_M + 10, label_M, 0.0, "", "", False)
        verdicts = ClassificationResult(None, "", known, np.zeros(2), None, [], [], None)
        return verdicts.at_mask_rates()[1][0]

    assert 0.9 < calibration(prompts) < 1.1
    assert 0.9 < calibration(passes) < 1.1


def test_the_accuracy_by_mask_rate_is_of_passes_that_every_text_took():
    """A hard text takes more of them, which would count it more."""
    nats_MCP = np.array([[[0.0, np.nan], [1.0, np.nan]], [[1.0, 1.0], [0.0, 0.0]]])  # right once, wrong twice
    rate_MP, zero_M = np.where(np.isnan(nats_MCP[:, 0]), np.nan, 0.5), np.zeros(2, dtype=int)
    known = ClassScores(np.arange(2), zero_M, nats_MCP, rate_MP, 1, zero_M + 10, zero_M, 0.0, "", "", False)
    found = ClassificationResult(None, "", known, np.zeros(2), None, [], [], None).at_mask_rates()[1]
    assert [one.value for one in found] == [0.5]


def test_generative_perplexity_and_diversity():
    """Of independent texts, and of rows of documents, each with a vocabulary and a rate of its own."""

    def perplexity(rng: np.random.Generator, documents: bool) -> Estimate:
        nats_M, tokens_M, first_M, last_M = wrapped(rng, 80, 60)
        some_M = rng.permutation(len(nats_M))[:64]
        units = Units.of({"first_document": first_M[some_M], "last_document": last_M[some_M]})
        if documents:
            return TextScores(nats_M[some_M], tokens_M[some_M]).summary({}, units).perplexity
        tokens_M = rng.integers(5, 80, 64)
        return TextScores(tokens_M * rng.normal(3, 0.3, 64), tokens_M).summary({}).perplexity

    def texts(rng: np.random.Generator, of: Callable[..., Estimate], documents: bool) -> Estimate:
        size_D = rng.integers(3, 25, 30)
        of_row = np.repeat(np.arange(30), 2 if documents else 1)
        rows = [rng.integers(0, size_D[d], 20).tolist() for d in of_row]
        return of(rows, Units.each(of_row)) if documents else of(rows)

    for documents in (False, True):
        assert 0.9 < calibration(lambda rng, d=documents: perplexity(rng, d)) < 1.1
        assert 0.9 < calibration(lambda rng, d=documents: texts(rng, unigram_entropy, d)) < 1.1
    assert 0.9 < calibration(lambda rng: texts(rng, lambda rows, units=None: distinct(rows, 2, units), False)) < 1.1


def test_units_are_named_and_counted():
    rows = {"sample_id": np.array([3, 1, 0, 2, 8, 5, 6, 7, 4])}
    runs = Units.of(rows)
    assert str(runs) == "3 runs of rows" and runs.first_M.tolist() == [1, 0, 0, 0, 2, 1, 2, 2, 1]
    known = {**rows, "first_document": np.array([0, 0, 2]), "last_document": np.array([0, 2, 3])}
    assert str(Units.of(known)) == "4 documents"
    alone = {**rows, "first_document": np.zeros(9, dtype=int), "last_document": np.zeros(9, dtype=int)}
    assert Units.of(alone).name == "runs of rows", "nothing can be learned from a single document"
    assert math.isnan(ratio([1.0, 2.0], [1, 1], Units.each([4, 4])).se) and math.isnan(mean([]).value)
    shuffled = np.random.default_rng(0).permutation(3)
    some = Units.of(known)[shuffled]
    influence = np.array([0.5, -1.0, 0.5])
    assert some.variance(influence[shuffled]) == pytest.approx(Units.of(known).variance(influence))


def test_overlapping_pairs_are_those_that_share_a_document():
    """Against all pairs, one by one."""
    rng = np.random.default_rng(0)
    nats_M, tokens_M, first_M, last_M = wrapped(rng, 30, 50)
    influence_M = nats_M - nats_M.sum() / tokens_M.sum() * tokens_M
    shared_MM = (first_M[:, None] <= last_M) & (first_M <= last_M[:, None])
    wanted = influence_M @ shared_MM @ influence_M / (1 - shared_MM.mean())
    assert Units("documents", first_M, last_M).variance(influence_M) == pytest.approx(wanted)
    one = scores(np.ones((2, 1)), Units.each([0, 1]))
    assert replace(one, exact=True).monte_carlo_se == 0 and math.isnan(one.monte_carlo_se)
