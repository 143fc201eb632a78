"""Which tokens of a text an edit may rewrite: at random, at the end, where the text is least certain, or where the new
latent explains it worst.

Shape suffixes: B batch, L length, R rows at once, N selected positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from palimpsest.common.randomness import KeyedNoise
from palimpsest.denoisers import Denoiser
from palimpsest.samplers.base import row_chunks, rows_of
from palimpsest.samplers.ordered import next_positions

_PAIRS = 4


@dataclass(frozen=True)
class Selection:
    """masked_BL: what is to be rewritten. share_B: of the tokens that may be, float64. evaluations_B: network
    evaluations spent on the choice."""

    masked_BL: Tensor
    share_B: Tensor
    evaluations_B: Tensor


@torch.no_grad()
def select(
    model: Denoiser, x_BL: Tensor, eligible_BL: Tensor, generator: KeyedNoise, *, positions: str, rate: float,
    source: Tensor, target: Tensor, **cond: Tensor,
) -> Selection:  # fmt: skip
    """The floor(rate * n) of the n eligible tokens of each text that come first by `positions`.

    random. suffix: the last ones. entropy: where the text alone, without any latent, leaves most open. contrast: where
    the token is likelier given the latent of the text, `source` (B, K, D), than given the one that it is to get,
    `target`. Both look at every token while it and about half of the others are masked, in complementary halves:
    a network of masks has learned to predict masked tokens, and says nothing of those that it sees.
    """
    n_B = eligible_BL.sum(-1)
    count_B = (rate * n_B + 1e-9).long()
    score_BL, passes = generator.uniform(x_BL.shape[1]), 0
    if positions == "suffix":
        score_BL = torch.arange(x_BL.shape[1], device=x_BL.device).double().expand(x_BL.shape)
    elif positions != "random":
        score_BL, passes = _looked_at(model, x_BL, eligible_BL, generator, positions, source, target, cond)
    masked_BL = next_positions(score_BL.masked_fill(~eligible_BL, -torch.inf), count_B, x_BL.shape[1])
    return Selection(masked_BL, count_B.double() / n_B.clamp(min=1), torch.full_like(n_B, passes))


def _looked_at(
    model: Denoiser, x_BL: Tensor, eligible_BL: Tensor, generator: KeyedNoise, positions: str, source: Tensor,
    target: Tensor, cond: dict[str, Tensor],
) -> tuple[Tensor, int]:  # fmt: skip
    """What `positions` ranks by, summed over the passes, float64 (B, L), and how many there were for each text."""
    score_BL = torch.zeros(x_BL.shape, dtype=torch.float64, device=x_BL.device)
    half = model.schedule.t_from_alpha(torch.tensor(0.5, dtype=torch.float64, device=x_BL.device))
    every_R = torch.arange(len(x_BL), device=x_BL.device)
    for _ in range(_PAIRS):
        first_BL = generator.uniform(x_BL.shape[1]) < 0.5
        for at_BL in (first_BL & eligible_BL, ~first_BL & eligible_BL):
            for rows_R in row_chunks(every_R, at_BL.sum(-1), model.vocab_size):
                at_RL, t_R = at_BL[rows_R], half.expand(len(rows_R))
                seen_RL, given = model.process.mask(x_BL[rows_R], at_RL), rows_of(cond, rows_R)
                if positions == "entropy":
                    log_p_NV = model.denoise(seen_RL, t_R, at_RL, **given).double()
                    found_N = -(log_p_NV.exp() * log_p_NV.masked_fill(log_p_NV.isneginf(), 0.0)).sum(-1)
                else:
                    token_N1 = x_BL[rows_R][at_RL][:, None]
                    old_N, new_N = (model.denoise(seen_RL, t_R, at_RL, latent=latent[rows_R], **given).double()
                                    .gather(1, token_N1)[:, 0] for latent in (source, target))  # fmt: skip
                    found_N = old_N - new_N
                score_BL[rows_R] += torch.zeros_like(score_BL[rows_R]).masked_scatter(at_RL, found_N)
    return score_BL, 2 * _PAIRS * (1 if positions == "entropy" else 2)
