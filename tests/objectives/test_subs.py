"""SUBS: its identities, exact enumeration, purity, and the reference implementation's numbers."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from palimpsest.common.positions import Positions
from palimpsest.common.randomness import KeyedNoise, evaluation_noise
from palimpsest.models.checkpoints import read_checkpoint
from palimpsest.models.dit import DiT
from palimpsest.noise_schedule import Cosine, Linear, LogLinear
from palimpsest.objectives.mask_sampling import Bernoulli
from palimpsest.objectives.projection import cross_entropy
from palimpsest.objectives.subs import Subs
from palimpsest.process import Absorbing
from tests.helpers.draws import draw_at
from tests.helpers.laws import batch_of
from tests.helpers.networks import close, reference_dit

VOCAB, MASK = 5, 4


@pytest.mark.parametrize("mask_id", [4, 1])
def test_no_mass_on_the_mask_and_visible_tokens_are_copied(random_dit, mask_id):
    subs, net = Subs(LogLinear(), Absorbing(mask_id)), random_dit(VOCAB)
    x = torch.tensor([[0, mask_id, 2, mask_id], [mask_id, 3, 3, 0]])
    p = subs.denoise(net, x, torch.full((2,), 0.5)).exp()
    torch.testing.assert_close(p.sum(-1), torch.ones_like(p[..., 0]))
    assert (p[..., mask_id] == 0).all()
    visible = x != mask_id
    assert (p[visible].gather(1, x[visible][:, None]) == 1).all()


def test_projecting_some_positions_equals_projecting_all(random_dit):
    subs, net = Subs(LogLinear(), Absorbing(MASK)), random_dit(VOCAB)
    x = torch.tensor([[0, MASK, 2, MASK], [MASK, 3, 3, 0]])
    t = torch.tensor([0.3, 0.8])
    at = torch.tensor([[True, True, False, False], [True, False, False, True]])
    torch.testing.assert_close(subs.denoise(net, x, t, Positions(at)), subs.denoise(net, x, t)[at])


def test_the_loss_projects_only_masked_positions_and_never_all_logits(random_dit, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "palimpsest.objectives.subs.cross_entropy", lambda h, *a: seen.append(len(h)) or cross_entropy(h, *a)
    )
    x0 = torch.randint(MASK, (8, 16))
    loss = Subs(LogLinear(), Absorbing(MASK)).loss(random_dit(VOCAB), batch_of(x0), KeyedNoise(0, torch.arange(8)))
    assert seen == [int(loss.logs["num_masked"].sum())] and 0 < seen[0] < x0.numel()


def exact_nelbo(net: DiT, x0: torch.Tensor, schedule, points: int = 2000, low: float = 0.0, high: float = 1.0) -> float:
    """E over t in [low, high] of the integrand of eq. 11, every mask enumerated, t by Gauss-Legendre quadrature."""
    length = x0.shape[1]
    ce = {}
    for pattern in itertools.product([False, True], repeat=length):
        masked = torch.tensor([pattern])
        xt = torch.where(masked, MASK, x0)
        log_p = Subs(schedule, Absorbing(MASK)).denoise(net, xt, torch.full((1,), 0.5))
        ce[pattern] = -log_p.detach().gather(-1, x0[..., None]).squeeze(-1)[masked].sum().item()
    nodes, weights = np.polynomial.legendre.leggauss(points)
    t = torch.from_numpy((nodes + 1) / 2 * (high - low) + low)
    level = schedule(t)
    total = torch.zeros_like(t)
    for pattern, nats in ce.items():
        k = sum(pattern)
        total += level.move_chance**k * level.alpha ** (length - k) * nats
    return float((total * level.elbo_weight * torch.from_numpy(weights / 2)).sum())


def test_the_bound_is_the_same_under_every_schedule_with_the_same_end_points(random_dit):
    net, x0 = random_dit(VOCAB), torch.tensor([[0, 3, 1, 2, 2]])
    linear = Linear(-math.log1p(-1e-9), -math.log(1e-9))
    values = [exact_nelbo(net, x0, s) for s in (LogLinear(eps=1e-9), Cosine(eps=1e-9), linear)]
    assert max(values) - min(values) < 1e-5 * values[0]


def test_the_monte_carlo_loss_is_unbiased_against_enumeration(random_dit):
    """5 standard errors: a false alarm once in 1.7 million seeds."""
    net, x0 = random_dit(VOCAB), torch.tensor([[0, 3, 1, 2, 2, 0]])
    rows = x0.expand(4000, -1)
    for antithetic in (True, False):
        subs = Subs(LogLinear(), Absorbing(MASK), Bernoulli(antithetic, sampling_eps=1e-3))
        with torch.no_grad():
            nll = subs.loss(net, batch_of(rows), evaluation_noise(1, torch.arange(4000))).nll_BL.sum(-1)
        wanted = exact_nelbo(net, x0, LogLinear(), low=1e-3)
        assert abs(nll.mean() - wanted) < 5 * nll.std() / math.sqrt(len(nll))


def test_the_bound_is_above_the_likelihood_of_the_any_order_model(random_dit):
    """By Jensen the NELBO lies above -log of the average over orders of the chain-rule likelihood."""
    net, x0 = random_dit(VOCAB), torch.tensor([[0, 3, 1, 2]])
    subs, likelihoods = Subs(LogLinear(eps=0.0), Absorbing(MASK)), []
    chain = []
    for order in itertools.permutations(range(4)):
        xt, nats = torch.full_like(x0, MASK), 0.0
        for position in order:
            nats -= subs.denoise(net, xt, torch.full((1,), 0.5))[0, position, x0[0, position]].item()
            xt[0, position] = x0[0, position]
        chain.append(nats)
        likelihoods.append(math.exp(-nats))
    nelbo = exact_nelbo(net, x0, LogLinear(eps=0.0))
    assert nelbo == pytest.approx(sum(chain) / len(chain), rel=1e-6), "the NELBO is the mean over random orders"
    assert nelbo >= -math.log(sum(likelihoods) / len(likelihoods))


def test_padding_is_neither_masked_nor_scored_nor_seen(random_dit):
    subs, net = Subs(LogLinear(), Absorbing(MASK)), random_dit(VOCAB)
    x0 = torch.tensor([[0, 1, 2, 3, 0, 0], [3, 2, 1, 0, 2, 2]])
    ids = torch.arange(2)
    loss = subs.loss(net, batch_of(x0, padding=2), evaluation_noise(0, ids))
    assert (loss.nll_BL[:, 4:] == 0).all() and int(loss.mask_BL.sum()) == 8
    short = subs.loss(net, batch_of(x0[:, :4]), evaluation_noise(0, ids))
    torch.testing.assert_close(loss.nll_BL[:, :4], short.nll_BL)
    torch.testing.assert_close(loss.mean(), short.mean())


def test_loss_and_denoise_write_into_no_input(random_dit):
    subs, net = Subs(LogLinear(), Absorbing(MASK)), random_dit(VOCAB)
    batch = batch_of(torch.randint(MASK, (3, 6)), padding=1)
    before = {name: (value.clone(), value._version) for name, value in batch.items()}
    subs.loss(net, batch, evaluation_noise(0, batch["sample_id"])).mean().backward()
    x = torch.full((2, 4), MASK)
    subs.denoise(net, x, torch.full((2,), 0.5))
    assert x._version == 0
    for name, (value, version) in before.items():
        assert torch.equal(batch[name], value) and batch[name]._version == version


def test_the_generator_is_the_only_randomness(random_dit):
    subs = Subs(LogLinear(), Absorbing(MASK))
    net = random_dit(VOCAB)
    batch = batch_of(torch.randint(MASK, (3, 6)))
    first = subs.loss(net, batch, evaluation_noise(0, batch["sample_id"])).nll_BL
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert torch.equal(first, subs.loss(net, batch, evaluation_noise(0, batch["sample_id"])).nll_BL)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("weights", ["raw", "ema"])
@pytest.mark.parametrize("variant", ["mdlm_subs", "mdlm_subs_tc", "mdlm_subs_midmask"])
def test_golden_numbers(fixtures_dir, variant, weights):
    folder = fixtures_dir / variant
    meta = json.loads((folder / "golden.json").read_text())
    golden = load_file(folder / "golden.safetensors")
    net = reference_dit(meta)
    read_checkpoint(folder / "mdlm.ckpt").load_into(net, use_ema=weights == "ema")
    subs = Subs(LogLinear(), Absorbing(meta["mask_index"]))
    xt, t = golden["xt"], golden["t"]
    sigma = subs.schedule(t).sigma
    assert close(sigma, golden[f"{weights}.sigma"])
    assert close(net.conditioning(sigma), golden[f"{weights}.cond"])
    assert close(net(xt, sigma), golden[f"{weights}.logits"])
    reference = golden[f"{weights}.model_output"]
    possible = reference > -1e5  # the reference writes -1e6 where we write -inf
    log_p = subs.denoise(net, xt, t)
    assert close(log_p[possible], reference[possible]) and (log_p[~possible] == -torch.inf).all()
    batch = {"input_ids": golden["x0"], "attention_mask": golden["attention_mask"].bool()}
    loss = subs.loss_at(net, batch, draw_at(xt, t))
    assert close(loss.nll_BL, golden[f"{weights}.nlls"])
    assert close(loss.mean(), golden[f"{weights}.token_nll"])


@pytest.mark.parametrize("variant", ["mdlm_subs"])
def test_golden_gradients(fixtures_dir, variant):
    folder = fixtures_dir / variant
    meta = json.loads((folder / "golden.json").read_text())
    golden, grads = load_file(folder / "golden.safetensors"), load_file(folder / "grads.safetensors")
    net = reference_dit(meta)
    read_checkpoint(folder / "mdlm.ckpt").load_into(net, use_ema=False)
    batch = {"input_ids": golden["x0"], "attention_mask": golden["attention_mask"].bool()}
    Subs(LogLinear(), Absorbing(meta["mask_index"])).loss_at(
        net, batch, draw_at(golden["xt"], golden["t"])
    ).mean().backward()
    named = dict(net.named_parameters())
    compared = 0
    for name, reference in grads.items():
        if name.startswith("grad."):
            assert close(named[name.removeprefix("grad.")].grad, reference), name
            compared += 1
    assert compared == len(named)


def test_golden_hub_layout(fixtures_dir):
    folder = fixtures_dir / "hf_mdlm"
    checkpoint = read_checkpoint(folder)
    golden, config = load_file(folder / "golden.safetensors"), checkpoint.config
    net = DiT(config["vocab_size"], config["hidden_dim"], config["cond_dim"], config["n_blocks"], config["n_heads"])
    checkpoint.load_into(net)
    xt = next(value for name, value in golden.items() if name.endswith("xt"))
    logits = next(value for name, value in golden.items() if "logits" in name)
    assert close(net.eval()(xt, torch.zeros(len(xt))), logits)
