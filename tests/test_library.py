"""The library: what a notebook does in a few lines is what main.py does."""

from __future__ import annotations

import math

import numpy as np
import pytest

import palimpsest
from tests.helpers.commands import FEW, TINY, run, trained

RUN = [*TINY, *FEW, "trainer.max_steps=4", "data.cache_dir=cache"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of the first class and one of the second."""
    here = tmp_path_factory.mktemp("library")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        for label in (0, 1):
            trained(*RUN, f"data.label={label}", "checkpointing.save_dir=run")
    return here


@pytest.fixture
def model(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return palimpsest.load("run/label=1")


TEXTS = ["The film is dull .", "The plot is clever and the songs feel wonderful ."]


def test_it_exports_what_it_says():
    assert 20 <= len(palimpsest.__all__) <= 30 and set(dir(palimpsest)) >= set(palimpsest.__all__)
    for name in palimpsest.__all__:
        assert getattr(palimpsest, name).__doc__
    with pytest.raises(AttributeError, match="what it exports: .*load"):
        palimpsest.nonsense  # noqa: B018


def test_likelihoods_are_those_of_the_command(folder, model, monkeypatch):
    monkeypatch.chdir(folder)
    results = run(*RUN, "mode=ppl_eval", "data.label=1", "checkpointing.save_dir=run", "eval.num_draws=8")
    texts = model.data.texts("validation")["text"][:]
    measured = model.log_likelihood(texts, num_draws=8)
    assert measured.nats_per_token == pytest.approx(results["nll_nats_per_token"].value, rel=0.05)
    assert (measured.evaluations == 8).all() and (measured.se > 0).all() and measured.tokens.sum() > len(texts)
    again = model.log_likelihood(texts, num_draws=8)
    assert (again.log_p == measured.log_p).all(), "a function of the seed"


def test_texts_are_written(model):
    texts = model.sample(3)
    assert len(texts) == 3 and all(texts) and texts == model.sample(3)
    assert model.sample(1, seed=2) != texts[:1]
    assert all(text.startswith("the film") for text in model.sample(2, prefix="the film", length=12))


def test_classes_by_bayes_rule(folder, monkeypatch):
    monkeypatch.chdir(folder)
    p = palimpsest.classify(["run/label=0", "run/label=1"], TEXTS, num_draws=4)
    assert p.shape == (2, 2) and np.allclose(p.sum(1), 1)
    same = palimpsest.classify(["run/label=1", "run/label=1"], TEXTS, num_draws=4)
    assert np.allclose(same, 0.5), "one model against itself, under the same masks"
    skewed = palimpsest.classify(["run/label=1", "run/label=1"], TEXTS, num_draws=4, prior=[0.9, 0.1])
    assert np.allclose(skewed[:, 0], 0.9)


def test_what_does_not_fit_is_refused(folder, model, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(FileNotFoundError):
        palimpsest.load("run/label=7")
    with pytest.raises(ValueError, match="longer than model.length"):
        model.log_likelihood(["word " * 500])
    assert math.isfinite(model.log_likelihood(TEXTS, num_draws=1).log_p.sum())
