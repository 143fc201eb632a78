"""The chunked projection: values and gradients of the plain one, whether or not the weights are known beforehand."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy as plain_cross_entropy

from palimpsest.common.randomness import training_noise
from palimpsest.noise_schedule import LogLinear
from palimpsest.objectives import projection
from palimpsest.objectives.d3pm import D3PM
from palimpsest.objectives.gidd import GIDD
from palimpsest.objectives.mask_sampling import Bernoulli, Complementary, ExactCount
from palimpsest.objectives.mlm import MaskedLM, Rates
from palimpsest.objectives.projection import cross_entropy, losses
from palimpsest.objectives.sedd import SEDD
from palimpsest.objectives.subs import Subs
from palimpsest.objectives.udlm import UDLM
from palimpsest.process import Absorbing, Hybrid, Uniform

VOCAB, MASK, N, WIDTH = 11, 10, 10, 6


@pytest.fixture(params=[3, 9, 100], ids="chunks of {}".format)
def chunk(request, monkeypatch):
    monkeypatch.setattr(projection, "_CHUNK_BYTES", 4 * VOCAB * request.param)


def gradients(learned, loss):
    for tensor in learned:
        tensor.grad = None
    loss.backward()
    return [None if tensor.grad is None else tensor.grad.clone() for tensor in learned]


@pytest.mark.parametrize("known", [True, False], ids=["weights known", "weights unknown"])
@pytest.mark.parametrize("bias", [True, False])
def test_cross_entropy_has_the_plain_gradients(chunk, bias, known):
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(WIDTH, VOCAB, bias=bias), torch.randn(N, WIDTH, requires_grad=True)
    target, weight = torch.randint(MASK, (N,)), torch.rand(N)
    learned = [hidden, *head.parameters()]
    nll = cross_entropy(hidden, head, target, MASK, weight if known else None)
    ours = gradients(learned, (nll * weight * 0.3).sum())
    logits = head(hidden).index_fill(1, torch.tensor([MASK]), -torch.inf)
    plain = plain_cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(nll, plain)
    for got, wanted in zip(ours, gradients(learned, (plain * weight * 0.3).sum()), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("known", [True, False], ids=["weights known", "weights unknown"])
def test_any_loss_has_the_plain_gradients_and_its_other_numbers_have_none(chunk, known):
    torch.manual_seed(1)
    head, hidden = torch.nn.Linear(WIDTH, VOCAB), torch.randn(N, WIDTH, requires_grad=True)
    shift, learned = torch.rand(N), [hidden, *head.parameters()]

    def two_numbers(logits, shift):
        return torch.stack([(logits - shift[:, None]).tanh().sum(-1), logits.amax(-1)], dim=1).double()

    value, largest = losses(two_numbers, hidden, head, shift, weight_N=shift if known else None)
    wanted, wanted_largest = two_numbers(head(hidden), shift).unbind(1)
    torch.testing.assert_close((value, largest), (wanted, wanted_largest))
    assert value.dtype == torch.float64 and not largest.requires_grad
    ours = gradients(learned, (value * shift).sum())
    for got, expected in zip(ours, gradients(learned, (wanted * shift).sum()), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("frozen", ["hidden", "head", "bias", "all"])
def test_nothing_is_computed_for_what_is_frozen(frozen):
    torch.manual_seed(2)
    head, hidden = torch.nn.Linear(WIDTH, VOCAB), torch.randn(N, WIDTH, requires_grad=frozen not in ("hidden", "all"))
    head.weight.requires_grad_(frozen not in ("head", "all"))
    head.bias.requires_grad_(frozen not in ("bias", "head", "all"))
    target = torch.randint(MASK, (N,))
    nll = cross_entropy(hidden, head, target, MASK, torch.ones(N))
    if frozen == "all":
        assert not nll.requires_grad
        return
    learned = [hidden, *head.parameters()]
    for got, tensor in zip(gradients(learned, nll.sum()), learned, strict=True):
        assert (got is not None) == tensor.requires_grad


def test_under_autocast_products_are_in_its_precision_and_sums_are_not():
    torch.manual_seed(3)
    head, hidden = torch.nn.Linear(WIDTH, VOCAB), torch.randn(N, WIDTH, requires_grad=True)
    target, learned = torch.randint(MASK, (N,)), [hidden, *head.parameters()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        nll = cross_entropy(hidden, head, target, MASK, torch.ones(N))
    assert nll.dtype == torch.float32
    ours = gradients(learned, nll.sum())
    exact = gradients(learned, cross_entropy(hidden, head, target, MASK).sum())
    for got, wanted, tensor in zip(ours, exact, learned, strict=True):
        assert got.dtype == tensor.dtype
        torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.05)


def test_a_loss_that_is_no_number_has_a_gradient_that_is_none():
    head, hidden = torch.nn.Linear(WIDTH, VOCAB), torch.randn(N, WIDTH, requires_grad=True)
    nll = cross_entropy(hidden, head, torch.randint(MASK, (N,)), MASK, torch.ones(N))
    assert all(grad.isnan().all() for grad in gradients([hidden, *head.parameters()], nll.sum() * torch.nan))


def test_no_position_at_all():
    head, hidden = torch.nn.Linear(WIDTH, VOCAB), torch.zeros(0, WIDTH, requires_grad=True)
    nll = cross_entropy(hidden, head, torch.zeros(0, dtype=torch.long), MASK, torch.ones(0))
    assert nll.shape == (0,)
    assert all((grad == 0).all() for grad in gradients([hidden, *head.parameters()], nll.sum()))


def test_other_weights_than_announced_are_refused_and_so_is_a_second_gradient():
    head, hidden = torch.nn.Linear(WIDTH, VOCAB), torch.randn(N, WIDTH)
    target, weight = torch.randint(MASK, (N,)), torch.rand(N)
    with pytest.raises(RuntimeError, match="weighted otherwise than by `weight_N`; leave `weight_N` out"):
        cross_entropy(hidden, head, target, MASK, weight).sum().backward()
    weight = torch.tensor([1e4, *torch.ones(N - 1)])
    announced = weight * torch.tensor([*torch.ones(N - 1), 8.0])
    with pytest.raises(RuntimeError, match="weighted otherwise"):  # small beside the largest weight, and wrong
        (weight * cross_entropy(hidden, head, target, MASK, announced)).sum().backward()
    loss = cross_entropy(hidden, head, target, MASK, torch.ones(N)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="taken already"):
        loss.backward()


MASKED = Absorbing(MASK)
OBJECTIVES = {
    "subs": Subs(LogLinear(), MASKED, Bernoulli()),
    "subs, exact counts": Subs(LogLinear(), MASKED, ExactCount()),
    "subs, pairs of masks": Subs(LogLinear(), MASKED, Complementary()),
    "subs, 8 steps": Subs(LogLinear(), MASKED, T=8),
    "mlm": MaskedLM(LogLinear(), MASKED, Rates()),
    "sedd": SEDD(LogLinear(), MASKED, ExactCount()),
    "d3pm": D3PM(LogLinear(), MASKED, T=8),
    "udlm": UDLM(LogLinear(), Uniform(VOCAB)),
    "gidd": GIDD(LogLinear(), Hybrid(MASK, VOCAB, 0.2)),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_of_a_training_step_needs_no_second_look_at_the_logits(name, random_dit, monkeypatch):
    """The weights that an objective announces are those of its loss."""
    network = random_dit(VOCAB, time_conditioning=True).float()
    batch = {"input_ids": torch.randint(MASK, (6, 8)), "attention_mask": torch.arange(8).expand(6, -1) < 7}
    evaluated, found = projection._Losses.apply, []

    def without_weights(step, banned_id, weight_N, *rest):
        return evaluated(step, banned_id, None, *rest)

    for apply in (evaluated, without_weights):
        monkeypatch.setattr(projection._Losses, "apply", apply)
        loss = OBJECTIVES[name].loss(network, batch, training_noise(0, torch.arange(6), 6))
        found.append([loss.total().detach(), *gradients(list(network.parameters()), loss.total() / 6)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
