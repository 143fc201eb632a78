"""The joint objective: rows draw their directions one by one, each term is what it is alone, and a step's mean is exact
however it is cut."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from palimpsest.common.randomness import KeyedNoise, evaluation_noise, training_noise
from palimpsest.gaussian_process import cosine_level
from palimpsest.noise_schedule import LogLinear
from palimpsest.objectives.gaussian import EARLIEST, LATEST, GaussianDiffusion
from palimpsest.objectives.joint import MODE_SHARES, MODES, JointDiffusion
from palimpsest.objectives.mask_sampling import Complementary, ExactCount
from palimpsest.objectives.reduction import StepLoss
from palimpsest.objectives.subs import Subs
from palimpsest.process import Absorbing
from palimpsest.samplers.ancestral import sample
from tests.helpers.joint import LENGTH, MASK, SHAPE, batch, network, noise, objective

ROWS = 64
NAMES = tuple(MODES)
UNIFORM = dict.fromkeys(NAMES, 1.0)


class Seen:
    """The network, with what it was shown."""

    def __init__(self, net) -> None:
        self.net, self.head, self.encodes_positions, self.shown = net, net.head, True, []

    def encode_both(self, tokens_BL, sigma_B, **cond):
        self.shown.append({"tokens": tokens_BL, "sigma": sigma_B, **cond})
        return self.net.encode_both(tokens_BL, sigma_B, **cond)


def shown(modes, rows: int = ROWS, **settings):
    """One pass, the batch it was of, and its loss."""
    net, texts = Seen(network()), batch(rows)
    loss = objective(modes, **settings).loss(net, texts, noise(rows))
    return net.shown[0], texts, loss


@pytest.mark.parametrize("name", NAMES)
def test_each_direction_shows_and_scores_what_it_is_meant_to(name):
    pass_, texts, loss = shown({name: 1.0})
    x0, latent, padding = texts["input_ids"], texts["latent"], ~texts["attention_mask"]
    masked, text_t = pass_["tokens"] == MASK, 1 - (-pass_["sigma"].double()).exp()
    assert not (masked & padding).any(), "padding is never masked"
    assert torch.equal(torch.where(masked, x0, pass_["tokens"]), x0)
    nats_B, row_B = loss.nll_BL.detach().sum(-1), loss.row_B.detach()
    mode = MODES[name]
    if mode.text == "conditioning":
        assert not masked.any() and not pass_["sigma"].any() and not nats_B.any()
    if mode.text == "dropped":
        assert (masked | padding).all() and (text_t > 0.99).all() and not nats_B.any()
    if mode.text == "denoised":
        assert text_t.min() < 0.1 and text_t.max() > 0.9, "not always all masked"
        share = masked.sum(-1) / (~padding).sum(-1)
        assert torch.corrcoef(torch.stack([share, text_t]))[0, 1] > 0.8
        assert torch.equal(loss.nll_BL != 0, masked) and (nats_B > 0).sum() > 50
    if mode.latent == "conditioning":
        assert not pass_["latent_t"].any() and torch.equal(pass_["latent"], latent) and not row_B.any()
    if mode.latent == "dropped":
        assert (pass_["latent_t"] == 1).all() and not row_B.any()
    if mode.latent == "denoised":
        t_B = pass_["latent_t"]
        assert EARLIEST <= t_B.min() < 0.1 and 0.9 < t_B.max() <= LATEST and (row_B > 0).all()
        level = cosine_level(t_B).like(latent)
        eps = (pass_["latent"] - level.alpha * latent) / level.sigma
        assert abs(float(eps.mean())) < 0.2 and abs(float(eps.std()) - 1) < 0.1


def test_joint_times_are_independent():
    pass_, _, _ = shown({"joint": 1.0}, rows=1000)
    text_t, latent_t = 1 - (-pass_["sigma"].double()).exp(), pass_["latent_t"]
    quarters = torch.histogramdd(torch.stack([text_t, latent_t], 1), bins=4, range=[0.0, 1.0, 0.0, 1.0]).hist
    assert quarters.min() > 30 and quarters.max() < 95, "62.5 expected in each of the 16"


def test_every_row_draws_its_own_direction_whatever_batch_it_is_in():
    _, _, loss = shown(UNIFORM, rows=200)
    shares = [loss.means[f"share_{name}"].tolist() for name in NAMES]
    assert all(total == 200 for _, total in shares) and sum(rows for rows, _ in shares) == 200
    assert all(15 < rows < 65 for rows, _ in shares), "modes by the batch would give one of them all"
    texts, law = batch(16), objective(UNIFORM)
    whole = law.loss(network(), texts, noise(16))
    for rows in ([3, 4, 5], [11], [15, 0]):
        part = {name: column[rows] for name, column in texts.items()}
        found = law.loss(network(), part, training_noise(0, torch.tensor(rows), 16))
        torch.testing.assert_close(found.nll_BL, whole.nll_BL[rows], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.row_B, whole.row_B[rows], rtol=1e-4, atol=1e-5)


def test_the_default_covers_every_direction():
    assert (
        set(MODE_SHARES) == set(NAMES)
        and min(MODE_SHARES.values()) > 0
        and sum(MODE_SHARES.values()) == pytest.approx(1)
    )
    assert objective({"l2t": 3, "t2l": 1, "joint": 0}).shares == {"l2t": 0.75, "t2l": 0.25}


@torch.no_grad()
def test_the_text_s_term_is_the_bound_of_subs():
    net = network()
    texts = batch()
    subs = Subs(LogLinear(), Absorbing(MASK))
    found = objective({"text": 1.0}).loss(net, texts, noise(8))
    plain = {name: texts[name] for name in ("input_ids", "attention_mask")}
    wanted = subs.loss(net, plain, noise(8))
    torch.testing.assert_close(found.nll_BL, wanted.nll_BL)
    assert torch.equal(found.mask_BL, wanted.mask_BL)
    assert float(found.mean()) == pytest.approx(float(wanted.mean())) and found.logs.keys() == wanted.logs.keys()
    given = objective({"l2t": 1.0}).loss(net, texts, noise(8))
    torch.testing.assert_close(given.nll_BL, subs.loss(net, {**plain, "latent": texts["latent"]}, noise(8)).nll_BL)
    assert not torch.allclose(given.nll_BL, found.nll_BL)


@torch.no_grad()
def test_measured_it_is_the_text_s_likelihood_given_the_latent_or_alone():
    net, texts = network(), batch()
    measured, names = objective().bound(None), torch.arange(8)
    plain = {name: texts[name] for name in ("input_ids", "attention_mask")}
    hidden = {**texts, "latent_t": torch.ones(8, dtype=torch.float64)}
    alone = Subs(LogLinear(), Absorbing(MASK)).bound(None).loss(net, plain, evaluation_noise(1, names)).nll_BL
    for law in (measured, measured.bound(None)):
        assert torch.equal(law.loss(net, hidden, evaluation_noise(1, names)).nll_BL, alone)
        assert torch.equal(law.loss(net, plain, evaluation_noise(1, names)).nll_BL, alone)
        assert not torch.allclose(law.loss(net, texts, evaluation_noise(1, names)).nll_BL, alone)
    assert measured.loss_name == "nll" and objective().loss_name == "loss"
    loss = measured.loss(net, texts, evaluation_noise(1, names))
    assert loss.row_B is None and loss.means == {}


@torch.no_grad()
def test_a_likelihood_without_information_does_not_hang_on_what_stands_in_its_place():
    net, texts, one = network(), batch(), torch.ones(8, dtype=torch.float64)
    found = [objective().bound(None).loss(net, {**texts, "latent": latent, "latent_t": one}, noise(8)).nll_BL
             for latent in (texts["latent"], 100 * texts["latent"].flip(0))]  # fmt: skip
    assert torch.equal(*found)


@torch.no_grad()
def test_latents_are_predicted_from_the_text_and_from_nothing():
    net, texts, law = network(), batch(), objective()
    x, latent, half = texts["input_ids"], texts["latent"], torch.full((8,), 0.5, dtype=torch.float64)
    ask = partial(law.model(net).predict_latent, latent, attention_mask=texts["attention_mask"])
    zero, one = 0 * half, 0 * half + 1
    given, alone = ask(half, x, zero), ask(half, torch.full_like(x, MASK), one)
    assert not torch.allclose(given.v_BKD, alone.v_BKD)
    level = cosine_level(half).like(latent)
    torch.testing.assert_close(given.x0_BKD, level.alpha * latent - level.sigma * given.v_BKD)
    # At its last time it is still shown the latent, which at 1 exactly it would not be.
    assert torch.equal(ask(one, x, zero).v_BKD, ask(0 * one + LATEST, x, zero).v_BKD)
    assert not torch.equal(law.model(net).predict_latent(0 * latent, one, x, zero).v_BKD, ask(one, x, zero).v_BKD)


@torch.no_grad()
def test_samplers_write_texts_given_a_latent():
    net, texts = network(), batch()
    write = partial(sample, objective().bound(None).model(net), steps=4, skip_idle=True)
    masks = torch.where(texts["attention_mask"], MASK, 0)
    cond = {name: texts[name] for name in ("attention_mask", "latent")}
    out = write(masks, KeyedNoise(0, torch.arange(8)), **cond).ids_BL
    assert not (out == MASK).any() and torch.equal(out[~texts["attention_mask"]], masks[~texts["attention_mask"]])
    other = write(masks, KeyedNoise(0, torch.arange(8)), attention_mask=texts["attention_mask"]).ids_BL
    assert not torch.equal(out, other)


def gradients(net) -> list[torch.Tensor]:
    return [p.grad.clone() for p in net.parameters()]


@pytest.mark.parametrize("cut", [[[0, 1, 2, 3, 4, 5, 6, 7]], [[0, 1, 2, 3], [4, 5, 6, 7]],
                                 [[row] for row in (6, 0, 3, 1, 2, 7, 5, 4)]], ids=["1", "2", "8"])  # fmt: skip
def test_the_gradient_of_a_step_is_that_of_its_mean_however_it_is_cut(cut):
    """Two devices, each with its micro-batches: gradients are averaged over devices, then scaled once."""
    net, texts, law = network().double(), batch(8), objective(UNIFORM, latent_weight=0.7, text_weight=1.3)
    whole = law.loss(net, texts, noise(8))
    lengths = texts["attention_mask"].sum(-1)
    ((whole.nll_BL.sum() + whole.row_B.sum()) / lengths.sum()).backward()
    wanted, total, sums = gradients(net), [0.0] * len(list(net.parameters())), 0
    devices = [cut[: len(cut) // 2], cut[len(cut) // 2 :]] if len(cut) > 1 else [cut]
    steps = []
    for device in devices:
        net.zero_grad()
        steps.append(StepLoss())
        for rows in device:
            part = {name: column[rows] for name, column in texts.items()}
            loss = law.loss(net, part, training_noise(0, torch.tensor(rows), 8))
            (steps[-1].add(loss) / len(device)).backward()
        total = [a + b / len(devices) for a, b in zip(total, gradients(net), strict=True)]
        sums = sums + steps[-1]._sums_2
    factor = steps[0].rows_per_token(lambda _: sums)
    for found, expected in zip(total, wanted, strict=True):
        torch.testing.assert_close(found * factor, expected, rtol=1e-4, atol=1e-7)


def test_weights_and_the_length_of_a_row_say_what_a_latent_counts_for():
    plain = shown(UNIFORM)[2]
    heavy = shown(UNIFORM, latent_weight=3.0, text_weight=0.5)[2]
    torch.testing.assert_close(heavy.row_B, 3 * plain.row_B)
    torch.testing.assert_close(heavy.nll_BL, 0.5 * plain.nll_BL)
    law = objective({"t2l": 1.0})
    full = {**batch(), "attention_mask": torch.ones(8, LENGTH, dtype=torch.bool)}
    loss = law.loss(network(), full, noise(8))
    assert loss.mean().item() == pytest.approx((loss.means["latent_loss"][0] / loss.means["latent_loss"][1]).item())


def test_what_is_logged_adds_up():
    _, texts, loss = shown(UNIFORM, latent_weight=0.3, text_weight=2.0)
    value = {name: (pair[0] / pair[1]).item() for name, pair in loss.means.items()}
    assert value["text_term"] + value["latent_term"] == pytest.approx(loss.mean().item(), rel=1e-5)
    assert value["text_term"] > 0 and value["latent_term"] > 0
    for term, names in (("text", ("joint", "l2t", "text")), ("latent", ("joint", "t2l", "latent"))):
        parts = torch.stack([loss.means[f"{term}_loss_{name}"] for name in names]).sum(0)
        torch.testing.assert_close(parts, loss.means[f"{term}_loss"])
        assert not any(f"{term}_loss_{name}" in loss.means for name in set(NAMES) - set(names))
    assert value["latent_mse"] > 0 and -1 <= value["latent_cos"] <= 1
    tokens = texts["attention_mask"].sum()
    assert loss.means["text_term"][1] == tokens > loss.means["text_loss"][1]
    assert not any("nll" in name for name in loss.means)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_has_a_part_in_every_direction(name):
    """Check that every mode uses every parameter, because DistributedDataParallel waits for all gradients."""
    net = network().train()
    objective({name: 1.0}).loss(net, batch(2), noise(2)).mean().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []
    other = net.head.weight if MODES[name].text != "denoised" else net.latent_output.mlp[-1].weight
    assert (MODES[name].text == MODES[name].latent == "denoised") == bool(other.grad.any())


@pytest.mark.parametrize("mask_sampler", [ExactCount(), Complementary()], ids=["exact_count", "complementary"])
@torch.no_grad()
def test_other_ways_to_draw_masks_go_with_it(mask_sampler):
    texts, text = batch(ROWS), partial(Subs, LogLinear(), noising=mask_sampler)
    law = JointDiffusion(Absorbing(MASK), text, GaussianDiffusion(), UNIFORM, latent_tokens=LENGTH)
    loss = law.loss(network(), texts, noise(ROWS))
    assert loss.nll_BL.isfinite().all() and loss.logs["num_masked"].shape == (ROWS, mask_sampler.passes)
    alone = JointDiffusion(Absorbing(MASK), text, GaussianDiffusion(), {"text": 1.0})
    plain = {name: texts[name] for name in ("input_ids", "attention_mask")}
    wanted = Subs(LogLinear(), Absorbing(MASK), mask_sampler).loss(network(), plain, noise(ROWS)).nll_BL
    torch.testing.assert_close(alone.loss(network(), texts, noise(ROWS)).nll_BL, wanted)


def test_given_tokens_stay_and_are_not_scored():
    texts = batch(ROWS)
    given = torch.zeros_like(texts["attention_mask"])
    given[:, 0] = True
    net = Seen(network())
    loss = objective(UNIFORM).loss(net, {**texts, "observed": given}, noise(ROWS))
    assert torch.equal(net.shown[0]["tokens"][:, 0], texts["input_ids"][:, 0])
    assert not loss.nll_BL[:, 0].any() and not loss.mask_BL[:, 0].any()


@pytest.mark.parametrize(("settings", "said"), [
    ({"modes": {"l2x": 1}}, "l2x is unknown; choose among joint, l2t, t2l, text, latent"),
    ({"modes": {"l2t": 0}}, "at least one of the modes"),
    ({"modes": {"l2t": 1}, "text_weight": 0}, "nothing is trained"),
    ({"modes": {"t2l": 1}, "latent_weight": 0.0}, "nothing is trained"),
])  # fmt: skip
def test_what_means_nothing_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        objective(**settings)
    with pytest.raises(ValueError, match="choose latents="):
        objective().loss(network(), {name: column for name, column in batch().items() if name != "latent"}, noise(8))


def test_shapes_of_the_latents_are_those_of_the_network():
    model, texts = objective().model(network()), batch()
    said = model.predict_latent(texts["latent"], torch.rand(8), texts["input_ids"], torch.zeros(8))
    assert said.v_BKD.shape == (8, *SHAPE) and replace(said).x0_BKD.shape == (8, *SHAPE)
