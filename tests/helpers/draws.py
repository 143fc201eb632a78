"""Draws of a known noised text."""

from __future__ import annotations

import torch
from torch import Tensor

from palimpsest.objectives.mask_sampling import Draw


def draw_at(xt_BL: Tensor, t_B: Tensor) -> Draw:
    """Return the draw of noised tokens at a time, without a further factor."""
    return Draw(xt_BL, t_B, torch.ones_like(t_B))
