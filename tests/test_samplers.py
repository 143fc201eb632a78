"""Samplers: their law against exact enumeration, given tokens, caching, seeds, float64 draws."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy import stats

from forward_process import draw_categorical, posterior, unmask_step
from noise_schedule import Cosine, LogLinear
from objectives.subs import Subs
from randomness import KeyedNoise
from samplers.ancestral import sample
from samplers.base import time_grid

VOCAB, MASK, LENGTH = 4, 3, 3
ALPHA = 1e-4  # false-alarm rate of each chi-square test; seeds are fixed


def draw(net, schedule, x, steps, seed=0, skip_idle=True, first=0, **kwargs):
    denoise = lambda *args, **cond: Subs(schedule, MASK).denoise(net, *args, **cond)  # noqa: E731
    noise = KeyedNoise(seed, torch.arange(first, first + len(x)))
    return sample(denoise, schedule, x, MASK, noise, steps=steps, skip_idle=skip_idle, **kwargs)


def exact_law(net, schedule, steps: int) -> dict[tuple, float]:
    """The ancestral chain's law over final sequences, by propagating all 4^3 states (MDLM, eq. 7, step by step)."""
    law = {(MASK,) * LENGTH: 1.0}
    grid = time_grid(steps, 1e-5)
    for t, s in itertools.pairwise(grid):
        moved: dict[tuple, float] = {}
        for state, mass in law.items():
            p = Subs(schedule, MASK).denoise(net, torch.tensor([state]), t[None])[0].exp()
            one_step = posterior(p, schedule(t).alpha, schedule(s).alpha, MASK)
            choices = [one_step[i] if token == MASK else p[i] for i, token in enumerate(state)]
            for after in itertools.product(range(VOCAB), repeat=LENGTH):
                weight = float(torch.stack([choices[i][a] for i, a in enumerate(after)]).prod())
                if weight:
                    moved[after] = moved.get(after, 0.0) + mass * weight
        law = moved
    return law


@pytest.mark.parametrize("time_conditioning", [False, True])
@pytest.mark.parametrize("schedule", [LogLinear(), Cosine()], ids=["loglinear", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_samples_follow_the_exact_law(random_dit, steps, schedule, time_conditioning):
    net = random_dit(VOCAB, time_conditioning=time_conditioning)
    with torch.no_grad():
        law = exact_law(net, schedule, steps)
    num = 20_000
    ids = draw(net, schedule, torch.full((num, LENGTH), MASK), steps, noise_removal=False).ids_BL
    states = [state for state in law if law[state] * num >= 5]
    observed = [int((ids == torch.tensor(state)).all(-1).sum()) for state in states]
    expected = [law[state] * num for state in states]
    rest_observed, rest_expected = num - sum(observed), num - sum(expected)
    pvalue = (
        stats.chisquare(observed + [rest_observed], expected + [rest_expected]).pvalue
        if rest_expected > 1
        else (stats.chisquare(observed, [e * sum(observed) / sum(expected) for e in expected]).pvalue)
    )
    assert pvalue > ALPHA


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
    assert stats.chisquare(counts[:4], expected[:4] * counts[:4].sum() / expected[:4].sum()).pvalue > ALPHA


def test_categorical_draws_reach_probabilities_that_float32_gumbel_can_not():
    """A token of probability 2^-30: inversion in float64 finds it at the right uniform number."""
    log_p = torch.log(torch.tensor([[1 - 2**-30, 2**-30, 0.0]], dtype=torch.float64))
    u = torch.tensor([0.0, 1 - 2**-29, 1 - 2**-31, 1 - 2**-53], dtype=torch.float64)
    assert draw_categorical(log_p.expand(4, 3), u).tolist() == [0, 0, 1, 1]


def test_a_token_without_mass_is_never_drawn():
    log_p = torch.tensor([[-torch.inf, 0.0, -torch.inf]]).expand(3, 3)
    assert draw_categorical(log_p, torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)).tolist() == [1, 1, 1]


def test_too_few_steps_are_refused():
    with pytest.raises(ValueError, match="sampling.steps=0"):
        time_grid(0, 1e-5)
