"""The importance-weighted any-order bound (Eso-LM, Sahoo et al., arXiv 2506.01928, theorem 3.1): tighter than the NELBO
for the same weights.

Shape suffixes: B batch, L length, V vocabulary, K orders.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from estimators.base import Measured, refuse_causal
from objectives.base import Batch, Model, context, counted_mask, scored_mask
from randomness import KeyedNoise
from samplers.ordered import time_of


class AnyOrder:
    """-log of the mean over K random orders of prod over i of p(x_(i-th) | those before): an upper bound of -log p(x)
    in expectation, equal to the NELBO at K = 1 and falling to -log p(x) as K grows (Burda et al., arXiv 1509.00519).

    """

    in_parts = False
    kind = "importance-weighted any-order bound"

    def label(self, model: Model, num_draws: int) -> str:
        return f"importance-weighted any-order bound, {num_draws} orders"

    def exact(self, model: Model) -> bool:
        return False

    def passes(self, model: Model) -> int:
        return 1

    def __call__(
        self, model: Model, batch: Batch, seed: int, num_draws: int, start: int = 0, of: int | None = None
    ) -> Measured:
        """One value per row from `num_draws` orders, each of which takes a network evaluation per scored token."""
        refuse_causal(model, "importance_weighted")
        orders = [self._one_order(model, batch, KeyedNoise(seed, batch["sample_id"], draw=k)) for k in range(num_draws)]
        tokens_B, scored_B = counted_mask(batch).sum(-1), scored_mask(batch).sum(-1)
        nll_B1 = math.log(num_draws) - torch.stack(orders, dim=1).logsumexp(1, keepdim=True)
        return Measured(nll_B1, tokens_B, scored_B * num_draws)

    def _one_order(self, model: Model, batch: Batch, noise: KeyedNoise) -> Tensor:
        """log of the product of the conditional probabilities along one random order, float64 (B,)."""
        x0_BL, scored_BL = batch["input_ids"], scored_mask(batch)
        tokens_B = scored_BL.sum(-1)
        rank_BL = noise.uniform(x0_BL.shape[1]).masked_fill(~scored_BL, torch.inf).argsort(-1).argsort(-1)
        log_p_B = torch.zeros(len(x0_BL), dtype=torch.float64, device=x0_BL.device)
        for step in range(int(tokens_B.max())):
            rows_R = (tokens_B > step).nonzero().squeeze(-1)
            rank_RL, x0_RL = rank_BL[rows_R], x0_BL[rows_R]
            x_RL = torch.where((rank_RL >= step) & scored_BL[rows_R], model.mask_id, x0_RL)
            now_RL = rank_RL == step
            cond = {name: told[rows_R] for name, told in context(batch).items()}
            t_R = time_of(model, tokens_B[rows_R] - step, tokens_B[rows_R])
            log_p_RV = model.denoise(x_RL, t_R, now_RL, **cond)
            log_p_B[rows_R] += log_p_RV.gather(1, x0_RL[now_RL][:, None]).squeeze(1).double()
        return log_p_B
