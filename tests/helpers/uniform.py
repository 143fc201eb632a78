"""The exact network of uniform-state diffusion for a known distribution over tiny texts, and its chain."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import torch
from torch.nn.functional import one_hot

from palimpsest.common.positions import Positions
from palimpsest.objectives.base import Model
from palimpsest.objectives.udlm import UDLM, _divergence
from palimpsest.process import Uniform
from palimpsest.samplers.base import time_grid
from tests.helpers.laws import texts

V, L = 3, 2
NO_NETWORK = SimpleNamespace(head=SimpleNamespace(out_features=V))


class Bayes:
    """The leave-one-out posterior of a known distribution over texts, under uniform noise."""

    def __init__(self, p_M: torch.Tensor) -> None:
        self.p_M, self.texts_ML = p_M.double(), texts(V, L)

    def __call__(self, x_BL: torch.Tensor, alpha_B: torch.Tensor) -> torch.Tensor:
        """log p(x_0 at i | x_t without i), (B, L, V)."""
        if len(x_BL) <= len(self.texts_ML) or (alpha_B != alpha_B[0]).any():
            return self._of(x_BL, alpha_B)
        place_B = (x_BL * V ** torch.arange(L - 1, -1, -1)).sum(-1)  # of the row among all texts
        return self._of(self.texts_ML, alpha_B[: len(self.texts_ML)])[place_B]

    def _of(self, x_BL: torch.Tensor, alpha_B: torch.Tensor) -> torch.Tensor:
        same_BML = (x_BL[:, None] == self.texts_ML[None]).double()
        q_BML = alpha_B[:, None, None] * same_BML + (1 - alpha_B[:, None, None]) / V
        out = torch.zeros(len(x_BL), L, V, dtype=torch.float64)
        for i in range(L):
            weight_BM = self.p_M * torch.cat([q_BML[..., :i], q_BML[..., i + 1 :]], -1).prod(-1)
            out[:, i] = weight_BM @ one_hot(self.texts_ML[:, i], V).double()
        return (out / out.sum(-1, keepdim=True)).log()


class BayesUDLM(UDLM):
    """UDLM with the exact network."""

    def __init__(self, bayes: Bayes, schedule) -> None:
        super().__init__(schedule, Uniform(V))
        self.bayes = bayes

    def leave_one_out(self, backbone, x_BL, t_B, at, **cond):
        return at.take(self.bayes(x_BL, self.schedule(t_B).alpha))

    def rate(self, x0_BL, xt_BL, t_B):
        """The integrand, from the exact prediction."""
        level = self.schedule(t_B)
        log_p_BLV, alpha_BL = self.bayes(xt_BL, level.alpha), level.alpha[:, None].expand(xt_BL.shape)
        total_BL = (alpha_BL[..., None] * (V * log_p_BLV.exp() - 1)).log1p().sum(-1)
        ids = torch.stack([x0_BL, xt_BL], -1)
        picked = torch.cat([log_p_BLV.gather(-1, ids), total_BL[..., None]], -1)
        found = _divergence(picked.flatten(0, 1), ids.flatten(0, 1), alpha_BL.flatten(), V)
        return -level.dalpha * found.view(xt_BL.shape).sum(-1)


def chain(model: Model, steps: int, start: tuple[int, ...]) -> dict[tuple, float]:
    """The law of the sampler: random tokens at the blanks, then steps through p(x_s | x_t)."""
    blanks = [i for i, token in enumerate(start) if token == Uniform.blank_id]
    law: dict[tuple, float] = {}
    for tokens in itertools.product(range(V), repeat=len(blanks)):
        state = list(start)
        for place, token in zip(blanks, tokens, strict=True):
            state[place] = token
        law[tuple(state)] = V ** -len(blanks)
    at = Positions(torch.tensor([[i in blanks for i in range(L)]]))
    for t, s in itertools.pairwise(time_grid(steps, 1e-5)):
        moved: dict[tuple, float] = {}
        for state, mass in law.items():
            q_NV = model.reverse(torch.tensor([state]), t[None], s[None], at).exp()
            for tokens in itertools.product(range(V), repeat=len(blanks)):
                after = list(state)
                for place, token in zip(blanks, tokens, strict=True):
                    after[place] = token
                weight = mass * float(torch.stack([q_NV[i, v] for i, v in enumerate(tokens)]).prod())
                moved[tuple(after)] = moved.get(tuple(after), 0.0) + weight
        law = moved
    return law
