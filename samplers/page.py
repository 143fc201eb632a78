"""The page that a sampler writes on: tokens, the step and the confidence of each, what they cost, and who watches.

Shape suffixes: B batch, L length, R rows written to, W length of an inset, N written positions, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from process import Process
from samplers.base import Frame, Generation, Watcher


class Page:
    """A copy of `x_BL` to be written on, with all that a `Generation` says of it.

    watch: is shown the page after each step. open_BL: True where the sampler is to write.
    """

    def __init__(self, x_BL: Tensor, process: Process, watch: Watcher | None = None) -> None:
        self.ids_BL, self.step_BL = x_BL.clone(), torch.zeros_like(x_BL)
        self.open_BL = x_BL == process.blank_id
        self.confidence_BL = (~self.open_BL).float()
        self.evaluations_B = torch.zeros(len(x_BL), dtype=torch.long, device=x_BL.device)
        self.num_steps = 0
        self._blank_id = process.blank_id
        self._watch = watch

    @property
    def masked_BL(self) -> Tensor:
        """True where nothing is written yet."""
        return self.ids_BL == self._blank_id

    def write(self, step: int, at_RL: Tensor, ids_N: Tensor, log_p_NV: Tensor, rows_R: Tensor | None = None) -> None:
        """Put `ids_N` at the N positions of `at_RL`, in the rows `rows_R` (None: in all). log_p_NV: the model's own
        prediction there, before any choice was made of it."""
        where = self._places(at_RL, rows_R)
        self.ids_BL[where], self.step_BL[where] = ids_N, step
        self.confidence_BL[where] = log_p_NV.gather(-1, ids_N[:, None]).squeeze(-1).exp().float()

    def erase(self, at_RL: Tensor, rows_R: Tensor | None = None) -> None:
        """Mask the positions of `at_RL` again."""
        where = self._places(at_RL, rows_R)
        self.ids_BL[where] = self._blank_id
        self.step_BL[where] = 0
        self.confidence_BL[where] = 0.0

    def end_step(self, step: int) -> None:
        """Show what is there after `step`."""
        if self._watch is not None:
            self._watch(Frame(step, self.ids_BL, self.confidence_BL, self.evaluations_B))

    def inset(self, at_BL: Tensor, here_RW: Tensor, rows_R: Tensor | None = None) -> Watcher | None:
        """Who watches another sampler that writes a part of this page: the True positions of `at_BL` here are, one
        after the other, those of `here_RW` there. Its steps follow on those of this page. rows_R: its rows here."""
        if self._watch is None:
            return None

        def show(frame: Frame) -> None:
            self.ids_BL[at_BL] = frame.ids_BL[here_RW]
            self.confidence_BL[at_BL] = frame.confidence_BL[here_RW]
            evaluations_B = self.evaluations_B.clone()
            evaluations_B[slice(None) if rows_R is None else rows_R] += frame.evaluations_B
            self._watch(Frame(self.num_steps + frame.step, self.ids_BL, self.confidence_BL, evaluations_B))

        return show

    def paste(self, out: Generation, at_BL: Tensor, here_RW: Tensor, rows_R: Tensor | None = None) -> None:
        """Take over what was written on a part (`inset`), with its steps and evaluations. rows_R: its rows here."""
        step_N, written_N = out.step_BL[here_RW], out.step_BL[here_RW] > 0
        self.ids_BL[at_BL] = out.ids_BL[here_RW]
        self.step_BL[at_BL] = torch.where(written_N, step_N + self.num_steps, self.step_BL[at_BL])
        self.confidence_BL[at_BL] = torch.where(written_N, out.confidence_BL[here_RW], self.confidence_BL[at_BL])
        self.evaluations_B[slice(None) if rows_R is None else rows_R] += out.evaluations_B
        self.num_steps += out.num_steps

    def finished(self, num_steps: int | None = None, length_B: Tensor | None = None) -> Generation:
        """What the sampler returns. num_steps: how many there were, if not those of the pasted parts."""
        steps = self.num_steps if num_steps is None else num_steps
        return Generation(self.ids_BL, self.step_BL, self.confidence_BL, steps, self.evaluations_B, length_B)

    def _places(self, at_RL: Tensor, rows_R: Tensor | None) -> tuple[Tensor, Tensor]:
        row_N, place_N = at_RL.nonzero(as_tuple=True)
        return (row_N if rows_R is None else rows_R[row_N]), place_N
