"""Left to right, one token at a time, with a KV cache: draws the law of a causal model.

Shape suffixes: B batch, L length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from process import Absorbing
from randomness import KeyedNoise
from samplers.base import Generation, Model, TokenChoice, Watcher, writes
from samplers.page import Page


@writes(Absorbing)
@torch.no_grad()
def sample(
    model: Model,
    x_BL: Tensor,
    generator: KeyedNoise,
    *,
    choice: TokenChoice = TokenChoice(),  # noqa: B008 - frozen
    kv_cache: bool = True,
    stop_id: int | None = None,
    watch: Watcher | None = None,
    **cond: Tensor,
) -> Generation:
    """Fill the masked positions of `x_BL` from the left; its other tokens are given and never change.

    stop_id: end once every row has this token behind its first; what is left of them stays masked.
    kv_cache: keep keys and values of the prefix; False runs the whole prefix again for every token, to the same result.

    Raises:
        ValueError: the model is not causal, a row begins with a mask, or has given tokens behind one.
    """
    if not hasattr(model.objective, "next_token"):
        raise ValueError("sampling.predictor=ar needs parameterization=ar; use ddpm_cache, analytic or first_hitting")
    masked_BL = model.process.is_corrupted(x_BL)
    if bool(masked_BL[:, 0].any()):
        raise ValueError(
            "a causal model needs a first token to start from: give one, or data.insert_train_special=true"
        )
    if bool(((masked_BL.cumsum(-1) > 0) & ~masked_BL).any()):
        raise ValueError("a causal model can not fill in before given text: use sampling.prefix, not sampling.template")
    length = x_BL.shape[1]
    u_BL, page = generator.uniform(length), Page(x_BL, model.process, watch)
    first = int(masked_BL.any(0).nonzero()[0]) if bool(masked_BL.any()) else length
    cache = model.new_cache(len(x_BL), length) if kv_cache else None
    told = {name: value for name, value in cond.items() if name != "attention_mask"}  # padding stands on the right
    x_BL, ended_B = page.ids_BL, torch.zeros_like(masked_BL[:, 0])
    for place in range(first, length):
        if cache is None:
            log_p_BV = model.denoise(x_BL[:, : place + 1], None, _only(place, x_BL[:, : place + 1]), **told)
        else:
            new_Bn = x_BL[:, :first] if place == first else x_BL[:, place - 1 : place]
            log_p_BV = model.next_token(new_Bn, cache, **told)
        drawn_B, here_B = choice.draw(log_p_BV, u_BL[:, place]), masked_BL[:, place]
        page.write(place - first + 1, _only(place, x_BL) & masked_BL, drawn_B[here_B], log_p_BV[here_B])
        page.evaluations_B += ~ended_B
        page.end_step(place - first + 1)
        ended_B |= x_BL[:, place] == (-1 if stop_id is None else stop_id)
        if bool(ended_B.all()):
            break
    return page.finished(length - first)


def _only(place: int, x_BL: Tensor) -> Tensor:
    at_BL = torch.zeros_like(x_BL, dtype=torch.bool)
    at_BL[:, place] = True
    return at_BL
