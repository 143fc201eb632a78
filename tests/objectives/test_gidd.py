"""Masks and random words: the process, the bound and the sampler by enumeration."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy
import pytest
import torch
from torch.nn.functional import one_hot

from palimpsest.common.positions import Positions
from palimpsest.common.randomness import KeyedNoise, evaluation_noise
from palimpsest.experiment.running import checked
from palimpsest.noise_schedule import Cosine, LogLinear
from palimpsest.objectives.base import Model
from palimpsest.objectives.gidd import GIDD
from palimpsest.objectives.subs import Subs
from palimpsest.process import Absorbing, Hybrid
from palimpsest.samplers import uniform
from palimpsest.samplers.base import time_grid
from palimpsest.settings.command_line import compose_config
from tests.helpers.draws import draw_at
from tests.helpers.laws import assert_follows, noised, texts

V = 4
L = 2
MASK = 1
WORDS = [0, 2, 3]
NO_NETWORK = SimpleNamespace(head=SimpleNamespace(out_features=V))


def test_what_becomes_of_a_token():
    process, rows = Hybrid(MASK, V, 0.2), 40_000
    half = process.level(torch.tensor(0.5))
    assert float(half.word) == pytest.approx(0.2) and float(half.kept) == pytest.approx(float(half.mask))
    ends = process.level(torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(ends.kept, torch.tensor([1.0, 0.0]).double(), atol=1e-9, rtol=0)
    alpha = torch.linspace(0.01, 0.99, 9).double().requires_grad_()
    level = process.level(alpha)
    torch.testing.assert_close(level.kept + level.word + level.mask, torch.ones(9).double())
    for noise, rate in ((level.word, level.word_rate), (level.mask, level.mask_rate)):  # r' - r kept' / kept
        slope, kept_slope = (torch.autograd.grad(v.sum(), alpha, retain_graph=True)[0] for v in (noise, level.kept))
        torch.testing.assert_close(-(slope - noise * kept_slope / level.kept), rate)
    x0 = torch.full((rows, 1), 2)
    xt = process.corrupt(x0, torch.full((rows,), 0.5).double(), KeyedNoise(0, torch.arange(rows)), x0 == 2)
    law = noised(process, torch.tensor(0.5))[2]
    assert_follows(xt, {(v,): float(law[v]) for v in range(V)})


def test_the_posterior_is_bayes_rule():
    torch.manual_seed(0)
    process = Hybrid(MASK, V, 0.3)
    alpha_t = torch.tensor(0.3).double()
    alpha_s = torch.tensor(0.7).double()
    early, late = noised(process, alpha_s), noised(process, alpha_t)
    step = torch.linalg.solve(early, late)  # q(x_t | x_s), since the chain is Markov
    assert (step > -1e-12).all()
    log_p = torch.randn(V, V).double()
    log_p[:, MASK] = -torch.inf
    log_p = log_p.log_softmax(-1)
    joint = early[:, :, None] * step[None]  # x_0, x_s, x_t
    wanted = torch.einsum("tz,zst->ts", log_p.exp(), joint / joint.sum(1, keepdim=True))
    found = process.posterior(torch.arange(V), log_p, alpha_t.expand(V), alpha_s.expand(V))
    torch.testing.assert_close(found.exp(), wanted)


class BayesGIDD(GIDD):
    """GIDD with the exact network for a known distribution over texts."""

    def __init__(self, p_M: torch.Tensor, schedule, word_share: float) -> None:
        super().__init__(schedule, Hybrid(MASK, V, word_share))
        self.p_M, self.texts_ML = p_M.double(), texts(V, L, MASK)

    def others(self, x_BL, alpha_B):
        q_BVV = noised(self.process, alpha_B)
        q_BML = q_BVV[torch.arange(len(x_BL))[:, None, None], self.texts_ML[None], x_BL[:, None]]
        out = torch.zeros(len(x_BL), L, V, dtype=torch.float64)
        for i in range(L):
            weight_BM = self.p_M * torch.cat([q_BML[..., :i], q_BML[..., i + 1 :]], -1).prod(-1)
            out[:, i] = weight_BM @ one_hot(self.texts_ML[:, i], V).double()
        return (out / out.sum(-1, keepdim=True)).log()

    def leave_one_out(self, backbone, x_BL, t_B, at, **cond):
        return at.take(self.others(x_BL, self.schedule(t_B).alpha))

    def rate(self, x0_BL, xt_BL, t_B):
        level = self.schedule(t_B)
        alpha_BL = level.alpha[:, None].expand(xt_BL.shape)
        log_p_BLV, (kept_BL, word_BL) = self.others(xt_BL, level.alpha), self._kept_and_word(alpha_BL)
        total_BL1 = ((kept_BL / word_BL)[..., None] * log_p_BLV.exp()).log1p().sum(-1, keepdim=True)
        ids = torch.stack([x0_BL, xt_BL], -1)
        picked = torch.cat([log_p_BLV.gather(-1, ids), total_BL1], -1)
        found = self.divergence(picked.flatten(0, 1), ids.flatten(0, 1), alpha_BL.flatten())
        return -level.dalpha * found.view(xt_BL.shape).sum(-1)


def some_law() -> torch.Tensor:
    torch.manual_seed(3)
    p_M = torch.rand(len(WORDS) ** L).double() ** 3
    return p_M / p_M.sum()


@pytest.mark.parametrize("schedule", [LogLinear(eps=0.0), Cosine(eps=0.0)], ids=["loglinear", "cosine"])
@pytest.mark.parametrize("word_share", [0.02, 0.3])
def test_the_bound_of_the_exact_network_is_the_entropy(schedule, word_share):
    p_M = some_law()
    every = texts(V, L, MASK)
    points = 600
    nodes, weights = numpy.polynomial.legendre.leggauss(points)
    angle = torch.from_numpy((nodes + 1) / 2) * torch.pi  # t = (1 - cos) / 2: the integrand is steep at both ends
    t, weight = (1 - angle.cos()) / 2, torch.from_numpy(weights) / 2 * torch.pi * angle.sin() / 2
    t = t.clamp(min=1e-5 if isinstance(schedule, Cosine) else 0.0)  # nearer to 0, 1 - cos(t) has few digits
    objective, bound = BayesGIDD(p_M, schedule, word_share), 0.0
    q = noised(objective.process, objective.schedule(t).alpha)
    for x0 in range(len(every)):
        for xt in itertools.product(range(V), repeat=L):
            chance = torch.stack([q[:, a, b] for a, b in zip(every[x0].tolist(), xt, strict=True)]).prod(0)
            rate = objective.rate(every[x0].expand(points, -1), torch.tensor(xt).expand(points, -1), t)
            bound += float(p_M[x0] * (weight * torch.where(chance > 0, chance * rate, 0.0)).sum())
    assert bound == pytest.approx(float(-(p_M * p_M.log()).sum()), rel=1e-3)


def test_hardly_any_words_are_masked_diffusion(random_dit):
    net = random_dit(V, time_conditioning=True)
    x0 = torch.tensor([[0, 2, 3, 0, 2, 3]]).expand(64, -1)
    batch, noise = {"input_ids": x0}, lambda: evaluation_noise(0, torch.arange(64))
    few = GIDD(LogLinear(), Hybrid(MASK, V, 1e-9)).loss(net, batch, noise())
    none = Subs(LogLinear(), Absorbing(MASK)).loss(net, batch, noise())
    assert float(few.nll_BL.detach().mean()) == pytest.approx(float(none.nll_BL.detach().mean()), rel=0.2)
    xt, t = torch.where(torch.arange(6) % 2 == 0, MASK, x0), torch.full((64,), 0.4).double()
    torch.testing.assert_close(
        GIDD(LogLinear(eps=0.0), Hybrid(MASK, V, 1e-9)).loss_at(net, batch, draw_at(xt, t)).nll_BL[:, ::2],
        Subs(LogLinear(eps=0.0), Absorbing(MASK)).loss_at(net, batch, draw_at(xt, t)).nll_BL[:, ::2],
        rtol=1e-4,
        atol=1e-5,
    )


def test_the_sampler_draws_the_law_of_its_chain():
    model = Model(BayesGIDD(some_law(), LogLinear().full_range, 0.3), NO_NETWORK)
    start, rows = (2, MASK), 20_000
    out = uniform.sample(
        model, torch.tensor([start]).expand(rows, -1), KeyedNoise(7, torch.arange(rows)), steps=4, noise_removal=False
    )
    law, at = {start: 1.0}, Positions(torch.tensor([[False, True]]))
    for t, s in itertools.pairwise(time_grid(4, 1e-5)):
        moved: dict[tuple, float] = {}
        for state, mass in law.items():
            q_1V = model.reverse(torch.tensor([state]), t[None], s[None], at).exp()
            for v in range(V):
                moved[2, v] = moved.get((2, v), 0.0) + mass * float(q_1V[0, v])
        law = moved
    assert_follows(out.ids_BL, law)


def test_an_objective_brings_its_process():
    for typed in (["process=uniform"], ["algo=gidd", "process=absorbing"], ["algo=udlm", "process=hybrid"]):
        with pytest.raises(ValueError, match="process=.* is not that of parameterization=.*leave process= out"):
            checked(compose_config(typed), "a test")
