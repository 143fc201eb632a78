"""Scoring of classes, sequential draws, token attributions, and the files and reports of a classification."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hydra.errors import InstantiationException

from palimpsest.classification.attributions import explain, token_attributions
from palimpsest.classification.methods import ComparedMethods, _texts, fit, text_keys
from palimpsest.classification.models import ClassModel
from palimpsest.classification.predictions import predictions_file, read_posterior, write_predictions
from palimpsest.classification.scoring import ClassScores, SequentialTest, score_classes
from palimpsest.classification.typical import nats_per_token
from palimpsest.data.rows import text_hashes
from palimpsest.estimators.any_order import AnyOrder
from palimpsest.estimators.nelbo import Nelbo, for_comparison
from palimpsest.experiment.experiment import Experiment
from palimpsest.objectives.mask_sampling import Bernoulli, ExactCount, TiltedCount
from palimpsest.settings.command_line import compose_config
from tests.helpers.commands import TINY, run
from tests.helpers.networks import EVEN, random_network, two_models

WINDOWS = ["data.long_texts=windows", "model.length=24", "data.insert_valid_eos=false"]


def experiment(*overrides: str) -> Experiment:
    return Experiment(compose_config([*TINY, *overrides]), "a test")


def scores_of(e: Experiment, models: list[ClassModel], test: SequentialTest, estimator: object = None) -> ClassScores:
    return score_classes(e.trainer, models, e.build.data(), "test", estimator or Nelbo(), test, 3, EVEN)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_each_class_is_measured_as_its_model_alone_would_be():
    e = experiment()
    models = two_models(e)
    found = scores_of(e, models, SequentialTest(4), Nelbo(ExactCount()))
    by_hand = []
    for batch in e.build.data().eval_dataloader("test"):
        order = batch["text_id"]
        nll = [Nelbo(ExactCount())(h.diffusion.model, batch, 3, 4).nll_BK.mean(1).detach() for h in models]
        by_hand += list(zip(order.tolist(), *[n.tolist() for n in nll], strict=True))
    np.testing.assert_allclose(found.log_p_MC, -np.array([row[1:] for row in sorted(by_hand)]), rtol=1e-5)
    assert found.evaluations_M.tolist() == [8] * 8 and found.draws_M.tolist() == [4] * 8


def test_common_masks_cancel_and_independent_ones_do_not():
    """Two classes with one model: its likelihood ratio is 1, whatever the masks, if they are the same."""
    e = experiment()
    same = [ClassModel(random_network(e, 0))] * 2
    common, independent = (
        scores_of(e, same, SequentialTest(4, masks=masks)).log_p_MC for masks in ("common", "independent")
    )
    assert (common[:, 0] == common[:, 1]).all()
    assert (independent[:, 0] != independent[:, 1]).all() and (independent[:, 0] == common[:, 0]).sum() == 0


def test_windows_of_a_text_are_summed_and_masked_alike():
    e = experiment(*WINDOWS)
    rows = e.build.data().split("test")
    assert len(rows) > 8, "the texts have several windows"
    found = scores_of(e, two_models(e), SequentialTest(8), Nelbo(ExactCount()))
    tokens = np.zeros(8)
    np.add.at(tokens, np.searchsorted(found.text_id_M, rows["text_id"]), np.array(rows["length"][:]) - 0)
    assert len(found.text_id_M) == 8 and (found.tokens_M <= tokens).all() and (found.tokens_M > 24).any()
    spread = found.rate_MP[:, :, None] - (np.arange(8) + 0.5) / 8
    assert (np.abs(spread).min(-1) < 1 / 16 + 0.07).all(), "each pass masks about one share of all windows"
    assert (np.sort((found.rate_MP * 7.99).astype(int), axis=1)[:, -1] == 7).all()


def test_the_sequential_test_takes_the_draws_of_the_fixed_design():
    e = experiment("data.max_test_texts=8")
    models = two_models(e)
    fixed, sequential = (
        scores_of(e, models, SequentialTest(16)),
        scores_of(e, models, SequentialTest(16, confidence=0.9)),
    )
    taken = np.isfinite(sequential.nats_MCP)
    same = fixed.nats_MCP[:, :, : taken.shape[2]]
    np.testing.assert_allclose(sequential.nats_MCP[taken], same[taken], rtol=1e-4)
    assert (sequential.draws_M < 16).any(), "networks as different as these are told apart early"
    assert (sequential.evaluations_M == 2 * sequential.draws_M).all() and (fixed.draws_M == 16).all()
    assert (taken.all(axis=1) == taken.any(axis=1)).all(), "all classes stop together"
    partly = pytest.raises(ValueError, match="limit_test_batches")
    limited = experiment("data.max_test_texts=8", "trainer.limit_test_batches=1", "loader.eval_batch_size=3")
    with partly:
        scores_of(limited, models, SequentialTest(4))


def test_looks_take_whole_pairs_and_end_with_the_budget():
    assert SequentialTest(64, 0.99).looks(2) == [4, 6, 8, 12, 16, 24, 32, 48, 64] and SequentialTest(10, 0.99).looks(
        1
    ) == [4, 6, 8, 10]
    assert SequentialTest(64).looks(2) == [64]


def test_comparison_draws_small_counts_more_often_unless_something_else_was_chosen():
    e = experiment()
    model = random_network(e, 0).model
    assert isinstance(for_comparison(Nelbo(), model).mask_sampler, TiltedCount)
    assert isinstance(for_comparison(Nelbo(Bernoulli()), model).mask_sampler, Bernoulli)


@pytest.mark.parametrize("masks", ["common", "independent"])
def test_token_attributions_add_up_to_the_log_likelihood_ratio(masks):
    e = experiment()
    models = two_models(e)
    rows = [5, 0, 3]
    test = SequentialTest(8, 0.9, masks)
    found = scores_of(e, models, test)
    place = [found.text_id_M.tolist().index(e.build.data().split("test")[r]["text_id"]) for r in rows]
    draws = {row: int(found.draws_M[m]) for row, m in zip(rows, place, strict=True)}
    nats = token_attributions(models, e.build.data(), "test", draws, test, Nelbo(), 3)
    for m, nats_CL in zip(place, nats, strict=True):
        np.testing.assert_allclose(-np.nansum(nats_CL, axis=1), found.log_p_MC[m], rtol=1e-4)
        assert np.isnan(nats_CL[:, 0]).all(), "a given BOS is not weighed"


@pytest.mark.parametrize("fill", ["null", "eos"])
def test_the_likelihood_of_a_text_does_not_depend_on_the_weight_of_its_few_masks(fill):
    e = experiment(f"data.fill={fill}")
    models = two_models(e)
    test, many = SequentialTest(4, 0.51), SequentialTest(256)
    few = [score_classes(e.trainer, models, e.build.data(), "test", Nelbo(), test, s, EVEN) for s in range(12)]
    exact = scores_of(e, models, many)
    assert np.allclose(exact.weight_MP.mean(1), exact.tokens_M, rtol=0.02)
    found_SM = np.stack([nats_per_token(one, EVEN) for one in few])
    plain_SM = np.stack([nats_per_token(replace(one, weight_MP=None), EVEN) for one in few])
    assert found_SM.std(0).mean() < 0.7 * plain_SM.std(0).mean()
    se_M = found_SM.std(0, ddof=1) / np.sqrt(len(few))
    assert np.abs((found_SM.mean(0) - nats_per_token(exact, EVEN)) / se_M).max() < 5


def test_an_estimate_from_several_orders_counts_them_and_has_no_parts():
    e = experiment()
    models = two_models(e)
    found = scores_of(e, models, SequentialTest(3), AnyOrder())
    assert (found.draws_M == 3).all() and not found.has_several_draws
    assert found.evaluations_per_draw == found.tokens_M.mean()
    with pytest.raises(ValueError, match="is not a sum over tokens; use eval.estimator=auto"):
        token_attributions(models, e.build.data(), "test", {0: 3}, SequentialTest(3), AnyOrder(), 3)
    result = SimpleNamespace(scores=found, log_prior_C=EVEN, data=e.build.data(), split="test")
    assert explain(models, result, AnyOrder(), SequentialTest(3), 2, 3) == []


def test_a_conditional_network_serves_all_classes():
    e = experiment("classify.sharing=conditional")
    diffusion = random_network(e, 0)
    torch.nn.init.normal_(diffusion.backbone.blocks[0].adaLN_modulation.weight)
    found = scores_of(e, [ClassModel(diffusion, k) for k in range(2)], SequentialTest(4))
    assert (found.log_p_MC[:, 0] != found.log_p_MC[:, 1]).all()
    unconditional = scores_of(e, [ClassModel(diffusion, -1), ClassModel(diffusion)], SequentialTest(4))
    assert (unconditional.log_p_MC[:, 0] == unconditional.log_p_MC[:, 1]).all()


def fake_scores() -> ClassScores:
    nats = np.array([[[1.0, 3.0], [4.0, 4.0]], [[5.0, np.nan], [2.0, np.nan]]])
    rate = np.where(np.isnan(nats[:, 0]), np.nan, [0.25, 0.75])
    return ClassScores(
        np.array([7, 9]),
        np.array([0, 0]),
        nats,
        rate,
        1,
        np.array([4, 4]),
        np.array([4, 2]),
        1.0,
        "NELBO",
        "a test",
        False,
    )


def test_an_interval_has_its_probability_inside():
    nats_MCK, zero_M = np.random.default_rng(0).normal(scale=3, size=(200, 2, 4)), np.zeros(200, dtype=int)
    rate_MK = np.full((200, 4), 0.5)
    known = ClassScores(np.arange(200), zero_M, nats_MCK, rate_MK, 1, zero_M + 10, zero_M + 4, 0.0, "", "", False)
    low_MC, high_MC = known.interval(np.log([0.5, 0.5]))
    posterior_MC = known.posterior(np.log([0.5, 0.5]))
    assert ((low_MC <= posterior_MC) & (posterior_MC <= high_MC)).all() and (low_MC < high_MC).all()
    exact = replace(known, exact=True)
    assert np.array_equal(*exact.interval(np.log([0.5, 0.5])))


def test_predictions_come_back_for_the_same_texts_only(tmp_path):
    scores, posterior = fake_scores(), np.array([[0.9, 0.1], [0.2, 0.8]])
    text_M = text_hashes(["a", "b"])
    write_predictions(tmp_path, scores, text_M, posterior, {"temperature": posterior[:, ::-1]})
    path = predictions_file(tmp_path)
    table = pq.read_table(path).to_pydict()
    assert table["posterior_0"] == table["calibrated_temperature_1"] == [0.9, 0.2]
    assert table["text_id"] == [7, 9] and table["prediction"] == [0, 1] and table["draws"] == [2, 1]
    assert table["log_p_0"] == [-2.0, -5.0] and table["se_0"][0] == pytest.approx(1.0) and np.isnan(table["se_0"][1])
    assert table["margin"] == [2.0, 3.0] and table["margin_se"][0] == pytest.approx(1.0)
    np.testing.assert_array_equal(read_posterior(path, np.array([9]), np.array([0]), text_M[1:]), posterior[1:])
    columns = ("calibrated_length", "calibrated_temperature", "posterior")
    found = read_posterior(path, np.array([7, 9]), np.array([0, 0]), text_M, columns)
    np.testing.assert_array_equal(found, posterior[:, ::-1])
    for ids, labels, text in (([9, 8], [0, 0], "ba"), ([9], [1], "b"), ([9], [0], "c")):
        with pytest.raises(ValueError, match="classify.compare"):
            read_posterior(path, np.array(ids), np.array(labels), text_hashes(text))
    with pytest.raises(FileNotFoundError, match="classify.compare"):
        predictions_file(tmp_path / "nowhere")


def test_other_runs_are_read_before_the_training(tmp_path, caplog):
    data = experiment().build.data()
    texts = text_keys(data, "test")
    number, half = len(texts.number_M), np.full((len(texts.number_M), 2), 0.5)
    assert texts.number_M.tolist() == data.texts("test")["text_id"][:]
    nats_MCK = np.ones((number, 2, 1))
    zero_M = np.zeros(number, dtype=int)
    rate_MK = np.full((number, 1), 0.5)
    known = ClassScores(texts.number_M, texts.label_M, nats_MCK, rate_MK, 1, zero_M + 9, zero_M + 1, 0.0, "", "", False)
    read = lambda *paths, prior=EVEN: ComparedMethods(compare=paths).other_runs(data, "test", tmp_path / "b", prior)
    for name in "ab":
        write_predictions(tmp_path / name, known, texts.hash_M, half, {})
    assert np.array_equal(read("a")["a"].posterior_MC, half)
    with pytest.raises(ValueError, match="b/../a/ is the folder of a; name each other run once"):
        read("a", "b/../a/")
    with pytest.raises(ValueError, match="b is the folder of this run itself"):
        read("b")
    (tmp_path / "a" / "results.json").write_text('{"prior": {"negative": 0.5, "positive": 0.5}}')
    read("a")
    assert "has the prior" not in caplog.text
    read("a", prior=np.log([0.3, 0.7]))
    assert "has the prior {'negative': 0.5, 'positive': 0.5} and this run {'negative': 0.3" in caplog.text
    write_predictions(tmp_path / "a", known, texts.hash_M[::-1], half, {})
    with pytest.raises(ValueError, match="is about other texts"):
        read("a")


def test_no_method_sees_what_is_cut_off_a_text():
    data = experiment("model.length=16", "data.long_texts=truncate").build.data()
    cut = _texts(data, "test")
    for text, ids, whole in zip(cut.texts, cut.ids, data.texts("test")["text"][:], strict=True):
        words, before = (re.findall(r"\w+|[^\w\s]", one.lower()) for one in (text, whole))
        assert len(words) <= len(ids) <= 16 and words == before[: len(words)]


def test_a_temperature_at_its_limit_is_said(caplog):
    """Two texts whose classes are told apart without an error do not say how sure the model may be."""
    scores = fake_scores()
    fit(replace(scores, label_M=np.array([0, 1])), EVEN)
    assert "the fitted temperature is at a limit, 0.1: 2 validation texts" in caplog.text
    caplog.clear()
    fit(replace(scores, label_M=np.array([1, 1])), EVEN)  # the surer prediction is right, the other is wrong
    assert "limit" not in caplog.text


def test_everything_is_reported_and_the_models_are_used_again(capsys):
    Path("other.txt").write_text("Film the subtle my superb.\nNo film this was.\nFresh fresh fresh.\n")
    ask = [*TINY, "mode=classify", "classify.num_draws=8", "classify.confidence=0.8", "classify.calibrate=true"]
    results = run(*ask, "classify.other_texts=other.txt")
    html = next(Path().rglob("classify/test/report.html")).read_text()
    light = [*ask, "classify.baselines=false", "sampling.num_sample_log=0", "classify.num_examples=0",
             "classify.calibrate=false"]  # fmt: skip
    names = set(results["methods"])
    assert {"this model", "this model, temperature fitted", "naive Bayes, unigrams", "Bayes-optimal"} <= names
    assert "this model, temperature by length" in names
    (mixed,) = (method for name, method in results["methods"].items() if name.startswith("ensemble with "))
    assert 0 <= mixed["weight_of_this_model"] <= 1 and results["temperature_by_length"]["mean_tokens"] > 1
    assert results["accuracy_at_coverage"]["1.0"] == results["accuracy"] and results["aurc"].value >= 0
    assert results["other_texts"]["texts"] == 3 and 0 <= results["other_texts"]["auroc_of_likelihood"].value <= 1
    assert results["texts"] == 8 and results["accuracy_wilson_95"][0] <= results["accuracy"].value
    folder = next(Path().rglob("classify/test"))
    saved = json.loads((folder / "results.json").read_text())
    assert saved["protocol"]["data"] == "reviews" and saved["network_evaluations_per_text"] <= 16
    assert [Path(model["checkpoint"]).is_file() and model["steps"] > 0 for model in saved["models"]] == [True, True]
    columns = pq.read_table(folder / "predictions.parquet").column_names
    assert {"calibrated_temperature_1", "calibrated_length_1"} <= set(columns)
    for heading in ("Accuracy", "Calibration", "Abstention", "Texts from elsewhere", "Accuracy by draws",
                    "Token attributions"):  # fmt: skip
        assert heading in html
    folder = folder.rename("before")  # this run has its place
    again = run(*light, f"classify.compare=[{folder}]", "classify.prior=[0.9,0.1]")
    assert "complete:" in capsys.readouterr().out and again["prior"]["negative"] == pytest.approx(0.9)
    assert again["methods"][str(folder)]["accuracy"] == results["accuracy"]
    assert "ensemble of 2 runs" in again["methods"] and again["other_texts"] is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["classify.confidence=0.3"], "classify.confidence=0.3"),
        (["classify.prior=even"], "classify.prior=even"),
        (["classify.masks=both"], "classify.masks=both"),
        (["classify.masks=independent", "algo=ar"], "classify.masks=independent"),
        (["classify.masks=independent", "algo=bd3lm", "block_size=1"], "classify.masks=independent"),
        (["classify.sharing=some"], "classify.sharing=some"),
        (["classify.sharing=conditional", "backbone=dimamba"], "dimamba"),
        (["classify.compare=[nowhere]", "eval.estimator=auto"], "classify.compare"),
        (["eval.estimator=importance_weighted", "classify.num_draws=2"], "classify.confidence=0.9"),
    ],
)
def test_mistakes_are_named(overrides, message):
    with pytest.raises((ValueError, FileNotFoundError, InstantiationException), match=message):
        run(*TINY, "mode=classify", *overrides)
