"""Block diffusion's objective: the reference's numbers, its identities, exact enumeration, clipped mask rates."""

from __future__ import annotations

import json
import math
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from palimpsest.common.positions import Positions
from palimpsest.common.randomness import KeyedNoise, evaluation_noise, training_noise
from palimpsest.estimators.any_order import AnyOrder
from palimpsest.estimators.nelbo import Nelbo
from palimpsest.estimators.ordered import Ordered
from palimpsest.models.checkpoints import read_checkpoint
from palimpsest.models.dit import DiT
from palimpsest.noise_schedule import Clipped, Cosine, LogLinear
from palimpsest.objectives.mask_sampling import Bernoulli, Complementary, Draw, ExactCount, TiltedCount
from palimpsest.objectives.subs import Subs
from palimpsest.process import Absorbing
from palimpsest.training.callbacks.metrics import BUCKETS, _Interval
from tests.helpers.blocks import MASK, VOCAB, block, causal_law, likelihood_of_blocks
from tests.helpers.laws import batch_of, exact_bound, texts


class Fixed:
    """A mask sampler with fixed draws."""

    label, passes, discrete, covers_all_rates, estimates_bound = "fixed", 1, False, False, True

    def __init__(self, xt_Rk, t_R):
        self.draws = [Draw(xt_Rk, t_R, torch.ones_like(t_R))]

    def __call__(self, *args):
        return self.draws


@pytest.mark.parametrize("size", [1, 4, 8])
@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_losses_are_the_references(fixtures_dir, size, weights):
    folder = fixtures_dir / f"bd3lms_bd3lm_bs{size}"
    golden, known = load_file(folder / "golden.safetensors"), json.loads((folder / "golden.json").read_text())
    net = DiT(known["vocab_size"], 64, 32, 2, 2).eval()
    read_checkpoint(folder / "bd3lm.ckpt").load_into(net, use_ema=weights == "ema")
    x0, mask_id, near = golden["x0"], known["mask_index"], {"rtol": 1e-4, "atol": 1e-4}
    t_R = golden["t"].double()[:, ::size].flatten()
    fixed = Fixed(golden["raw.xt_used"].reshape(-1, size), t_R)
    objective = block(size, LogLinear(eps=0.0), mask_id=mask_id, ignore_bos=True)
    objective.inner.mask_sampler = fixed
    batch = {"input_ids": x0}
    with torch.no_grad():
        loss = objective.loss(net, batch, KeyedNoise(0, torch.arange(len(x0))))
        torch.testing.assert_close(loss.nll_BL, golden[f"{weights}.loss_per_token"], **near)
        weighed = golden["attention_mask"].bool()
        assert torch.equal(loss.mask_BL & weighed, golden[f"{weights}.eval_token_mask"].bool())
        scored = golden[f"{weights}.eval_token_mask"]
        nats = (loss.nll_BL * scored).sum() / scored.sum()
        torch.testing.assert_close(nats, golden[f"{weights}.eval_token_nll"], **near)
        objective.inner.loss_weight = "uniform"
        loss = objective.loss(net, batch, KeyedNoise(0, torch.arange(len(x0))))
        torch.testing.assert_close(loss.nll_BL, golden[f"{weights}.loss_per_token_epsmin_0.6"], **near)
        eps = block(size, LogLinear(eps=1e-3), mask_id=mask_id, ignore_bos=True)
        eps.inner.mask_sampler = fixed
        loss = eps.loss(net, batch, KeyedNoise(0, torch.arange(len(x0))))
        if f"{weights}.mdlm_loss_scale_loss_per_token" in golden:
            torch.testing.assert_close(loss.nll_BL, golden[f"{weights}.mdlm_loss_scale_loss_per_token"], **near)
        if size > 1:
            log_p = objective.denoise(net, golden["raw.sample_x"], torch.full((len(x0),), 0.5))[:, -size:]
            wanted = golden[f"{weights}.sample_logprobs_last_block_nocache"]
            torch.testing.assert_close(log_p.exp(), wanted.double().exp().float(), **near)


def test_antithetic_times_of_blocks_are_spread_as_the_references(fixtures_dir):
    """The reference's uniforms go through its formula; ours are other numbers, spread as evenly."""
    golden = json.loads((fixtures_dir / "bd3lms_aux.json").read_text())["sample_t"]
    u = torch.tensor(golden["uniforms"], dtype=torch.float64)
    u = (u / u.numel() + torch.arange(u.numel()).reshape(u.shape) / u.numel()) % 1
    for name, schedule in [("(1e-3,1)", LogLinear(0.0)), ("(0.3,0.8)", Clipped(LogLinear(0.0), 0.3, 0.8))]:
        eps = 1e-3 if "e-3" in name else 0.0
        rate = schedule((1 - eps) * u + eps).move_chance.repeat_interleave(4, dim=1)
        wanted = torch.tensor(golden[f"antithetic_eps{name}"], dtype=torch.float64)
        torch.testing.assert_close(rate, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("mask_sampler", "settings"), [
    (Bernoulli(), {"time_conditioning": True}), (ExactCount(), {}), (TiltedCount(), {"num_classes": 2}),
    (Complementary(), {}),
], ids=lambda value: getattr(value, "label", ""))  # fmt: skip
def test_one_block_is_masked_diffusion_number_for_number(random_dit, mask_sampler, settings):
    net, x0 = random_dit(VOCAB, **settings), torch.randint(MASK, (5, 6))
    batch = batch_of(x0, padding=2)
    batch |= {"class_id": torch.tensor([0, 1, -1, 0, 1])} if "num_classes" in settings else {}
    for schedule in (LogLinear(), Cosine()):
        one, other = block(6, schedule, mask_sampler), Subs(schedule, Absorbing(MASK), mask_sampler)
        noise = partial(training_noise, 0, torch.arange(5), 5)
        ours, plain = one.loss(net, batch, noise()), other.loss(net, batch, noise())
        torch.testing.assert_close(ours.nll_BL, plain.nll_BL)
        assert torch.equal(ours.mask_BL, plain.mask_BL) and ours.logs.keys() >= plain.logs.keys()
        for name in plain.logs:
            torch.testing.assert_close(ours.logs[name], plain.logs[name])


def test_blocks_of_one_token_are_the_exact_left_to_right_likelihood(random_dit):
    net, x = random_dit(VOCAB), texts(VOCAB, 4, MASK)
    objective = block(1)
    loss = objective.loss(net, batch_of(x), evaluation_noise(0, torch.arange(len(x))))
    torch.testing.assert_close(loss.nll_BL, -causal_law(net, 1, x))
    assert objective.exact and abs(float((-loss.nll_BL.detach().sum(-1)).exp().sum()) - 1) < 1e-6, (
        "it is a law over texts"
    )
    again = objective.loss(net, batch_of(x), evaluation_noise(7, torch.arange(len(x)), 3, 5))
    torch.testing.assert_close(again.nll_BL, loss.nll_BL, msg="nothing is drawn")
    measured = Nelbo()(objective.model(net), batch_of(x), seed=0, num_draws=8)
    assert measured.nll_BK.shape == (len(x), 1) and (measured.evaluations_B == 1).all()
    assert Nelbo().label(objective.model(net), 8) == "exact"
    with pytest.raises(ValueError, match="block_size=1.*eval.estimator=auto"):
        Nelbo(ExactCount())(objective.model(net), batch_of(x), 0, 8)


@pytest.mark.parametrize("size", [2, 3])
def test_the_bound_is_unbiased_and_above_the_likelihood(random_dit, size):
    """The law over all texts sums to one; the bound of every block, by quadrature over t and enumeration of masks, is
    what the estimators give on average, and lies above it."""
    net, length = random_dit(VOCAB), 4
    every = texts(VOCAB, length, MASK)
    log_p = likelihood_of_blocks(net, size, every).detach()
    assert abs(float(log_p.exp().sum()) - 1) < 1e-6
    x0 = every[[5, 40]]
    objective, wanted = block(size, LogLinear(eps=0.0)), []
    for row in x0:
        total = 0.0
        for start in range(0, length, size):
            behind = objective.model(net).after(row[None, :start])

            class Bound:
                encodes_positions, head = True, net.head

                def encode(self, tokens, sigma, at=None, behind=behind):
                    return behind.backbone.encode(tokens, sigma, torch.zeros(len(tokens), dtype=torch.long), at)

            total += exact_bound(
                Subs(LogLinear(eps=0.0), Absorbing(MASK)), Bound(), row[None, start : start + size], points=60
            )
        wanted.append(total)
    wanted = torch.tensor(wanted, dtype=torch.float64)
    assert (wanted >= -log_p[[5, 40]] - 1e-6).all()
    many = x0.repeat(2000, 1)
    for mask_sampler in (ExactCount(), Bernoulli(sampling_eps=0.0)):
        measured = block(size, LogLinear(eps=0.0), mask_sampler)
        with torch.no_grad():
            nll_B = measured.loss(net, batch_of(many), evaluation_noise(1, torch.arange(len(many)))).nll_BL.sum(-1)
        draws = nll_B.reshape(2000, 2).double()
        assert ((draws.mean(0) - wanted).abs() < 5 * draws.std(0) / math.sqrt(2000)).all()  # 1 in 10^6 false alarms


def test_padding_further_changes_no_number(random_dit):
    net, x0 = random_dit(VOCAB), torch.randint(MASK, (3, 6))
    short = block(4).loss(net, batch_of(x0), training_noise(0, torch.arange(3), 3))
    longer = {"input_ids": torch.cat([x0, torch.zeros(3, 5, dtype=torch.long)], dim=1)}
    longer |= {"attention_mask": torch.arange(11).expand(3, -1) < 6}
    padded = block(4).loss(net, longer, training_noise(0, torch.arange(3), 3))
    torch.testing.assert_close(padded.nll_BL[:, :6], short.nll_BL)
    assert (padded.nll_BL[:, 6:] == 0).all() and not padded.mask_BL[:, 6:].any()


def test_times_of_blocks_are_even_over_the_batch_and_over_the_row():
    time = training_noise(0, torch.arange(64), 64).parts(8).time().reshape(64, 8)
    for part in time.T:
        assert (part.sort().values - (torch.arange(64) + 0.5) / 64).abs().max() < 1 / 64
    gaps = time.sort(1).values.diff(dim=1)
    assert gaps.max() < 0.25 and gaps.min() > 0.05
    noise = training_noise(0, torch.arange(4), 4)
    assert torch.equal(noise.parts(1).uniform(5), training_noise(0, torch.arange(4), 4).uniform(5))
    many, few = noise.parts(6).uniform(3).reshape(4, 6, 3), noise.parts(2).uniform(3).reshape(4, 2, 3)
    assert torch.equal(many[:, :2], few) and len(many.unique()) == many.numel()


def test_given_tokens_are_neither_masked_nor_scored_nor_hidden(random_dit):
    net, x0 = random_dit(VOCAB), torch.randint(MASK, (4, 6))
    given = torch.zeros(4, 6, dtype=torch.bool)
    given[:, 3] = True
    loss = block(3, ignore_bos=True).loss(
        net, {**batch_of(x0), "observed": given}, training_noise(0, torch.arange(4), 4)
    )
    assert not loss.mask_BL[:, [0, 3]].any() and loss.mask_BL[:, [1, 2, 4, 5]].all()
    assert (loss.nll_BL[:, [0, 3]] == 0).all()


@pytest.mark.parametrize("limits", [(0.3, 0.8), (0.5, 1.0), (0.45, 0.55)])
def test_resampled_shares_lie_within_the_limits_and_follow_their_law(limits):
    x0, mask_sampler = torch.zeros(20000, 8, dtype=torch.long), Bernoulli(resample=True, antithetic_sampling=False)
    schedule, scored = Clipped(LogLinear(0.0), *limits), torch.ones_like(x0, dtype=torch.bool)
    (draw,) = mask_sampler(schedule, x0, scored, Absorbing(1), KeyedNoise(0, torch.arange(20000)))
    share = (draw.xt_BL == 1).double().mean(-1)
    assert (share >= limits[0] - 1e-9).all() and (share <= limits[1] + 1e-9).all()
    for t, k in [(0.5, 4), (0.75, 6)]:
        near = (schedule(draw.t_B).move_chance - t).abs() < 0.01
        inside = [n for n in range(9) if limits[0] * 8 - 1e-9 <= n <= limits[1] * 8 + 1e-9]
        if k in inside and near.sum() > 200:
            law = {n: math.comb(8, n) * t**n * (1 - t) ** (8 - n) for n in inside}
            p = law[k] / sum(law.values())
            assert (
                abs(float((share[near] * 8 == k).double().mean()) - p)
                < 5 * math.sqrt(p * (1 - p) / int(near.sum())) + 0.02
            )
    assert ((draw.xt_BL == 1).double().mean(0) - share.mean()).abs().max() < 0.02, "every place alike"


def test_limits_that_no_number_of_masks_meets_take_the_nearest():
    x0, noise = torch.zeros(500, 4, dtype=torch.long), KeyedNoise(0, torch.arange(500))
    sampler, scored = Bernoulli(resample=True), torch.ones_like(x0, dtype=torch.bool)
    (draw,) = sampler(Clipped(LogLinear(0.0), 0.3, 0.4), x0, scored, Absorbing(1), noise)
    assert ((draw.xt_BL == 1).sum(-1) <= 2).all(), "no share of four lies between 0.3 and 0.4"
    (draw,) = sampler(LogLinear(), x0, scored, Absorbing(1), noise)
    assert set((draw.xt_BL == 1).sum(-1).tolist()) == {0, 1, 2, 3, 4}, "nothing is enforced at the ends"


def test_clipping_trains_on_a_part_and_measures_the_whole(random_dit):
    net, x0 = random_dit(VOCAB), torch.randint(MASK, (64, 8))
    clipped, plain = block(4), block(4)
    clipped.clip(0.6, 0.8)
    assert clipped.sampling_eps == (0.6, 0.8)
    rates = clipped.loss(net, batch_of(x0), training_noise(0, torch.arange(64), 64)).logs["num_masked"] / 8
    assert 0.6 < float(rates.double().mean()) < 0.8
    noise = partial(evaluation_noise, 0, torch.arange(64))
    a, b = (o.bound(None).loss(net, batch_of(x0), noise()).nll_BL for o in (clipped, plain))
    torch.testing.assert_close(a, b)
    clipped.clip(1e-3, 1.0)
    assert isinstance(clipped.schedule, LogLinear)
    for mistake in [(0.8, 0.3), (0.5, 1.5)]:
        with pytest.raises(ValueError, match="sampling_eps_min"):
            block(4).clip(*mistake)
    with pytest.raises(ValueError, match="block_size=1"):
        block(1).clip(0.3, 0.8)


def test_whoever_asks_behind_masks_is_told(random_dit):
    x = torch.tensor([[0, MASK, MASK, MASK]])
    at = Positions(torch.tensor([[False, False, True, False]]))
    with pytest.raises(ValueError, match="block_size=2 predicts block after block.*sampling.predictor=block"):
        block(2).denoise(random_dit(VOCAB), x, torch.ones(1), at)


@pytest.mark.parametrize("estimator", [Ordered("margin"), AnyOrder()], ids=["duel", "importance_weighted"])
def test_estimators_that_fill_in_anywhere_are_refused(random_dit, estimator):
    with pytest.raises(ValueError, match="unmasks tokens anywhere in a text.*block after block.*eval.estimator=auto"):
        estimator(block(2).model(random_dit(VOCAB)), batch_of(torch.zeros(1, 4, dtype=torch.long)), 0, 4)


def test_nothing_given_is_written_into(random_dit):
    net, x0 = random_dit(VOCAB), torch.randint(MASK, (2, 8))
    batch = {**batch_of(x0, padding=1), "observed": torch.zeros(2, 8, dtype=torch.bool)}
    before = {name: tensor.clone() for name, tensor in batch.items()}
    block(4, ignore_bos=True).loss(net, batch, training_noise(0, torch.arange(2), 2)).mean().backward()
    assert all(torch.equal(batch[name], before[name]) for name in batch)


def test_mask_rates_are_those_of_blocks():
    """Every block draws a rate of its own; a text's share of masks would always be about a half."""
    torch.manual_seed(0)
    net, x0 = DiT(VOCAB, 16, 8, 1, 2).eval(), torch.randint(3, (3, 8))
    logs = block(2).loss(net, batch_of(x0), KeyedNoise(0, torch.arange(3))).logs
    parts = {name: logs[f"{name}_by_part"] for name in ("num_masked", "cross_entropy", "num_scored")}
    assert all(value.shape == (3, 4) for value in parts.values()) and (parts["num_scored"] == 2).all()
    for name in ("num_masked", "cross_entropy"):
        torch.testing.assert_close(parts[name].sum(1, keepdim=True), logs[name])
    interval = _Interval(torch.device("cpu"))
    interval._add_by_rate(*(value.double() for value in parts.values()))
    masked = [float(parts["num_masked"][parts["num_masked"] == k].sum()) for k in (1, 2)]
    assert interval.sums_S[-BUCKETS:].tolist() == [0, 0, masked[0], 0, masked[1]]
