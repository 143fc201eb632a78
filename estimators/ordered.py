"""The exact likelihood of the ordered sampler (samplers/ordered.py): DUEL, Turok et al., arXiv 2603.01367.

It differs from the likelihood of the diffusion model.

Shape suffixes: B batch, L length, N masked positions, V vocabulary, R rows evaluated.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from palimpsest.common.values import AtLeastOne
from palimpsest.estimators.base import LikelihoodEstimate, require_mask_filling
from palimpsest.objectives.base import Batch, Model, Objective, context, counted_mask, scored_mask
from palimpsest.process import scatter_positions
from palimpsest.samplers.base import row_chunks, select_rows
from palimpsest.samplers.ordered import first_positions, preference, time_of


class Ordered:
    """-log p(x) of the sampler that unmasks positions in an order that its own prediction decides.

    The order depends on the visible tokens only, so one path leads to each text. Its probability is the product of the
    probabilities of the tokens, each at the step that unmasks it.

    Args:
        order: left_to_right, confidence, margin or entropy.
        tokens_per_step: tokens unmasked from one prediction.
    """

    in_parts = True
    kind = "exact likelihood of the ordered sampler (DUEL)"

    def __init__(
        self,
        order: Literal["left_to_right", "confidence", "margin", "entropy"] = "margin",
        tokens_per_step: AtLeastOne = 1,
    ) -> None:
        self.order = order
        self.tokens_per_step = tokens_per_step

    def check(self, objective: Objective) -> None:
        require_mask_filling(objective.process, objective.model_class, "duel")

    def label(self, model: Model, num_draws: int) -> str:
        return f"DUEL, order by {self.order}, {self.tokens_per_step} a step"

    def exact(self, model: Model) -> bool:
        return True

    def passes(self, model: Model) -> int:
        return 1

    def __call__(
        self, model: Model, batch: Batch, seed: int, num_draws: int, start: int = 0, of: int | None = None
    ) -> LikelihoodEstimate:
        """Return the exact likelihood, which depends neither on noise nor on the number of draws."""
        require_mask_filling(model.process, type(model), "duel")
        x0_BL, scored_BL = batch["input_ids"], scored_mask(batch)
        x_BL = model.process.mask(x0_BL, scored_BL)
        tokens_B = counted_mask(batch).sum(-1)
        nll_BL = torch.zeros(x0_BL.shape, dtype=torch.float64, device=x0_BL.device)
        evaluations_B = torch.zeros_like(tokens_B)
        while len(busy_R := (model.process.is_corrupted(x_BL) & scored_BL).any(-1).nonzero().squeeze(-1)):
            left_R = (model.process.is_corrupted(x_BL[busy_R]) & scored_BL[busy_R]).sum(-1)
            for rows_R in row_chunks(busy_R, left_R, model.vocab_size):
                self._step(model, batch, x_BL, nll_BL, scored_BL, rows_R)
            evaluations_B[busy_R] += 1
        return LikelihoodEstimate(nll_BL.sum(-1, keepdim=True), tokens_B, evaluations_B)

    def _step(
        self, model: Model, batch: Batch, x_BL: Tensor, nll_BL: Tensor, scored_BL: Tensor, rows_R: Tensor
    ) -> None:
        """Unmask the next positions of some rows, in place, and add the nats of their tokens to `nll_BL`."""
        x_RL, x0_RL = x_BL[rows_R], batch["input_ids"][rows_R]
        at_RL = model.process.is_corrupted(x_RL) & scored_BL[rows_R]
        left_R, tokens_R = at_RL.sum(-1), scored_BL[rows_R].sum(-1)
        cond = select_rows(context(batch), rows_R)
        log_p_NV = model.denoise(x_RL, time_of(model, left_R, tokens_R), at_RL, **cond)
        now_RL = first_positions(preference(log_p_NV, at_RL, self.order), left_R.clamp(max=self.tokens_per_step))
        nats_N = -log_p_NV.gather(1, x0_RL[at_RL][:, None]).squeeze(1).double()
        nll_BL[rows_R] += scatter_positions(nats_N, at_RL) * now_RL
        x_BL[rows_R] = torch.where(now_RL, x0_RL, x_RL)
