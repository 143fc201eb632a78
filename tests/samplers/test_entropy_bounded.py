"""Entropy-bounded: which positions go together, given tokens that stay, and tokens drawn from the prediction."""

import math

import pytest
import torch

from palimpsest.common.positions import Positions
from palimpsest.common.randomness import KeyedNoise
from palimpsest.denoisers import Denoiser
from palimpsest.noise_schedule import LogLinear
from palimpsest.process import Absorbing
from palimpsest.samplers.entropy_bounded import bounded, sample

MASK = 8
CHOICES = torch.tensor([4, 2, 3, 1, 8, 2])  # of each position, all equally likely: log 4, log 2, ... nats
X = torch.tensor([[MASK, MASK, 7, MASK, MASK, MASK], [7, 7, 7, 7, MASK, 7]])


class EvenAmong(Denoiser):
    process = Absorbing(MASK)
    schedule = LogLinear()
    vocab_size = 9

    def denoise(self, x_BL, t_B, at=None, **cond):
        p_LV = (torch.arange(9) < CHOICES[:, None]) / CHOICES[:, None]
        return at.take(p_LV.log().expand(len(x_BL), -1, -1))


@pytest.mark.parametrize(
    ("gamma", "steps"),
    [(0, [3, 1, 0, 1, 4, 2]), (0.7, [2, 1, 0, 1, 3, 1]), (100, [1, 1, 0, 1, 1, 1]), (math.inf, [1, 1, 0, 1, 1, 1])],
)
def test_the_least_entropy_goes_first_and_given_tokens_stay(gamma, steps):
    out = sample(EvenAmong(), X, KeyedNoise(0, torch.arange(2)), gamma=gamma)
    assert out.step_BL.tolist() == [steps, [0, 0, 0, 0, 1, 0]]
    assert out.evaluations_B.tolist() == [max(steps), 1]
    assert torch.equal(out.ids_BL[X != MASK], X[X != MASK])
    assert (out.ids_BL < CHOICES)[X == MASK].all()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
def test_a_step_takes_the_longest_prefix_that_the_bound_allows(gamma):
    generator = torch.Generator().manual_seed(0)
    logits_RLV = 4 * torch.randn(20, 7, 5, generator=generator, dtype=torch.float64)
    at_RL = torch.rand(20, 7, generator=generator) < 0.7
    now_RL = bounded(logits_RLV.log_softmax(-1)[at_RL], Positions(at_RL), gamma)
    for row, (at_L, now_L) in enumerate(zip(at_RL, now_RL, strict=True)):
        entropies = {i: torch.distributions.Categorical(logits=logits_RLV[row, i]).entropy().item() for i in range(7)}
        order = sorted(at_L.nonzero().flatten().tolist(), key=entropies.get)
        sums = [[entropies[i] for i in order[: n + 1]] for n in range(len(order))]
        allowed = [n + 1 for n, h in enumerate(sums) if sum(h) - max(h) <= gamma + 1e-12]
        assert sorted(order[: max(allowed, default=0)]) == now_L.nonzero().flatten().tolist()


def test_tokens_of_a_step_are_independent_draws_from_the_prediction():
    out = sample(EvenAmong(), X[:1].expand(4000, -1), KeyedNoise(0, torch.arange(4000)), gamma=100)
    pair = out.ids_BL[:, 1] * 2 + out.ids_BL[:, 5]  # two positions of two tokens each: four pairs, 1000 of each
    assert (pair.bincount(minlength=4) - 1000).abs().max() < 5 * math.sqrt(4000 * 3 / 16)
