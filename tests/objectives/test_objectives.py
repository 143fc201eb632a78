"""D3PM, SEDD and AR: how they reduce to SUBS and to the chain rule, and the reference implementations' numbers."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from safetensors.torch import load_file

from palimpsest.common.positions import Positions
from palimpsest.models.checkpoints import read_checkpoint
from palimpsest.noise_schedule import Cosine, FullRange, LogLinear
from palimpsest.objectives.base import Model
from palimpsest.objectives.d3pm import D3PM
from palimpsest.objectives.mask_sampling import Bernoulli, Complementary, ExactCount
from palimpsest.objectives.sedd import SEDD
from palimpsest.objectives.subs import Subs
from palimpsest.process import Absorbing
from tests.helpers.draws import draw_at
from tests.helpers.laws import batch_of
from tests.helpers.networks import close, reference_dit

VOCAB, MASK = 5, 4


@pytest.mark.parametrize("law", [Subs, SEDD, D3PM])
def test_a_clean_text_costs_nothing_where_it_is_said(random_dit, law):
    net, x_BL = random_dit(5).float(), torch.randint(4, (2, 6))
    loss = law(LogLinear(), Absorbing(4)).loss_at(
        net, {"input_ids": x_BL}, draw_at(x_BL, torch.tensor([0.3, 0.7]).double())
    )
    assert bool(loss.nll_BL.any()) != law.zero_loss_on_clean_text


class Scripted(torch.nn.Module):
    """A backbone that answers the logits it was given, whatever it sees; the vocabulary is its hidden width."""

    causal, encodes_positions = False, False

    def __init__(self, logits_BLV: torch.Tensor) -> None:
        super().__init__()
        self.logits_BLV = logits_BLV
        self.head = torch.nn.Linear(logits_BLV.shape[-1], logits_BLV.shape[-1]).to(logits_BLV.dtype)
        torch.nn.init.eye_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)

    def encode(self, tokens_BL, sigma_B, attention_mask=None):
        return self.logits_BLV


def noised(rate: float = 0.6):
    torch.manual_seed(0)
    x0 = torch.randint(MASK, (6, 9))
    return x0, torch.where(torch.rand(6, 9) < rate, MASK, x0), torch.rand(6, dtype=torch.float64) * 0.9 + 0.05


@pytest.mark.parametrize("schedule", [LogLinear(), Cosine()], ids=["loglinear", "cosine"])
def test_sedd_fed_the_score_of_log_p_is_subs_token_by_token(schedule):
    """The score that log p implies is p alpha / (1 - alpha), which SEDD reads off logits log p + log(V - 1)."""
    x0, xt, t = noised()
    log_p = torch.randn(6, 9, VOCAB, dtype=torch.float64)
    log_p[..., MASK] = -torch.inf
    log_p = log_p.log_softmax(-1)
    finite = log_p.masked_fill(log_p.isinf(), -50.0)
    subs = Subs(schedule, Absorbing(MASK)).loss_at(Scripted(finite), batch_of(x0), draw_at(xt, t)).nll_BL
    sedd = (
        SEDD(schedule, Absorbing(MASK))
        .loss_at(Scripted(finite + math.log(VOCAB - 1)), batch_of(x0), draw_at(xt, t))
        .nll_BL
    )
    torch.testing.assert_close(sedd.double(), subs.double(), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("T", [3, 100])
def test_d3pm_without_mass_on_the_mask_is_subs_at_the_same_t(T):
    x0, xt, t = noised()
    t = torch.floor(t * T) / T + 1 / T
    net = Scripted(torch.randn(6, 9, VOCAB, dtype=torch.float64))
    d3pm = D3PM(LogLinear(), Absorbing(MASK), T=T, subs_masking=True).loss_at(net, batch_of(x0), draw_at(xt, t)).nll_BL
    subs = Subs(LogLinear(), Absorbing(MASK), T=T).loss_at(net, batch_of(x0), draw_at(xt, t)).nll_BL
    reconstruction = (
        -D3PM(LogLinear(), Absorbing(MASK), T=T, subs_masking=True).denoise(net, x0, t).gather(-1, x0[..., None])
    )
    torch.testing.assert_close(d3pm - reconstruction.squeeze(-1).float(), subs, rtol=1e-4, atol=1e-4)


def test_d3pm_step_is_the_kl_of_its_own_reverse_step(random_dit):
    """KL(q(x_s | mask, x_0) || p(x_s | mask)) written out with the law that the sampler draws from."""
    net, T = random_dit(VOCAB), 4
    objective = D3PM(Cosine(), Absorbing(MASK), T=T)
    x0, xt, _ = noised()
    t = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.5, 1.0], dtype=torch.float64)
    s, at = t - 1 / T, xt == MASK
    log_q = objective.reverse(net, xt, t, s, Positions(at))
    chance = ((objective.schedule(s).alpha - objective.schedule(t).alpha) / (1 - objective.schedule(t).alpha))[
        :, None
    ].expand_as(at)[at]
    stays = torch.where(chance < 1, (1 - chance) * ((1 - chance).log() - log_q[:, MASK]), 0.0)
    kl = chance * (chance.log() - log_q.gather(1, x0[at][:, None]).squeeze(1)) + stays
    loss = objective.loss_at(net, batch_of(x0), draw_at(xt, t)).nll_BL
    log_p0 = objective.network_log_probs(net, x0, torch.zeros_like(t)).gather(-1, x0[..., None]).squeeze(-1)
    torch.testing.assert_close((loss.double() + log_p0)[at] / T, kl, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [
    lambda: Subs(Cosine(), Absorbing(MASK)), lambda: SEDD(LogLinear(), Absorbing(MASK)),
    lambda: D3PM(LogLinear(), Absorbing(MASK), T=10),
    lambda: D3PM(LogLinear(), Absorbing(MASK), T=10, subs_masking=True),
], ids=["subs", "sedd", "d3pm", "d3pm_subs_masking"])  # fmt: skip
def test_reverse_steps_are_distributions_and_denoise_knows_no_mask(random_dit, build):
    net, objective = random_dit(VOCAB, time_conditioning=True), build()
    _, xt, t = noised()
    at = xt == MASK
    p = objective.reverse(net, xt, t, t - 0.04, Positions(at)).exp()
    assert (p >= 0).all() and ((p.sum(-1) - 1).abs() < 1e-6).all()
    p0 = objective.denoise(net, xt, t, Positions(at)).exp()
    assert (p0[:, MASK] == 0).all() and ((p0.sum(-1) - 1).abs() < 1e-5).all()


def test_a_rescaled_schedule_ends_in_masks_and_loglinear_becomes_the_papers_own():
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    torch.testing.assert_close(FullRange(LogLinear())(t).alpha, 1 - t)
    for base in (Cosine(), LogLinear()):
        schedule = FullRange(base)
        assert schedule(t).alpha[[0, -1]].tolist() == pytest.approx([1, 0], abs=1e-12)
        torch.testing.assert_close(schedule.t_from_alpha(schedule(t).alpha), t, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("build", "said"), [
    (lambda: D3PM(LogLinear(), Absorbing(MASK), T=0), "parameterization=d3pm with T=0"),
    (lambda: Subs(LogLinear(), Absorbing(MASK), ExactCount(), T=10), "T=10 and masks by exact mask counts"),
    (lambda: SEDD(LogLinear(), Absorbing(MASK), Bernoulli(T=7)), "T=7 means nothing to parameterization=sedd"),
    (lambda: Subs(LogLinear(), Absorbing(MASK), T=10).bound(Complementary()), "contradict"),
    (lambda: Bernoulli(importance_sampling=True, T=3), "T=3"),
])  # fmt: skip
def test_contradictions_are_refused(build, said):
    with pytest.raises(ValueError, match=said):
        build()


def golden_of(fixtures_dir, variant, weights):
    folder = fixtures_dir / variant
    meta = json.loads((folder / "golden.json").read_text())
    net = reference_dit({"time_conditioning": meta.get("algo", {}).get("time_conditioning"), **meta})
    read_checkpoint(next(folder.glob("*.ckpt"))).load_into(net, use_ema=weights == "ema")
    return meta, load_file(folder / "golden.safetensors"), net


@pytest.mark.parametrize("weights", ["raw", "ema"])
@pytest.mark.parametrize("variant", ["mdlm_d3pm", "mdlm_d3pm_subsmask"])
def test_golden_d3pm(fixtures_dir, variant, weights):
    meta, golden, net = golden_of(fixtures_dir, variant, weights)
    objective = D3PM(LogLinear(), Absorbing(meta["mask_index"]), T=meta["T"], subs_masking=variant.endswith("subsmask"))
    batch = {"input_ids": golden["x0"], "attention_mask": golden["attention_mask"].bool()}
    t = golden[f"{weights}.t_effective"]
    reference = golden[f"{weights}.model_output"]
    likely = reference > -1e5
    assert close(objective.network_log_probs(net, golden["xt"], t)[likely], reference[likely])
    loss = objective.loss_at(net, batch, draw_at(golden["xt"], t.double()))
    assert close(loss.nll_BL, golden[f"{weights}.nlls"])
    assert close(loss.mean(), golden[f"{weights}.token_nll"])


@pytest.mark.parametrize("weights", ["raw", "ema"])
@pytest.mark.parametrize("variant", ["mdlm_sedd", "mdlm_sedd_midmask"])
def test_golden_sedd(fixtures_dir, variant, weights):
    meta, golden, net = golden_of(fixtures_dir, variant, weights)
    objective = SEDD(LogLinear(), Absorbing(meta["mask_index"]))
    xt, t = golden["xt"], golden["t"]
    batch = {"input_ids": golden["x0"], "attention_mask": golden["attention_mask"].bool()}
    at = xt == meta["mask_index"]
    tokens = [v for v in range(meta["vocab_size"]) if v != meta["mask_index"]]
    ours = objective.log_score(net, xt, t, Positions(at))[:, tokens]
    assert close(ours, golden[f"{weights}.model_output"][at][:, tokens].double())
    loss = objective.loss_at(net, batch, draw_at(xt, t))
    assert close(loss.nll_BL, golden[f"{weights}.nlls"])
    assert close(loss.mean(), golden[f"{weights}.token_nll"])


@pytest.mark.parametrize("weights", ["raw", "ema"])
@pytest.mark.parametrize("variant", ["bd3lms_mdlm", "bd3lms_sedd"])
def test_golden_bd3lms(fixtures_dir, variant, weights):
    """There the first token is given (ignore_bos) and the log-linear schedule has no eps."""
    meta, golden, net = golden_of(fixtures_dir, variant, weights)
    law = Subs if variant == "bd3lms_mdlm" else SEDD
    objective = law(LogLinear(eps=0.0), Absorbing(meta["mask_index"]))
    x0, xt, t = golden["x0"], golden["raw.xt_used"], golden["t"].squeeze(-1)
    given = torch.zeros_like(x0, dtype=torch.bool)
    given[:, 0] = True
    mask = golden["attention_mask"].bool()
    loss = objective.loss_at(net, {"input_ids": x0, "attention_mask": mask, "observed": given}, draw_at(xt, t))
    assert close(loss.nll_BL, golden[f"{weights}.eval_nlls"])
    assert close(loss.mean(), golden[f"{weights}.eval_token_nll"])
    assert close(loss.nll_BL.sum() / mask.sum(), golden[f"{weights}.train_token_nll"])


@pytest.mark.parametrize("variant", ["mdlm_d3pm", "mdlm_sedd"])
def test_golden_gradients(fixtures_dir, variant):
    meta, golden, net = golden_of(fixtures_dir, variant, "raw")
    grads = load_file(fixtures_dir / variant / "grads.safetensors")
    mask_id, batch = meta["mask_index"], {"input_ids": golden["x0"], "attention_mask": golden["attention_mask"].bool()}
    objective = (
        D3PM(LogLinear(), Absorbing(mask_id), T=meta["T"])
        if variant == "mdlm_d3pm"
        else SEDD(LogLinear(), Absorbing(mask_id))
    )
    t = golden["raw.t_effective"].double()
    objective.loss_at(net, batch, draw_at(golden["xt"], t)).mean().backward()
    named = dict(net.named_parameters())
    names = [name.removeprefix("grad.") for name in grads if name.startswith("grad.")]
    assert sorted(names) == sorted(named)
    for name in names:
        assert close(named[name].grad, grads[f"grad.{name}"]), name


def golden_sampler(fixtures_dir, variant):
    meta, _, net = golden_of(fixtures_dir, variant, "raw")
    known = json.loads((fixtures_dir / variant / "sampler.json").read_text())
    law = {"mdlm_sedd": SEDD, "mdlm_d3pm": lambda s, m: D3PM(s, m, T=meta["T"])}.get(variant, Subs)
    model = Model(law(LogLinear(), Absorbing(meta["mask_index"])), net)
    return known, load_file(fixtures_dir / variant / "sampler.safetensors"), model


@pytest.mark.parametrize("variant", ["mdlm_subs", "mdlm_subs_tc", "mdlm_sedd"])
def test_golden_one_step_posteriors(fixtures_dir, variant):
    known, golden, model = golden_sampler(fixtures_dir, variant)
    x, compared = golden["x_t"], 0
    at = x == model.process.mask_id
    for step in known["steps"]:
        t, s = (torch.full((len(x),), step[name], dtype=torch.float64) for name in ("t", "s"))
        for kind in ("ddpm_posterior", "analytic_probs"):
            if (name := f"raw.{step['index']}.{kind}") in golden:
                reference = golden[name][at].double().clamp(min=0)  # it never draws what it gives less than nothing
                assert close(
                    model.reverse(x, t, s, Positions(at)).exp(), reference / reference.sum(-1, keepdim=True)
                ), name
                compared += 1
        if variant == "mdlm_subs":
            assert torch.equal(
                model.denoise(x, t, Positions(at)).argmax(-1), golden[f"raw.{step['index']}.noise_removal_argmax"][at]
            )
    assert compared


def test_golden_prediction_of_d3pm_in_its_posteriors(fixtures_dir):
    """The reference unmasks by the schedule alone; ours by the reverse step that the loss trains, which p([MASK])
    slows down. The prediction inside is the same."""
    known, golden, model = golden_sampler(fixtures_dir, "mdlm_d3pm")
    x = golden["x_t"]
    at = x == model.process.mask_id
    for step in known["steps"]:
        t = torch.full((len(x),), step["t"], dtype=torch.float64)
        p = model.objective.network_log_probs(model.backbone, x, t, Positions(at)).exp() * (1 - step["s"] / step["t"])
        reference = golden[f"raw.{step['index']}.ddpm_posterior"][at]
        assert close(p[:, :-1], reference[:, :-1])


@pytest.mark.parametrize(("variant", "sampler"), [
    ("mdlm_subs", "ddpm"), ("mdlm_subs", "ddpm_cache"), ("mdlm_subs", "analytic"), ("mdlm_subs_tc", "ddpm"),
    ("mdlm_sedd", "analytic"),
])  # fmt: skip
def test_golden_trajectories_are_those_of_our_steps_under_the_recorded_numbers(fixtures_dir, variant, sampler):
    known, golden, model = golden_sampler(fixtures_dir, variant)
    path, uniforms = golden[f"traj.{sampler}.x"], golden[f"traj.{sampler}.uniforms"]
    times = torch.linspace(1, 1e-5, known[f"traj.{sampler}"]["num_steps"] + 1, dtype=torch.float64)
    changed = 0
    for i, (t, s) in enumerate(itertools.pairwise(times)):
        x, after = path[i], path[i + 1]
        at = x == model.process.mask_id
        p = model.reverse(x, t.expand(len(x)), s.expand(len(x)), Positions(at)).exp()
        drawn = (p / (1e-10 - (uniforms[i][at] + 1e-10).log())).argmax(-1)
        if i < len(times) - 2:  # the last entry of the path is behind the removal of noise
            assert torch.equal(drawn, after[at])
            changed += int((drawn != model.process.mask_id).sum())
    assert changed
