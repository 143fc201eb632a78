"""Tasks on measurements: baselines, errors, Bayes' rule, independence of the batch."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch

from palimpsest.common.metrics import Estimate, NLLMeter
from palimpsest.corpora.reviews import ReviewGrammar
from palimpsest.data.collate import Collate
from palimpsest.data.unigram import token_counts, unigram_nll
from palimpsest.estimators.nelbo import Nelbo
from palimpsest.evaluation.likelihood import Precision, row_numbers, score
from palimpsest.experiment.experiment import Experiment
from palimpsest.objectives.mask_sampling import Bernoulli
from palimpsest.settings.command_line import compose_config
from palimpsest.tasks.base import write_results
from tests.helpers.commands import TINY, run


def test_the_ratio_estimate_and_its_error():
    """Against the delta method written out, and the same however the texts are batched."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 50, 400)
    nll = tokens * rng.normal(2.0, 0.3, 400)
    whole, parts = NLLMeter(), NLLMeter()
    columns = {"sample_id": torch.arange(400), "text_id": torch.arange(400)}
    whole.update(torch.from_numpy(nll), torch.from_numpy(tokens), columns)
    for i in range(0, 400, 7):
        here = slice(i, i + 7)
        batch = {name: column[here] for name, column in columns.items()}
        parts.update(torch.from_numpy(nll[here]), torch.from_numpy(tokens[here]), batch)
    ratio = nll.sum() / tokens.sum()
    residual = nll - ratio * tokens
    se = residual.std(ddof=1) / math.sqrt(400) / tokens.mean()
    assert whole.estimate().value == pytest.approx(ratio) == pytest.approx(parts.estimate().value)
    assert whole.estimate().se == pytest.approx(se, rel=1e-6) == pytest.approx(parts.estimate().se, rel=1e-6)
    assert whole.estimate().exp().se == pytest.approx(math.exp(ratio) * se, rel=1e-6)


def test_nothing_measured_is_an_error():
    with pytest.raises(ValueError, match="empty"):
        NLLMeter().estimate()


@pytest.mark.parametrize("causal", [False, True])
def test_the_unigram_baseline_begins_where_scoring_does(causal):
    """The second row is a window without BOS (id 0): a bound scores its first token, a causal model is given it."""
    rows = datasets.Dataset.from_dict({"input_ids": [[0, 2, 2, 1], [3, 2, 1]]})
    packing = SimpleNamespace(bos=True, chunk_special=False)
    data = SimpleNamespace(
        collate=Collate(5, 1, (0,), fill=True),
        fill="eos",
        vocabulary=SimpleNamespace(size=4, bos_id=0),
        split=lambda name: rows,
        packings={"train": packing},
    )
    counts_V = np.array([0, 2, 3, 1])
    np.testing.assert_array_equal(token_counts(data, causal)[0], counts_V)
    nats_V = -np.log((counts_V + 1) / (counts_V + 1).sum())
    second = [2, 1] if causal else [3, 2, 1]
    assert unigram_nll(data, "test", causal) == pytest.approx([nats_V[[2, 2, 1]].sum(), nats_V[second].sum()])


def test_unigram_baseline_leaves_given_tokens_out():
    """Ids 0 and 1 are BOS and EOS; of the other two, one is three times as frequent (plus one each)."""
    texts = {"train": [[0, 2, 2, 2, 1], [0, 3, 1]], "test": [[0, 2, 3, 1]]}
    rows = {split: datasets.Dataset.from_dict({"input_ids": ids}) for split, ids in texts.items()}
    data = SimpleNamespace(
        collate=Collate(5, 1, (0, 1)),
        fill=None,
        vocabulary=SimpleNamespace(size=4),
        split=rows.__getitem__,
    )
    assert unigram_nll(data, "test") == pytest.approx([-math.log(4 / 6) - math.log(2 / 6)])


def test_row_numbers_follow_sample_ids_in_any_order():
    assert row_numbers({"sample_id": [30, 10, 20]}, np.array([10, 20, 30])).tolist() == [1, 2, 0]


def test_a_likelihood_does_not_depend_on_the_batch_and_mask_rates_add_up(untrained):
    measured = []
    for size in (3, 8):
        experiment, data, diffusion = untrained(f"loader.eval_batch_size={size}")
        loader = data.eval_dataloader("validation")
        measured.append(score(experiment.trainer("test"), diffusion, loader, Nelbo(Bernoulli()), Precision(4), seed=0))
    np.testing.assert_allclose(measured[0].nll_MK, measured[1].nll_MK, rtol=1e-4)
    np.testing.assert_array_equal(measured[0].num_masked_MP, measured[1].num_masked_MP)
    rate, nats = measured[0].by_mask_rate()
    assert ((rate >= 0) & (rate <= 1)).all() and all(one.value > 0 for one in nats) and (np.diff(rate) > 0).all()


def test_rounds_go_on_until_the_monte_carlo_error_is_small_enough(untrained):
    """Four times the draws halve the error: the stopping rule must use about as many as that says."""
    experiment, data, diffusion = untrained()
    ask = lambda *limits: score(  # noqa: E731
        experiment.trainer("test"),
        diffusion,
        data.eval_dataloader("validation"),
        Nelbo(Bernoulli()),
        Precision(4, *limits),
        seed=0,
    )
    eight = ask(1e-9, 32)
    assert eight.evaluations_M.tolist() == [32] * 8 and eight.round_K.max() == 7
    wanted = eight.monte_carlo_se * 1.3
    enough = ask(wanted, 1024)
    assert enough.monte_carlo_se <= wanted and enough.round_K.max() < 7
    assert len(np.unique(enough.nll_MK)) == enough.nll_MK.size, "every round draws anew"


@pytest.mark.parametrize("command", [["mode=train"], ["mode=ppl_eval"]])
def test_the_true_entropy_is_that_of_the_texts_that_fit(tmp_path, monkeypatch, command):
    """Some texts are left out, so the number of a row is not that of its text."""
    monkeypatch.chdir(tmp_path)
    ask = [*TINY, "data.max_valid_texts=40", "eval.num_draws=1", "model.length=40", "data.long_texts=drop"]
    run(*ask)
    found = run(*ask, *command)
    data, truth = Experiment(compose_config(ask), "test").build.data(), ReviewGrammar()
    texts, kept = data.texts("validation"), data.split("validation")
    text_of = dict(zip(texts["text_id"], texts["text"], strict=True))
    assert len(kept) < len(texts) == 40
    counted = np.array([len(ids) - 2 for ids in kept["input_ids"]])  # without BOS and EOS
    rows = [text_of[number] for number in kept["text_id"]]
    joint = np.logaddexp(truth.log_prob(rows, 0), truth.log_prob(rows, 1))
    lengths = np.logaddexp(truth.log_prob_length(counted, 0), truth.log_prob_length(counted, 1))
    assert found["true_nats_per_token"].value == pytest.approx((lengths - joint).sum() / counted.sum())


def test_the_true_entropy_is_unknown_where_texts_are_cut(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for way in ("truncate", "windows"):
        found = run(*TINY, "eval.num_draws=1", "model.length=32", f"data.long_texts={way}")
        assert found["true_nats_per_token"] is None
    results = run(*TINY, "mode=ppl_eval", "eval.num_draws=2", "model.length=32", f"data.long_texts={way}")
    assert results["texts"] == 8 and 2 < results["network_evaluations_per_text"] < 6, "several windows a text"


def test_results_are_json_without_nan(tmp_path):
    write_results(tmp_path, {"x": Estimate(1.0, math.nan), "y": [math.inf, 2.0]})
    text = (tmp_path / "results.json").read_text()
    assert json.loads(text) == {"x": {"value": 1.0, "se": None}, "y": [None, 2.0]} and "NaN" not in text


def test_results_that_are_replaced_are_named(tmp_path, capsys):
    write_results(tmp_path, {"command": "sampling.predictor=ddpm"})
    write_results(tmp_path, {"command": "sampling.predictor=ddpm"})
    assert not capsys.readouterr().out
    write_results(tmp_path, {"command": "sampling.predictor=block"})
    assert "held the results of: sampling.predictor=ddpm" in capsys.readouterr().out


def test_kinds_of_likelihood_do_not_overwrite_one_another_and_say_what_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ask = [*TINY, "data.max_valid_texts=3", "eval.num_draws=1"]
    run(*ask)
    for more in ([], ["eval.estimator=duel"], ["eval.estimator=importance_weighted"], ["eval.split=test"]):
        run(*ask, "mode=ppl_eval", *more)
    found = {
        path.parent.name: json.loads(path.read_text())["protocol"] for path in tmp_path.rglob("ppl_eval/*/results.json")
    }
    assert {name: known["kind"] for name, known in found.items()} == {
        "validation": "NELBO",
        "test": "NELBO",
        "validation-duel": "exact likelihood of the ordered sampler (DUEL)",
        "validation-importance-weighted_any-order_bound": "importance-weighted any-order bound",
    }
    results = json.loads(next(tmp_path.rglob("ppl_eval/test/results.json")).read_text())
    assert (results["units"], results["num_units"]) == ("texts", results["texts"])
    assert found["validation"]["parameterization"] == "subs" and found["validation"]["seed"] == 1
