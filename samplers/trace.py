"""The trace of a batch of texts during sampling: tokens, steps, confidences, network evaluations.

Shape suffixes: B batch, L length, R rows written to, W length of a part, N written positions, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

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

    def write(self, at_RL: Tensor, ids_N: Tensor, log_p_NV: Tensor, rows_R: Tensor | None = None) -> None:
        """Write `ids_N` to the N positions of `at_RL`, in the rows `rows_R` (None: all), as step `num_steps` + 1.

        log_p_NV: the model's prediction there, before temperature and truncation.
        """
        row_N, place_N = at_RL.nonzero(as_tuple=True)
        where = (row_N if rows_R is None else rows_R[row_N]), place_N
        self.ids_BL[where] = ids_N
        self.step_BL[where] = self.num_steps + 1
        self.confidence_BL[where] = log_p_NV.gather(-1, ids_N[:, None]).squeeze(-1).exp().float()

    def erase(self, at_BL: Tensor) -> None:
        """Make the positions of `at_BL` blanks again."""
        self.ids_BL[at_BL] = self._blank_id
        self.step_BL[at_BL] = 0
        self.confidence_BL[at_BL] = 0.0

    def end_step(self, shown: bool = True) -> None:
        """Count a step and, if `shown`, call the watcher."""
        self.num_steps += 1
        if shown and self._watch is not None:
            self._watch(self)

    def part_watcher(self, at_BL: Tensor, here_RW: Tensor, rows_R: Tensor | None = None) -> Watcher | None:
        """Return a watcher for a sampler that writes a part of these texts.

        Args:
            at_BL: the positions of the part in this trace, in the order of the True positions of `here_RW`.
            here_RW: the positions of the part in the other sampler's trace.
            rows_R: the rows of the part; None for all.
        """
        if self._watch is None:
            return None

        def show(part: Trace) -> None:
            self.ids_BL[at_BL] = part.ids_BL[here_RW]
            self.confidence_BL[at_BL] = part.confidence_BL[here_RW]
            shown = copy.copy(self)
            shown.num_steps = self.num_steps + part.num_steps
            shown.evaluations_B = self.evaluations_B.clone()
            shown.evaluations_B[slice(None) if rows_R is None else rows_R] += part.evaluations_B
            self._watch(shown)

        return show

    def merge_part(self, part: Trace, at_BL: Tensor, here_RW: Tensor, rows_R: Tensor | None = None) -> None:
        """Copy the tokens, steps and evaluations of a finished part, such as a block (arguments: `part_watcher`)."""
        step_N, written_N = part.step_BL[here_RW], part.step_BL[here_RW] > 0
        self.ids_BL[at_BL] = part.ids_BL[here_RW]
        self.step_BL[at_BL] = torch.where(written_N, step_N + self.num_steps, self.step_BL[at_BL])
        self.confidence_BL[at_BL] = torch.where(written_N, part.confidence_BL[here_RW], self.confidence_BL[at_BL])
        self.evaluations_B[slice(None) if rows_R is None else rows_R] += part.evaluations_B
        self.num_steps += part.num_steps


# A sampler calls its watcher (`watch=`) after each step that may have written a token.
Watcher = Callable[[Trace], None]
