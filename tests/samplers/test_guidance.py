"""Guidance towards a class: its laws by enumeration, for masks and for random tokens, and through the command line."""

from __future__ import annotations

import json
import math

import pytest
import torch

from palimpsest.common.positions import Positions
from palimpsest.common.randomness import KeyedNoise
from palimpsest.denoisers import ClassGuided, ClassifierGuided, Denoiser
from palimpsest.evaluation.noised_classifier import NoisedClassifier, fit_classifier
from palimpsest.experiment import running
from palimpsest.noise_schedule import LogLinear
from palimpsest.objectives.base import Model
from palimpsest.process import Absorbing, Uniform
from palimpsest.samplers import first_hitting, uniform
from palimpsest.settings.command_line import compose_config
from tests.helpers.commands import TINY, run
from tests.helpers.laws import any_order_law, assert_follows, texts
from tests.helpers.uniform import NO_NETWORK, Bayes, BayesUDLM, L, V, chain

MASK = V


def laws() -> tuple[torch.Tensor, torch.Tensor]:
    """Of the texts of two classes, (2, M), and of both together."""
    torch.manual_seed(8)
    p_CM = torch.rand(2, V**L).double() ** 3
    p_CM /= p_CM.sum(1, keepdim=True)
    return p_CM, p_CM.mean(0)


class Masks(Denoiser):
    """The exact denoiser of masks, with or without a class."""

    process = Absorbing(MASK)
    schedule = LogLinear()
    vocab_size = V + 1
    independent_unmasking = True

    def denoise(self, x_BL, t_B, at=None, class_id=None):
        p_CM, p_M = laws()
        texts_ML = texts(V, L)
        p_BM = p_M.expand(len(x_BL), -1) if class_id is None else p_CM[class_id]
        p_BM = p_BM * ((texts_ML == x_BL[:, None]) | (x_BL[:, None] == MASK)).all(-1)
        p_BLV = torch.einsum("bm,mlv->blv", p_BM, torch.eye(V + 1, dtype=torch.float64)[texts_ML])
        return at.take(p_BLV / p_BM.sum(-1)[:, None, None]).log()


class Words(Denoiser):
    """The exact denoiser of random tokens, with or without a class."""

    process = Uniform(V)
    schedule = LogLinear()
    vocab_size = V
    independent_unmasking = False

    def _model(self, class_id) -> Model:
        p_CM, p_M = laws()
        known = p_M if class_id is None else p_CM[int(class_id[0])]
        return Model(BayesUDLM(Bayes(known), LogLinear().full_range), NO_NETWORK)

    def denoise(self, x_BL, t_B, at=None, class_id=None):
        return self._model(class_id).denoise(x_BL, t_B, at)

    def reverse(self, x_BL, t_B, s_B, at, class_id=None):
        return self._model(class_id).reverse(x_BL, t_B, s_B, at)


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_masks_follow_the_guided_law(weight):
    model, rows = ClassGuided(Masks(), 1, weight), 20_000
    blank = torch.full((rows, L), MASK)
    out = first_hitting.sample(model, blank, KeyedNoise(3, torch.arange(rows)))
    law = any_order_law(model, L, V + 1)
    assert_follows(out.ids_BL, law)
    assert (out.evaluations_B == L * (1 if weight in (0, 1) else 2)).all()
    p_CM, p_M = laws()
    known = dict(zip(map(tuple, texts(V, L).tolist()), (p_M if weight == 0 else p_CM[1]).tolist(), strict=True))
    close = all(math.isclose(law[text], p, rel_tol=1e-9) for text, p in known.items())
    assert close == (weight in (0, 1)), "1 is the conditional distribution and 0 the unconditional one, exactly"


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.0])
def test_random_tokens_follow_the_guided_chain(weight):
    model, rows = ClassGuided(Words(), 0, weight), 20_000
    out = uniform.sample(
        model, torch.full((rows, L), -1), KeyedNoise(4, torch.arange(rows)), steps=3, noise_removal=False
    )
    law = chain(model, 3, (-1,) * L)
    assert_follows(out.ids_BL, law)
    inner = Words()._model(None if weight == 0 else torch.tensor([0]))
    plain = chain(inner, 3, (-1,) * L)
    assert (max(abs(law[text] - plain[text]) for text in law) < 1e-12) == (weight in (0, 1))


def test_more_weight_makes_the_class_likelier():
    p_CM, p_M = laws()
    of_class_M = p_CM[1] / p_CM.sum(0)
    shares = []
    for weight in (0.0, 1.0, 3.0):
        law = any_order_law(ClassGuided(Masks(), 1, weight), L, V + 1)
        shares.append(
            sum(law[text] * float(p) for text, p in zip(map(tuple, texts(V, L).tolist()), of_class_M, strict=True))
        )
    assert shares[0] == pytest.approx(0.5) and shares[0] < shares[1] < shares[2]


def test_a_classifier_tilts_by_its_gradient():
    """To first order: the derivative of log p(class | text) by the amount of each token, here through mixtures."""
    torch.manual_seed(1)
    classifier = NoisedClassifier(V + 1, 3, LogLinear()).eval().requires_grad_(False)
    torch.nn.init.normal_(classifier.body.blocks[0].adaLN_modulation.weight)
    x_BL, t_B = torch.tensor([[MASK, 1, MASK], [0, MASK, 2]]), torch.tensor([0.3, 0.8]).double()
    here_BL, at_BL = torch.tensor([[1, 1, 0], [1, 1, 1]]), x_BL == MASK
    amount_BLV = torch.eye(V + 1)[x_BL].requires_grad_()
    (gain_BLV,) = torch.autograd.grad(classifier(amount_BLV, t_B, here_BL)[:, 2].sum(), amount_BLV)
    with torch.inference_mode():
        gain_NV = classifier.gain(x_BL.clone(), t_B.clone(), 2, Positions(at_BL), here_BL.clone())
    torch.testing.assert_close(gain_NV, gain_BLV[at_BL])
    assert not gain_BLV[0, 2].any(), "padding says nothing of the class"

    x_BL, at_BL = x_BL[:, :L], at_BL[:, :L]
    plain_NV = Masks().denoise(x_BL, t_B, Positions(at_BL))
    model = ClassifierGuided(Masks(), 1, 2.0, classifier)
    wanted_NV = (plain_NV + 2.0 * classifier.gain(x_BL, t_B, 1, Positions(at_BL))).log_softmax(-1)
    torch.testing.assert_close(model.denoise(x_BL, t_B, Positions(at_BL)), wanted_NV)
    off = ClassifierGuided(Masks(), 1, 0.0, classifier)
    assert torch.equal(off.denoise(x_BL, t_B, Positions(at_BL)), plain_NV)
    s_B, words_BL = torch.tensor([0.2]).double(), torch.tensor([[0, 1]])
    everywhere = Positions.everywhere(words_BL)
    of_words = NoisedClassifier(V, 2, LogLinear()).eval().requires_grad_(False)
    whole_NV = ClassifierGuided(Words(), 1, 2.0, of_words).reverse(words_BL, t_B[:1], s_B, everywhere)
    torch.testing.assert_close(whole_NV.exp().sum(-1), torch.ones(L).double())


@pytest.mark.parametrize("process", [Absorbing(6), Uniform(6)], ids=["masks", "random tokens"])
def test_a_classifier_learns_noised_texts(process):
    """Texts of two classes with other words each: as sure as the noise allows."""
    torch.manual_seed(0)
    classifier, generator = NoisedClassifier(7, 2, LogLinear().full_range), torch.Generator().manual_seed(0)

    def rows(number: int) -> dict[str, torch.Tensor]:
        label = torch.randint(2, (number,), generator=generator)
        return {"label": label, "input_ids": torch.randint(3, (number, 8), generator=generator) + 3 * label[:, None]}

    fit_classifier(classifier, process, rows, steps=60, seed=0)
    few, many = torch.full((64,), 0.05).double(), torch.full((64,), 0.999).double()
    batch = rows(64)
    for t_B, least, most in ((few, 0.97, 1.0), (many, 0.3, 0.75)):
        noise = KeyedNoise(5, torch.arange(64))
        x_BL = process.corrupt(batch["input_ids"], LogLinear()(t_B).alpha, noise, torch.ones(64, 8).bool())
        right = (classifier(x_BL, t_B).argmax(-1) == batch["label"]).double().mean()
        assert least <= right <= most


FEW = ["data.max_train_texts=64", "data.max_valid_texts=16", "data.max_test_texts=16", "sampling.num_samples=4"]


@pytest.mark.parametrize("algo", [[], ["algo=udlm"]], ids=["subs", "udlm"])
def test_the_command_line_draws_texts_of_a_class(tmp_path, monkeypatch, algo):
    monkeypatch.chdir(tmp_path)
    small = [*TINY, *FEW, *algo, "classify.sharing=conditional"]
    running.run(compose_config([*small]), "a training")
    found = {}
    for typed in (
        ["sampling.guidance=1"],
        ["sampling.guidance=3"],
        ["sampling.guidance=3", "sampling.guidance_by=classifier", "sampling.guidance_steps=2"],
    ):
        words = [*small, "mode=sample_eval", "classify.class=positive", *typed]
        results = run(*words)
        protocol = json.loads(next(tmp_path.rglob("sample_eval/results.json")).read_text())["protocol"]
        assert protocol["class"] == "positive" and {"possible", "of_the_class"} <= set(results)
        found[" ".join(typed)] = results["network_evaluations_per_sample"]
    one, two, free = found.values()
    assert two == pytest.approx(2 * one) and free == pytest.approx(one), "D-CFG asks the network twice, D-CBG once"


@pytest.mark.parametrize(("typed", "said"), [
    (["sampling.guidance=2"], "sampling.guidance=2.* add classify.class="),
    (["sampling.guidance_by=classifier"], "^sampling.guidance_by=classifier guides .* add classify.class="),
    (["classify.class=positive", "sampling.guidance_by=magic"], "sampling.guidance_by=magic.*network, classifier"),
    (["classify.class=sideways"], "classify.class=sideways is none of the classes of these texts: negative, positive"),
    (["classify.class=positive"], "classify.class=positive needs a network with class.*sharing=conditional"),
])  # fmt: skip
def test_what_cannot_guide_is_refused(tmp_path, monkeypatch, typed, said):
    monkeypatch.chdir(tmp_path)
    small = [*TINY, *FEW]
    if typed == ["classify.class=positive"]:
        running.run(compose_config(small), "a training")
    with pytest.raises(ValueError, match=said):
        run(*small, "mode=sample_eval", *typed)
