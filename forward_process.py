"""The absorbing ("mask") forward process as pure functions on tokens.

Shape suffixes: B batch, L length, N selected positions, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mask_tokens(x0_BL: Tensor, move_chance_B: Tensor, mask_id: int, maskable_BL: Tensor, u_BL: Tensor) -> Tensor:
    """x_t ~ q(x_t | x_0): each maskable token becomes `mask_id` with probability 1 - alpha(t), independently
    (MDLM, arXiv 2406.07524, eq. 5). `u_BL` are uniform numbers in [0, 1)."""
    return torch.where((u_BL < move_chance_B[:, None]) & maskable_BL, mask_id, x0_BL)


def unmask_chance(alpha_t: Tensor, alpha_s: Tensor) -> Tensor:
    """P(x_s is not masked | x_t is masked) = (alpha_s - alpha_t) / (1 - alpha_t) for s < t (MDLM, eq. 7)."""
    return (alpha_s - alpha_t) / (1 - alpha_t)


def log_posterior(log_p_x0_NV: Tensor, alpha_t_N: Tensor, alpha_s_N: Tensor, mask_id: int) -> Tensor:
    """log p(x_s | x_t = mask), (N, V) in the precision of alpha: the prediction times the chance of unmasking, the rest
    on `mask_id` (MDLM, eq. 7)."""
    chance_N = unmask_chance(alpha_t_N, alpha_s_N)
    out_NV = log_p_x0_NV + chance_N.log()[:, None]
    out_NV[:, mask_id] = torch.log1p(-chance_N)
    return out_NV


def unmask_step(u_BL: Tensor, alpha_S: Tensor) -> Tensor:
    """When the ancestral sampler unmasks each position, drawn for all steps at once: (B, L) in 0..S-1.

    alpha_S are alpha(t_0) < alpha(t_1) < ... of a grid of S times, from noise to data. A masked position stays masked
    from t_i to t_(i+1) with probability (1 - alpha_(i+1)) / (1 - alpha_i), whatever the tokens are; the product
    telescopes to P(masked at t_i) = (1 - alpha_i) / (1 - alpha_0), which inverts in one look-up. Step i goes from t_i
    to t_(i+1); S - 1 means never within the grid. `u_BL` are uniform numbers in [0, 1).
    """
    survived_S = (1 - alpha_S.double()) / (1 - alpha_S[0].double())
    unmasked_by_S = 1 - survived_S[1:]
    return torch.searchsorted(unmasked_by_S, u_BL, right=True)


def draw_categorical(log_p_NV: Tensor, u_N: Tensor) -> Tensor:
    """One token id per row by inversion of the cumulative distribution, in float64; (N,).

    float32 Gumbel noise cannot reach probabilities below 2^-24 and so sharpens the distribution
    (Zheng et al., arXiv 2409.02908, section 4); one float64 number per row has no such floor.
    """
    cumulative_NV = log_p_NV.double().exp().cumsum(-1)
    total_N = cumulative_NV[:, -1]
    # Rounding may lift u * total to the total itself, beyond every token that has mass.
    threshold_N = torch.minimum(u_N.double() * total_N, torch.nextafter(total_N, torch.zeros_like(total_N)))
    return torch.searchsorted(cumulative_NV, threshold_N[:, None], right=True).squeeze(-1)
