"""The exact likelihood of the sampler that fills positions in an order decided by its own prediction
(samplers/ordered.py): DUEL, Turok et al., arXiv 2603.01367, algorithm 1. Not the likelihood of the diffusion model.

Shape suffixes: B batch, L length, N masked positions, V vocabulary, R rows evaluated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from estimators.base import Measured, refuse_causal
from objectives.base import Batch, Model, scored_mask
from samplers.ordered import ORDERS, next_positions, preference, time_of


class Ordered:
    """-log p(x) of the ordered sampler: since the order is a function of what is visible, one path leads to each text,
    and its probability is the product of the probabilities of its tokens where and when they are filled.

    order: left_to_right, confidence, margin or entropy. tokens_per_step: how many are filled from one prediction.
    """

    kind = "exact likelihood of the ordered sampler (DUEL)"

    def __init__(self, order: str = "margin", tokens_per_step: int = 1) -> None:
        if order not in ORDERS:
            raise ValueError(f"estimator.order={order} is unknown; choose one of: {', '.join(ORDERS)}")
        if tokens_per_step < 1:
            raise ValueError(f"estimator.tokens_per_step={tokens_per_step} must be at least 1")
        self.order, self.tokens_per_step = order, tokens_per_step

    def label(self, model: Model, num_draws: int) -> str:
        return f"DUEL, order by {self.order}, {self.tokens_per_step} a step"

    def exact(self, model: Model) -> bool:
        return True

    def __call__(self, model: Model, batch: Batch, seed: int, num_draws: int) -> Measured:
        """Exact: neither noise nor the number of draws plays a part."""
        refuse_causal(model, "duel")
        x0_BL, scored_BL = batch["input_ids"], scored_mask(batch)
        mask_BL = batch.get("attention_mask")
        x_BL = torch.where(scored_BL, model.mask_id, x0_BL)
        tokens_B, nll_BL = scored_BL.sum(-1), torch.zeros(x0_BL.shape, dtype=torch.float64, device=x0_BL.device)
        evaluations_B = torch.zeros_like(tokens_B)
        while True:
            hidden_BL = (x_BL == model.mask_id) & scored_BL
            rows_R = hidden_BL.any(-1).nonzero().squeeze(-1)
            if not len(rows_R):
                break
            at_RL, left_R = hidden_BL[rows_R], hidden_BL[rows_R].sum(-1)
            cond = {} if mask_BL is None else {"attention_mask": mask_BL[rows_R]}
            log_p_NV = model.denoise(x_BL[rows_R], time_of(model, left_R, tokens_B[rows_R]), at_RL, **cond)
            now_RL = next_positions(preference(log_p_NV, at_RL, self.order), left_R, self.tokens_per_step)
            nll_BL[rows_R] += _of_true_tokens(log_p_NV, x0_BL[rows_R], at_RL, now_RL)
            x_BL[rows_R] = torch.where(now_RL, x0_BL[rows_R], x_BL[rows_R])
            evaluations_B[rows_R] += 1
        return Measured(nll_BL.sum(-1, keepdim=True), tokens_B, evaluations_B)


def _of_true_tokens(log_p_NV: Tensor, x0_RL: Tensor, at_RL: Tensor, now_RL: Tensor) -> Tensor:
    """-log p of the true tokens at the positions of `now_RL`, 0 elsewhere, float64 (R, L)."""
    nats_N = -log_p_NV.gather(1, x0_RL[at_RL][:, None]).squeeze(1).double()
    return torch.zeros(at_RL.shape, dtype=torch.float64, device=at_RL.device).masked_scatter(at_RL, nats_N) * now_RL
