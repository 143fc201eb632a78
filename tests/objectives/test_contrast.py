"""Classes compared in training: common masks and dropout, exact gradients, a choice of many classes."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from palimpsest.common.randomness import KeyedNoise
from palimpsest.models.ar import AR
from palimpsest.models.dit import DiT
from palimpsest.noise_schedule import LogLinear
from palimpsest.objectives.ar import AR as ARObjective
from palimpsest.objectives.base import TokenLoss
from palimpsest.objectives.block import BlockDiffusion
from palimpsest.objectives.contrast import class_log_joint, class_losses
from palimpsest.objectives.mask_sampling import ExactCount, shuffle_keys
from palimpsest.objectives.mlm import MaskedLM
from palimpsest.objectives.projection import gradients_afterwards
from palimpsest.objectives.subs import Subs
from palimpsest.objectives.udlm import UDLM
from palimpsest.process import Absorbing, Uniform
from palimpsest.training.optimizers import adamw, muon

VOCAB, MASK, ROWS, LENGTH = 9, 8, 6, 10
OBJECTIVES = {
    "subs": lambda: Subs(LogLinear(), Absorbing(MASK)),
    "subs, plain cross-entropy": lambda: Subs(LogLinear(), Absorbing(MASK), loss_weight="uniform"),
    "subs, 8 steps": lambda: Subs(LogLinear(), Absorbing(MASK), T=8),
    "mlm": lambda: MaskedLM(LogLinear(), Absorbing(MASK)),
    "udlm": lambda: UDLM(LogLinear(), Uniform(VOCAB)),
    "ar": lambda: ARObjective(Absorbing(MASK)),
    "bd3lm": lambda: BlockDiffusion(Absorbing(MASK), lambda process: Subs(LogLinear(), process), block_size=5),
}


def network(objective, classes: int, dropout: float = 0.0):
    torch.manual_seed(0)
    if objective.causal:
        net = AR(VOCAB, 16, 2, 2, dropout=dropout, num_classes=classes)
    else:
        net = DiT(VOCAB, 16, 8, 2, 2, dropout=dropout, num_classes=classes, time_conditioning=objective.needs_time)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return net


def texts(classes: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    lengths = torch.tensor([LENGTH, LENGTH, 7, 5, 10, 3])
    return {
        "input_ids": torch.randint(VOCAB - 1, (ROWS, LENGTH)),
        "attention_mask": torch.arange(LENGTH) < lengths[:, None],
        "label": torch.randint(classes, (ROWS,)),
    }


def log_odds(objective, net, batch, prior, seed: int = 3, dropout_seed: int = 5) -> torch.Tensor:
    noise = KeyedNoise(seed, torch.arange(ROWS), time_B=(torch.arange(ROWS) + 0.5) / ROWS)
    return class_log_joint(objective, net, batch, prior, noise, lambda: torch.manual_seed(dropout_seed))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_column_is_a_class_under_the_same_masks_and_its_gradient_is_exact(name):
    objective, prior = OBJECTIVES[name](), torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64).log()
    net, batch = network(objective, 3), texts(3)
    found_BK = log_odds(objective, net, batch, prior)
    with gradients_afterwards():
        nats_BC = torch.stack(
            [_nats(objective, net, {**batch, "class_id": torch.full((ROWS,), k)}, k) for k in range(3)], 1
        )
    joint_BC = prior - nats_BC
    own_B1 = batch["label"][:, None]
    torch.testing.assert_close(found_BK[:, :1], joint_BC.gather(1, own_B1))
    torch.testing.assert_close(found_BK.sort(1).values, joint_BC.sort(1).values)
    # Its derivative by the nats of class k is [k = label] - p_k, by which every row is weighted otherwise.
    weight_BC = (F.one_hot(batch["label"], 3) - joint_BC.detach().softmax(1)) / ROWS
    loss = class_losses(found_BK, 3)[:, 0].mean()
    parameters = list(net.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    plain = torch.autograd.grad((weight_BC * nats_BC).sum(), parameters, allow_unused=True)
    for ours, expected in zip(found, plain, strict=True):
        assert (ours is None) == (expected is None)
        if ours is not None:
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def _nats(objective, net, batch, label: int) -> torch.Tensor:
    nll_BL = _token_nats(objective, net, batch)
    if isinstance(objective, Subs | BlockDiffusion):  # the bias of a class counts once, whether masked or not
        flat = copy.deepcopy(net)
        for parameter in flat.head.parameters():
            torch.nn.init.zeros_(parameter)
        weight_BL = _token_nats(objective, flat, batch).detach() / math.log(VOCAB - 1)  # each mask costs this
        bias_BL = net.head.weight[:, label - 3][batch["input_ids"]]
        scored_BL = batch["attention_mask"].clone()
        scored_BL[:, 0] &= isinstance(objective, Subs)  # to block diffusion the first token is context
        nll_BL = nll_BL + (weight_BL - scored_BL.float()) * bias_BL
    return nll_BL.double().sum(-1)


def _token_nats(objective, net, batch) -> torch.Tensor:
    noise = KeyedNoise(3, torch.arange(ROWS), time_B=(torch.arange(ROWS) + 0.5) / ROWS)
    noise.uniform(3)  # the choice of the classes has numbers of its own
    return objective.contrasted().loss(net, batch, noise).nll_BL


@pytest.mark.parametrize("name", ["subs", "mlm", "bd3lm"])
def test_biases_of_classes_are_counted_without_noise(name):
    """If the trunk ignores classes and context, p(class | text) is that of unigrams, whatever is masked."""
    objective = OBJECTIVES[name]()
    net, batch = network(objective, 3), texts(3)
    torch.nn.init.zeros_(net.head.weight[:, :-3].data)
    logits_VC = (net.head.bias[:, None] + net.head.weight[:, -3:]).double()
    logits_VC[MASK] = -torch.inf
    scored_BL = batch["attention_mask"].clone()
    scored_BL[:, 0] &= isinstance(objective, Subs)
    exact_BC = (logits_VC.log_softmax(0)[batch["input_ids"]] * scored_BL[..., None]).sum(1)
    for seed in range(5):
        found_BC = log_odds(objective, net, batch, torch.zeros(3), seed=seed).sort(1).values
        odds_BC, expected_BC = (log_BC - log_BC.mean(1, keepdim=True) for log_BC in (found_BC, exact_BC))
        torch.testing.assert_close(odds_BC, expected_BC.sort(1).values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["subs", "ar", "udlm"])
def test_classes_that_change_nothing_have_equal_odds_whatever_the_dropout(name):
    objective = OBJECTIVES[name]()
    net, batch = network(objective, 2, dropout=0.5).train(), texts(2)
    with torch.no_grad():
        for parameter, columns in [*net.class_parameters, (net.head.weight, slice(-2, None))]:
            parameter[:, columns] = 0
    odds_BK = log_odds(objective, net, batch, torch.zeros(2))
    assert torch.equal(odds_BK[:, 0], odds_BK[:, 1])
    assert class_losses(odds_BK, 2)[:, 1].tolist() == [0.5] * ROWS, "equal classes share the credit"
    other_BK = log_odds(objective, net, batch, torch.zeros(2), dropout_seed=6)
    assert not torch.equal(odds_BK, other_BK), "dropout is at work"


def test_of_many_classes_a_random_choice_stands_for_all_others():
    classes = 11

    class Fixed:  # an objective whose likelihoods depend on the class alone
        def contrasted(self):
            return self

        def loss(self, net, batch, noise):
            return TokenLoss(batch["class_id"][:, None].double() * 0.3, torch.ones(len(batch["label"]), 1))

    batch = {"label": torch.full((4000,), 4), "input_ids": torch.zeros(4000, 1, dtype=torch.long)}
    noise = KeyedNoise(1, torch.arange(4000))
    odds_BK = class_log_joint(
        Fixed(), network(Subs(LogLinear(), Absorbing(MASK)), classes), batch, torch.zeros(classes), noise, lambda: None
    )
    assert odds_BK.shape == (4000, 4) and torch.equal(odds_BK[:, 0], torch.full((4000,), -1.2, dtype=torch.float64))
    others = sum(np.exp(-0.3 * k) for k in range(classes) if k != 4)
    losses_B2 = class_losses(odds_BK, classes)
    sums_B = (losses_B2[:, 0] + odds_BK[:, 0]).exp() - odds_BK[:, 0].exp()  # what stands for the others
    assert abs(float(sums_B.mean()) - others) < 4 * float(sums_B.std()) / 4000**0.5
    assert torch.equal(losses_B2[:, 1] == 1, (odds_BK[:, 1:] < -1.2).all(1))


def test_the_choice_of_classes_is_independent_of_the_masks():
    """The keys of the classes and of the positions would be the same numbers if both were a row's first ones."""
    chosen, masked = [], []

    class Spy(Subs):
        def contrasted(self):
            return self

        def loss(self, net, batch, noise):
            chosen.append(batch["class_id"])
            if len(chosen) == 1:
                masked.append(shuffle_keys(noise, torch.ones(2000, 11, dtype=torch.bool)) < 0.4)
            return TokenLoss(torch.zeros(2000, 1), torch.ones(2000, 1))

    batch = {"label": torch.zeros(2000, dtype=torch.long), "input_ids": torch.zeros(2000, 11, dtype=torch.long)}
    noise = KeyedNoise(1, torch.arange(2000))
    spy = Spy(LogLinear(), Absorbing(MASK))
    class_log_joint(spy, network(spy, 11), batch, torch.zeros(11), noise, lambda: None)
    compared_BC = torch.stack([F.one_hot(one, 11) for one in chosen]).sum(0).bool()
    agree = (compared_BC[:, 1:] == masked[0][:, 1:]).double().mean()
    expected = 0.3 * 0.4 + 0.7 * 0.6
    assert abs(float(agree) - expected) < 0.02


def test_high_counts_are_all_counts_from_a_share_on():
    x, scored = torch.zeros(7000, 10, dtype=torch.long), torch.ones(7000, 10, dtype=torch.bool)
    (draw,) = ExactCount(lowest_rate=0.4)(LogLinear(), x, scored, Absorbing(MASK), KeyedNoise(1, torch.arange(7000)))
    counts = torch.bincount((draw.xt_BL == MASK).sum(1), minlength=11)
    assert counts[:4].sum() == 0 and (counts[4:] - 1000).abs().max() < 5 * 1000**0.5
    torch.testing.assert_close(draw.scale_B * draw_weight(draw), 10 / (draw.xt_BL == MASK).sum(1).double())


def draw_weight(draw) -> torch.Tensor:
    return LogLinear()(draw.t_B).elbo_weight


@pytest.mark.parametrize("build", [adamw, muon])
def test_class_lr_multiplies_the_updates_of_what_belongs_to_the_classes(build):
    settings = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0}
    settings |= {"matrix_lr": 0.02} if build is muon else {}
    changes = []
    for class_lr in (None, 5e-3):
        net = network(OBJECTIVES["subs"](), 2)
        optimizer = build(net, **settings, class_lr=class_lr)
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        changes.append({name: p.detach() - before[name] for name, p in net.named_parameters()})
    plain, faster = changes
    own = [net.head.weight, *(parameter for parameter, _ in net.class_parameters)]
    names = [name for name, p in net.named_parameters() if any(p is other for other in own)]
    for name, change in plain.items():
        if name in names:
            torch.testing.assert_close(faster[name][:, -2:], 5 * change[:, -2:], rtol=1e-4, atol=1e-7)
            assert torch.equal(faster[name][:, :-2], change[:, :-2])
        else:
            assert torch.equal(faster[name], change)
    with pytest.raises(ValueError, match="optim.class_lr=0.005: the network is not told classes"):
        build(network(OBJECTIVES["subs"](), 0), **settings, class_lr=5e-3)
