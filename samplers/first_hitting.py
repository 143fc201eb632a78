"""The first-hitting sampler (Zheng et al., arXiv 2409.02908): the continuous-time limit of ancestral
sampling, simulated event by event. It draws exactly from the model's distribution, without any time grid.

Each mask goes at a time of its own, at which 1 - alpha is uniform; almost surely no two go together. So the masks of a
row are filled one at a time, in the order of those times: as many network evaluations as masks, rows side by side.

Shape suffixes: B batch, L length, R rows evaluated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from process import Absorbing
from randomness import KeyedNoise
from samplers.base import Generation, Model, TokenChoice, Watcher, rows_of, writes
from samplers.page import Page


@writes(Absorbing)
@torch.no_grad()
def sample(
    model: Model,
    x_BL: Tensor,
    generator: KeyedNoise,
    *,
    choice: TokenChoice = TokenChoice(),  # noqa: B008 - frozen
    watch: Watcher | None = None,
    **cond: Tensor,
) -> Generation:
    """Fill the masked positions of `x_BL`; its other tokens are given and never change.

    Raises:
        ValueError: the network decides when a mask goes, so that its times can not be drawn first.
    """
    if not model.independent_unmasking:
        raise ValueError(
            "sampling.predictor=first_hitting draws all unmasking times before the network runs, which is right for "
            "parameterization=subs only; use sampling.predictor=analytic"
        )
    page = Page(x_BL, model.process, watch)
    masked_BL = page.masked_BL
    start = model.schedule(torch.ones((), dtype=torch.float64, device=x_BL.device)).move_chance
    level_BL = (generator.uniform(x_BL.shape[1]) * start).masked_fill(~masked_BL, -1.0)
    u_BL = generator.uniform(x_BL.shape[1])
    order_BL = level_BL.argsort(dim=-1, descending=True)
    count_B = masked_BL.sum(-1)
    num_steps = int(count_B.max())
    for step in range(num_steps):
        rows_R = (count_B > step).nonzero().squeeze(-1)
        place_R = order_BL[rows_R, step]
        at_RL = torch.zeros_like(masked_BL[rows_R]).scatter(1, place_R[:, None], True)
        t_R = model.schedule.t_from_alpha(1 - level_BL[rows_R, place_R]).clamp(0.0, 1.0)
        log_p_RV = model.denoise(page.ids_BL[rows_R], t_R, at_RL, **rows_of(cond, rows_R))
        page.write(step + 1, at_RL, choice.draw(log_p_RV, u_BL[rows_R, place_R]), log_p_RV, rows_R)
        page.evaluations_B[rows_R] += 1
        page.end_step(step + 1)
    return page.finished(num_steps)
