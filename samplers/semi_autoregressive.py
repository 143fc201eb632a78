"""Semi-autoregressive generation (MDLM, arXiv 2406.07524): texts longer than the network's
window, a stride at a time.

Shape suffixes: B batch, L length of the window, W length of everything.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from randomness import KeyedNoise
from samplers.base import Generation, Model


@torch.no_grad()
def sample(
    model: Model,
    x_BL: Tensor,
    generator: KeyedNoise,
    *,
    inner: Callable[..., Generation],
    stride_length: int,
    num_strides: int,
    **cond: Tensor,
) -> Generation:
    """The window `x_BL` filled by `inner`, then `num_strides` times `stride_length` tokens more, each time behind the
    last L - stride_length tokens of what is there, which stay as they are: (B, L + stride_length * num_strides).

    Raises:
        ValueError: the stride does not fit the window, or rows are padded.
    """
    length = x_BL.shape[1]
    if not 0 < stride_length <= length or num_strides < 0:
        raise ValueError(
            f"sampling.stride_length={stride_length} must lie in 1..{length} (model.length) and "
            f"sampling.num_strides={num_strides} must be 0 or more"
        )
    if "attention_mask" in cond and not bool(cond["attention_mask"].all()):
        raise ValueError("sampling.semi_ar=true goes on behind full rows; use wrapped data (data.wrap=true)")
    out = inner(model, x_BL, generator, **cond)
    ids, steps, total, evaluations_B = [out.ids_BL], [out.step_BL], out.num_steps, out.evaluations_B
    for _ in range(num_strides):
        blank = torch.full_like(x_BL[:, :stride_length], model.mask_id)
        window_BL = torch.cat([ids[-1][:, stride_length - length :], blank] if length > stride_length else [blank], 1)
        out = inner(model, window_BL, generator, **cond)
        ids.append(torch.cat([ids[-1], out.ids_BL[:, -stride_length:]], dim=1))
        steps.append(out.step_BL[:, -stride_length:] + total)
        total, evaluations_B = total + out.num_steps, evaluations_B + out.evaluations_B
    return Generation(ids[-1], torch.cat(steps, dim=1), total, evaluations_B)
