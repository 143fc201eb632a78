"""Ancestral sampling of masked diffusion on a grid of times (MDLM, arXiv 2406.07524, section 3.2 and algorithm 1).

An approximation: the tokens that one step writes are drawn independently of each other. It tends to the model's
distribution as the steps become many more than the tokens (docs/sampling.md). samplers/first_hitting.py draws exactly
from it, with one network evaluation for each token.

Positions first, tokens second: which positions a step unmasks does not depend on their tokens, so it is drawn before
the network runs. The network then projects those positions only, and rows with none need no evaluation at all.

Shape suffixes: B batch, L length, R rows evaluated, N positions drawn, S times of a grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from process import Absorbing, unmask_step
from randomness import KeyedNoise
from samplers import analytic
from samplers.base import Generation, Model, TokenChoice, Watcher, rows_of, time_grid, writes
from samplers.page import Page


@writes(Absorbing)
@torch.no_grad()
def sample(
    model: Model,
    x_BL: Tensor,
    generator: KeyedNoise,
    *,
    steps: int,
    skip_idle: bool,
    choice: TokenChoice = TokenChoice(),  # noqa: B008 - frozen
    noise_removal: bool = True,
    eps: float = 1e-5,
    watch: Watcher | None = None,
    begin_B: Tensor | None = None,
    **cond: Tensor,
) -> Generation:
    """Fill the masked positions of `x_BL`; its other tokens are given and never change.

    Where the network itself decides when a mask goes (D3PM, SEDD) the steps are those of samplers/analytic.py.

    Args:
        skip_idle: evaluate only the rows that have a position to draw. Exact, also with time conditioning, since the
            network's answer for the other rows would not be used; False keeps every step's shapes alike.
        cond: passed on to the model, row by row (B, ...).
        begin_B: the time of each row, float64, where that is not 1: of a text that is masked in part only (editing).
        noise_removal: after the last step write the most likely token wherever a mask is left. Otherwise masks stay.
    """
    if not model.independent_unmasking and begin_B is not None:
        raise ValueError("texts that are masked in part are filled by a sampler whose steps are the schedule's alone")
    if not model.independent_unmasking:
        settings = {"steps": steps, "choice": choice, "noise_removal": noise_removal, "eps": eps}
        return analytic.sample(model, x_BL, generator, **settings, watch=watch, **cond)
    grid = time_grid(steps, eps, x_BL.device)  # (S,) for all rows, or (B, S)
    if begin_B is not None:  # from there in as many steps
        grid = eps + (grid - eps) * (begin_B[:, None].clamp(min=eps) - eps) / (1 - eps)
    page = Page(x_BL, model.process, watch)
    write_at_BL = unmask_step(generator.uniform(x_BL.shape[1]), model.schedule(grid).alpha)
    write_at_BL = write_at_BL.masked_fill(~page.masked_BL, -1)
    u_BL = generator.uniform(x_BL.shape[1])
    busy = set(write_at_BL.unique().tolist())
    for step in range(steps + 1 if noise_removal else steps):
        if skip_idle and step not in busy:
            continue
        now_BL = write_at_BL == step
        rows_R = now_BL.any(-1).nonzero().squeeze(-1) if skip_idle else torch.arange(len(x_BL), device=x_BL.device)
        t_R = grid[step].expand(len(rows_R)) if begin_B is None else grid[rows_R, step]
        log_p_NV = model.denoise(page.ids_BL[rows_R], t_R, now_BL[rows_R], **rows_of(cond, rows_R))
        last = step == steps
        drawn_N = log_p_NV.argmax(-1) if last else choice.draw(log_p_NV, u_BL[now_BL])
        page.write(step + 1, now_BL, drawn_N, log_p_NV)
        page.evaluations_B[rows_R] += 1
        page.end_step(step + 1)
    return page.finished(steps + noise_removal)
