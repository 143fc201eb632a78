"""Samplers of latents, and of texts and latents together: laws that are known, identities, what is asked."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from palimpsest.common.positions import Positions
from palimpsest.common.randomness import KeyedNoise
from palimpsest.denoisers import JointDenoiser, LatentGuided, WithoutTokens
from palimpsest.evaluation.edited_tokens import select
from palimpsest.gaussian_process import LatentPrediction, cosine_level
from palimpsest.objectives.joint import JointModel
from palimpsest.samplers import ancestral, gaussian, joint
from palimpsest.samplers.base import TokenChoice
from palimpsest.samplers.gaussian import LatentSteps
from palimpsest.samplers.joint import with_guidance
from tests.helpers.joint import LENGTH, MASK, SHAPE, VOCAB, network, objective

ROWS = 5
DDPM = partial(ancestral.sample, steps=6, skip_idle=False)


def noise(rows: int = ROWS, seed: int = 3) -> KeyedNoise:
    return KeyedNoise(seed, torch.arange(rows))


def model() -> JointModel:
    return objective().bound(None).model(network().double())


def texts(rows: int = ROWS) -> torch.Tensor:
    return torch.randint(MASK, (rows, LENGTH), generator=torch.Generator().manual_seed(1))


def latents(rows: int = ROWS) -> torch.Tensor:
    return torch.randn(rows, *SHAPE, generator=torch.Generator().manual_seed(2)).double()


class Spied(JointDenoiser):
    """A model whose every question is written down."""

    def __init__(self, inner: JointModel) -> None:
        self.inner = inner
        self.asked = []
        self.latent_shape = inner.latent_shape
        self.process = inner.process
        self.schedule = inner.schedule
        self.vocab_size = inner.vocab_size
        self.independent_unmasking = True

    def denoise(self, x_BL, t_B, at, **cond):
        self.asked.append((x_BL.clone(), t_B, at.mask_BL, cond))
        return self.inner.denoise(x_BL, t_B, at, **cond)

    def predict_latent(self, latent_BKD, latent_t_B, x_BL, t_B, **cond):
        self.asked.append((x_BL.clone(), t_B, latent_t_B, cond))
        return self.inner.predict_latent(latent_BKD, latent_t_B, x_BL, t_B, **cond)

    def denoise_both(self, x_BL, t_B, at, latent_BKD, latent_t_B, **cond):
        self.asked.append((x_BL.clone(), t_B, latent_t_B, at.mask_BL))
        return self.inner.denoise_both(x_BL, t_B, at, latent_BKD, latent_t_B, **cond)


class NormalLatents:
    """The optimal prediction where latents are normal, with a mean and a spread."""

    latent_shape = SHAPE

    def __init__(self, mean: float, spread: float) -> None:
        self.mean, self.spread = mean, spread

    def predict_latent(self, latent_BKD, latent_t_B, x_BL, t_B, **cond):
        level = cosine_level(latent_t_B).like(latent_BKD)
        alpha, sigma = level.alpha, level.sigma
        gain = alpha * self.spread**2 / (alpha**2 * self.spread**2 + sigma**2)
        x0_BKD = self.mean + gain * (latent_BKD - alpha * self.mean)
        eps_BKD = (latent_BKD - alpha * x0_BKD) / sigma
        return LatentPrediction(x0_BKD, eps_BKD, alpha * eps_BKD - sigma * x0_BKD)


def test_the_law_of_normal_latents_comes_out():
    """DDIM carries each noise to the latent of its quantile; ancestral steps end in the same law."""
    rows, x = 2000, torch.zeros(2000, 1, dtype=torch.long)
    known = NormalLatents(2.0, 0.5)
    drawn = gaussian.sample(known, x, noise(rows), LatentSteps(200))
    torch.testing.assert_close(drawn, (2 + 0.5 * noise(rows).normal(*SHAPE)).float(), atol=0.02, rtol=0)
    for eta in (0.5, 1.0):
        drawn = gaussian.sample(known, x, noise(rows), LatentSteps(200, eta))
        assert abs(drawn.mean() - 2) < 0.02 and abs(drawn.std() - 0.5) < 0.02, eta
    for eta in (0.0, 1.0):  # what is certain is found in any number of steps
        exact = gaussian.sample(NormalLatents(-1.5, 0.0), x[:3], noise(3), LatentSteps(3, eta))
        torch.testing.assert_close(exact, torch.full_like(exact, -1.5), atol=1e-5, rtol=0)


def test_an_ancestral_step_is_the_posterior_and_every_step_keeps_the_marginal():
    t, s = (torch.full((1,), v, dtype=torch.float64) for v in (0.7, 0.4))
    now, then = cosine_level(t), cosine_level(s)
    x0, eps = torch.tensor([[[0.3]]]).double(), torch.tensor([[[-1.1]]]).double()
    said, x_t = LatentPrediction(x0, eps, eps), now.alpha * x0 + now.sigma * eps
    one, none = (
        type("N", (), {"normal": lambda self, *shape, v=v: torch.full((1, *shape), v).double()})() for v in (1.0, 0.0)
    )
    for eta in (0.0, 0.3, 1.0):
        fresh = gaussian.step(said, x_t, t, s, eta, one) - gaussian.step(said, x_t, t, s, eta, none)
        kept = (gaussian.step(said, x_t, t, s, eta, none) - then.alpha * x0) / eps
        torch.testing.assert_close(fresh**2 + kept**2, (then.sigma**2).reshape(1, 1, 1))
    # q(x_s | x_t, x_0): precisions of x_0's noise up to s, and of x_t given x_s, add up.
    ratio = now.alpha / then.alpha
    between = now.sigma**2 - (ratio * then.sigma) ** 2
    variance = 1 / (1 / then.sigma**2 + ratio**2 / between)
    mean = variance * (then.alpha * x0 / then.sigma**2 + ratio * x_t / between)
    torch.testing.assert_close(fresh**2, variance.reshape(1, 1, 1))
    torch.testing.assert_close(gaussian.step(said, x_t, t, s, 1.0, none), mean.reshape(1, 1, 1))


def test_guidance_of_latents_goes_from_the_marginal_to_the_text_and_beyond():
    net, x, hidden = model(), texts(), torch.full((ROWS, LENGTH), MASK)
    draw = lambda w, x=x, **more: gaussian.sample(  # noqa: E731
        net, x, noise(), LatentSteps(4, guidance=w), masked_BL=hidden, **more
    )
    assert torch.equal(draw(1.0), gaussian.sample(net, x, noise(), LatentSteps(4)))
    assert torch.equal(draw(0.0), draw(0.0, x=x.flip(0))) and not torch.equal(draw(1.0), draw(1.0, x=x.flip(0)))
    z, t, s = noise().normal(*SHAPE), torch.ones(ROWS).double(), torch.zeros(ROWS).double()
    conditional, unconditional = net.predict_latent(z, t, x, s), net.predict_latent(z, t, hidden, t)
    torch.testing.assert_close(
        gaussian.sample(net, x, noise(), LatentSteps(1, guidance=3.0), masked_BL=hidden),
        (unconditional.x0_BKD + 3 * (conditional.x0_BKD - unconditional.x0_BKD)).float(),
    )
    with pytest.raises(ValueError, match="sampling.guidance=2"):
        gaussian.sample(net, x, noise(), LatentSteps(4, guidance=2.0))


def test_the_marginal_is_asked_with_masks_at_time_1_and_the_text_clean_at_0():
    spied, x, hidden = Spied(model()), texts(), torch.full((ROWS, LENGTH), MASK)
    how = LatentSteps(3, guidance=2.0)
    gaussian.sample(spied, x, noise(), how, masked_BL=hidden)
    assert how.evaluations == len(spied.asked) == 6
    for asked, t_B, _, _ in spied.asked:
        assert torch.equal(asked, x) and (t_B == 0).all() or torch.equal(asked, hidden) and (t_B == 1).all()


def test_guidance_of_texts_goes_from_the_marginal_to_the_latent_and_beyond():
    net, z = model(), latents()
    x = torch.full((ROWS, LENGTH), MASK)
    at = Positions.everywhere(x)
    half = torch.full((ROWS,), 0.5).double()
    conditional, unconditional = net.denoise(x, half, at, latent=z), net.denoise(x, half, at)
    assert not torch.allclose(conditional, unconditional)
    torch.testing.assert_close(LatentGuided(net, 1.0).denoise(x, half, at, latent=z), conditional)
    torch.testing.assert_close(LatentGuided(net, 0.0).denoise(x, half, at, latent=z), unconditional)
    beyond = LatentGuided(net, 3.0).denoise(x, half, at, latent=z)
    tokens = [token for token in range(VOCAB) if token != MASK]
    wanted = (unconditional.double() + 3 * (conditional.double() - unconditional.double()))[:, tokens].log_softmax(-1)
    torch.testing.assert_close(beyond[:, tokens], wanted)
    assert beyond[:, MASK].isneginf().all() and with_guidance(DDPM, 1.0) is DDPM
    plain = DDPM(net, x, noise(), latent=z)
    twice = with_guidance(DDPM, 1.0 + 1e-12)(net, x, noise(), latent=z)
    assert torch.equal(plain.ids_BL, twice.ids_BL) and torch.equal(2 * plain.evaluations_B, twice.evaluations_B)
    hidden = DDPM(net, x, noise(), latent=z, latent_t=torch.ones(ROWS).double())
    assert torch.equal(with_guidance(DDPM, 0.0)(net, x, noise(), latent=z).ids_BL, hidden.ids_BL)


def test_text_and_latent_go_down_one_grid_and_end_complete():
    spied, x = Spied(model()), texts()
    x[:, 2:] = MASK
    text, latent_BKD = joint.sample(spied, x, noise(), steps=5, choice=TokenChoice(temperature=0.7))
    times = [t_B[0].item() for _, t_B, _, _ in spied.asked[:5]]
    assert times == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2], abs=1e-4)
    assert all(torch.equal(t_B, z_B) for _, t_B, z_B, _ in spied.asked[:5])
    assert torch.equal(text.ids_BL[:, :2], x[:, :2]) and not (text.ids_BL == MASK).any()
    assert latent_BKD.shape == (ROWS, *SHAPE) and latent_BKD.isfinite().all()
    written = torch.stack([at for _, _, _, at in spied.asked[:5]]).sum(0)  # each mask is drawn once, or left to the end
    assert (written[:, 2:] <= 1).all() and not written[:, :2].any()


def test_a_row_does_not_depend_on_its_batch():
    net, z, x = model(), latents(), texts()
    masks = torch.full_like(x, MASK)
    some = torch.tensor([3, 1])
    every, few = noise(), KeyedNoise(3, some)
    steps = LatentSteps(4, 1.0, 2.0)
    chosen = {"positions": "contrast", "rate": 0.5, "eligible_BL": torch.ones_like(x, dtype=torch.bool)}
    pairs = [
        [DDPM(net, masks[i], key, latent=z[i]).ids_BL for i, key in ((slice(None), every), (some, few))],
        [gaussian.sample(net, x[i], key, steps, masked_BL=masks[i])
         for i, key in ((slice(None), noise()), (some, KeyedNoise(3, some)))],
        [joint.sample(net, masks[i], key, steps=4, eta=1.0)[1]
         for i, key in ((slice(None), noise()), (some, KeyedNoise(3, some)))],
        [joint.sample(net, masks[i], key, steps=4, eta=1.0)[0].ids_BL
         for i, key in ((slice(None), noise()), (some, KeyedNoise(3, some)))],
        [select(net, x[i], generator=key, source=z[i], target=z.flip(0)[i],
                **{**chosen, "eligible_BL": chosen["eligible_BL"][i]}).masked_BL
         for i, key in ((slice(None), noise()), (some, KeyedNoise(3, some)))],
    ]  # fmt: skip
    for whole, part in pairs:
        torch.testing.assert_close(whole[some], part)


def test_a_text_that_is_masked_in_part_is_filled_from_its_own_time():
    spied, x = Spied(model()), texts()
    x[:, -3:] = MASK
    begin = torch.linspace(0.1, 0.9, ROWS).double()
    out = DDPM(spied, x, noise(), begin_B=begin, latent=latents())
    asked = torch.stack([t_B for _, t_B, _, _ in spied.asked])
    torch.testing.assert_close(asked[0], begin)
    assert (asked.diff(dim=0) < 0).all() and len(asked) == 7
    assert torch.equal(out.ids_BL[:, :-3], x[:, :-3]) and not (out.ids_BL == MASK).any()
    every = torch.full((ROWS, LENGTH), MASK)
    whole = DDPM(model(), every, noise(), latent=latents())
    assert torch.equal(
        DDPM(model(), every, noise(), begin_B=torch.ones(ROWS).double(), latent=latents()).ids_BL, whole.ids_BL
    )


def test_tokens_that_are_barred_are_never_written_and_the_rest_keeps_its_odds():
    x, t = torch.full((ROWS, 5), model().process.mask_id), torch.full((ROWS,), 0.5, dtype=torch.float64)
    at, cond = Positions.everywhere(x), {"latent": latents(), "latent_t": torch.zeros(ROWS)}
    free, barred = (found.denoise(x, t, at, **cond).exp() for found in (model(), WithoutTokens(model(), (0, 2))))
    assert (barred[:, [0, 2]] == 0).all() and (free[:, [0, 2]] > 0).all()
    free[:, [0, 2]] = 0
    torch.testing.assert_close(barred, free / free.sum(-1, keepdim=True))
