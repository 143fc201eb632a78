"""Sampling segment after segment: as samplers/block.py, for blocks of any lengths, which differ from row to row.

Each segment attends to the earlier clean ones, whose keys and values are computed once. The sampler is exact if `inner`
is exact within a segment (first hitting), and approximate on a grid of times.

Shape suffixes: B batch, L length, S segments, W tokens of the longest row of a segment.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from palimpsest.common.positions import Positions
from palimpsest.common.randomness import KeyedNoise
from palimpsest.denoisers import BlockDenoiser
from palimpsest.process import Absorbing
from palimpsest.samplers.base import sampler
from palimpsest.samplers.trace import Trace, Watcher


@sampler(Absorbing)
def sample(
    model: BlockDenoiser,
    x_BL: Tensor,
    generator: KeyedNoise,
    segment_ends: Tensor,
    *,
    inner: Callable[..., Trace],
    kv_cache: bool = True,
    watch: Watcher | None = None,
    **cond: Tensor,
) -> Trace:
    """Fill the masked positions of `x_BL`; its other tokens never change.

    Args:
        segment_ends: end (exclusive) of each segment except the last, (B, S - 1).
        inner: fills the masks of one segment.
        kv_cache: keep keys and values of the clean segments; otherwise they are read at every evaluation, with equal
            results.

    Raises:
        ValueError: prompt tokens follow a segment with masks.
    """
    place_L = torch.arange(x_BL.shape[1], device=x_BL.device)
    segment_BL = (place_L >= segment_ends[..., None]).sum(1)
    masked_BL = model.process.is_corrupted(x_BL)
    check_no_gaps(masked_BL, ~masked_BL, segment_BL, _GAPS)
    trace, rows_B = Trace(x_BL, model.process, watch), torch.arange(len(x_BL), device=x_BL.device)
    earlier: object = model.new_segment_cache(len(x_BL)) if kv_cache else []
    last = segment_ends.shape[1]
    for segment in range(last + 1):
        at = Positions(segment_BL == segment)
        tokens_BW, here = _left_aligned(trace.ids_BL, at, filler=int(model.process.mask_id == 0))
        if bool(model.process.is_corrupted(tokens_BW).any()):
            segment_model, noise = model.after(earlier, **cond), generator.part(segment)
            filled = partial(inner, segment_model, tokens_BW, noise, row=rows_B, attention_mask=here.mask_BL)
            tokens_BW = trace.fill(filled, at, here).ids_BL
        if segment == last:
            break
        if kv_cache:
            model.remember_segment(tokens_BW, here.mask_BL, earlier, **cond)
            trace.evaluations_B += 1
        else:
            earlier = [*earlier, (tokens_BW, here.mask_BL)]
    return trace


def _left_aligned(x_BL: Tensor, at: Positions, filler: int) -> tuple[Tensor, Positions]:
    """Return the tokens of one segment as left-aligned rows, (B, W), and their positions in these rows."""
    here_BW = torch.arange(max(at.counts), device=x_BL.device) < at.mask_BL.sum(-1, keepdim=True)
    here = Positions(here_BW, at.counts)
    return here.spread(at.take(x_BL), filler), here


_GAPS = (
    "data.segments=true: segments are written from the first to the last, without attending to tokens given behind "
    "them; give the beginning of a text only"
)


def check_no_gaps(masked_BL: Tensor, given_BL: Tensor, part_BL: Tensor, message: str) -> None:
    """Raise ValueError if given tokens follow a gap in an earlier part, because only their own would attend to them."""
    first_gap_B1 = torch.where(masked_BL, part_BL, masked_BL.shape[1]).min(-1, keepdim=True).values
    if bool((given_BL & (part_BL > first_gap_B1)).any()):
        raise ValueError(message)
