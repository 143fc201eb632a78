"""Ancestral sampling of processes whose noise is other tokens, on a grid of times (UDLM, 2412.10193, section 3.2), with
correctors between the steps.

An approximation: the positions of one step are drawn independently of each other. It tends to the model's distribution
as the steps become many more than the tokens. A corrector draws some tokens again, each given all others at the same
time (Gibbs sampling by the leave-one-out posterior, arXiv 2605.22765), so it takes back what fits nothing.

Shape suffixes: B batch, L length, R rows evaluated, N positions drawn, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from denoisers import Denoiser
from process import Hybrid, Uniform
from randomness import KeyedNoise
from samplers.base import Asked, Step, TokenChoice, sampler_of, time_grid
from samplers.ordered import first_positions
from samplers.trace import Trace

CORRECTORS = ("random", "informed")


class Resample(Step):
    """Ask for p(x_s | x_t) at every open position; in the end for the most likely clean tokens.

    Every blank starts as pure noise, and any of them may change at any step; given tokens never do.

    Args:
        noise_removal: after the last step write the most likely token everywhere ("greedy tail", DUO, 2506.10892).
        corrector_steps: evaluations of a corrector after each step; each draws `corrector_tokens` tokens again.
        corrector: which: random, which leaves the distribution at that time as it is for one token at a time; informed,
            those least likely given all others, a heuristic.
        self_correction_steps: evaluations at the end, at most, each of which puts right the one token of a text whose
            others are surest of another in its place, until there is none (GIDD, arXiv 2503.04482, section 5); a
            heuristic.

    Raises:
        ValueError: numbers out of range, or a corrector that does not exist.
    """

    def __init__(
        self, model: Denoiser, trace: Trace, noise: KeyedNoise, *, steps: int,
        choice: TokenChoice = TokenChoice(),  # noqa: B008 - frozen
        noise_removal: bool = True, eps: float = 1e-5,
        corrector_steps: int = 0, corrector_tokens: int = 1, corrector: str = "random",
        self_correction_steps: int = 0,
    ) -> None:  # fmt: skip
        least = {"corrector_steps": (corrector_steps, 0), "corrector_tokens": (corrector_tokens, 1),
                 "self_correction_steps": (self_correction_steps, 0)}  # fmt: skip
        for key, (value, minimum) in least.items():
            if value < minimum:
                raise ValueError(f"sampling.{key}={value} must be at least {minimum}")
        if corrector not in CORRECTORS:
            raise ValueError(f"sampling.corrector={corrector} is unknown; choose one of: {', '.join(CORRECTORS)}")
        self.model, self.trace, self.noise, self.choice = model, trace, noise, choice
        self.grid, self.cycle = time_grid(steps, eps, trace.ids_BL.device), 1 + corrector_steps
        self.before_tail, self.written = steps * self.cycle, steps * self.cycle + noise_removal
        self.num_steps = self.written + self_correction_steps
        self.count, self.informed, self.correcting = corrector_tokens, corrector == "informed", False
        self.number, self.wrong_B = 0, trace.open_BL.any(-1)
        trace.ids_BL = model.process.prior(trace.ids_BL, noise, trace.open_BL)

    def positions(self, number: int, trace: Trace) -> Asked | None:
        if number > self.num_steps:
            return None
        batch, length = trace.ids_BL.shape
        self.number, self.u_BL = number, self.noise.uniform(length)
        step, within = divmod(number - 1, self.cycle)
        if number > self.written:
            self.alpha = self.model.schedule(self.grid[-1]).alpha
            return (
                Asked(trace.open_BL & self.wrong_B[:, None], self.grid[-1].expand(batch))
                if self.wrong_B.any()
                else None
            )
        if number > self.before_tail:
            return Asked(trace.open_BL, self.grid[step].expand(batch))
        self.correcting = within > 0
        if not self.correcting:
            return Asked(trace.open_BL, self.grid[step].expand(batch), self.grid[step + 1].expand(batch))
        self.alpha = self.model.schedule(self.grid[step + 1]).alpha
        at_BL = trace.open_BL
        if not self.informed:
            chance_BL = self.noise.uniform(length).masked_fill(~at_BL, -torch.inf)
            at_BL = first_positions(chance_BL, at_BL.sum(-1).clamp(max=self.count))
        return Asked(at_BL, self.grid[step + 1].expand(batch))

    def tokens(self, log_p_NV: Tensor, at_RL: Tensor, rows_R: Tensor) -> tuple[Tensor, Tensor]:
        here_N, u_N = self.trace.ids_BL[rows_R][at_RL], self.u_BL[rows_R][at_RL]
        if self.number > self.written:
            drawn_N = self._put_right(log_p_NV, here_N, at_RL, rows_R)
        elif self.number > self.before_tail:
            drawn_N = log_p_NV.argmax(-1)
        elif self.correcting:
            drawn_N = self._corrected(log_p_NV, here_N, u_N, at_RL)
        else:
            drawn_N = self.choice.draw(log_p_NV, u_N)
        new_N = drawn_N != here_N
        if self.number == self.written:  # the noise that it began with and never left
            new_N |= self.trace.step_BL[rows_R][at_RL] == 0
        return drawn_N[new_N], new_N

    def _corrected(self, log_p_NV: Tensor, here_N: Tensor, u_N: Tensor, at_RL: Tensor) -> Tensor:
        """Tokens drawn again given all others, at the positions that the corrector chooses; elsewhere those here."""
        log_q_NV = self.model.process.conditional(here_N, log_p_NV, self.alpha.expand(len(here_N)))
        drawn_N = self.choice.draw(log_q_NV, u_N)
        if not self.informed:
            return drawn_N
        likely_N = log_q_NV.gather(1, here_N[:, None]).squeeze(1)
        unlikely_RL = torch.full(at_RL.shape, -torch.inf, dtype=likely_N.dtype, device=likely_N.device)
        unlikely_RL = unlikely_RL.masked_scatter(at_RL, -likely_N)
        chosen_RL = first_positions(unlikely_RL, at_RL.sum(-1).clamp(max=self.count))
        return torch.where(chosen_RL[at_RL], drawn_N, here_N)

    def _put_right(self, log_p_NV: Tensor, here_N: Tensor, at_RL: Tensor, rows_R: Tensor) -> Tensor:
        """The tokens here, but in each row the one place where the others are surest of another token."""
        others_NV = self.model.process.without_own_token(here_N, log_p_NV, self.alpha.expand(len(here_N)))
        log_best_N, best_N = others_NV.max(-1)
        sure_RL = torch.full(at_RL.shape, -torch.inf, dtype=log_best_N.dtype, device=log_best_N.device)
        sure_RL = sure_RL.masked_scatter(at_RL, log_best_N.masked_fill(best_N == here_N, -torch.inf))
        self.wrong_B[rows_R] = ~sure_RL.isneginf().all(-1)
        chosen_RL = first_positions(sure_RL, self.wrong_B[rows_R].long())
        return torch.where(chosen_RL[at_RL], best_N, here_N)


sample = sampler_of(Resample, Uniform, Hybrid)
