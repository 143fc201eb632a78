"""Exact answers for tiny vocabularies and lengths, by enumeration: what estimators and samplers are held against."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from scipy import stats
from torch.nn.functional import one_hot

from palimpsest.common.positions import Positions
from palimpsest.objectives.base import Model, TokenDiffusion
from palimpsest.process import Hybrid, Uniform
from palimpsest.samplers.base import time_grid
from palimpsest.samplers.ordered import first_positions, preference, time_of
from tests.helpers.draws import draw_at

FALSE_ALARM = 1e-4  # of each chi-square test; seeds are fixed, so a test that passes keeps passing


def batch_of(x0: torch.Tensor, padding: int = 0) -> dict[str, torch.Tensor]:
    mask = torch.ones_like(x0, dtype=torch.bool)
    if padding:
        mask[:, -padding:] = False
    return {"input_ids": x0, "attention_mask": mask, "sample_id": torch.arange(len(x0))}


def texts(vocab: int, length: int, mask_id: int | None = None) -> torch.Tensor:
    """Every text there is of the tokens that are not the mask."""
    tokens = [v for v in range(vocab) if v != mask_id]
    return torch.tensor(list(itertools.product(tokens, repeat=length)))


@torch.no_grad()
def exact_bound(
    objective: TokenDiffusion, net: torch.nn.Module, x0: torch.Tensor, low: float = 0.0, points: int = 400
) -> float:
    """The mean over t in [low, 1] (or over the T times) of the expectation of the loss over all masks, in nats."""
    length = x0.shape[1]
    if objective.T:
        t = (torch.arange(objective.T, dtype=torch.float64) + 1) / objective.T
        weight = torch.full_like(t, 1 / objective.T)
    else:
        nodes, weights = np.polynomial.legendre.leggauss(points)
        t, weight = torch.from_numpy((nodes + 1) / 2 * (1 - low) + low), torch.from_numpy(weights / 2)
    move = objective.schedule(t).move_chance
    total = 0.0
    for pattern in itertools.product([False, True], repeat=length):
        masked, k = torch.tensor([pattern]), sum(pattern)
        xt = torch.where(masked, objective.process.mask_id, x0).expand(len(t), -1)
        rows = {"input_ids": x0.expand(len(t), -1)}
        loss = objective.loss_at(net, rows, draw_at(xt, t)).nll_BL.double().sum(-1)
        total += float((weight * move**k * (1 - move) ** (length - k) * loss).sum())
    return total


@torch.no_grad()
def exact_bound_of_any_noise(objective: TokenDiffusion, net: torch.nn.Module, x0: torch.Tensor) -> float:
    """The same for one text of a process in which a token may become any other, over every noised text."""
    vocab, points = objective.process.vocab_size, 400
    nodes, weights = np.polynomial.legendre.leggauss(points)
    angle = torch.from_numpy((nodes + 1) / 2) * torch.pi  # t = (1 - cos) / 2: the integrand is steep at both ends
    t, weight = (1 - angle.cos()) / 2, torch.from_numpy(weights) / 2 * torch.pi * angle.sin() / 2
    q = noised(objective.process, objective.schedule(t).alpha)
    total = 0.0
    for xt in itertools.product(range(vocab), repeat=x0.shape[1]):
        chance = torch.stack([q[:, a, b] for a, b in zip(x0[0].tolist(), xt, strict=True)]).prod(0)
        rows = {"input_ids": x0.expand(points, -1)}
        loss = objective.loss_at(net, rows, draw_at(torch.tensor(xt).expand(points, -1), t)).nll_BL.double().sum(-1)
        total += float((weight * torch.where(chance > 0, chance * loss, 0.0)).sum())
    return total


def noised(process: Uniform | Hybrid, alpha: torch.Tensor) -> torch.Tensor:
    """q(x_t | x_0) as a matrix, (..., V from, V to)."""
    size = process.vocab_size
    if isinstance(process, Uniform):
        return alpha[..., None, None] * torch.eye(size).double() + (1 - alpha[..., None, None]) / size
    level = process.level(alpha)
    noise = torch.full((*alpha.shape, size), 1.0, dtype=torch.float64) * (level.word / (size - 1))[..., None]
    noise[..., process.mask_id] = level.mask
    return level.kept[..., None, None] * torch.eye(size).double() + noise[..., None, :]


@torch.no_grad()
def chain_law(model: Model, length: int, vocab: int, steps: int, start: tuple | None = None) -> dict[tuple, float]:
    """The law over final sequences of steps through p(x_s | x_t), by propagating every state."""
    start = start or (model.process.mask_id,) * length
    x_SL = torch.tensor(list(itertools.product(range(vocab), repeat=length)))  # every state there is
    at_SL = x_SL == model.process.mask_id
    mass_S = (x_SL == torch.tensor(start)).all(-1).double()
    moves_SSL = torch.zeros(len(x_SL), len(x_SL), length, dtype=torch.float64)  # from, to, where
    for t, s in itertools.pairwise(time_grid(steps, 1e-5)):
        p_SLV = one_hot(x_SL, vocab).double()
        if at_SL.any():
            p_SLV[at_SL] = (
                model.reverse(x_SL, t.expand(len(x_SL)), s.expand(len(x_SL)), Positions(at_SL)).exp().double()
            )
        for place in range(length):
            moves_SSL[..., place] = p_SLV[:, place, x_SL[:, place]]
        mass_S = mass_S @ moves_SSL.prod(-1)
    return {tuple(state): p for state, p in zip(x_SL.tolist(), mass_S.tolist(), strict=True) if p}


@torch.no_grad()
def any_order_law(model: Model, length: int, vocab: int, start: tuple | None = None) -> dict[tuple, float]:
    """The mean over all orders of the chain rule along the order: the continuous-time law of a time-free network."""
    start = start or (model.process.mask_id,) * length
    holes = [i for i, token in enumerate(start) if token == model.process.mask_id]
    orders = list(itertools.permutations(holes))
    law: dict[tuple, float] = {}
    for order in orders:
        states = {start: 1.0 / len(orders)}
        for place in order:
            states = _fill(model, states, [place], vocab, torch.tensor([0.5], dtype=torch.float64))
        for state, mass in states.items():
            law[state] = law.get(state, 0.0) + mass
    return law


@torch.no_grad()
def ordered_law(model: Model, length: int, vocab: int, order: str, tokens_per_step: int) -> dict[tuple, float]:
    """The law of filling positions in a deterministic order."""
    law = {(model.process.mask_id,) * length: 1.0}
    while any(model.process.mask_id in state for state in law):
        x = torch.tensor(list(law))
        masked = x == model.process.mask_id
        at, left = Positions(masked), masked.sum(-1)
        t = time_of(model, left, torch.full((len(x),), length))
        chosen = first_positions(preference(model.denoise(x, t, at), at, order), left.clamp(max=tokens_per_step))
        together: dict[tuple, dict] = {}  # states that are filled at the same places
        for state, places in zip(law, chosen, strict=True):
            together.setdefault(tuple(places.nonzero().squeeze(-1).tolist()), {})[state] = law[state]
        law = {}
        for places, states in together.items():
            for after, p in _fill(model, states, list(places), vocab, t[:1]).items():
                law[after] = law.get(after, 0.0) + p
    return law


def _fill(model: Model, states: dict, places: list[int], vocab: int, t: torch.Tensor) -> dict[tuple, float]:
    """The law after `places` of every state are drawn from the prediction at the time t."""
    x = torch.tensor(list(states))
    at = torch.zeros_like(x, dtype=torch.bool)
    at[:, places] = True
    p_SNV = model.denoise(x, t.expand(len(x)), Positions(at)).exp().view(len(x), len(places), -1).tolist()
    out: dict[tuple, float] = {}
    for (state, mass), p_NV in zip(states.items(), p_SNV, strict=True):
        for tokens in itertools.product(range(vocab), repeat=len(places)):
            weight = mass * math.prod(p_V[token] for p_V, token in zip(p_NV, tokens, strict=True))
            if weight:
                after = list(state)
                for place, token in zip(places, tokens, strict=True):
                    after[place] = token
                out[tuple(after)] = out.get(tuple(after), 0.0) + weight
    return out


def assert_follows(ids: torch.Tensor, law: dict[tuple, float]) -> None:
    """Chi-square of observed rows against an exact law; cells expected fewer than five times are pooled."""
    num = len(ids)
    counts: dict[tuple, int] = {}
    for row in ids.tolist():
        counts[tuple(row)] = counts.get(tuple(row), 0) + 1
    assert set(counts) <= {state for state, p in law.items() if p > 0}, "a sequence that has no probability was drawn"
    large = [state for state in law if law[state] * num >= 5]
    observed, expected = [counts.get(s, 0) for s in large], [law[s] * num for s in large]
    rest = num - sum(expected)
    if rest > 5:
        observed, expected = [*observed, num - sum(observed)], [*expected, rest]
    expected = [e * sum(observed) / sum(expected) for e in expected]
    assert stats.chisquare(observed, expected).pvalue > FALSE_ALARM
