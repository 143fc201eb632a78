"""Schedules: derivative, inverse, end points, and the references' values."""

from __future__ import annotations

import json

import pytest
import torch

from palimpsest.noise_schedule import Cosine, CosineSquared, Geometric, Linear, LogLinear

SCHEDULES = [LogLinear(), LogLinear(eps=0.0), Cosine(), CosineSquared(), Linear(1e-4, 20), Geometric(1e-4, 20)]
T = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_dalpha_is_the_derivative_of_alpha(schedule):
    t = T.clone().requires_grad_()
    (derivative,) = torch.autograd.grad(schedule(t).alpha.sum(), t)
    torch.testing.assert_close(schedule(T).dalpha, derivative, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_t_from_alpha_inverts_alpha(schedule):
    torch.testing.assert_close(schedule.t_from_alpha(schedule(T).alpha), T, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_alpha_falls_and_what_follows_from_it_is_consistent(schedule):
    level = schedule(T)
    assert (level.alpha.diff() < 0).all() and (level.elbo_weight > 0).all()
    torch.testing.assert_close(torch.exp(-level.sigma), 1 - level.move_chance)


def test_log_linear_weight_is_one_over_t():
    torch.testing.assert_close(LogLinear()(T).elbo_weight, 1 / T)


@pytest.mark.parametrize("build", [Linear, Geometric])
def test_impossible_parameters_are_refused(build):
    with pytest.raises(ValueError, match="noise.sigma_min=2 must be below noise.sigma_max=2"):
        build(2, 2)


def test_reference_values(fixtures_dir):
    golden = json.loads((fixtures_dir / "schedules_mdlm.json").read_text())
    ours = {
        "loglinear": LogLinear(), "cosine": Cosine(), "cosinesqr": CosineSquared(),
        "linear(sigma_min=1e-3,sigma_max=7.0)": Linear(1e-3, 7.0), "geometric(1e-3,1)": Geometric(1e-3, 1.0),
    }  # fmt: skip
    t = torch.tensor(golden["t"], dtype=torch.float64)
    for name, schedule in ours.items():
        level, reference = schedule(t), golden["mdlm"][name]
        torch.testing.assert_close(level.sigma, torch.tensor(reference["sigma"]).double(), rtol=1e-4, atol=1e-4)
        dsigma = -level.dalpha / level.alpha
        torch.testing.assert_close(dsigma, torch.tensor(reference["dsigma"]).double(), rtol=1e-3, atol=2e-4)
