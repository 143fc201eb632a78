"""Ancestral sampling of processes whose noise is other tokens, on a grid of times (UDLM, 2412.10193, section 3.2).

An approximation: the tokens of one step are drawn independently of each other. It tends to the model's distribution as
the number of steps grows far beyond the number of tokens.

A corrector redraws some tokens, each given all others at the same time. This is Gibbs sampling by the leave-one-out
posterior (arXiv 2605.22765).

Shape suffixes: B batch, L length, N positions drawn, V vocabulary.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from palimpsest.common.positions import Positions
from palimpsest.common.values import COUNT, AtLeastOne, Count, Needs, whole
from palimpsest.process import Hybrid, Uniform, draw_categorical
from palimpsest.samplers.base import Request, Step, TokenChoice, sampler_of, time_grid
from palimpsest.samplers.ordered import first_positions
from palimpsest.samplers.trace import Trace


@dataclass(kw_only=True)
class Resample(Step):
    """Redraw every open position at each step, from pure noise to a clean text; prompt tokens never change.

    Args:
        choice: applied to the prediction of each token given all others. A step changes few tokens, so p(x_s | x_t) is
            mostly the token that is there, and a lower temperature of that would keep the initial noise. With one token
            the choice has its distribution exactly. Guidance then mixes predictions of clean tokens, not of a step.
        noise_removal: end with the most likely token at every position ("greedy tail", DUO, 2506.10892).
        corrector_steps: corrector evaluations after each step; each redraws `corrector_tokens` tokens.
        corrector: `random` chooses these tokens at random, which keeps the distribution if it is one token at a time.
            `informed` chooses the tokens that are least likely given all others, which is a heuristic.
        self_correction_steps: maximum number of evaluations at the end. Each replaces, in every text, the token whose
            context most strongly predicts another one (GIDD, arXiv 2503.04482, section 5), which is a heuristic.
    """

    steps: Count
    noise_removal: bool = True
    eps: float = 1e-5
    corrector_steps: Annotated[int, whole(0, COUNT)] = 0
    corrector_tokens: Annotated[AtLeastOne, Needs("corrector_steps")] = 1
    corrector: Annotated[Literal["random", "informed"], Needs("corrector_steps")] = "random"
    self_correction_steps: Annotated[int, whole(0, COUNT)] = 0

    def __post_init__(self) -> None:
        self.plain = self.choice == TokenChoice()
        trace, steps = self.trace, self.steps
        self.grid = time_grid(steps, self.eps, trace.ids_BL.device)
        # The action of each step, and the index of its time in the grid.
        self.plan: list[tuple[str, int]] = []
        for place in range(steps):
            self.plan += [("predict", place), *[("correct", place + 1)] * self.corrector_steps]
        self.plan += [("tail", steps)] * self.noise_removal
        self.last_draw = len(self.plan)
        self.plan += [("self-correct", steps)] * self.self_correction_steps
        self.open = Positions(trace.open_BL)
        self.wrong_B = trace.open_BL.any(-1)  # rows in which self-correction may still change a token
        trace.ids_BL = self.model.process.prior(trace.ids_BL, self.noise, trace.open_BL)

    def positions(self, number: int, trace: Trace) -> Request | None:
        if number > len(self.plan):
            return None
        batch, length = trace.ids_BL.shape
        self.number = number
        self.u_BL = self.noise.uniform(length)
        self.action, place = self.plan[number - 1]
        self.alpha = self.model.schedule(self.grid[place]).alpha
        self.after = torch.ones_like(self.alpha)  # alpha of the predicted tokens, clean ones or those of a step
        at = self.open
        if self.action == "predict":
            self.next = self.model.schedule(self.grid[place + 1]).alpha
            if self.plain:
                self.after = self.next
                return Request(at, self.grid[place].expand(batch), self.grid[place + 1].expand(batch))
            return Request(at, self.grid[place].expand(batch))
        if self.action == "correct" and self.corrector == "random":
            score_BL = self.noise.uniform(length).masked_fill(~at.mask_BL, -torch.inf)
            count_B = at.mask_BL.sum(-1).clamp(max=self.corrector_tokens)
            counts = [min(count, self.corrector_tokens) for count in at.counts]
            self.chosen_BL = first_positions(score_BL, count_B)
            if number < self.last_draw:
                at = Positions(self.chosen_BL, counts)
        if self.action == "self-correct":
            at = Positions(at.mask_BL & self.wrong_B[:, None])
            if not len(at):
                return None
        return Request(at, self.grid[place].expand(batch))

    def tokens(self, log_p_NV: Tensor, at: Positions) -> tuple[Tensor, Positions]:
        current_N, u_N = at.take(self.trace.ids_BL), at.take(self.u_BL)
        chosen_NV = log_p_NV if self.plain else self._sharper(log_p_NV, current_N)
        if self.action == "predict":
            drawn_N = draw_categorical(chosen_NV, u_N)
        elif self.action == "correct":
            drawn_N = self._corrected(chosen_NV, current_N, u_N, at)
        elif self.action == "tail":
            drawn_N = chosen_NV.argmax(-1)
        else:
            drawn_N = self._self_corrected(chosen_NV, current_N, at)
        new_N = drawn_N != current_N
        if self.number == self.last_draw:  # a token may still be the noise that it started as
            new_N |= at.take(self.trace.step_BL) == 0
        new = Positions(at.spread(new_N))
        here_M = at.find(new)
        ids_M = drawn_N[here_M]
        # The confidence of a token is its probability given all others. That of a step is mostly the old token's.
        log_p_NV[here_M, ids_M] = self._given_others(ids_M, current_N[here_M], log_p_NV[here_M]).to(log_p_NV.dtype)
        return ids_M, new

    def _sharper(self, log_p_NV: Tensor, current_N: Tensor) -> Tensor:
        """Return log p(x_0 | x_t), or in a step log p(x_s | x_t), of the prediction that `choice` has sharpened."""
        process, alpha_N = self.model.process, self.alpha.expand(len(current_N))
        others_NV = self.choice.adjusted(process.without_own_token(current_N, log_p_NV, alpha_N))
        sharp_NV = process.with_own_token(current_N, others_NV, alpha_N)
        if self.action != "predict":
            return sharp_NV
        return process.posterior(current_N, sharp_NV, alpha_N, self.next.expand(len(current_N)))

    def _given_others(self, ids_M: Tensor, current_M: Tensor, log_p_MV: Tensor) -> Tensor:
        """Return the log-probability of each token given all others, float64 (M,)."""
        alphas = (alpha.expand(len(ids_M)) for alpha in (self.alpha, self.after))
        return self.model.process.given_others(ids_M, current_M, log_p_MV, *alphas)

    def _corrected(self, log_p_NV: Tensor, current_N: Tensor, u_N: Tensor, at: Positions) -> Tensor:
        """Return the tokens after the corrector redraws those it chooses, each given all others."""
        log_q_NV = self.model.process.conditional(current_N, log_p_NV, self.alpha.expand(len(current_N)))
        drawn_N = draw_categorical(log_q_NV, u_N)
        if self.corrector == "random":
            return torch.where(at.take(self.chosen_BL), drawn_N, current_N)
        surprise_N = -log_q_NV.gather(1, current_N[:, None]).squeeze(1)
        count_B = at.mask_BL.sum(-1).clamp(max=self.corrector_tokens)
        chosen_BL = first_positions(at.spread(surprise_N, -torch.inf), count_B)
        return torch.where(at.take(chosen_BL), drawn_N, current_N)

    def _self_corrected(self, log_p_NV: Tensor, current_N: Tensor, at: Positions) -> Tensor:
        """Return the tokens with one replaced per row: the one whose context most strongly predicts another token."""
        log_others_NV = self.model.process.without_own_token(current_N, log_p_NV, self.alpha.expand(len(current_N)))
        log_best_N, best_N = log_others_NV.max(-1)
        score_BL = at.spread(log_best_N.masked_fill(best_N == current_N, -torch.inf), -torch.inf)
        found_B = ~score_BL.isneginf().all(-1)
        self.wrong_B = torch.where(at.mask_BL.any(-1), found_B, self.wrong_B)
        return torch.where(at.take(first_positions(score_BL, found_B.long())), best_N, current_N)


sample = sampler_of(Resample, Uniform, Hybrid)
