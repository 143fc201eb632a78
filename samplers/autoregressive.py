"""Sampling from left to right, one token at a time, with a KV cache: exact for a causal model.

Shape suffixes: B batch, L length, R rows evaluated, N positions drawn, V vocabulary.
"""

import torch
from torch import Tensor

from palimpsest.common.positions import Positions
from palimpsest.common.randomness import KeyedNoise
from palimpsest.denoisers import CausalDenoiser
from palimpsest.process import Absorbing
from palimpsest.samplers.base import TokenChoice, sampler, select_rows
from palimpsest.samplers.trace import Trace, Watcher


@sampler(Absorbing)
def sample(
    model: CausalDenoiser,
    x_BL: Tensor,
    generator: KeyedNoise,
    *,
    choice: TokenChoice = TokenChoice(),  # noqa: B008 - frozen
    kv_cache: bool = True,
    stop_id: int | None = None,
    watch: Watcher | None = None,
    **cond: Tensor,
) -> Trace:
    """Fill the masked positions of `x_BL` from the left; its other tokens never change.

    Args:
        stop_id: a row ends with the first `stop_id` that is written; the rest of it stays masked.
        kv_cache: keep keys and values of the prefix; False reads the prefix again for every token, with equal results.

    Raises:
        ValueError: the model is not causal, a row begins with a mask, or a mask is followed by a prompt token.
    """
    trace = Trace(x_BL, model.process, watch)
    if bool(trace.open_BL[:, 0].any()):
        raise ValueError(
            "a causal model needs a first token to start from: give one, or data.insert_train_special=true"
        )
    if bool(((trace.open_BL.cumsum(-1) > 0) & ~trace.open_BL).any()):
        raise ValueError("a causal model cannot fill in before given text: use sampling.prefix, not sampling.template")
    cond.pop("attention_mask", None)  # padding is on the right, where no token attends to it
    first, length = int((~trace.open_BL.any(0)).long().cumprod(0).sum()), x_BL.shape[1]
    cache, read = (model.new_cache(*x_BL.shape), 0) if kv_cache else (None, 0)
    u_BL, goes_on_B = generator.uniform(length), torch.ones_like(trace.open_BL[:, 0])
    for place in range(first, length):
        if place > first and stop_id is not None:
            goes_on_B &= (trace.ids_BL[:, place - 1] != stop_id) | ~trace.open_BL[:, place - 1]
        at_BL = torch.zeros_like(trace.open_BL)
        at_BL[:, place] = trace.open_BL[:, place] & goes_on_B
        at, going = Positions.of_each(at_BL, goes_on_B[:, None])
        if not len(going):
            break
        if not len(at):  # the texts that go on have longer prompts
            trace.end_step(shown=False)
            continue
        if cache is None:
            rows_R, inside = at.compact()
            seen = Positions(inside.mask_BL[:, : place + 1], inside.counts)
            log_p_NV = model.denoise(trace.ids_BL[rows_R, : place + 1], None, seen, **select_rows(cond, rows_R))
        else:
            log_p_NV = at.of_rows(model.next_token(trace.ids_BL[:, read:place], cache, **cond))
            read = place
        ids_N = choice.draw(log_p_NV, at.take(u_BL))
        trace.write(at, ids_N, log_p_NV.gather(1, ids_N[:, None])[:, 0])
        trace.evaluations_B += at_BL.any(-1)
        trace.end_step()
    return trace
