"""The exact likelihood of the ordered sampler (samplers/ordered.py): DUEL, Turok et al., arXiv 2603.01367.

It differs from the likelihood of the diffusion model.

Shape suffixes: B batch, L length, N masked positions, V vocabulary, R rows evaluated.
"""

from typing import Literal

import torch

from palimpsest.common.positions import Positions
from palimpsest.common.values import AtLeastOne
from palimpsest.estimators.base import Estimator, LikelihoodEstimate, require_mask_filling
from palimpsest.objectives.base import Batch, Model, Objective, context, counted_mask, scored_mask
from palimpsest.samplers.base import row_chunks, select_rows
from palimpsest.samplers.ordered import first_positions, preference, time_of


class Ordered(Estimator):
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

    def __call__(
        self, model: Model, batch: Batch, seed: int, num_draws: int, start: int = 0, of: int | None = None
    ) -> LikelihoodEstimate:
        """Return the exact likelihood, which depends neither on noise nor on the number of draws."""
        require_mask_filling(model.process, type(model), "duel")
        x0_BL, masked = batch["input_ids"], Positions(scored_mask(batch))
        scored_B = masked.mask_BL.sum(-1)
        nll_BL = torch.zeros(x0_BL.shape, dtype=torch.float64, device=x0_BL.device)
        evaluations_B = torch.zeros_like(scored_B)
        while len(masked):
            x_BL, t_B = model.process.mask(x0_BL, masked.mask_BL), time_of(model, masked.mask_BL.sum(-1), scored_B)
            now_BL = torch.zeros_like(masked.mask_BL)
            for at, rows_R, inside in row_chunks(masked, model.vocab_size):
                log_p_NV = model.denoise(x_BL[rows_R], t_B[rows_R], inside, **select_rows(context(batch), rows_R))
                count_B = at.mask_BL.sum(-1).clamp(max=self.tokens_per_step)
                now_BL |= first_positions(preference(log_p_NV, at, self.order), count_B)
                nll_BL -= at.spread(log_p_NV.gather(1, at.take(x0_BL)[:, None]).squeeze(1).double()) * now_BL
                evaluations_B[rows_R] += 1
            counts = [max(0, count - self.tokens_per_step) for count in masked.counts]
            masked = Positions(masked.mask_BL & ~now_BL, counts)
        return LikelihoodEstimate(nll_BL.sum(-1, keepdim=True), counted_mask(batch).sum(-1), evaluations_B)
