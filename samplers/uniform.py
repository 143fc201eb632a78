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

    Raises:
        ValueError: numbers out of range, or a corrector that does not exist.
    """

    def __init__(
        self, model: Denoiser, trace: Trace, noise: KeyedNoise, *, steps: int,
        choice: TokenChoice = TokenChoice(),  # noqa: B008 - frozen
        noise_removal: bool = True, eps: float = 1e-5,
        corrector_steps: int = 0, corrector_tokens: int = 1, corrector: str = "random",
    ) -> None:  # fmt: skip
        if corrector_steps < 0 or corrector_tokens < 1 or corrector not in CORRECTORS:
            raise ValueError(
                f"sampling.corrector_steps={corrector_steps} must be 0 or more, sampling.corrector_tokens="
                f"{corrector_tokens} at least 1, and sampling.corrector={corrector} one of: {', '.join(CORRECTORS)}"
            )
        self.model, self.trace, self.noise, self.choice = model, trace, noise, choice
        self.grid, self.cycle = time_grid(steps, eps, trace.ids_BL.device), 1 + corrector_steps
        self.before_tail, self.num_steps = steps * self.cycle, steps * self.cycle + noise_removal
        self.count, self.informed, self.correcting = corrector_tokens, corrector == "informed", False
        self.number = 0
        trace.ids_BL = model.process.prior(trace.ids_BL, noise, trace.open_BL)

    def positions(self, number: int, trace: Trace) -> Asked | None:
        if number > self.num_steps:
            return None
        batch, length = trace.ids_BL.shape
        self.number, self.u_BL = number, self.noise.uniform(length)
        step, within = divmod(number - 1, self.cycle)
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
        if self.number > self.before_tail:
            drawn_N = log_p_NV.argmax(-1)
        elif self.correcting:
            drawn_N = self._corrected(log_p_NV, here_N, u_N, at_RL)
        else:
            drawn_N = self.choice.draw(log_p_NV, u_N)
        new_N = drawn_N != here_N
        if self.number == self.num_steps:  # the noise that it began with and never left
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


sample = sampler_of(Resample, Uniform, Hybrid)
