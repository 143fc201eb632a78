"""Estimators of the likelihood: unbiased against enumeration, exact where they say so, refused where they must be."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from palimpsest.common.randomness import evaluation_noise
from palimpsest.estimators.any_order import AnyOrder
from palimpsest.estimators.nelbo import Nelbo
from palimpsest.estimators.ordered import Ordered
from palimpsest.noise_schedule import Clipped, Cosine, CosineSquared, Linear, LogLinear
from palimpsest.objectives.base import Model
from palimpsest.objectives.d3pm import D3PM
from palimpsest.objectives.gidd import GIDD
from palimpsest.objectives.mask_sampling import Bernoulli, Complementary, ExactCount, TiltedCount
from palimpsest.objectives.sedd import SEDD
from palimpsest.objectives.subs import Subs
from palimpsest.objectives.udlm import UDLM
from palimpsest.process import Absorbing, Hybrid, Uniform
from palimpsest.samplers.ordered import ORDERS
from palimpsest.settings.command_line import compose_config
from palimpsest.settings.instantiation import instantiate
from tests.helpers.laws import any_order_law, batch_of, exact_bound, exact_bound_of_any_noise, ordered_law, texts

VOCAB, MASK = 4, 3
X0 = torch.tensor([[0, 2, 1, 1]])


def mean_loss(objective, net, x0=X0, draws=1, rows=6000):
    """(mean, standard error) of the loss over many rows of one text."""
    with torch.no_grad():
        many = x0.expand(rows, -1)
        nll = (
            sum(
                objective.loss(net, batch_of(many), evaluation_noise(3, torch.arange(rows), k, draws))
                .nll_BL.double()
                .sum(-1)
                for k in range(draws)
            )
            / draws
        )
    return float(nll.mean()), float(nll.std() / math.sqrt(rows))


MASK_SAMPLERS = {
    "uniform": Bernoulli(antithetic_sampling=False),
    "stratified": Bernoulli(),
    "importance": Bernoulli(importance_sampling=True),
    "bell": Bernoulli(time_density="bell_corrected"),
    "exact_count": ExactCount(),
    "tilted_count": TiltedCount(),
    "complementary": Complementary(),
}
LAWS = {
    "subs": (lambda mask_sampler: Subs(LogLinear(eps=0.0), Absorbing(MASK), mask_sampler), False),
    "subs_time": (lambda mask_sampler: Subs(LogLinear(eps=0.0), Absorbing(MASK), mask_sampler), True),
    "subs_cosine_time": (lambda mask_sampler: Subs(Cosine(eps=0.0), Absorbing(MASK), mask_sampler), True),
    "sedd": (lambda mask_sampler: SEDD(LogLinear(eps=0.0), Absorbing(MASK), mask_sampler), True),
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("mask_sampler", MASK_SAMPLERS)
def test_every_noising_is_unbiased(random_dit, law, mask_sampler):
    """5 standard errors: a false alarm once in 1.7 million seeds."""
    build, time_conditioning = LAWS[law]
    net = random_dit(VOCAB, time_conditioning=time_conditioning)
    objective = build(MASK_SAMPLERS[mask_sampler])
    value, se = mean_loss(objective, net)
    assert abs(value - exact_bound(objective, net, X0)) < 5 * se


@pytest.mark.parametrize("draws", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 2, 3])
def test_counts_are_unbiased_for_every_length_and_number_of_draws(random_dit, length, draws):
    net, x0 = random_dit(VOCAB), X0[:, :length]
    for mask_sampler in (ExactCount(), TiltedCount(), Complementary()):
        objective = Subs(LogLinear(eps=0.0), Absorbing(MASK), mask_sampler)
        value, se = mean_loss(objective, net, x0, draws=draws)
        assert abs(value - exact_bound(objective, net, x0)) < 5 * se + 1e-6


@pytest.mark.parametrize("build", [
    lambda: Subs(LogLinear(), Absorbing(MASK), T=5), lambda: D3PM(LogLinear(), Absorbing(MASK), T=5),
    lambda: D3PM(Cosine(), Absorbing(MASK), T=4, subs_masking=True),
], ids=["subs", "d3pm", "d3pm_subs_masking"])  # fmt: skip
def test_discrete_time_losses_are_unbiased(random_dit, build):
    objective, net = build(), random_dit(VOCAB, time_conditioning=True)
    value, se = mean_loss(objective, net)
    assert abs(value - exact_bound(objective, net, X0)) < 5 * se


@pytest.mark.parametrize("time_density", ["bell", "bell_corrected"])
def test_times_follow_the_bell(time_density):
    """A normal distribution around 1/2, cut at the smallest t and at 1; only the corrected draws are reweighted."""
    rows, low = 4_000, 0.1
    x0 = torch.zeros(rows, 3, dtype=torch.long)
    draw_t = Bernoulli(time_density=time_density, sampling_eps=low, antithetic_sampling=False)
    (draw,) = draw_t(LogLinear(), x0, x0 == 0, Absorbing(MASK), evaluation_noise(0, torch.arange(rows)))
    bell = stats.truncnorm((low - 0.5) / 0.2, 2.5, 0.5, 0.2)
    assert stats.kstest(draw.t_B.numpy(), bell.cdf).pvalue > 1e-3
    wanted = 1 / ((1 - low) * bell.pdf(draw.t_B.numpy())) if time_density == "bell_corrected" else np.ones(rows)
    np.testing.assert_allclose(draw.scale_B.numpy(), wanted, rtol=1e-9)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"T": 8}, "training.time_density=bell with T=8"),
        ({"importance_sampling": True}, "training.time_density=bell with training.importance_sampling"),
        ({"change_of_variables": True}, "training.time_density=bell with training.importance_sampling or"),
    ],
)
def test_t_is_drawn_in_one_way(settings, said):
    with pytest.raises(ValueError, match=said):
        Bernoulli(time_density="bell", **settings)


def test_the_bell_measures_no_bound():
    with pytest.raises(ValueError, match="leaves mask rates out"):
        Subs(LogLinear(), Absorbing(MASK)).bound(Bernoulli(time_density="bell"))
    for density, name in (("bell", "loss"), ("bell_corrected", "nll"), (None, "nll")):
        assert Subs(LogLinear(), Absorbing(MASK), Bernoulli(time_density=density)).loss_name == name


def test_every_token_is_masked_once_in_a_complementary_pair(random_dit):
    x0 = torch.randint(MASK, (64, 7))
    scored = torch.ones_like(x0, dtype=torch.bool)
    scored[:, 5:] = False
    first, second = Complementary()(LogLinear(), x0, scored, Absorbing(MASK), evaluation_noise(0, torch.arange(64)))
    masked = torch.stack([first.xt_BL == MASK, second.xt_BL == MASK])
    assert (masked.sum(0) == scored).all()
    assert len(set(masked[0].sum(-1).tolist())) == 3, "the smaller half has 0, 1 or 2 of 5"


@pytest.mark.parametrize("mask_sampler", [ExactCount(), Complementary()])
@pytest.mark.parametrize("length", [1, 2, 7, 8])
def test_counts_have_no_noise_of_their_own(mask_sampler, length):
    """Where every masked token costs one nat, every single draw is exactly the length."""
    x0 = torch.zeros(500, length, dtype=torch.long)
    schedule, scored = LogLinear(), torch.ones_like(x0, dtype=torch.bool)
    draws = mask_sampler(schedule, x0, scored, Absorbing(MASK), evaluation_noise(0, torch.arange(500)))
    nats = sum(draw.scale_B * schedule(draw.t_B).elbo_weight * (draw.xt_BL == MASK).sum(-1) for draw in draws)
    torch.testing.assert_close(nats / len(draws), torch.full((500,), float(length), dtype=torch.float64))


@pytest.mark.parametrize("schedule", [Cosine(), CosineSquared(), LogLinear(eps=0.0), Linear(1e-4, 20.0)])
def test_every_estimator_is_finite_under_every_schedule(random_dit, schedule):
    """Counts ask for mask rates that a schedule may not reach."""
    net, batch = random_dit(VOCAB, time_conditioning=True), batch_of(torch.randint(MASK, (200, 3)))
    model = Model(Subs(schedule, Absorbing(MASK)).bound(None), net)
    for estimator in (Nelbo(ExactCount()), Nelbo(Complementary()), Ordered(), AnyOrder()):
        with torch.no_grad():
            assert estimator(model, batch, 0, 4).nll_BK.isfinite().all()


@pytest.mark.parametrize("schedule", [Linear(1.0, 20.0), Linear(1e-4, 1.0), LogLinear(eps=0.5)])
@pytest.mark.parametrize("mask_sampler", [None, Bernoulli()], ids=["counts", "t"])
def test_the_bound_covers_the_mask_rates_that_a_schedule_leaves_out(random_dit, schedule, mask_sampler):
    values = [
        mean_loss(Subs(s, Absorbing(MASK)).bound(mask_sampler), random_dit(VOCAB))
        for s in (schedule, LogLinear(eps=0.0))
    ]
    if mask_sampler is None:
        assert values[0][0] == pytest.approx(values[1][0], rel=1e-6)
    assert abs(values[0][0] - values[1][0]) < 5 * (values[0][1] + values[1][1])


@pytest.mark.parametrize("mask_sampler", [ExactCount(), TiltedCount(), Complementary(), Bernoulli()])
def test_rows_without_a_scored_token_cost_nothing_and_break_nothing(random_dit, mask_sampler):
    batch = batch_of(torch.randint(MASK, (3, 4)))
    batch["observed"] = torch.zeros(3, 4, dtype=torch.bool)
    batch["observed"][1] = True
    loss = Subs(LogLinear(), Absorbing(MASK), mask_sampler).loss(
        random_dit(VOCAB), batch, evaluation_noise(0, torch.arange(3))
    )
    assert torch.isfinite(loss.nll_BL).all() and (loss.nll_BL[1] == 0).all()


def test_uniform_weight_is_the_plain_cross_entropy_and_evaluation_the_bound(random_dit):
    net, batch = random_dit(VOCAB), batch_of(torch.randint(MASK, (16, 6)))
    noise = lambda: evaluation_noise(0, torch.arange(16))  # noqa: E731
    plain = Subs(LogLinear(), Absorbing(MASK), Complementary(), loss_weight="uniform").loss(net, batch, noise())
    assert plain.mask_BL.all(), "both halves of the pair are seen"
    wanted = (plain.logs["cross_entropy"].sum() / plain.logs["num_masked"].sum()).float()
    torch.testing.assert_close(plain.mean(), wanted)
    bound = Subs(LogLinear(), Absorbing(MASK), loss_weight="uniform").bound(Bernoulli())
    torch.testing.assert_close(
        bound.loss(net, batch, noise()).nll_BL, Subs(LogLinear(), Absorbing(MASK)).loss(net, batch, noise()).nll_BL
    )


def test_clipped_schedules_train_on_their_range_and_measure_the_whole(random_dit):
    schedule = Clipped(LogLinear(), 0.3, 0.8)
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(schedule(t).move_chance, torch.tensor([0.3, 0.8], dtype=torch.float64))
    assert Subs(schedule, Absorbing(MASK)).bound(None).schedule(t).move_chance.tolist() == [0, 1]
    for t, rate in ((0.0, 0.3), (1.0, 0.8)):
        shown = [
            Subs(s, Absorbing(MASK), change_of_variables=True).conditioning(
                s.t_from_alpha(torch.tensor([1 - rate]).double())
            )
            for s in (schedule, schedule.base)
        ]
        torch.testing.assert_close(*shown)
        torch.testing.assert_close(schedule.t_from_alpha(torch.tensor([1 - rate]).double()), torch.tensor([t]).double())


def test_the_importance_weighted_bound_lies_between_the_likelihood_and_the_nelbo(random_dit):
    net = random_dit(VOCAB)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2.2)  # so that the order matters
    model = Model(Subs(LogLinear(eps=0.0), Absorbing(MASK)).bound(None), net)
    true = -math.log(any_order_law(model, 4, VOCAB)[tuple(X0[0].tolist())])
    nelbo = exact_bound(model.objective, net, X0)
    batch = batch_of(X0.expand(1000, -1))
    with torch.no_grad():
        found = {k: AnyOrder()(model, batch, 0, k).nll_BK for k in (1, 4, 32)}
    mean = {k: float(v.mean()) for k, v in found.items()}
    se = {k: float(v.std() / math.sqrt(1000)) for k, v in found.items()}
    assert abs(mean[1] - nelbo) < 5 * se[1], "one order is the NELBO"
    assert nelbo > mean[4] + 3 * se[4] and mean[4] > mean[32] + 3 * se[4], "it falls with the number of orders"
    assert true - 5 * se[32] < mean[32] < true + 0.15 * (nelbo - true) + 5 * se[32]
    assert (AnyOrder()(model, batch, 0, 4).evaluations_B == 16).all()


@pytest.mark.parametrize("schedule", [LogLinear(), Cosine()], ids=["loglinear", "cosine"])
def test_one_order_is_the_nelbo_of_a_network_that_is_shown_the_time(random_dit, schedule):
    """The times belong to the order: that at which a share of masks is expected gives another number."""
    net, x0 = random_dit(VOCAB, time_conditioning=True), X0[:, :2]
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2.5)  # so that the time matters
    model = Model(Subs(schedule, Absorbing(MASK)).bound(None), net)
    with torch.no_grad():
        found = AnyOrder()(model, batch_of(x0.expand(20_000, -1)), 0, 1).nll_BK
    assert abs(float(found.mean()) - exact_bound(model.objective, net, x0)) < 5 * float(found.std()) / math.sqrt(20_000)


@pytest.mark.parametrize(
    "objective", [SEDD(LogLinear(), Absorbing(MASK)), D3PM(LogLinear(), Absorbing(MASK), T=5)], ids=["sedd", "d3pm"]
)
def test_orders_are_refused_where_the_network_decides_when_a_mask_goes(random_dit, objective):
    with pytest.raises(ValueError, match="eval.estimator=importance_weighted.*sedd or d3pm.*eval.estimator=auto"):
        AnyOrder()(Model(objective, random_dit(VOCAB, time_conditioning=True)), batch_of(X0), 0, 1)


@pytest.mark.parametrize("tokens_per_step", [1, 2])
@pytest.mark.parametrize("time_conditioning", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_the_likelihood_of_an_ordered_sampler_is_a_distribution(random_dit, order, tokens_per_step, time_conditioning):
    net = random_dit(VOCAB, time_conditioning=time_conditioning)
    model = Model(Subs(LogLinear(), Absorbing(MASK)).bound(None), net)
    every = texts(VOCAB, 3, MASK)
    found = Ordered(order, tokens_per_step)(model, batch_of(every), 0, 1)
    p = (-found.nll_BK[:, 0]).exp().detach()
    assert float(p.sum()) == pytest.approx(1.0, abs=1e-6)
    law = ordered_law(model, 3, VOCAB, order, tokens_per_step)
    for text, mass in zip(every.tolist(), p.tolist(), strict=True):
        assert mass == pytest.approx(law[tuple(text)], abs=1e-6)
    assert (found.evaluations_B == -(-3 // tokens_per_step)).all()


def test_padding_does_not_change_a_likelihood(random_dit):
    model = Model(Subs(LogLinear(), Absorbing(MASK)).bound(None), random_dit(VOCAB))
    x0 = torch.randint(MASK, (5, 6))
    for estimator in (Nelbo(), Ordered(), AnyOrder(), Nelbo(ExactCount())):
        padded, short = batch_of(x0, padding=2), batch_of(x0[:, :4])
        a, b = (estimator(model, rows, 0, 4).nll_BK for rows in (padded, short))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["auto", "stratified", "uniform", "importance"])
@pytest.mark.parametrize("law", [UDLM, GIDD])
def test_every_estimator_of_noise_without_masks_is_unbiased(random_dit, law, name):
    """Every one that these objectives accept, against all noised texts and a quadrature over t."""
    net = random_dit(4, time_conditioning=True)
    process = Uniform(4) if law is UDLM else Hybrid(MASK, 4, 0.3)
    objective, x0 = law(LogLinear(), process), torch.tensor([[0, 2, 1]])
    importance = Nelbo(Bernoulli(importance_sampling=True))
    estimator = (
        importance if name == "importance" else instantiate(compose_config([f"eval.estimator={name}"]).estimator)
    )
    estimator.check(objective)
    rows, draws = 4_000, 4
    batch = {"input_ids": x0.expand(rows, -1), "sample_id": torch.arange(rows)}
    with torch.no_grad():
        nll_B = estimator(Model(objective, net), batch, 5, draws).nll_BK.mean(1)
    assert (nll_B.std() > 0) and estimator.passes(Model(objective, net)) == 1
    # Rows of one stratum of t differ by the noise alone, so the error is at most that of independent rows.
    error = float(nll_B.std()) / math.sqrt(rows)
    assert float(nll_B.mean()) == pytest.approx(exact_bound_of_any_noise(objective.bound(None), net, x0), abs=4 * error)


def test_draws_must_fit_the_estimator(random_dit):
    model = Model(Subs(LogLinear(), Absorbing(MASK)).bound(None), random_dit(VOCAB))
    batch = batch_of(X0)
    with pytest.raises(ValueError, match="eval.num_draws=3.*multiple of 2"):
        Nelbo(Complementary())(model, batch, 0, 3)
    assert Nelbo()(model, batch, 0, 3).nll_BK.shape == (1, 3)
    assert Nelbo(Complementary())(model, batch, 0, 4).nll_BK.shape == (1, 2)


def test_the_bound_is_the_same_under_linear_and_loglinear(random_dit):
    linear = Linear(1e-9, 25.0)
    values = [
        exact_bound(Subs(s, Absorbing(MASK)), random_dit(VOCAB), X0, points=2000) for s in (LogLinear(eps=0.0), linear)
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-4)
