"""Step by step through p(x_s | x_t) of any masked-diffusion objective: for SEDD the analytic (Tweedie) sampler
(arXiv 2310.16834, theorem 4.1), for D3PM its reverse chain, for SUBS ancestral sampling the plain way. Draws the law of
the chain that these steps define.

Shape suffixes: B batch, L length, R rows evaluated, N masked positions, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from process import Absorbing
from randomness import KeyedNoise
from samplers.base import Generation, Model, TokenChoice, Watcher, row_chunks, rows_of, time_grid, writes
from samplers.page import Page


@writes(Absorbing)
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
    """Fill the masked positions of `x_BL`; its other tokens are given and never change.

    Every masked position is projected at every step, since the network decides whether it goes; rows without masks
    rest. noise_removal: after the last step draw a token wherever a mask is left, as SEDD's denoiser does.
    """
    grid, page = time_grid(steps, eps, x_BL.device), Page(x_BL, model.process, watch)
    for step in range(steps + 1 if noise_removal else steps):
        goes_BL, u_BL = generator.uniform(x_BL.shape[1]), generator.uniform(x_BL.shape[1])
        masked_BL = page.masked_BL
        busy_R = masked_BL.any(-1).nonzero().squeeze(-1)
        last = step == steps
        t, s = grid[step], grid[step] / 2 if last else grid[step + 1]  # the last draw ignores who would have stayed
        for rows_R in row_chunks(busy_R, masked_BL[busy_R].sum(-1), model.vocab_size):
            at_RL, given = masked_BL[rows_R], rows_of(cond, rows_R)
            log_q_NV = model.reverse(page.ids_BL[rows_R], t.expand(len(rows_R)), s.expand(len(rows_R)), at_RL, **given)
            leaves_N = torch.full_like(log_q_NV[:, 0], last, dtype=torch.bool)
            leaves_N |= goes_BL[rows_R][at_RL] < -torch.expm1(log_q_NV[:, model.process.mask_id])
            log_q_NV[:, model.process.mask_id] = -torch.inf
            log_p_NV = log_q_NV.log_softmax(-1)
            drawn_N = choice.draw(log_p_NV, u_BL[rows_R][at_RL])
            leaves_RL = torch.zeros_like(at_RL).masked_scatter(at_RL, leaves_N)
            page.write(step + 1, leaves_RL, drawn_N[leaves_N], log_p_NV[leaves_N], rows_R)
        page.evaluations_B[busy_R] += 1
        page.end_step(step + 1)
    return page.finished(steps + noise_removal)
