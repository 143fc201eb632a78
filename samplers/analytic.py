"""Step by step through p(x_s | x_t) of any masked-diffusion objective: for SEDD the analytic (Tweedie) sampler
(arXiv 2310.16834, theorem 4.1), for D3PM its reverse chain, for SUBS ancestral sampling the plain way. Draws the law of
the chain that these steps define.

Shape suffixes: B batch, L length, R rows evaluated, N masked positions, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from randomness import KeyedNoise
from samplers.base import Generation, Model, TokenChoice, rows_of, time_grid


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
        goes_2BL = generator.uniform(2, x_BL.shape[1])
        masked_BL = x_BL == model.mask_id
        rows_R = masked_BL.any(-1).nonzero().squeeze(-1)
        if not len(rows_R):
            break
        at_RL, t_R = masked_BL[rows_R], grid[step].expand(len(rows_R))
        last = step == steps
        s_R = t_R / 2 if last else grid[step + 1].expand(len(rows_R))  # the last draw ignores who would have stayed
        log_q_NV = model.reverse(x_BL[rows_R], t_R, s_R, at_RL, **rows_of(cond, rows_R))
        leaves_N = torch.ones_like(log_q_NV[:, 0], dtype=torch.bool)
        if not last:
            leaves_N = goes_2BL[masked_BL.nonzero()[:, 0], 0, masked_BL.nonzero()[:, 1]] < -torch.expm1(
                log_q_NV[:, model.mask_id]
            )
        log_q_NV[:, model.mask_id] = -torch.inf
        drawn_N = choice.draw(log_q_NV.log_softmax(-1), goes_2BL[:, 1][masked_BL])
        x_BL[masked_BL] = torch.where(leaves_N, drawn_N, model.mask_id)
        step_BL[masked_BL & (x_BL != model.mask_id)] = step + 1
        evaluations_B[rows_R] += 1
    return Generation(x_BL, step_BL, steps + noise_removal, evaluations_B)
