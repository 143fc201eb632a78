"""Sampling from left to right, one token at a time, with a KV cache: exact for a causal model.

Shape suffixes: B batch, L length, N positions drawn, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from palimpsest.common.positions import Positions
from palimpsest.common.randomness import KeyedNoise
from palimpsest.denoisers import CausalDenoiser, Denoiser
from palimpsest.process import Absorbing
from palimpsest.samplers.base import Request, Step, TokenChoice, run, sampler, select_rows
from palimpsest.samplers.trace import Trace, Watcher


class LeftToRight(Step):
    """Generate the next token of every row that has not ended."""

    def __init__(self, open_BL: Tensor, noise: KeyedNoise, choice: TokenChoice, stop_id: int | None) -> None:
        self.u_BL = noise.uniform(open_BL.shape[1])
        self.choice = choice
        self.stop_id = stop_id
        self.first = int((~open_BL.any(0)).long().cumprod(0).sum())
        self.goes_on_B = torch.ones_like(open_BL[:, 0])

    def positions(self, number: int, trace: Trace) -> Request | None:
        place = self.first + number - 1
        if number > 1 and self.stop_id is not None:
            self.goes_on_B &= trace.ids_BL[:, place - 1] != self.stop_id
        if place == trace.ids_BL.shape[1]:
            return None
        at_BL = torch.zeros_like(trace.open_BL)
        at_BL[:, place] = trace.open_BL[:, place] & self.goes_on_B
        at, going = Positions.of_each(at_BL, self.goes_on_B[:, None])
        return Request(at, None) if len(going) else None


class _OnePosition(Denoiser):
    """A causal model that predicts one position of each row; with a cache it reads every token once."""

    def __init__(
        self, model: CausalDenoiser, trace: Trace, first: int, cond: dict[str, Tensor], kv_cache: bool
    ) -> None:
        self.vocab_size = model.vocab_size
        self._model = model
        self._trace = trace
        self._first = first
        self._cond = cond
        self._cache = model.new_cache(*trace.ids_BL.shape) if kv_cache else None
        self._read = 0

    def denoise(self, x_BL: Tensor, t_B: None, at: Positions | None = None, *, row: Tensor) -> Tensor:
        place = self._first + self._trace.num_steps
        if self._cache is None:
            cond = select_rows(self._cond, row)
            at = Positions(at.mask_BL[:, : place + 1], at.counts)
            return self._model.denoise(x_BL[:, : place + 1], None, at, **cond)
        if place > self._read:
            new_Bn = self._trace.ids_BL[:, self._read : place]
            self._log_p_BV = self._model.next_token(new_Bn, self._cache, **self._cond)
            self._read = place
        return self._log_p_BV[row]


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
        stop_id: a row ends with the first token `stop_id` after its start; the rest of it stays masked.
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
    step = LeftToRight(trace.open_BL, generator, choice, stop_id)
    denoiser = _OnePosition(model, trace, step.first, cond, kv_cache)
    return run(step, denoiser, trace, {"row": torch.arange(len(x_BL), device=x_BL.device)})
