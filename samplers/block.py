"""Block after block (BD3-LM, Arriola et al., arXiv 2503.09573, algorithm 2): each is sampled by masked diffusion behind
the clean blocks before it, whose keys and values are computed once. With or without the cache it draws from the model's
distribution: exactly if `inner` does within a block (first hitting, or blocks of one token), else approximately, as
ancestral sampling on a grid of times does.
Texts that come with `segment_ends` are those of samplers/segments.py, which know no window and no ending.

Shape suffixes: B batch, L length, R rows still being written, k tokens of a block, S tokens so far.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from palimpsest.common.randomness import KeyedNoise
from palimpsest.common.values import AtLeastOne, Count, NotNegative
from palimpsest.denoisers import BlockDenoiser
from palimpsest.process import Absorbing
from palimpsest.samplers import ancestral, segments
from palimpsest.samplers.base import TokenChoice, sampler
from palimpsest.samplers.first_hitting import sample as mask_by_mask
from palimpsest.samplers.trace import Trace, Watcher


@dataclass(frozen=True)
class Ending:
    """Where a text of variable length ends: behind its first end token that was written, or, as soon as it is longer
    than `last` tokens that were written, where the entropy of the last `last` falls below `min_entropy` nats (None:
    never); those are cut off then, since a text that repeats itself has ended before.

    The rules of the reference, row by row, and of what was written alone: a given beginning neither ends a text nor is
    cut off.
    """

    min_entropy: float | None = 4.0
    last: int = 256

    def length(self, ids_S: Tensor, written_S: Tensor, stop_id: int | None) -> int | None:
        """Tokens of a text that ends with what is there, None for one that goes on. `written_S`: not given."""
        ended = ((ids_S == stop_id) & written_S).nonzero() if stop_id is not None else ids_S[:0]
        if len(ended):
            return int(ended[0]) + 1
        if self.min_entropy is None or len(ids_S) <= self.last or int(written_S.sum()) < self.last:
            return None
        return len(ids_S) - self.last if unigram_entropy(ids_S[-self.last :]) < self.min_entropy else None


def ending(var_length: bool, min_entropy: NotNegative | None) -> Ending | None:
    """The configuration's way to say it: None unless texts are of variable length."""
    return Ending(min_entropy) if var_length else None


def within(first_hitting: bool, steps: Count, choice: TokenChoice) -> Callable[..., Trace]:
    """Return what fills a block: mask by mask, which is exact, or on a grid of `steps` times in each block, which is an
    approximation (samplers/ancestral.py)."""
    if first_hitting:
        return partial(mask_by_mask, choice=choice)
    return partial(ancestral.sample, steps=steps, skip_idle=True, choice=choice)


def unigram_entropy(ids_S: Tensor) -> float:
    """Entropy of the tokens' frequencies, in nats."""
    p = ids_S.unique(return_counts=True)[1].double() / len(ids_S)
    return float(-(p * p.log()).sum())


@sampler(Absorbing)
def sample(
    model: BlockDenoiser,
    x_BL: Tensor,
    generator: KeyedNoise,
    *,
    inner: Callable[..., Trace],
    kv_cache: bool = True,
    context: AtLeastOne | None = None,
    ending: Ending | None = None,
    stop_id: int | None = None,
    watch: Watcher | None = None,
    **cond: Tensor,
) -> Trace:
    """Fill the masked positions of `x_BL`; its other tokens are given and never change.

    Args:
        inner: fills the masks of one block, in rows that are still being written.
        kv_cache: keep keys and values of the clean blocks; else the text is read for every evaluation, to equal result.
        context: tokens that a token sees, its block and those before; None for all. Up to so many the law is the
            model's own, then that of the same network with attention limited to this window in every layer. Rotary
            attention knows distances only, so none is new to a network that was trained at `context` tokens.
        ending: of texts of variable length, which cost nothing once they have ended. None: all are full.
        stop_id: the end token, where there is one.

    Raises:
        ValueError: the window is no multiple of them, or text stands behind a gap.
    """
    if "segment_ends" in cond:
        return segments.sample(model, x_BL, generator, inner=inner, kv_cache=kv_cache, watch=watch, **cond)
    size = _block_size(model, context)
    length = x_BL.shape[1]
    masked_BL = model.process.is_corrupted(x_BL)
    here_BL = cond.pop("attention_mask", torch.ones_like(masked_BL)).bool()
    _refuse_gaps(masked_BL, here_BL, size)
    trace, end_B = Trace(x_BL, model.process, watch), here_BL.sum(-1)
    x_BL, rows_R = trace.ids_BL, torch.arange(len(x_BL), device=x_BL.device)
    window = None if context is None else context - size  # of clean tokens
    cache = model.new_block_cache(len(x_BL), length, window) if kv_cache else None
    first = int((~masked_BL.any(0)).long().cumprod(0).sum()) // size * size  # before it everything is given
    if cache is not None and first:
        model.remember(x_BL[:, :first], cache, **cond)
        trace.evaluations_B += 1
    for start in range(first, length, size):
        block = slice(start, min(start + size, length))
        earlier = x_BL[rows_R, :start] if cache is None else cache
        law = model.after(earlier, window, **{name: value[rows_R] for name, value in cond.items()})
        noise, row = generator.part(start // size).rows(rows_R), torch.arange(len(rows_R), device=x_BL.device)
        at_BL, whole_Rk = _block_of(masked_BL, rows_R, block)
        watched, here_Rk = trace.inset(at_BL, whole_Rk, rows_R), here_BL[rows_R, block]
        out = inner(law, x_BL[rows_R, block], noise, watch=watched, row=row, attention_mask=here_Rk)
        trace.paste(out, at_BL, whole_Rk, rows_R)
        if ending is not None:
            end_B[rows_R] = _ends(ending, x_BL[rows_R, : block.stop], masked_BL[rows_R], stop_id, end_B[rows_R])
        going_R = end_B[rows_R] > block.stop
        if not bool(going_R.any()):
            break
        rows_R = rows_R[going_R]
        if cache is not None:
            cache.keep(going_R)
            model.remember(x_BL[rows_R, block], cache, **{name: value[rows_R] for name, value in cond.items()})
            trace.evaluations_B[rows_R] += 1
    trace.length_B = None if ending is None else end_B
    return trace


def _block_of(like_BL: Tensor, rows_R: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """Where some rows have a block, (B, L), and all of what they have there, (R, k)."""
    at_BL = torch.zeros_like(like_BL).index_fill(0, rows_R, True)
    at_BL[:, : block.start], at_BL[:, block.stop :] = False, False
    return at_BL, at_BL[rows_R, block]


def _ends(ending: Ending, x_RS: Tensor, masked_RL: Tensor, stop_id: int | None, end_R: Tensor) -> Tensor:
    """Where the rows end, by what is there of them; `end_R` where that says nothing."""
    found = [
        ending.length(ids_S, masked_L[: len(ids_S)], stop_id) for ids_S, masked_L in zip(x_RS, masked_RL, strict=True)
    ]
    return torch.stack([end if here is None else end.clamp(max=here) for here, end in zip(found, end_R, strict=True)])


def _block_size(model: BlockDenoiser, context: int | None) -> int:
    size = model.block_size
    if context is not None and (context < size or context % size):
        raise ValueError(
            f"sampling.context={context} must be a multiple of block_size={size}: the window moves by whole blocks"
        )
    return size


def _refuse_gaps(masked_BL: Tensor, here_BL: Tensor, size: int) -> None:
    """Given tokens behind a gap are seen by their own block only. The last of a text may be given: it tells where the
    text ends, and training gives it too."""
    length = masked_BL.shape[1]
    block_L = torch.arange(length, device=masked_BL.device) // size
    first_gap_B1 = torch.where(masked_BL, block_L, length).min(-1, keepdim=True).values
    last_BL = torch.arange(length, device=masked_BL.device) == here_BL.sum(-1, keepdim=True) - 1
    if bool((here_BL & ~masked_BL & ~last_BL & (block_L > first_gap_B1)).any()):
        raise ValueError(
            f"blocks of {size} tokens are written from left to right, not knowing what is given behind them: use "
            "sampling.prefix in place of sampling.template, or a model with block_size=model.length"
        )
