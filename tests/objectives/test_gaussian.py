"""Gaussian diffusion of latents: its identities, its closed forms, and what each option changes."""

from __future__ import annotations

import pytest
import torch

from palimpsest.common.randomness import KeyedNoise
from palimpsest.gaussian_process import cosine_level, noise_latent, read_prediction, velocity
from palimpsest.objectives.gaussian import EARLIEST, LATEST, GaussianDiffusion

ROWS = 5
torch.manual_seed(0)
X0, EPS = torch.randn(2, ROWS, 3, 4, dtype=torch.float64)
T = torch.tensor([0.001, 0.2, 0.5, 0.9, 0.999], dtype=torch.float64)
LEVEL = cosine_level(T).like(X0)


def test_v_x0_and_eps_are_three_forms_of_one_prediction():
    xt, v = noise_latent(X0, EPS, LEVEL), velocity(X0, EPS, LEVEL)
    for kind, output in (("v", v), ("x0", X0), ("eps", EPS)):
        said = read_prediction(kind, output, xt, LEVEL)
        for found, wanted in ((said.x0_BKD, X0), (said.eps_BKD, EPS), (said.v_BKD, v)):
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_the_level_is_a_function_of_each_row_s_own_time():
    """Not of a product over the rows of the batch, which leaves almost everything without noise."""
    level = cosine_level(T)
    torch.testing.assert_close(level.alpha**2 + level.sigma**2, torch.ones_like(T))
    torch.testing.assert_close((level.alpha / level.sigma) ** 2, (torch.pi / 2 * T).tan() ** -2)
    assert level.alpha[-1] < 0.002 and level.sigma[0] < 0.002
    for row in range(ROWS):
        assert torch.equal(cosine_level(T[row : row + 1]).alpha, level.alpha[row : row + 1])
    drawn = GaussianDiffusion().draw(torch.zeros(4000, 1, 2), KeyedNoise(0, torch.arange(4000)))
    spread = drawn.xt_BKD.square().mean((-2, -1)).sqrt() / cosine_level(drawn.t_B).sigma
    assert (spread[drawn.t_B > 0.9].square().mean() - 1).abs() < 0.2 and (drawn.t_B > 0.9).sum() > 300
    assert EARLIEST <= drawn.t_B.min() < 0.01 and 0.99 < drawn.t_B.max() <= LATEST


def test_what_a_row_draws_hangs_on_nothing_but_its_name():
    noise = lambda keys: KeyedNoise(3, torch.tensor(keys))  # noqa: E731
    whole = GaussianDiffusion().draw(X0, noise([7, 8, 9, 10, 11]))
    part = GaussianDiffusion().draw(X0[[3, 1]], noise([10, 8]))
    assert torch.equal(part.xt_BKD, whole.xt_BKD[[3, 1]]) and torch.equal(part.t_B, whole.t_B[[3, 1]])


def test_normal_numbers_are_normal_and_finite():
    x = KeyedNoise(0, torch.arange(2000)).normal(50)
    assert x.isfinite().all() and x.dtype == torch.float64
    for power, wanted, variance in ((1, 0.0, 1.0), (2, 1.0, 2.0), (4, 3.0, 96.0)):
        assert abs(float((x**power).mean()) - wanted) < 5 * (variance / x.numel()) ** 0.5
    ends = KeyedNoise(0, torch.zeros(2, dtype=torch.long))
    ends.uniform = lambda *shape: torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    low, high = ends.normal().tolist()
    assert -9 < low < -8 < 8 < high < 9


@pytest.mark.parametrize("target", ["v", "x0", "eps"])
def test_the_best_prediction_of_a_gaussian_latent_costs_what_the_formula_says(target):
    """x_0 of variance s^2: given x_t, x_0 has mean a s^2 x_t / (a^2 s^2 + q^2) and variance s^2 q^2 / (a^2 s^2 + q^2),
    with a = alpha and q = sigma. Its error times 1 / q^2 is that of v (which is (a x_t - x_0) / q), times a^2 / q^2
    that of eps."""
    s2, rows = 0.3, 200_000
    x0 = KeyedNoise(1, torch.arange(rows)).normal(1, 1) * s2**0.5
    latent = GaussianDiffusion(target=target)
    for t in (0.1, 0.5, 0.9):
        time = torch.full((rows,), t, dtype=torch.float64)
        noised = latent.at(x0, KeyedNoise(2, torch.arange(rows)).normal(1, 1), time)
        level = cosine_level(time).like(x0)
        total = level.alpha**2 * s2 + level.sigma**2
        best = read_prediction("x0", level.alpha * s2 / total * noised.xt_BKD, noised.xt_BKD, level)
        output = {"v": best.v_BKD, "x0": best.x0_BKD, "eps": best.eps_BKD}[target]
        of_x0 = float((s2 * level.sigma**2 / total)[0])
        factor = {"x0": 1.0, "v": 1 / level.sigma[0] ** 2, "eps": (level.alpha / level.sigma)[0] ** 2}[target]
        found = latent.loss(output, noised)
        for loss_B, wanted in ((found.loss_B, of_x0 * float(factor)), (found.mse_B, of_x0)):
            assert abs(float(loss_B.mean()) - wanted) < 5 * float(loss_B.std()) / rows**0.5


def test_every_loss_is_its_formula():
    noised = GaussianDiffusion().at(X0, EPS, T)
    output = torch.randn(ROWS, 3, 4, dtype=torch.float64) * 2
    miss = output - velocity(X0, EPS, LEVEL)
    said = LEVEL.alpha * noised.xt_BKD - LEVEL.sigma * output
    cosine = ((said * X0).sum(-1) / said.norm(dim=-1) / X0.norm(dim=-1)).mean(-1)
    mse = miss.square().mean((1, 2))
    huber = torch.where(miss.abs() < 1, miss**2 / 2, miss.abs() - 0.5).mean((1, 2))
    wanted = {"mse": mse, "huber": huber, "mse_cosine": mse + 0.5 * (1 - cosine)}
    for name, value in wanted.items():
        found = GaussianDiffusion(loss=name, cosine_weight=0.5).loss(output, noised)
        torch.testing.assert_close(found.loss_B, value)
        torch.testing.assert_close(found.cosine_B, cosine)
        torch.testing.assert_close(found.mse_B, (said - X0).square().mean((1, 2)))
    of_x0 = GaussianDiffusion("x0", "cosine").loss(said, noised)
    torch.testing.assert_close(of_x0.loss_B, 1 - cosine)
    by_target = [GaussianDiffusion(target).loss(output, noised).loss_B for target in ("v", "x0", "eps")]
    assert all(not torch.allclose(a, b) for a, b in zip(by_target, by_target[1:], strict=False))


def test_all_of_it_is_in_float32_under_autocast():
    noised = GaussianDiffusion().draw(torch.randn(2, 1, 8), KeyedNoise(0, torch.arange(2)))
    assert noised.xt_BKD.dtype == noised.eps_BKD.dtype == torch.float32
    output = torch.randn(2, 1, 8).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = GaussianDiffusion(loss="mse_cosine").loss(output, noised)
    assert found.loss_B.dtype == torch.float32
    torch.testing.assert_close(found.loss_B, GaussianDiffusion(loss="mse_cosine").loss(output.float(), noised).loss_B)


@pytest.mark.parametrize(("settings", "said"), [
    ({"loss": "cosine"}, "latent_loss=cosine with training.latent_target=v: a cosine ignores the length"),
    ({"loss": "cosine", "target": "eps"}, "latent_target=x0 .directions only., or training.latent_loss=mse_cosine"),
])  # fmt: skip
def test_what_means_nothing_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        GaussianDiffusion(**settings)
