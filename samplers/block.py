"""Sampling block after block (BD3-LM, Arriola et al., arXiv 2503.09573, algorithm 2).

Each block is sampled by masked diffusion, conditioned on the clean blocks before it, whose keys and values are computed
once. The sampler is exact if `inner` is exact within a block (first hitting, or blocks of one token). Otherwise it is
an approximation, like ancestral sampling on a grid of times. Texts with `segment_ends` are sampled by
samplers/segments.py, without window and ending.

Shape suffixes: B batch, L length, R rows still being written, k tokens of a block, S tokens so far.
"""

from collections.abc import Callable
from functools import partial
from typing import Annotated

import torch
from torch import Tensor

from palimpsest.common.positions import Positions
from palimpsest.common.randomness import KeyedNoise
from palimpsest.common.values import AtLeastOne, Count, Needs, NotNegative
from palimpsest.denoisers import BlockDenoiser
from palimpsest.process import Absorbing
from palimpsest.samplers import ancestral, segments
from palimpsest.samplers.base import TokenChoice, sampler, select_rows
from palimpsest.samplers.first_hitting import sample as first_hitting_sample
from palimpsest.samplers.trace import Trace, Watcher

_GAPS = (
    "blocks of {} tokens are written from left to right, without attending to tokens given behind them: use "
    "sampling.prefix instead of sampling.template, or a model with block_size=model.length"
)
_LAST = 256  # generated tokens by which a text that repeats itself is recognised


def within(first_hitting: bool, steps: Count, choice: TokenChoice) -> Callable[..., Trace]:
    """Return the sampler of a block: exact by first hitting, or approximate on a grid of `steps` times per block."""
    if first_hitting:
        return partial(first_hitting_sample, choice=choice)
    return partial(ancestral.sample, steps=steps, skip_idle=True, choice=choice)


def text_length(ids_S: Tensor, written_S: Tensor, stop_id: int | None, min_entropy: float | None) -> int | None:
    """Return the length of a text that ends with these tokens, as in the reference, or None.

    A text ends after its first generated end token. A text that repeats itself ends too: if it is longer than 256
    generated tokens, and the unigram entropy of the last 256 is below `min_entropy` nats, these are cut off. Prompt
    tokens, where `written_S` is False, neither end a text nor are cut off.
    """
    ended = ((ids_S == stop_id) & written_S).nonzero() if stop_id is not None else ids_S[:0]
    if len(ended):
        return int(ended[0]) + 1
    if min_entropy is None or len(ids_S) <= _LAST or int(written_S.sum()) < _LAST:
        return None
    return len(ids_S) - _LAST if unigram_entropy(ids_S[-_LAST:]) < min_entropy else None


def unigram_entropy(ids_S: Tensor) -> float:
    """Return the entropy of the token frequencies, in nats."""
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
    var_length: bool = False,
    min_entropy: Annotated[NotNegative | None, Needs("var_length")] = 4.0,
    stop_id: int | None = None,
    watch: Watcher | None = None,
    **cond: Tensor,
) -> Trace:
    """Fill the masked positions of `x_BL`; its other tokens never change.

    Args:
        inner: fills the masks of one block, in rows that are still being written.
        kv_cache: keep keys and values of the clean blocks; otherwise they are read at every evaluation, with equal
            results.
        context: number of tokens that a token attends to, its block and those before; None for all. Up to this length
            the distribution is the model's own; beyond it, that of the network with attention limited to this window in
            every layer. Rotary attention depends on distances only, so a network trained at `context` tokens meets no
            new ones.
        var_length: texts end by themselves (`text_length`), and need no evaluations after their end.
        min_entropy: below so many nats a text ends because it repeats itself; None: never.
        stop_id: the end token, if any.

    Raises:
        ValueError: the window is not a multiple of the block size, or a gap is followed by prompt tokens.
    """
    if "segment_ends" in cond:
        return segments.sample(model, x_BL, generator, inner=inner, kv_cache=kv_cache, watch=watch, **cond)
    size = model.block_size
    check_context(context, size)
    length = x_BL.shape[1]
    masked_BL = model.process.is_corrupted(x_BL)
    here_BL = cond.pop("attention_mask", torch.ones_like(masked_BL)).bool()
    place_L = torch.arange(length, device=x_BL.device)
    # The last token of a text is allowed: it marks the end of the text, as in training.
    given_BL = here_BL & ~masked_BL & (place_L != here_BL.sum(-1, keepdim=True) - 1)
    segments.check_no_gaps(masked_BL, given_BL, place_L // size, _GAPS.format(size))
    trace, ends = Trace(x_BL, model.process, watch), here_BL.sum(-1).tolist()
    rows = list(range(len(x_BL)))  # rows that are still being written
    x_BL, rows_R = trace.ids_BL, torch.arange(len(x_BL), device=x_BL.device)
    window = None if context is None else context - size  # number of clean tokens
    cache = model.new_block_cache(len(x_BL), length, window) if kv_cache else None
    first = int((~masked_BL.any(0)).long().cumprod(0).sum()) // size * size  # only prompt tokens before it
    if cache is not None and first:
        model.remember(x_BL[:, :first], cache, **cond)
        trace.evaluations_B += 1
    for start in range(first, length, size):
        block = slice(start, min(start + size, length))
        earlier = x_BL[rows_R, :start] if cache is None else cache
        row_cond = select_rows(cond, rows_R)
        block_model = model.after(earlier, window, **row_cond)
        noise, row = generator.part(start // size).rows(rows_R), torch.arange(len(rows_R), device=x_BL.device)
        at, here = _block_of(masked_BL, rows, rows_R, block)
        padded = min(ends[row] for row in rows) < block.stop
        inside = {"attention_mask": here_BL[rows_R, block]} if padded else {}
        trace.fill(partial(inner, block_model, x_BL[rows_R, block], noise, row=row, **inside), at, here, rows_R)
        for row in rows if var_length else ():
            texts = (x_BL[row, : block.stop], masked_BL[row, : block.stop])
            ends[row] = min(ends[row], text_length(*texts, stop_id, min_entropy) or ends[row])
        kept = [number for number, row in enumerate(rows) if ends[row] > block.stop]
        if not kept:
            break
        if len(kept) < len(rows):
            rows, rows_R = [rows[number] for number in kept], rows_R[kept]
        if cache is not None:
            cache.keep(kept)
            model.remember(x_BL[rows_R, block], cache, **select_rows(cond, rows_R))
            trace.evaluations_B[rows_R] += 1
    trace.length_B = torch.tensor(ends, device=x_BL.device) if var_length else None
    return trace


def _block_of(like_BL: Tensor, rows: list[int], rows_R: Tensor, block: slice) -> tuple[Positions, Positions]:
    """Return the positions of a block of some rows, and those of its tokens in rows of their own, (R, k)."""
    at_BL = torch.zeros_like(like_BL).index_fill(0, rows_R, True)
    at_BL[:, : block.start], at_BL[:, block.stop :] = False, False
    size = block.stop - block.start
    at = Positions(at_BL, [size if row in rows else 0 for row in range(len(at_BL))])
    return at, Positions.everywhere(at_BL[rows_R, block])


def check_context(context: int | None, size: int) -> None:
    """Refuse a window that is no multiple of the block size. Raises ValueError."""
    if context is not None and (context < size or context % size):
        raise ValueError(
            f"sampling.context={context} must be a multiple of block_size={size}: the window moves by whole blocks"
        )
