"""Samplers: their laws against exact enumeration, given tokens, caching, seeds, float64 draws, truncation."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from scipy import stats

from palimpsest.common.randomness import KeyedNoise
from palimpsest.models.dit import DiT
from palimpsest.noise_schedule import Cosine, LogLinear
from palimpsest.objectives.ar import AR
from palimpsest.objectives.base import Model
from palimpsest.objectives.d3pm import D3PM
from palimpsest.objectives.sedd import SEDD
from palimpsest.objectives.subs import Subs
from palimpsest.process import Absorbing, draw_categorical, unmask_step
from palimpsest.samplers import analytic, ancestral, autoregressive, first_hitting, ordered, semi_autoregressive
from palimpsest.samplers.base import TokenChoice, time_grid
from tests.helpers.laws import FALSE_ALARM, any_order_law, assert_follows, chain_law, ordered_law

VOCAB, MASK, LENGTH = 4, 3, 3
MANY = 5_000


def subs(net, schedule=None) -> Model:
    return Model(Subs(schedule or LogLinear(), Absorbing(MASK)), net)


def run(sampler, model, x, seed=0, first=0, **settings):
    return sampler(model, x, KeyedNoise(seed, torch.arange(first, first + len(x))), **settings)


def draw(net, schedule, x, steps, seed=0, skip_idle=True, first=0, **kwargs):
    return run(ancestral.sample, subs(net, schedule), x, seed, first, steps=steps, skip_idle=skip_idle, **kwargs)


def blank(rows: int = MANY, length: int = LENGTH) -> torch.Tensor:
    return torch.full((rows, length), MASK)


@pytest.mark.parametrize("time_conditioning", [False, True])
@pytest.mark.parametrize("schedule", [LogLinear(), Cosine()], ids=["loglinear", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_ancestral_samples_follow_the_exact_law(random_dit, steps, schedule, time_conditioning):
    model = subs(random_dit(VOCAB, time_conditioning=time_conditioning), schedule)
    settings = {"steps": steps, "noise_removal": False}
    out = run(ancestral.sample, model, blank(), skip_idle=True, **settings)
    assert_follows(out.ids_BL, chain_law(model, LENGTH, VOCAB, steps))


@pytest.mark.parametrize("objective", [
    Subs(LogLinear(), Absorbing(MASK)), SEDD(LogLinear(), Absorbing(MASK)), D3PM(LogLinear(), Absorbing(MASK), T=10),
    D3PM(Cosine(), Absorbing(MASK), T=10, subs_masking=True),
], ids=["subs", "sedd", "d3pm", "d3pm_subs_masking"])  # fmt: skip
@pytest.mark.parametrize("name", ["analytic", "ddpm_cache"])
def test_stepwise_samples_follow_the_exact_law_of_their_objective(random_dit, objective, name):
    model = Model(objective, random_dit(VOCAB, time_conditioning=True))
    sampler = analytic.sample if name == "analytic" else partial(ancestral.sample, skip_idle=True)
    out = run(sampler, model, blank(), steps=3, noise_removal=False)
    assert_follows(out.ids_BL, chain_law(model, LENGTH, VOCAB, 3))


def test_first_hitting_samples_follow_the_continuous_time_law(random_dit):
    model = subs(random_dit(VOCAB))
    out = run(first_hitting.sample, model, blank())
    assert_follows(out.ids_BL, any_order_law(model, LENGTH, VOCAB))
    assert (out.evaluations_B == LENGTH).all() and out.num_steps == LENGTH


def test_first_hitting_agrees_with_many_ancestral_steps_under_time_conditioning(random_dit):
    model = subs(random_dit(VOCAB, time_conditioning=True), Cosine())
    assert_follows(run(first_hitting.sample, model, blank(length=2)).ids_BL, chain_law(model, 2, VOCAB, 1000))


@pytest.mark.parametrize("tokens_per_step", [1, 2])
@pytest.mark.parametrize("order", ordered.ORDERS)
def test_ordered_samples_follow_the_law_whose_likelihood_duel_computes(random_dit, order, tokens_per_step):
    model = subs(random_dit(VOCAB))
    out = run(ordered.sample, model, blank(), order=order, tokens_per_step=tokens_per_step)
    assert_follows(out.ids_BL, ordered_law(model, LENGTH, VOCAB, order, tokens_per_step))


@pytest.mark.parametrize("order", ["confidence", "margin", "entropy"])
def test_equal_predictions_are_a_tie_whatever_their_rounding_errors(order):
    """A network without time predicts the same at every mask of a text of masks; attention rounds differently there."""
    torch.manual_seed(0)
    net = DiT(VOCAB, 16, 8, 2, 2, 0.0, time_conditioning=False).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    for rows in (1, 3, 64):
        out = run(ordered.sample, subs(net), blank(rows, length=7), order=order)
        assert (out.step_BL[:, 0] == 1).all()


def test_semi_autoregressive_samples_follow_the_law_of_their_windows(random_dit):
    model = subs(random_dit(VOCAB))
    settings = {"inner": first_hitting.sample, "stride_length": 1, "num_strides": 2}
    out = run(semi_autoregressive.sample, model, blank(), **settings)
    assert out.ids_BL.shape == (MANY, LENGTH + 2)
    law = any_order_law(model, LENGTH, VOCAB)
    for _ in range(2):
        longer: dict[tuple, float] = {}
        for text, mass in law.items():
            for window, p in any_order_law(model, LENGTH, VOCAB, start=(*text[-2:], MASK)).items():
                longer[(*text, window[-1])] = longer.get((*text, window[-1]), 0.0) + mass * p
        law = longer
    assert_follows(out.ids_BL, law)
    assert (out.evaluations_B == LENGTH + 2).all() and int(out.step_BL.max()) == LENGTH + 2


@pytest.mark.parametrize("sampler", [
    partial(ancestral.sample, steps=6, skip_idle=True), partial(analytic.sample, steps=6), first_hitting.sample,
    partial(ordered.sample, order="margin"),
    partial(semi_autoregressive.sample, inner=first_hitting.sample, stride_length=2, num_strides=2),
], ids=["ancestral", "analytic", "first_hitting", "ordered", "semi_ar"])  # fmt: skip
def test_every_sampler_keeps_given_tokens_and_does_not_know_its_batch(random_dit, sampler):
    model = subs(random_dit(VOCAB))
    x = torch.tensor([[0, MASK, 2, MASK, MASK, 1]]).repeat(5, 1)
    x[0, 1] = 1
    before = x.clone()
    out = run(sampler, model, x)
    given = x != MASK
    assert torch.equal(out.ids_BL[:, :6][given], x[given]) and (out.ids_BL != MASK).all()
    assert (out.step_BL[:, :6][given] == 0).all() and (out.step_BL[:, :6][~given] > 0).all()
    assert torch.equal(x, before), "the input is not written to"
    alone = [run(sampler, model, x[i : i + 1], first=i) for i in range(5)]
    assert torch.equal(out.ids_BL, torch.cat([one.ids_BL for one in alone]))
    assert torch.equal(out.evaluations_B, torch.cat([one.evaluations_B for one in alone]))


def test_samplers_that_do_not_fit_a_model_say_so(random_dit):
    net = random_dit(VOCAB, time_conditioning=True)
    with pytest.raises(ValueError, match="sampling.predictor=first_hitting.*analytic"):
        run(first_hitting.sample, Model(SEDD(LogLinear(), Absorbing(MASK)), net), blank(2))
    with pytest.raises(ValueError, match="writes texts of parameterization=ar.*sampling.predictor=ddpm_cache"):
        run(autoregressive.sample, subs(net), blank(2))
    with pytest.raises(ValueError, match="sampling.stride_length=9"):
        run(semi_autoregressive.sample, subs(net), blank(2), inner=first_hitting.sample, stride_length=9, num_strides=1)
    causal = AR(Absorbing(MASK)).model(net)
    with pytest.raises(ValueError, match="first token"):
        run(autoregressive.sample, causal, blank(2))
    with pytest.raises(ValueError, match="sampling.prefix, not sampling.template"):
        run(autoregressive.sample, causal, torch.tensor([[0, MASK, 1]]))


@pytest.mark.parametrize(("choice", "wanted"), [
    (TokenChoice(), [0.5, 0.3, 0.15, 0.05]),
    (TokenChoice(top_k=2), [0.625, 0.375, 0, 0]),
    (TokenChoice(nucleus_p=0.5), [1, 0, 0, 0]),
    (TokenChoice(nucleus_p=0.51), [0.625, 0.375, 0, 0]),
    (TokenChoice(nucleus_p=0.96), [0.5, 0.3, 0.15, 0.05]),
    (TokenChoice(temperature=0.5), [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
    (TokenChoice(temperature=0.5, top_k=1), [1, 0, 0, 0]),
    (TokenChoice(temperature=0), [1, 0, 0, 0]),
])  # fmt: skip
def test_temperature_top_k_and_nucleus(choice, wanted):
    """Probabilities by reading off where the inversion of a fine grid of uniform numbers lands."""
    p = torch.tensor([[0.15, 0.5, 0.05, 0.3]], dtype=torch.float64)
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    drawn = choice.draw(p.log().expand(20_000, 4), u)
    share = torch.bincount(drawn, minlength=4).double() / 20_000
    assert share[[1, 3, 0, 2]].tolist() == pytest.approx(wanted, abs=2e-4)


def test_skipping_idle_rows_changes_nothing_but_the_cost(random_dit):
    net, x = random_dit(VOCAB), torch.full((6, 12), MASK)
    plain, cached = (draw(net, LogLinear(), x, steps=64, skip_idle=skip) for skip in (False, True))
    assert torch.equal(plain.ids_BL, cached.ids_BL) and torch.equal(plain.step_BL, cached.step_BL)
    assert (plain.evaluations_B == 65).all() and (cached.evaluations_B <= 12).all()


def test_a_sample_does_not_know_its_batch(random_dit):
    net, x = random_dit(VOCAB), torch.full((6, 8), MASK)
    whole = draw(net, LogLinear(), x, steps=16).ids_BL
    alone = torch.cat([draw(net, LogLinear(), x[:1], steps=16, first=i).ids_BL for i in range(6)])
    assert torch.equal(whole, alone)
    assert not torch.equal(whole, draw(net, LogLinear(), x, steps=16, seed=1).ids_BL)


def test_given_tokens_never_change_and_masks_all_go(random_dit):
    net = random_dit(VOCAB)
    x = torch.tensor([[0, MASK, 2, MASK, MASK, 1]]).repeat(50, 1)
    out = draw(net, LogLinear(), x, steps=8)
    given = x != MASK
    assert torch.equal(out.ids_BL[given], x[given]) and (out.ids_BL != MASK).all()
    assert (out.step_BL[given] == 0).all() and (out.step_BL[~given] >= 1).all()
    assert (x[:, 1] == MASK).all(), "the input is not written to"


def test_unmask_steps_have_the_chance_of_each_step():
    alpha = LogLinear()(time_grid(4, 1e-5)).alpha
    steps = unmask_step(KeyedNoise(0, torch.arange(200)).uniform(500), alpha)
    counts = torch.bincount(steps.flatten(), minlength=5)
    survived = (1 - alpha) / (1 - alpha[0])
    expected = torch.cat([-survived.diff(), survived[-1:]]) * steps.numel()
    assert stats.chisquare(counts[:4], expected[:4] * counts[:4].sum() / expected[:4].sum()).pvalue > FALSE_ALARM


def test_categorical_draws_reach_probabilities_that_float32_gumbel_can_not():
    """A token of probability 2^-30: inversion in float64 finds it at the right uniform number."""
    log_p = torch.log(torch.tensor([[1 - 2**-30, 2**-30, 0.0]], dtype=torch.float64))
    u = torch.tensor([0.0, 1 - 2**-29, 1 - 2**-31, 1 - 2**-53], dtype=torch.float64)
    assert draw_categorical(log_p.expand(4, 3), u).tolist() == [0, 0, 1, 1]


def test_a_token_without_mass_is_never_drawn():
    log_p = torch.tensor([[-torch.inf, 0.0, -torch.inf]]).expand(3, 3)
    assert draw_categorical(log_p, torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)).tolist() == [1, 1, 1]
