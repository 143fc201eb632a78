"""Guidance towards a class: its laws by enumeration, for masks and for random tokens, and through the command line."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from palimpsest.common.positions import Positions
from palimpsest.common.randomness import KeyedNoise
from palimpsest.denoisers import ClassGuided, ClassifierGuided, Denoiser
from palimpsest.evaluation.guidance import class_shares
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


def test_a_classifier_of_single_tokens_tilts_by_its_gradient():
    """To first order: the derivative of log p(class | text) by the amount of each token at a masked place."""
    torch.manual_seed(1)
    log_p_CV, log_prior_C = torch.randn(2, V + 1).double().log_softmax(-1), torch.tensor([0.3, 0.7]).double().log()
    model = ClassifierGuided(Masks(), 1, 2.0, log_p_CV, log_prior_C)
    x_BL = torch.tensor([[MASK, 1], [0, MASK]])
    at_BL = x_BL == MASK
    amount_BLV = torch.zeros(2, L, V + 1).double()
    amount_BLV[~at_BL] = torch.eye(V + 1).double()[x_BL[~at_BL]]
    amount_BLV.requires_grad_()
    said_BC = torch.einsum("blv,cv->bc", amount_BLV, log_p_CV) + log_prior_C
    (gain_BLV,) = torch.autograd.grad(said_BC.log_softmax(-1)[:, 1].sum(), amount_BLV)
    plain_NV = Masks().denoise(x_BL, None, Positions(at_BL))
    wanted_NV = (plain_NV + 2.0 * gain_BLV[at_BL]).log_softmax(-1)
    torch.testing.assert_close(model.denoise(x_BL, None, Positions(at_BL)), wanted_NV)
    off = ClassifierGuided(Masks(), 1, 0.0, log_p_CV, log_prior_C)
    assert torch.equal(off.denoise(x_BL, None, Positions(at_BL)), plain_NV)
    here, even_NV = Positions(torch.tensor([[True, False]])), torch.zeros(1, V + 1)
    beside = model._guided(even_NV, torch.tensor([[MASK, 1]]), here, attention_mask=torch.tensor([[1, 0]]))
    alone = model._guided(even_NV, torch.tensor([[MASK, MASK]]), here)
    torch.testing.assert_close(beside, alone, msg="padding says nothing of the class")
    whole_BLV = ClassifierGuided(Words(), 1, 2.0, log_p_CV[:, :V], log_prior_C).reverse(
        torch.tensor([[0, 1]]),
        torch.tensor([0.7]).double(),
        torch.tensor([0.4]).double(),
        Positions.everywhere(torch.tensor([[0, 1]])),
    )
    torch.testing.assert_close(whole_BLV.exp().sum(-1), torch.ones(L).double())


def test_the_shares_of_possible_texts_and_of_the_class_have_errors():
    truth = SimpleNamespace(posterior=lambda texts: np.array([[0.9, 0.1], [0.2, 0.8], [np.nan, np.nan], [0.1, 0.9]]))
    found = class_shares(truth, ["a"] * 4, 1)
    assert (found["possible"].value, found["of_the_class"].value, found["of_the_class"].texts) == (0.75, 2 / 3, 3)
    assert found["of_the_class"].low < 2 / 3 < found["of_the_class"].high
    none = SimpleNamespace(posterior=lambda texts: np.full((2, 2), np.nan))
    assert class_shares(none, ["a"] * 2, 1).keys() == {"possible"} and class_shares(None, [], 0) == {}


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
        ["sampling.guidance=3", "sampling.guidance_by=unigrams"],
    ):
        words = [*small, "mode=sample_eval", "classify.class=positive", *typed]
        results = run(*words)
        protocol = json.loads(next(tmp_path.rglob("sample_eval/results.json")).read_text())["protocol"]
        assert protocol["class"] == "positive" and results["possible"].texts == 4
        found[" ".join(typed)] = results["network_evaluations_per_sample"]
    one, two, free = found.values()
    assert two == pytest.approx(2 * one) and free == pytest.approx(one), "D-CFG asks the network twice, D-CBG once"


@pytest.mark.parametrize(("typed", "said"), [
    (["sampling.guidance=2"], "sampling.guidance=2.* add classify.class="),
    (["sampling.guidance_by=unigrams"], "^sampling.guidance_by=unigrams guides .* add classify.class="),
    (["classify.class=positive", "sampling.guidance_by=magic"], "sampling.guidance_by=magic.*network, unigrams"),
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
