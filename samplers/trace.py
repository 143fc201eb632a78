"""The trace of a batch of texts during sampling: tokens, steps, confidences, network evaluations.

Shape suffixes: B batch, L length, R rows written to, W length of a part, N written positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from palimpsest.common.positions import Positions
from palimpsest.process import Process


class Trace:
    """A batch of texts during and after sampling.

    A watcher gets the trace itself after each step. It must copy what it keeps, because the sampler continues writing.

    Attributes:
        ids_BL: the tokens, some of them blank.
        step_BL: the step, counted from 1, that wrote each token; 0 for prompt tokens and blanks.
        confidence_BL: the model's probability of each token when it was written, before temperature and truncation,
            float32; 1 for prompt tokens, 0 for blanks.
        num_steps: number of steps so far.
        evaluations_B: network evaluations of each row.
        open_BL: True at the positions to be generated.
        length_B: length of each text, if the sampler decides it; None otherwise.
    """

    def __init__(self, x_BL: Tensor, process: Process, watch: Watcher | None = None) -> None:
        self.ids_BL = x_BL.clone()
        self.step_BL = torch.zeros_like(x_BL)
        self.open_BL = x_BL == process.blank_id
        self.confidence_BL = (~self.open_BL).float()
        self.evaluations_B = torch.zeros(len(x_BL), dtype=torch.long, device=x_BL.device)
        self.num_steps = 0
        self.length_B: Tensor | None = None
        self._blank_id = process.blank_id
        self._watch = watch

    @property
    def masked_BL(self) -> Tensor:
        """True at blank positions."""
        return self.ids_BL == self._blank_id

    def write(self, at: Positions, ids_N: Tensor, log_p_N: Tensor) -> None:
        """Write `ids_N` to the N positions `at` as step `num_steps` + 1.

        log_p_N: the model's log-probabilities of these tokens, before temperature and truncation.
        """
        at.write(self.ids_BL, ids_N)
        at.write(self.step_BL, self.num_steps + 1)
        at.write(self.confidence_BL, log_p_N.exp().float())

    def erase(self, at_BL: Tensor) -> None:
        """Make the True positions of `at_BL` blanks again."""
        self.ids_BL.masked_fill_(at_BL, self._blank_id)
        self.step_BL.masked_fill_(at_BL, 0)
        self.confidence_BL.masked_fill_(at_BL, 0.0)

    def end_step(self, shown: bool = True) -> None:
        """Count a step and, if `shown`, call the watcher."""
        self.num_steps += 1
        if shown and self._watch is not None:
            self._watch(self)

    def fill(
        self, sample: Callable[..., Trace], at: Positions, here: Positions, rows: Tensor | slice = slice(None)
    ) -> Trace:
        """Let another sampler write a part of these texts, such as a block; return its own trace.

        Args:
            sample: the other sampler, with all its arguments but `watch`.
            at: the positions of the part in this trace, in the order of `here`.
            here: the positions of the part in the other sampler's trace.
            rows: the rows of the part.
        """
        first = self.num_steps
        evaluations_B = self.evaluations_B.clone()
        step_before_N = at.take(self.step_BL)
        confidence_before_N = at.take(self.confidence_BL)

        def include(part: Trace) -> None:
            step_N = here.take(part.step_BL)
            confidence_N = here.take(part.confidence_BL)
            at.write(self.ids_BL, here.take(part.ids_BL))
            at.write(self.step_BL, torch.where(step_N > 0, step_N + first, step_before_N))
            at.write(self.confidence_BL, torch.where(step_N > 0, confidence_N, confidence_before_N))
            self.evaluations_B[rows] = evaluations_B[rows] + part.evaluations_B
            self.num_steps = first + part.num_steps

        def show(part: Trace) -> None:
            include(part)
            self._watch(self)

        part = sample(watch=None if self._watch is None else show)
        include(part)
        return part


# A sampler calls its watcher (`watch=`) after each step that may have written a token.
Watcher = Callable[[Trace], None]
