"""Semi-autoregressive generation (MDLM, arXiv 2406.07524) of texts longer than the network's window.

It has its own distribution: each window is drawn by the inner sampler (ancestral, so an approximation), and the tokens
before the window are not seen.

Shape suffixes: B batch, L length of the window, W length of the text.
"""

from collections.abc import Callable
from functools import partial
from typing import Annotated

import torch
from torch import Tensor

from palimpsest.common.positions import Positions
from palimpsest.common.randomness import KeyedNoise
from palimpsest.common.values import COUNT, AtLeastOne, whole
from palimpsest.denoisers import Denoiser
from palimpsest.process import Absorbing
from palimpsest.samplers.base import sampler
from palimpsest.samplers.trace import Trace, Watcher

_MOST_TOKENS = 2**20  # after the first window of a text
UNFULL = (
    "sampling.predictor=semi_ar (also typed as sampling.semi_ar=true) continues full rows, and rows of data.wrap=false "
    "are padded; use wrapped data (data.wrap=true)"
)


@sampler(Absorbing, lengthens=True)
def sample(
    model: Denoiser,
    x_BL: Tensor,
    generator: KeyedNoise,
    *,
    inner: Callable[..., Trace],
    stride_length: AtLeastOne,
    num_strides: Annotated[int, whole(0, COUNT)],
    watch: Watcher | None = None,
    **cond: Tensor,
) -> Trace:
    """Fill the window `x_BL` by `inner`, then append `stride_length` tokens `num_strides` times.

    Each stride is conditioned on the last L - stride_length tokens. Returns (B, L + stride_length * num_strides).

    Raises:
        ValueError: the stride is longer than the window, texts would be too long, or rows are padded.
    """
    length = x_BL.shape[1]
    if stride_length > length:
        raise ValueError(f"sampling.stride_length={stride_length} must be at most model.length={length}")
    if stride_length * num_strides > _MOST_TOKENS:
        raise ValueError(
            f"sampling.stride_length={stride_length} x sampling.num_strides={num_strides} asks for texts of more than "
            f"{_MOST_TOKENS:,} tokens; lower one of them"
        )
    if "attention_mask" in cond and not bool(cond["attention_mask"].all()):
        raise ValueError(UNFULL)
    blank_BW = torch.full((len(x_BL), stride_length * num_strides), model.process.mask_id, device=x_BL.device)
    trace = Trace(torch.cat([x_BL, blank_BW], dim=1), model.process, watch)
    for start in range(0, stride_length * num_strides + 1, stride_length):
        window_BL = trace.ids_BL[:, start : start + length]
        new = length if start == 0 else stride_length  # number of tokens to write, at the end of the window
        place_W, end = torch.arange(trace.ids_BL.shape[1], device=x_BL.device), start + length
        at_BW = ((place_W >= end - new) & (place_W < end)).expand_as(trace.ids_BL)
        at, here = (Positions(part, [new] * len(x_BL)) for part in (at_BW, at_BW[:, start:end]))
        trace.fill(partial(inner, model, window_BL, generator, **cond), at, here)
    return trace
