"""Iterative unmasking: its laws by enumeration, budgets, what is kept, what is shown, what is refused."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from omegaconf import OmegaConf

from benchmarks.decoders import decoders
from benchmarks.kneser_ney import KneserNey
from palimpsest.common.positions import Positions
from palimpsest.common.randomness import KeyedNoise
from palimpsest.experiment.running import checked
from palimpsest.noise_schedule import LogLinear
from palimpsest.objectives.ar import AR
from palimpsest.objectives.base import Model
from palimpsest.objectives.block import BlockDiffusion
from palimpsest.objectives.d3pm import D3PM
from palimpsest.objectives.sedd import SEDD
from palimpsest.objectives.subs import Subs
from palimpsest.process import Absorbing
from palimpsest.samplers import block, semi_autoregressive
from palimpsest.samplers.base import TokenChoice
from palimpsest.samplers.unmasking import ORDERS, REMASKS, SCHEDULES, Unmasking, masks_left, remdm_probs, sample
from palimpsest.settings.command_line import compose_config
from tests.helpers.decoders import CHOICES, Toy, Watched, assert_sound, blank, unmask
from tests.helpers.laws import assert_follows

# -------------------------------------------------------------------------------- laws


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_token_a_step_in_random_order_is_the_models_law(schedule):
    toy = Toy(3, 3)
    out = unmask(toy, blank(8000, 3, 3), Unmasking(schedule), steps=5)
    assert_follows(out.ids_BL, toy.law)
    assert (out.evaluations_B == 3).all() and out.num_steps == 3
    together = out.confidence_BL.double().prod(-1).tolist()
    assert together == pytest.approx([toy.law[tuple(row)] for row in out.ids_BL.tolist()], rel=1e-5)


def test_several_tokens_a_step_are_not_but_more_steps_come_closer():
    toy = Toy(3, 3)
    off = []
    for steps in (1, 2, 3):
        ids = unmask(toy, blank(8000, 3, 3), steps=steps).ids_BL
        share = torch.bincount((ids * torch.tensor([9, 3, 1])).sum(-1), minlength=27) / 8000
        off.append(float((share - toy.p_M).abs().sum()))
    assert off[0] > off[1] > 2 * off[2]


@pytest.mark.parametrize(("schedule", "eta"), [("linear", 0.0), ("linear", 0.6), ("exponential", 0.6)])
def test_remdm_follows_the_law_of_its_chain(schedule, eta):
    toy, steps, mask = Toy(2, 3), 3, 2
    how = Unmasking(schedule, remask="remdm", remask_eta=eta)
    law = {(mask,) * 3: 1.0}
    for step in range(1, steps + 1):
        left = [1 - r if schedule == "linear" else 1 - (4**r - 1) / 3 for r in ((step - 1) / steps, step / steps)]
        alpha_t, alpha_s = 1 - left[0], 1 - left[1]
        sigma = min(eta, (1 - alpha_s) / alpha_t) if alpha_t else eta
        moved: dict[tuple, float] = {}
        for state, mass in law.items():
            x = torch.tensor([state])
            at = Positions.everywhere(x)
            p = toy.denoise(x, None, at).exp()
            write = (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t)
            choices = [
                [(0, write * float(p[i, 0])), (1, write * float(p[i, 1])), (mask, 1 - write)] if token == mask
                else [(token, 1 - sigma), (mask, sigma)] for i, token in enumerate(state)
            ]  # fmt: skip
            for picked in itertools.product(*choices):
                after = tuple(token for token, _ in picked)
                moved[after] = moved.get(after, 0.0) + mass * float(torch.tensor([q for _, q in picked]).prod())
        law = moved
    out = unmask(toy, blank(8000, 3, mask), how, steps)
    assert_follows(out.ids_BL, {text: p for text, p in law.items() if p > 1e-12})


def test_remdm_keeps_the_share_of_masks_whatever_eta():
    alpha = torch.linspace(0, 1, 9, dtype=torch.float64)
    for eta in (0.0, 0.1, 1.0):
        now, then = alpha[:-1], alpha[1:]
        unmask_B, remask_B = remdm_probs(now, then, eta)
        assert torch.allclose(now * remask_B + (1 - now) * (1 - unmask_B), 1 - then)
        for p in (unmask_B, remask_B):
            assert (p >= -1e-12).all() and (p <= 1 + 1e-12).all()
        assert unmask_B[-1] == 1 and remask_B[-1] == 0


def test_low_confidence_keeps_what_was_drawn_with_most_probability():
    class Two(Toy):
        def denoise(self, x_BL, t_B, at):
            p = torch.tensor([[0.6, 0.4, 0], [0.45, 0.55, 0]], dtype=torch.float64)
            return at.take(p.expand(len(x_BL), 2, 3)).log()

    steps = unmask(Two(2, 2), blank(4000, 2, 2), Unmasking(order="margin", remask="low_confidence"), steps=2).step_BL
    assert float((steps[:, 0] == 1).double().mean()) == pytest.approx(0.6, abs=0.03)
    assert (unmask(Two(2, 2), blank(50, 2, 2), Unmasking(order="confidence"), steps=2).step_BL[:, 0] == 1).all()


def test_a_threshold_writes_all_that_is_sure_one_at_least_and_the_rest_at_the_end():
    class Fixed(Toy):
        def denoise(self, x_BL, t_B, at):
            sure = torch.tensor([0.5, 0.95, 0.6, 0.99, 0.7], dtype=torch.float64)
            p = torch.stack([sure, 1 - sure, torch.zeros_like(sure)], -1)
            return at.take(p.expand(len(x_BL), 5, 3)).log()

    how, x = Unmasking(order="margin", threshold=0.9), torch.tensor([[2, 2, 2, 2, 2], [2, 0, 2, 0, 0]])
    for remask in ("none", "low_confidence"):
        how = Unmasking(order="margin", threshold=0.9, remask=remask)
        out = unmask(Fixed(2, 5), x, how, steps=9, choice=TokenChoice(temperature=0))
        assert out.step_BL.tolist() == [[4, 1, 3, 1, 2], [2, 0, 1, 0, 0]]
        assert out.evaluations_B.tolist() == [4, 2] and out.num_steps == 4
        short = unmask(Fixed(2, 5), x, how, steps=2, choice=TokenChoice(temperature=0))
        assert short.step_BL.tolist() == [[2, 1, 2, 1, 2], [2, 0, 1, 0, 0]]


def test_schedules_write_something_at_every_step_and_all_in_time():
    counts = torch.arange(0, 60)
    for schedule, steps in itertools.product(SCHEDULES, (1, 2, 7, 40, 100)):
        left = torch.stack([counts, *(masks_left(schedule, step, steps, counts) for step in range(1, steps + 1))])
        assert ((left.diff(dim=0) < 0) | (left[1:] == 0)).all() and (left[-1] == 0).all()
        assert torch.equal((left > 0).sum(0), counts.clamp(max=steps))
    assert [int(masks_left(s, 5, 10, torch.tensor([100]))) for s in SCHEDULES] == [50, 70, 90]


def test_every_combination_ends_and_says_what_it_did():
    toy, mask = Toy(2, 6), 2
    x = torch.tensor([[mask] * 6, [0, mask, mask, 1, mask, mask], [0, 1, 0, 1, 1, 0]])
    for schedule, order, remask, choice in itertools.product(SCHEDULES, ORDERS, REMASKS, CHOICES):
        if remask == "low_confidence" and order not in ("confidence", "margin"):
            continue  # it goes by confidence
        how, frames = Unmasking(schedule, order, None, remask, 0.5), Watched()
        assert_sound(toy, x, unmask(toy, x, how, 4, choice=choice, watch=frames), frames, 4)


@pytest.mark.parametrize("objective", [
    SEDD(LogLinear(), Absorbing(3)), D3PM(LogLinear(), Absorbing(3), T=10), Subs(LogLinear(), Absorbing(3)),
], ids=["sedd", "d3pm", "subs"])  # fmt: skip
@pytest.mark.parametrize("how", [Unmasking(), Unmasking(order="margin"), Unmasking(remask="remdm", remask_eta=0.5)])
def test_networks_that_are_shown_the_time(random_dit, objective, how):
    x = torch.tensor([[3, 0, 3, 3, 3, 1]]).repeat(4, 1)
    out = unmask(Model(objective, random_dit(4, time_conditioning=True)), x, how, steps=3)
    assert (out.ids_BL < 3).all() and torch.equal(out.ids_BL[:, [1, 5]], x[:, [1, 5]])
    assert ((out.confidence_BL > 0) & (out.confidence_BL <= 1)).all()


@pytest.mark.parametrize("how", [Unmasking(order="confidence"), Unmasking(remask="remdm", remask_eta=0.5)])
def test_blocks_have_a_budget_each_and_are_watched_as_part_of_the_text(random_dit, how):
    model = BlockDiffusion(Absorbing(3), partial(Subs, LogLinear()), 4, ignore_bos=False).model(random_dit(4))
    x, frames = blank(3, 12, 3), Watched()
    x[0, :6] = 1
    noise, inner = KeyedNoise(0, torch.arange(3)), partial(sample, steps=2, how=how)
    out = block.sample(model, x, noise, inner=inner, watch=frames)
    assert torch.equal(out.ids_BL[0, :6], x[0, :6]) and (out.ids_BL < 3).all() and out.num_steps <= 3 * 2
    assert all(frame.ids_BL.shape == (3, 12) for frame in frames) and torch.equal(frames[-1].ids_BL, out.ids_BL)
    alone = block.sample(model, x[1:2], KeyedNoise(0, torch.tensor([1])), inner=inner, kv_cache=False)
    assert torch.equal(alone.ids_BL[0], out.ids_BL[1])


def test_windows_get_the_same_noise_whatever_the_batch(random_dit):
    model, x = Model(Subs(LogLinear(), Absorbing(3)), random_dit(4)), torch.tensor([[3, 3, 3, 3], [1, 1, 1, 3]])
    window = {"inner": partial(sample, steps=9, how=Unmasking()), "stride_length": 2, "num_strides": 2}
    both = semi_autoregressive.sample(model, x, KeyedNoise(0, torch.arange(2)), **window)
    alone = semi_autoregressive.sample(model, x[1:], KeyedNoise(0, torch.arange(1, 2)), **window)
    assert torch.equal(both.ids_BL[1], alone.ids_BL[0])


def test_a_causal_model_is_refused(random_dit):
    with pytest.raises(ValueError, match="sampling.predictor=ar"):
        unmask(AR(Absorbing(3)).model(random_dit(4)), torch.tensor([[0, 3]]))


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="sampling.remask=remdm"):
        Unmasking(threshold=0.5, order="margin", remask="remdm")


def test_configurations_that_contradict_themselves_are_refused():
    chosen = compose_config(["sampling.predictor=unmask"])
    for changes, said in [
        ({"order": "random", "remask": "low_confidence"}, "sampling.remask=low_confidence goes by confidence"),
        ({"order": "left_to_right", "threshold": 0.9}, "sampling.threshold=0.9 goes by confidence"),
        ({"schedule": "cosine", "threshold": 0.9}, "sampling.schedule=cosine"),
        ({"steps": None}, "sampling.steps=null"), ({"threshold": "high"}, "sampling.threshold=high"),
        ({"remask_eta": None}, "sampling.remask_eta=null"),
        ({"num_samples": 0}, "sampling.num_samples=0"), ({"num_samples": 1.5}, "sampling.num_samples=1.5"),
        ({"max_length": 0}, "sampling.max_length=0"), ({"max_length": 1000}, "must lie in 1..72"),
    ]:  # fmt: skip
        cfg = chosen.copy()
        for key, value in changes.items():
            OmegaConf.update(cfg, f"sampling.{key}", value)
        with pytest.raises(ValueError, match=said):
            checked(cfg, "a test", [f"sampling.{key}=" for key in changes])
    for arguments, said in [
        (["parameterization=ar", "sampling.predictor=unmask"], "use sampling.predictor=ar"),
        (["sampling.predictor=block_unmask"], "block.py writes texts of algo=bd3lm.*predictor=ddpm_cache"),
        (["sampling.semi_ar=true", "sampling.max_length=20"], "sampling.max_length=20 contradicts"),
    ]:
        with pytest.raises(ValueError, match=said):
            checked(compose_config(arguments), "a test", arguments)


def test_the_table_of_decoders_has_one_that_every_model_can_run():
    """Every decoder of benchmarks/decoders.py is a configuration that is accepted."""
    for overrides in (["sampling.predictor=unmask"], ["sampling.predictor=block_unmask", "algo=bd3lm", "block_size=8"]):
        chosen = compose_config(overrides)
        for how in decoders(len(overrides) > 1, [4]).values():
            cfg = chosen.copy()
            for key, value in (setting.split("=") for setting in how if "predictor" not in setting):
                OmegaConf.update(cfg, key, OmegaConf.create(f"value: {value}").value, force_add=False)
            checked(cfg, "a test")


def test_the_scorer_of_the_table_is_a_distribution():
    class Letters:
        def get_vocab(self):
            return {"a": 0}

        def __call__(self, texts, **kwargs):
            return {"input_ids": [[ord(letter) - 97 for letter in text] for text in texts]}

    scorer = KneserNey(Letters(), ["abcab", "abd", "aab"], vocab_size=6)
    for before in itertools.product(range(-1, 6), repeat=2):
        assert sum(scorer.probability(token, before) for token in range(6)) == pytest.approx(1)
    assert scorer.probability(2, (0, 1)) > scorer.probability(4, (0, 1)) > 0
    assert scorer.perplexity(["abc"]).nats_per_token.value < scorer.perplexity(["fed"]).nats_per_token.value
