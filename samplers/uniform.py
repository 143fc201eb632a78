"""Ancestral sampling of processes whose noise is other tokens, on a grid of times (UDLM, 2412.10193, section 3.2).

An approximation: the positions of one step are drawn independently of each other. It tends to the model's distribution
as the steps become many more than the tokens.

Shape suffixes: B batch, L length, R rows evaluated, N positions drawn, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from process import Hybrid, Uniform
from randomness import KeyedNoise
from samplers.base import Generation, Model, TokenChoice, Watcher, row_chunks, rows_of, time_grid, writes
from samplers.page import Page


@writes(Uniform, Hybrid)
@torch.no_grad()
def sample(
    model: Model,
    x_BL: Tensor,
    generator: KeyedNoise,
    *,
    steps: int,
    choice: TokenChoice = TokenChoice(),  # noqa: B008 - frozen
    noise_removal: bool = True,
    eps: float = 1e-5,
    watch: Watcher | None = None,
    **cond: Tensor,
) -> Generation:
    """Write the blank positions of `x_BL`; its other tokens are given and never change.

    Every blank starts as pure noise, and any of them may change at any step.

    Args:
        noise_removal: after the last step write the most likely token everywhere ("greedy tail", DUO, 2506.10892).
    """
    grid, page = time_grid(steps, eps, x_BL.device), Page(x_BL, model.process, watch)
    open_BL = page.open_BL
    page.ids_BL = model.process.prior(page.ids_BL, generator, open_BL)
    busy_R, count_R = open_BL.any(-1).nonzero().squeeze(-1), open_BL.sum(-1)
    for step in range(steps + 1 if noise_removal else steps):
        u_BL, last = generator.uniform(x_BL.shape[1]), step == steps
        for rows_R in row_chunks(busy_R, count_R[busy_R], model.vocab_size):
            at_RL = open_BL[rows_R]
            given = rows_of(cond, rows_R)
            ids_RL = page.ids_BL[rows_R]
            t_R = grid[step].expand(len(rows_R))
            if last:
                log_p_NV = model.denoise(ids_RL, t_R, at_RL, **given)
                drawn_N = log_p_NV.argmax(-1)
            else:
                log_p_NV = model.reverse(ids_RL, t_R, grid[step + 1].expand(len(rows_R)), at_RL, **given)
                drawn_N = choice.draw(log_p_NV, u_BL[rows_R][at_RL])
            new_N = drawn_N != ids_RL[at_RL]
            new_RL = torch.zeros_like(at_RL).masked_scatter(at_RL, new_N)
            page.write(step + 1, new_RL, drawn_N[new_N], log_p_NV[new_N], rows_R)
        page.evaluations_B[busy_R] += 1
        page.end_step(step + 1)
    return page.finished(steps + noise_removal)
