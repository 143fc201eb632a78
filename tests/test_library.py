"""The library: what a notebook does in a few lines is what main.py does."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import palimpsest
from palimpsest.scripts import generate
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
    measured = model.log_likelihood(texts, draws=8)
    assert measured.nats_per_token == pytest.approx(results["nll_nats_per_token"].value, rel=0.05)
    assert (measured.evaluations == 8).all() and (measured.se > 0).all() and measured.tokens.sum() > len(texts)
    again = model.log_likelihood(texts, draws=8)
    assert (again.log_p == measured.log_p).all(), "a function of the seed"


def test_texts_are_written(model):
    texts = model.sample(3)
    assert len(texts) == 3 and all(texts) and texts == model.sample(3)
    assert model.sample(1, seed=2) != texts[:1]
    assert all(text.startswith("the film") for text in model.sample(2, prompt="the film", length=12))


def test_texts_bring_their_traces(model):
    (text,) = model.sample(1, template="the [MASK] was {{3}} .", sampler="first_hitting", seed=3)
    assert isinstance(text, str) and text.startswith("the ") and text.endswith(".")
    assert len(text.tokens) == len(text.steps) == len(text.confidence) and text.evaluations > 1
    written = [step for step in text.steps if step]
    assert len(written) == 4 and len(set(written)) == 4, "first hitting writes one token a step"
    assert len({step for step in model.sample(1, steps=2, seed=3)[0].steps if step}) <= 3
    with pytest.raises(ValueError, match="nonsense"):
        model.sample(1, sampler="nonsense")


def test_other_estimators(model):
    bound = model.log_likelihood(TEXTS, draws=16)
    exact = model.log_likelihood(TEXTS, estimator="duel")
    assert "DUEL" in exact.kind and "DUEL" not in bound.kind and (exact.se == 0).all()


def test_a_notebook_trains(folder, monkeypatch):
    monkeypatch.chdir(folder)
    words = [word for word in RUN if not word.startswith(("trainer.max_steps", "mode="))]
    model = palimpsest.train(*words, trainer={"max_steps": 2}, checkpointing={"save_dir": "trained"}, data="reviews")
    assert model.path.startswith("trained/checkpoints") and model.sample(1, length=6)
    with pytest.raises(ValueError, match="^T=7 .*contradict"):
        palimpsest.train(*words, data="reviews", T=7, training={"masking": "exact_count"})
    with pytest.raises(ValueError, match="training.ema=2"):
        palimpsest.train(training={"ema": 2})
    with pytest.raises(ValueError, match="what data has: .*path"):
        palimpsest.train(data="labelled", **{"data.pth": "x"})


def test_a_classifier_says_what_it_knows(folder, monkeypatch):
    monkeypatch.chdir(folder)
    classifier = palimpsest.load_classifier("run")
    found = classifier.predict(TEXTS, draws=8, confidence=1.0, attributions=True)
    assert found.classes == classifier.classes and found.label[0] in found.classes and found.unlike is None
    assert np.allclose(found.probability.sum(1), 1)
    assert (found.low <= found.probability).all() and (found.probability <= found.high).all()
    for m in range(2):
        parts_CL = found.attributions[m]
        assert parts_CL.shape == (2, len(found.tokens[m]))
        assert np.allclose(np.nansum(parts_CL, axis=1), found.log_p[m]), "tokens add up to the text"
    run(*RUN, "mode=classify", "checkpointing.save_dir=run", "classify.num_draws=4", "classify.baselines=false")
    strange = "wonderful wonderful the dull was is the and and plot plot plot"
    later = palimpsest.load_classifier("run").predict([*TEXTS, strange], draws=4)
    assert later.unlike is not None and later.unlike.shape == (3,)
    for wrong in ({"draws": 0}, {"confidence": 0}, {"confidence": 2}):
        with pytest.raises(ValueError, match=r"must be a whole number from 1, and confidence=.* in \(0.5, 1\]"):
            classifier.predict(TEXTS, **wrong)
    with pytest.raises(ValueError, match="run holds one model per class; .*label=0, or use palimpsest.load_classifier"):
        palimpsest.load("run")
    with pytest.raises(FileNotFoundError, match="holds no classifier"):
        palimpsest.load_classifier("cache")
    with pytest.raises(FileNotFoundError, match="holds no classifier"):
        palimpsest.load_classifier("run/label=7")


def test_classes_by_bayes_rule(folder, monkeypatch):
    monkeypatch.chdir(folder)
    p = palimpsest.classify(["run/label=0", "run/label=1"], TEXTS, draws=4)
    assert p.shape == (2, 2) and np.allclose(p.sum(1), 1)
    same = palimpsest.classify(["run/label=1", "run/label=1"], TEXTS, draws=4)
    assert np.allclose(same, 0.5), "one model against itself, under the same masks"
    skewed = palimpsest.classify(["run/label=1", "run/label=1"], TEXTS, draws=4, prior=[0.9, 0.1])
    assert np.allclose(skewed[:, 0], 0.9)
    for wrong in ("run/label=0", ["run/label=0"]):
        with pytest.raises(ValueError, match="give a list of models, one per class"):
            palimpsest.classify(wrong, TEXTS)
    words = ["data.tokenizer_name_or_path=bpe", "data.vocab_size=300", "data.long_texts=truncate"]
    trained(*RUN, *words, "data.label=1", "checkpointing.save_dir=other")
    with pytest.raises(ValueError, match="different tokenizers"):
        palimpsest.classify(["run/label=0", "other/label=1"], TEXTS)
    with pytest.raises(ValueError, match="prior=empirical: .*give the share of each class"):
        palimpsest.classify(["run/label=0", "run/label=1"], TEXTS, prior="empirical")
    trained(*RUN, "model.length=16", "data.long_texts=truncate", "data.label=1", "checkpointing.save_dir=short")
    with pytest.raises(ValueError, match=r"different parts of text 1 \(\d+, 1\d tokens\); load them with the same"):
        palimpsest.classify(["run/label=0", "short/label=1"], [TEXTS[0][:8], " ".join(TEXTS * 2)], draws=4)


def test_a_network_of_all_classes_is_no_model_of_one(folder, monkeypatch):
    monkeypatch.chdir(folder)
    start = ["classify.pretrain=all", "classify.pretrain_steps=2"]
    trained(*RUN, *start, "classify.sharing=conditional", "checkpointing.save_dir=both")
    with pytest.raises(ValueError, match="is one network for all classes; palimpsest.load_classifier reads it"):
        palimpsest.classify(["both", "both"], TEXTS)
    assert palimpsest.load("both/pretrained").sample(1), "a shared start is a model like any other"
    with pytest.raises(ValueError, match="both/pretrained holds a shared start, which knows no class yet"):
        palimpsest.load_classifier("both/pretrained")


def test_what_does_not_fit_is_refused(folder, model, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(FileNotFoundError):
        palimpsest.load("run/label=7")
    with pytest.raises(ValueError, match="longer than model.length"):
        model.log_likelihood(["word " * 500])
    with pytest.raises(ValueError, match=r"give a list of texts, not one text: \['The film"):
        model.log_likelihood("The film is dull .")
    with pytest.raises(ValueError, match=r"text 1 .*does not fit model.length=72; correct it, or leave it out"):
        palimpsest.load("run/label=1", "data.long_texts=drop").log_likelihood(["x", "The film is dull . " * 50])
    with pytest.raises(ValueError, match="data.wrap=true cuts rows .* load the model with data.wrap=false"):
        palimpsest.load("run/label=1", "data.wrap=true").log_likelihood(TEXTS)
    for word in ("data.tokenizer_name_or_path=char", "data.vocab_size=7"):
        with pytest.raises(ValueError, match="another tokenizer|data.vocab_size=7"):
            palimpsest.load("run/label=1", word)
    with pytest.raises(ValueError, match="model=tiny: the sizes of the network are those of .*; leave it out"):
        palimpsest.load("run/label=1", "model=tiny")
    for number in (0, -1, 1.5):
        with pytest.raises(ValueError, match=f"number={number}: give a number of texts"):
            model.sample(number)
    with pytest.raises(ValueError, match=r"text 1 \(''\) has no tokens; correct it, or leave it out"):
        model.log_likelihood(["The film is dull .", ""])
    with pytest.raises(ValueError, match="7 is not a text; give a list of texts"):
        model.log_likelihood(["The film is dull .", 7])
    for length in (1, 1000):
        with pytest.raises(ValueError, match=f"length={length} must lie in 2..72"):
            model.sample(length=length)
    assert math.isfinite(model.log_likelihood(TEXTS, draws=1).log_p.sum())


def test_the_average_may_be_left_out_in_either_spelling(folder, monkeypatch):
    monkeypatch.chdir(folder)

    def weights(*typed: str) -> torch.Tensor:
        network = palimpsest.load("run/label=1", *typed).diffusion.backbone
        return torch.cat([p.flatten() for p in network.parameters()])

    raw = weights("eval.disable_ema=true")
    assert torch.equal(raw, weights("eval.disable_ema=True")) and not torch.equal(raw, weights())


def test_a_model_of_ones_own_file_can_be_sampled_from_by_the_script(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("".join(f"a note about the number {i}\n" for i in range(60)))
    own = ["data=text", "data.path=notes.txt", "data.wrap=false", "data.tokenizer_name_or_path=char", "model.length=32"]
    trained(*TINY, *own, "checkpointing.save_dir=own", "data.max_train_texts=null", "data.max_valid_texts=null")
    generate.generate(["--checkpoint", "own", "--steps", "2"])
    assert capsys.readouterr().out.strip()
