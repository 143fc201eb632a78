"""Step by step through p(x_s | x_t) of any masked-diffusion objective: for SEDD the analytic (Tweedie) sampler
(arXiv 2310.16834, theorem 4.1), for D3PM its reverse chain, for SUBS ancestral sampling the plain way. Draws the law of
the chain that these steps define.

Shape suffixes: B batch, L length, R rows evaluated, N masked positions, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from randomness import KeyedNoise
from samplers.base import Generation, Model, TokenChoice, row_chunks, rows_of, time_grid


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
    **cond: Tensor,
) -> Generation:
    """Fill the masked positions of `x_BL`; its other tokens are given and never change.

    Every masked position is projected at every step, since the network decides whether it goes; rows without masks
    rest. noise_removal: after the last step draw a token wherever a mask is left, as SEDD's denoiser does.
    """
    grid = time_grid(steps, eps, x_BL.device)
    x_BL, step_BL = x_BL.clone(), torch.zeros_like(x_BL)
    evaluations_B = torch.zeros(len(x_BL), dtype=torch.long, device=x_BL.device)
    for step in range(steps + 1 if noise_removal else steps):
        goes_BL, u_BL = generator.uniform(x_BL.shape[1]), generator.uniform(x_BL.shape[1])
        masked_BL = x_BL == model.mask_id
        busy_R = masked_BL.any(-1).nonzero().squeeze(-1)
        last = step == steps
        t, s = grid[step], grid[step] / 2 if last else grid[step + 1]  # the last draw ignores who would have stayed
        for rows_R in row_chunks(busy_R, masked_BL[busy_R].sum(-1), model.vocab_size):
            at_RL, given = masked_BL[rows_R], rows_of(cond, rows_R)
            log_q_NV = model.reverse(x_BL[rows_R], t.expand(len(rows_R)), s.expand(len(rows_R)), at_RL, **given)
            leaves_N = torch.full_like(log_q_NV[:, 0], last, dtype=torch.bool)
            leaves_N |= goes_BL[rows_R][at_RL] < -torch.expm1(log_q_NV[:, model.mask_id])
            log_q_NV[:, model.mask_id] = -torch.inf
            drawn_N = choice.draw(log_q_NV.log_softmax(-1), u_BL[rows_R][at_RL])
            x_BL[rows_R] = x_BL[rows_R].masked_scatter(at_RL, torch.where(leaves_N, drawn_N, model.mask_id))
        step_BL[masked_BL & (x_BL != model.mask_id)] = step + 1
        evaluations_B[busy_R] += 1
    return Generation(x_BL, step_BL, steps + noise_removal, evaluations_B)
