"""Choice of the tokens that an edit rewrites: random ones, the last ones, the least certain ones, or those that the new
latent explains worst.

Shape suffixes: B batch, L length, R rows at once, N selected positions, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from palimpsest.common.positions import Positions
from palimpsest.common.randomness import KeyedNoise
from palimpsest.denoisers import Denoiser
from palimpsest.samplers.base import row_chunks, select_rows
from palimpsest.samplers.ordered import first_positions

_PAIRS = 4  # pairs of complementary masks


@dataclass(frozen=True)
class Selection:
    """The tokens to rewrite, their share of the eligible ones (float64), and the network evaluations of the choice."""

    masked_BL: Tensor
    share_B: Tensor
    evaluations_B: Tensor


@torch.no_grad()
def select(
    model: Denoiser,
    x_BL: Tensor,
    eligible_BL: Tensor,
    generator: KeyedNoise,
    *,
    positions: str,
    rate: float,
    source: Tensor,
    target: Tensor,
    **cond: Tensor,
) -> Selection:
    """Select the floor(rate * n) of the n eligible tokens of each text that rank first by `positions`.

    Args:
        positions: random; suffix: the last tokens; entropy: the largest entropy without any latent; contrast: the
            largest log-ratio of the token's probabilities given `source` and given `target`. For the last two, each
            token is predicted with about half of the others masked, because a network of masks predicts masked tokens
            only.
        source: latent of the text, (B, K, D).
        target: latent that the edited text should have, (B, K, D).
    """
    n_B = eligible_BL.sum(-1)
    count_B = (rate * n_B + 1e-9).long()
    score_BL, passes = generator.uniform(x_BL.shape[1]), 0
    if positions == "suffix":
        score_BL = torch.arange(x_BL.shape[1], device=x_BL.device).double().expand(x_BL.shape)
    elif positions == "entropy":
        score_BL = _masked_scores(_entropy, model, x_BL, eligible_BL, generator, cond)
        passes = 2 * _PAIRS
    elif positions == "contrast":
        cond = {**cond, "source": source, "target": target}
        score_BL = _masked_scores(_contrast, model, x_BL, eligible_BL, generator, cond)
        passes = 4 * _PAIRS
    masked_BL = first_positions(score_BL.masked_fill(~eligible_BL, -torch.inf), count_B)
    return Selection(masked_BL, count_B.double() / n_B.clamp(min=1), torch.full_like(n_B, passes))


def _masked_scores(
    score: Callable[..., Tensor],
    model: Denoiser,
    x_BL: Tensor,
    eligible_BL: Tensor,
    generator: KeyedNoise,
    cond: dict[str, Tensor],
) -> Tensor:
    """Return the sum of `score` over `_PAIRS` pairs of complementary masks, float64 (B, L)."""
    score_BL = torch.zeros(x_BL.shape, dtype=torch.float64, device=x_BL.device)
    half = model.schedule.t_from_alpha(torch.tensor(0.5, dtype=torch.float64, device=x_BL.device))
    for _ in range(_PAIRS):
        first_BL = generator.uniform(x_BL.shape[1]) < 0.5
        for pair in Positions.of_each(first_BL & eligible_BL, ~first_BL & eligible_BL):
            for at, rows_R, inside in row_chunks(pair, model.vocab_size):
                t_R, row_cond = half.expand(len(rows_R)), select_rows(cond, rows_R)
                score_BL += at.spread(score(model, x_BL[rows_R], t_R, inside, **row_cond))
    return score_BL


def _entropy(model: Denoiser, x_RL: Tensor, t_R: Tensor, at: Positions, **cond: Tensor) -> Tensor:
    """Return the entropy of the predictions at the N positions `at`, (N,)."""
    log_p_NV = model.denoise(model.process.mask(x_RL, at.mask_BL), t_R, at, **cond).double()
    return -(log_p_NV.exp() * log_p_NV.masked_fill(log_p_NV.isneginf(), 0.0)).sum(-1)


def _contrast(
    model: Denoiser, x_RL: Tensor, t_R: Tensor, at: Positions, source: Tensor, target: Tensor, **cond: Tensor
) -> Tensor:
    """Return the log-ratio of the tokens' probabilities given `source` and given `target`, (N,)."""
    masked_RL, token_N1 = model.process.mask(x_RL, at.mask_BL), at.take(x_RL)[:, None]
    old_NV, new_NV = (model.denoise(masked_RL, t_R, at, latent=z, **cond).double() for z in (source, target))
    return (old_NV.gather(1, token_N1) - new_NV.gather(1, token_N1))[:, 0]
