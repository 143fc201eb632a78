"""Biases of token pairs: the logits that get them, and that every pair counts once in a comparison of classes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from palimpsest.common.positions import Positions
from palimpsest.common.randomness import KeyedNoise
from palimpsest.denoisers import ClassGuided
from palimpsest.models.class_bigrams import ClassBigrams
from palimpsest.models.class_conditioning import UNCONDITIONAL, ClassHead, under_class
from palimpsest.models.dit import DiT
from palimpsest.noise_schedule import LogLinear
from palimpsest.objectives.base import Model
from palimpsest.objectives.mask_sampling import weighted
from palimpsest.objectives.subs import Subs
from palimpsest.process import Absorbing
from palimpsest.samplers import first_hitting
from tests.helpers.laws import any_order_law, assert_follows

VOCAB, MASK, CLASSES = 7, 6, 3
PAIRS = [(0, 0), (0, 3), (1, 2), (2, 1), (2, 2), (3, 0), (3, 5), (5, 3)]


def table() -> ClassBigrams:
    torch.manual_seed(2)
    bigrams = ClassBigrams(VOCAB, CLASSES, len(PAIRS))
    first_P, second_P = torch.tensor(PAIRS).T
    bigrams.set(first_P, second_P, torch.randn(CLASSES, len(PAIRS)))
    return bigrams


def network(time_conditioning: bool = False) -> DiT:
    torch.manual_seed(0)
    net = DiT(VOCAB, 16, 8, 2, 2, 0.0, num_classes=CLASSES, time_conditioning=time_conditioning)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    net.bigrams = table()
    return net.eval()


def test_each_position_gets_the_pairs_of_its_visible_neighbours():
    bigrams = table()
    x_BL = torch.tensor([[0, MASK, 2, MASK, MASK, 5], [MASK, 3, MASK, 3, 2, MASK]])
    visible_BL = x_BL != MASK
    visible_BL[1, 4] = False  # padding, say
    class_B = torch.tensor([2, 0])
    at = Positions(x_BL == MASK)
    rows = bigrams.neighbours(x_BL, visible_BL, at, class_B)
    for classes_N in (rows[2], torch.full_like(rows[2], -1)):
        found_NV = torch.zeros(len(at), VOCAB)
        bigrams.add(found_NV, *rows[:2], classes_N)
        bias = {(k, *pair): bigrams.bias_CP[k, p] for k in range(CLASSES) for p, pair in enumerate(PAIRS)}
        for n, (b, i) in enumerate(zip(at.row_N.tolist(), at.place_N.tolist(), strict=True)):
            for v in range(VOCAB):
                expected, k = 0.0, int(classes_N[n])
                if i > 0 and visible_BL[b, i - 1]:
                    expected += bias.get((k, int(x_BL[b, i - 1]), v), 0.0)
                if i + 1 < x_BL.shape[1] and visible_BL[b, i + 1]:
                    expected += bias.get((k, v, int(x_BL[b, i + 1])), 0.0)
                assert float(found_NV[n, v]) == pytest.approx(float(expected), abs=1e-6)
    found_NV, strided_NV = torch.zeros(len(at), VOCAB), torch.zeros(VOCAB, len(at)).T  # a CPU's layout of logits
    for logits_NV in (found_NV, strided_NV):
        bigrams.add(logits_NV, *rows)
    assert torch.equal(found_NV, strided_NV) and found_NV.abs().sum() > 1


def test_the_bias_of_each_pair_of_a_text():
    bigrams, text = table(), torch.tensor([[0, 3, 5, 3, 0, 0, 1, 2, 6]])
    found_L = bigrams.of_text(text, torch.tensor([1]))[0]
    for i in range(text.shape[1]):
        pair = (int(text[0, i - 1]), int(text[0, i]))
        expected = float(bigrams.bias_CP[1, PAIRS.index(pair)]) if i and pair in PAIRS else 0.0
        assert float(found_L[i]) == pytest.approx(expected)


def test_losses_and_predictions_are_of_one_distribution():
    net, objective = network(), Subs(LogLinear(), Absorbing(MASK))
    x_BL = torch.tensor([[0, 3, 5, 3, 2, 1]])
    masked_BL = torch.tensor([[False, True, False, True, True, False]])
    draw = weighted(objective.schedule, x_BL.masked_fill(masked_BL, MASK), torch.tensor([0.5]), torch.ones(1))
    batch = {"input_ids": x_BL, "class_id": torch.tensor([1])}
    nll_L = (objective.loss_at(net, batch, draw).nll_BL * draw.scale_B)[0]
    log_p_LV = objective.denoise(net, draw.xt_BL, draw.t_B, class_id=batch["class_id"])[0]
    assert log_p_LV.exp().sum(-1).tolist() == pytest.approx([1.0] * 6, abs=1e-5)
    torch.testing.assert_close(nll_L[masked_BL[0]].float(), -log_p_LV.gather(1, x_BL.T)[masked_BL.T].float())
    net.bigrams = None
    assert not torch.allclose(log_p_LV, objective.denoise(net, draw.xt_BL, draw.t_B, class_id=batch["class_id"])[0])


@pytest.mark.parametrize("weight", [1.0, 2.0])
def test_samples_of_a_class_follow_the_exact_law(weight):
    """The samplers project some positions only; the law is computed from predictions of one position at a time."""
    net, rows = network(), 5_000
    model = ClassGuided(Model(Subs(LogLinear(), Absorbing(MASK)), net), 1, weight)
    law = any_order_law(model, 3, VOCAB)
    out = first_hitting.sample(model, torch.full((rows, 3), MASK), KeyedNoise(4, torch.arange(rows)))
    assert_follows(out.ids_BL, law)
    net.bigrams = None
    assert max(abs(p - law[text]) for text, p in any_order_law(model, 3, VOCAB).items()) > 0.005


def test_rows_without_a_class_have_no_biases():
    net, objective = network(), Subs(LogLinear(), Absorbing(MASK))
    x_BL = torch.tensor([[0, 3, 5, 3, 2, 1]] * 2)
    draw = weighted(objective.schedule, x_BL.masked_fill(x_BL == 3, MASK), torch.full((2,), 0.5), torch.ones(2))
    batch = {"input_ids": x_BL, "class_id": torch.tensor([UNCONDITIONAL, 1])}
    with_pairs_BL = objective.loss_at(net, batch, draw).nll_BL
    net.bigrams = None
    without_BL = objective.loss_at(net, batch, draw).nll_BL
    assert torch.equal(with_pairs_BL[0], without_BL[0]) and not torch.allclose(with_pairs_BL[1], without_BL[1])


def test_a_tied_head_has_the_same_biases():
    net, objective = network(), Subs(LogLinear(), Absorbing(MASK))
    tied = network()
    matrix, columns = net.head.weight.detach().split([16, CLASSES], dim=1)
    linear = torch.nn.Linear(16, VOCAB)
    linear.load_state_dict({"weight": matrix, "bias": net.head.bias.detach()})
    tied.output_layer.linear = ClassHead(linear, CLASSES)
    tied.head.class_bias.data.copy_(columns)
    x_BL, cond = torch.tensor([[0, MASK, 5, MASK, 2, 1]]), {"class_id": torch.tensor([2])}
    t_B = torch.full((1,), 0.5)
    expected, found = (objective.denoise(each, x_BL, t_B, **cond) for each in (net, tied))
    torch.testing.assert_close(found, expected)


def test_bfloat16_has_the_biases_of_float32():
    net, objective = network(), Subs(LogLinear(), Absorbing(MASK))
    x_BL, t_B, cond = torch.tensor([[0, MASK, 5, MASK, 2, 1]]), torch.full((1,), 0.5), {"class_id": torch.tensor([1])}
    exact = objective.denoise(net, x_BL, t_B, **cond)
    with torch.autocast("cpu", torch.bfloat16):
        rough = objective.denoise(net, x_BL, t_B, **cond)
    possible = exact > -20
    torch.testing.assert_close(rough[possible].float(), exact[possible], atol=0.1, rtol=0.05)


@pytest.mark.parametrize("observed", [0, 2])
def test_biases_that_count_once_change_no_mean_over_all_masks(observed):
    """Over all masks of a text, biases count once whether they are added by the masks or for themselves."""
    net, objective = network(), Subs(LogLinear(), Absorbing(MASK))
    x_L = torch.tensor([3, 0, 3, 5, 3, 2, 2, 2])
    n = 7 - observed  # the last token is padding, and would be a pair with the one before
    batch = {
        "input_ids": x_L[None],
        "attention_mask": (torch.arange(8) < 7)[None],
        "observed": (torch.arange(8) < observed)[None],
    }
    for k in range(CLASSES):
        known = under_class(batch, torch.tensor([k]), net)
        plain = {name: known[name] for name in known if not name.endswith("_bias")}
        means = dict.fromkeys(("plain", "known", "unigrams"), 0.0)
        for size in range(1, n + 1):
            for places in itertools.combinations(range(observed, 7), size):
                xt_BL = x_L[None].clone()
                xt_BL[0, list(places)] = MASK
                draw = weighted(objective.schedule, xt_BL, torch.tensor([size / (n + 1)]), torch.tensor([n / size]))
                part = objective.loss_at(net, plain, draw)
                unigrams = {name: known[name] for name in known if name != "pair_bias"}
                for name, entries in (("plain", plain), ("known", known), ("unigrams", unigrams)):
                    nats = objective._scaled(part, draw, entries).detach().double().sum()
                    means[name] += float(nats) / (n * math.comb(n, size))
        assert means["known"] == pytest.approx(means["plain"], rel=1e-5)
        assert means["unigrams"] == pytest.approx(means["plain"], rel=1e-5)


def test_of_a_step_of_many_masks_no_pair_counts_by_itself():
    """With T steps two tokens may be unmasked at once, and then neither sees the other."""
    net, objective = network(), Subs(LogLinear(), Absorbing(MASK), T=4)
    batch = {"input_ids": torch.tensor([[3, 0, 3, 5]] * 64)}
    known = under_class(batch, torch.ones(64, dtype=torch.long), net)
    without = {name: known[name] for name in known if name != "pair_bias"}
    noises = [KeyedNoise(1, torch.arange(64), time_B=(torch.arange(64) + 0.5) / 64) for _ in range(2)]
    with_pairs, tokens_only = (
        objective.loss(net, entries, noise).nll_BL for entries, noise in zip((known, without), noises, strict=True)
    )
    assert torch.equal(with_pairs, tokens_only)
