"""Block diffusion of four tokens, and the exact likelihood of its samplers."""

from __future__ import annotations

import itertools
import math
from functools import partial

import torch

from palimpsest.common.positions import Positions
from palimpsest.noise_schedule import LogLinear
from palimpsest.objectives.block import BlockDiffusion
from palimpsest.objectives.subs import Subs
from palimpsest.process import Absorbing

VOCAB, MASK = 4, 3


def block(
    size: int, schedule=None, noising=None, mask_id: int = MASK, ignore_bos: bool = False, **kwargs
) -> BlockDiffusion:
    """Block diffusion over SUBS."""
    within = partial(Subs, schedule or LogLinear(), noising=noising, **kwargs)
    return BlockDiffusion(Absorbing(mask_id), within, size, ignore_bos)


def causal_law(net, size: int, x: torch.Tensor) -> torch.Tensor:
    """log p(x_i | x_<i) of every token with blocks of one, each from a pass of its own, (R, L)."""
    objective, log_p = block(1), []
    for place in range(x.shape[1]):
        row = x[:, : place + 1].clone()
        row[:, -1] = MASK
        at = torch.zeros_like(row, dtype=torch.bool)
        at[:, -1] = True
        log_p.append(
            objective.denoise(net, row, torch.full((len(x),), 0.5), Positions(at)).gather(1, x[:, place, None])
        )
    return torch.cat(log_p, dim=1)


def likelihood_of_blocks(net, size: int, x: torch.Tensor) -> torch.Tensor:
    """log p(x) of the any-order sampler within each block of `size`, by enumeration of the orders, (R,)."""
    objective, total = block(size), torch.zeros(len(x), dtype=torch.float64)
    for start in range(0, x.shape[1], size):
        places = range(start, min(start + size, x.shape[1]))
        orders = list(itertools.permutations(places))
        along = []
        for order in orders:
            row, log_p = x[:, : places.stop].clone(), torch.zeros(len(x), dtype=torch.float64)
            row[:, start:] = MASK
            for place in order:
                at = torch.zeros_like(row, dtype=torch.bool)
                at[:, place] = True
                answer = objective.denoise(net, row, torch.full((len(x),), 0.5), Positions(at))
                log_p += answer.gather(1, x[:, place, None]).squeeze(1)
                row[:, place] = x[:, place]
            along.append(log_p)
        total += torch.stack(along).logsumexp(0) - math.log(len(orders))
    return total
