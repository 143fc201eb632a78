"""Uniform-state diffusion: the reference's numbers, the bound by enumeration, and the law of one step."""

from __future__ import annotations

from functools import partial

import numpy
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import one_hot

from palimpsest.common.positions import Positions
from palimpsest.common.randomness import KeyedNoise, evaluation_noise
from palimpsest.denoisers import Denoiser
from palimpsest.experiment.from_checkpoint import complete
from palimpsest.models.checkpoints import read_checkpoint
from palimpsest.noise_schedule import Cosine, FullRange, LogLinear
from palimpsest.objectives.base import Model
from palimpsest.objectives.mask_sampling import Bernoulli, Complementary, ExactCount, TiltedCount
from palimpsest.objectives.mlm import Rates
from palimpsest.objectives.udlm import UDLM
from palimpsest.process import Hybrid, Uniform
from palimpsest.samplers import uniform
from palimpsest.samplers.base import TokenChoice
from palimpsest.samplers.trace import Trace
from palimpsest.settings.command_line import compose_config
from palimpsest.settings.instantiation import instantiate
from tests.helpers.draws import draw_at
from tests.helpers.laws import assert_follows, texts
from tests.helpers.uniform import NO_NETWORK, Bayes, BayesUDLM, L, V, chain


def test_the_posterior_is_bayes_rule():
    """q(x_s | x_t) by enumeration of x_0 and x_s, with any prediction of x_0."""
    torch.manual_seed(0)
    process = Uniform(V)
    alpha_t = torch.tensor(0.3).double()
    alpha_s = torch.tensor(0.7).double()

    def transition(alpha):  # P(to | from)
        return alpha * torch.eye(V).double() + (1 - alpha) / V

    log_p = torch.randn(V, V).double().log_softmax(-1)  # a prediction for each x_t
    joint = transition(alpha_s)[:, :, None] * transition(alpha_t / alpha_s)[None]  # x_0, x_s, x_t
    wanted = torch.einsum("tz,zst->ts", log_p.exp(), joint / joint.sum(1, keepdim=True))
    found = process.posterior(torch.arange(V), log_p, alpha_t.expand(V), alpha_s.expand(V))
    torch.testing.assert_close(found.exp(), wanted)
    others = process.without_own_token(torch.arange(V), log_p, alpha_t.expand(V))
    torch.testing.assert_close(process.with_own_token(torch.arange(V), others, alpha_t.expand(V)), log_p)
    for law in (process, Hybrid(V - 1, V, 0.3)):
        every, alphas = torch.arange(V), (alpha_t.expand(V), alpha_s.expand(V))
        others = law.without_own_token(every, log_p, alphas[0])
        for ids in (every, every.flip(0)):
            found = law.given_others(ids, every, law.posterior(every, log_p, *alphas), *alphas)
            torch.testing.assert_close(found, others.gather(1, ids[:, None])[:, 0])


@pytest.mark.parametrize("t", [1e-6, 1e-3, 0.3, 0.8, 0.999, 1 - 1e-9])
def test_the_integrand_is_the_papers(random_dit, t):
    """The divergence written out over the vocabulary in float64, with no regard to rounding, where that is possible."""
    torch.manual_seed(1)
    net, objective = random_dit(5, time_conditioning=True), UDLM(LogLinear(eps=0.0), Uniform(5))
    x0, xt = torch.randint(5, (6, 4)), torch.randint(5, (6, 4))
    xt[:3] = x0[:3]
    t_B = torch.full((6,), t, dtype=torch.float64)
    found = objective.loss_at(net, {"input_ids": x0}, draw_at(xt, t_B)).nll_BL.double()
    at = Positions.everywhere(x0)
    p = objective.leave_one_out(net, xt, t_B, at).double().exp().view(6, 4, 5)
    alpha = 1 - t
    true, predicted = (5 * alpha * one.double() + (1 - alpha) for one in (one_hot(x0, 5), p))
    true_t, predicted_t = (one.gather(-1, xt[..., None]) for one in (true, predicted))
    total = (true / true_t * ((predicted_t * true).log() - (predicted * true_t).log())).sum(-1, keepdim=True)
    wanted = (total - 5 / true_t + 5 / predicted_t).squeeze(-1) / (5 * alpha)
    if t <= 0.999:  # later the plain form has no digits left
        torch.testing.assert_close(found, wanted, rtol=2e-5, atol=1e-6)
    assert (found > -1e-6).all() and found.isfinite().all()
    assert t < 0.999999 or (found < 1e-6).all()


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_golden_duo_without_a_setting_typed(fixtures_dir, weights):
    path = fixtures_dir / "duo_uniform" / "duo.ckpt"
    golden = load_file(path.parent / "golden.safetensors")
    cfg = compose_config(complete(["mode=ppl_eval", f"eval.checkpoint_path={path}"]))
    process = instantiate(cfg.process, vocab_size=40, own_size=39, mask_id=39)
    objective = instantiate(cfg.parameterization, process=process)
    net = instantiate(cfg.backbone, vocab_size=process.vocab_size).eval()
    read_checkpoint(path).load_into(net, weights == "ema")
    x0 = golden["x0"]
    xt = golden["xt"]
    t = golden["t"].double()
    everywhere = Positions.everywhere(x0)
    with torch.no_grad():
        log_p = objective.leave_one_out(net, xt, t, everywhere).view(*x0.shape, 39)
        nll = objective.loss_at(net, {"input_ids": x0}, draw_at(xt, t)).nll_BL
    torch.testing.assert_close(log_p, golden[f"{weights}.model_output"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(nll, golden[f"{weights}.nll_per_token"], rtol=1e-4, atol=1e-4)


def test_a_file_of_duo_is_named_by_its_training_too(fixtures_dir):
    asked = ["mode=ppl_eval", f"eval.checkpoint_path={fixtures_dir / 'duo_uniform' / 'duo.ckpt'}"]
    assert compose_config(complete([*asked, "parameterization=duo"])).parameterization._target_.endswith("Duo")
    with pytest.raises(ValueError, match="trained with other settings; leave parameterization out"):
        complete([*asked, "parameterization=subs"])


@pytest.mark.parametrize("schedule", [LogLinear(eps=0.0), Cosine(eps=0.0)], ids=["loglinear", "cosine"])
def test_the_bound_of_the_exact_network_is_the_entropy(schedule):
    torch.manual_seed(3)
    every, points = texts(V, L), 400
    nodes, weights = numpy.polynomial.legendre.leggauss(points)
    t = torch.from_numpy((nodes + 1) / 2)
    one_token = torch.rand(V).double() + 0.1
    one_token /= one_token.sum()
    independent = one_token[every].prod(-1)
    mixed = torch.rand(len(every)).double() ** 3
    for p_M in (independent, mixed / mixed.sum()):
        objective = BayesUDLM(Bayes(p_M), schedule)
        alpha = objective.schedule(t).alpha
        bound = 0.0
        for x0 in range(len(every)):
            for xt in range(len(every)):
                same = (every[x0] == every[xt]).double()
                q = (alpha[:, None] * same + (1 - alpha[:, None]) / V).prod(-1)
                rows = [every[one].expand(points, -1) for one in (x0, xt)]
                rate = objective.rate(*rows, t)
                bound += float(p_M[x0] * (torch.from_numpy(weights) / 2 * q * rate).sum())
        entropy = float(-(p_M * p_M.log()).sum())
        assert bound == pytest.approx(entropy, rel=1e-4)


@pytest.mark.parametrize("start", [(-1, -1), (2, -1)], ids=["all", "given"])
def test_the_sampler_draws_the_law_of_its_chain(start):
    torch.manual_seed(5)
    p_M = torch.rand(V**L).double() ** 3
    model = Model(BayesUDLM(Bayes(p_M / p_M.sum()), LogLinear().full_range), NO_NETWORK)
    rows = 20_000
    out = uniform.sample(
        model, torch.tensor([start]).expand(rows, -1), KeyedNoise(7, torch.arange(rows)), steps=4, noise_removal=False
    )
    law = chain(model, 4, start)
    assert sum(law.values()) == pytest.approx(1.0)
    assert_follows(out.ids_BL, law)
    assert (out.evaluations_B == 4).all() and (start[0] == -1 or not out.step_BL[:, 0].any())


def test_many_steps_of_the_exact_network_draw_the_data():
    torch.manual_seed(6)
    p_M = torch.rand(V**L).double() ** 3
    p_M /= p_M.sum()
    model = Model(BayesUDLM(Bayes(p_M), LogLinear().full_range), NO_NETWORK)
    law = chain(model, 400, (-1, -1))
    found = torch.tensor([law[tuple(text)] for text in texts(V, L).tolist()])
    assert (
        (found - p_M).abs().sum()
        < 0.01
        < (torch.tensor([chain(model, 4, (-1, -1))[tuple(text)] for text in texts(V, L).tolist()]) - p_M).abs().sum()
    )


def test_given_tokens_and_padding_are_neither_noised_nor_scored(random_dit):
    net, objective = random_dit(5, time_conditioning=True), UDLM(LogLinear(), Uniform(5))
    x0 = torch.randint(5, (4, 6))
    given = torch.zeros_like(x0, dtype=torch.bool)
    given[:, :2] = True
    seen = []
    objective.mask_sampler = lambda *args: seen.extend(Bernoulli()(*args)) or seen
    batch = {"input_ids": x0, "observed": given, "attention_mask": torch.arange(6).expand(4, -1) < 5}
    loss = objective.loss(net, batch, evaluation_noise(0, torch.arange(4)))
    kept = given | (torch.arange(6) == 5)
    assert torch.equal(seen[0].xt_BL[kept], x0[kept]) and (seen[0].xt_BL != x0).any()
    assert (loss.nll_BL[kept] == 0).all() and (loss.nll_BL[~kept] > 0).all()
    assert torch.equal(loss.mask_BL, ~kept)


@pytest.mark.parametrize("mask_sampler", [ExactCount(), TiltedCount(), Complementary(), Rates([0.5])])
def test_draws_that_need_masks_are_refused(mask_sampler):
    with pytest.raises(ValueError, match=r"do not fit UDLM.*training.masking=bernoulli"):
        UDLM(LogLinear(), Uniform(V), mask_sampler)
    with pytest.raises(ValueError, match="do not fit UDLM"):
        UDLM(LogLinear(), Uniform(V)).bound(mask_sampler)


def test_the_chunked_projection_has_the_plain_gradients(random_dit, monkeypatch):
    net, objective = random_dit(5, time_conditioning=True).float(), UDLM(LogLinear(), Uniform(5))
    batch, found = {"input_ids": torch.randint(5, (3, 6))}, []
    for size in (4 * 5 * 4, 32 * 2**20):  # chunks of four positions, and one for all
        monkeypatch.setattr("palimpsest.objectives.projection._CHUNK_BYTES", size)
        net.zero_grad()
        loss = objective.loss(net, batch, evaluation_noise(0, torch.arange(3))).mean()
        loss.backward()
        found.append([loss.detach(), *(parameter.grad.clone() for parameter in net.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_one_token_drawn_again_given_the_others_keeps_the_distribution():
    """By enumeration: the mean over places of a Gibbs update leaves the distribution of x_t as it is."""
    torch.manual_seed(9)
    p_M, alpha = torch.rand(V**L).double() ** 3, torch.tensor(0.6).double()
    p_M /= p_M.sum()
    every = texts(V, L)
    process = Uniform(V)
    bayes = Bayes(p_M)
    same_SM = (every[:, None] == every[None]).double()
    q_S = ((alpha * same_SM + (1 - alpha) / V).prod(-1) * p_M).sum(1)  # of x_t
    log_others_SLV = bayes(every, alpha.expand(len(every)))
    after_S = torch.zeros_like(q_S)
    for place in range(L):
        here_S = every[:, place]
        log_p_SV = process.with_own_token(here_S, log_others_SLV[:, place], alpha.expand(len(every)))
        again_SV = process.conditional(here_S, log_p_SV, alpha.expand(len(every))).exp()
        for token in range(V):
            moved = every.clone()
            moved[:, place] = token
            target = (moved[:, None] == every[None]).all(-1).double()
            after_S += (q_S * again_SV[:, token]) @ target / L
    torch.testing.assert_close(after_S, q_S)


def test_a_corrector_mends_what_few_steps_get_wrong():
    torch.manual_seed(6)
    p_M = torch.rand(V**L).double() ** 3
    p_M /= p_M.sum()
    model, rows = Model(BayesUDLM(Bayes(p_M), LogLinear().full_range), NO_NETWORK), 8_000
    draw = partial(uniform.sample, model, torch.full((rows, L), -1), steps=2, noise_removal=False)
    plain = draw(KeyedNoise(2, torch.arange(rows)))
    corrected = draw(KeyedNoise(2, torch.arange(rows)), corrector_steps=30)
    at_once = draw(KeyedNoise(2, torch.arange(rows)), corrector_steps=30, corrector_tokens=L)

    def distance(ids_BL: torch.Tensor) -> float:
        place_B = (ids_BL * torch.tensor([V, 1])).sum(-1)
        return float((torch.bincount(place_B, minlength=V**L) / rows - p_M).abs().sum())

    assert (corrected.evaluations_B == 62).all() and distance(plain.ids_BL) > 0.1
    assert distance(corrected.ids_BL) < 0.05
    assert distance(at_once.ids_BL) > distance(plain.ids_BL), "all tokens at once are drawn independently"


def test_an_informed_corrector_draws_the_least_likely_token_again():
    law = torch.full((V**L,), 1e-9).double()
    law[0] = 1.0  # the text of zeros and hardly anything else
    model = Model(BayesUDLM(Bayes(law / law.sum()), LogLinear().full_range), NO_NETWORK)
    trace, noise = Trace(torch.full((1, L), -1), model.process), KeyedNoise(0, torch.arange(1))
    step = uniform.Resample(model, trace, noise, steps=1, corrector_steps=1, corrector="informed")
    step.trace.ids_BL = torch.tensor([[0, 1]])
    asked = step.positions(2, step.trace)
    ids, where = step.tokens(model.denoise(step.trace.ids_BL, asked.t_B, asked.at), asked.at)
    assert where.mask_BL.tolist() == [[False, True]] and ids.tolist() == [0]


def test_self_correction_puts_one_token_right_at_a_time_and_stops():
    law = torch.full((V**L,), 1e-9).double()
    law[0], law[-1] = 1.0, 1.0  # the texts 0 0 and 2 2
    model = Model(BayesUDLM(Bayes(law / law.sum()), LogLinear().full_range), NO_NETWORK)
    blank = torch.full((400, L), -1)
    settings = {"steps": 1, "noise_removal": False}
    plain = uniform.sample(model, blank, KeyedNoise(3, torch.arange(400)), **settings)
    right = uniform.sample(model, blank, KeyedNoise(3, torch.arange(400)), **settings, self_correction_steps=9)
    agree = plain.ids_BL[:, 0] == plain.ids_BL[:, 1]
    assert not agree.all() and (right.ids_BL[:, 0] == right.ids_BL[:, 1]).all()
    assert torch.equal(right.ids_BL[agree & (plain.ids_BL[:, 0] != 1)], plain.ids_BL[agree & (plain.ids_BL[:, 0] != 1)])
    assert (right.evaluations_B <= 1 + 3).all() and right.num_steps <= 4, "a text that is right is not looked at again"
    changed = (right.ids_BL != plain.ids_BL).sum(-1)
    assert int(changed.max()) >= 1 and (changed[agree & (plain.ids_BL[:, 0] != 1)] == 0).all()


class _OneToken(Denoiser):
    """The exact denoiser of texts of independent tokens, and of one token most of all."""

    process, vocab_size = Uniform(4), 4
    independent_unmasking, schedule = False, FullRange(LogLinear())
    log_p_V = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()

    def denoise(self, x_BL, t_B, at=None, **cond):
        alpha_N = at.of_rows(self.schedule(t_B).alpha)
        return self.process.with_own_token(at.take(x_BL), self.log_p_V.expand(len(at), 4), alpha_N)


@pytest.mark.parametrize("choice", [
    TokenChoice(), TokenChoice(0.7), TokenChoice(nucleus_p=0.8), TokenChoice(top_k=2), TokenChoice(temperature=0),
])  # fmt: skip
@pytest.mark.parametrize("how", [{"noise_removal": False}, {"noise_removal": False, "corrector_steps": 1}])
def test_a_token_follows_the_sharper_distribution_with_any_number_of_steps(choice, how):
    model, rows = _OneToken(), 8000
    for steps in (4, 64):
        noise = KeyedNoise(0, torch.arange(rows))
        found = uniform.sample(model, torch.full((rows, 1), -1), noise, steps=steps, choice=choice, **how)
        wanted_V = choice.adjusted(model.log_p_V[None]).softmax(-1)[0]
        share_V = found.ids_BL.flatten().bincount(minlength=4) / rows
        assert (share_V - wanted_V).abs().max() < 4 * (wanted_V.max() * (1 - wanted_V.max()) / rows) ** 0.5 + 0.002
        # The confidence is the model's probability of a token given all others, whatever the step and the choice.
        assert torch.allclose(found.confidence_BL, model.log_p_V.exp().float()[found.ids_BL], rtol=1e-4)


def test_every_generated_token_has_a_step_after_a_corrector_of_one_token():
    x_BL = torch.full((500, 4), -1)
    noise = KeyedNoise(0, torch.arange(len(x_BL)))
    found = uniform.sample(_OneToken(), x_BL, noise, steps=2, noise_removal=False, corrector_steps=1)
    assert (found.step_BL > 0).all() and (found.confidence_BL > 0).all()
