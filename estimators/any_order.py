"""The importance-weighted any-order bound (Eso-LM, Sahoo et al., arXiv 2506.01928, theorem 3.1), which is tighter than
the continuous-time NELBO of the same weights.

Shape suffixes: B batch, L length, V vocabulary, K orders.
"""

import math

import torch
from torch import Tensor

from palimpsest.common.positions import Positions
from palimpsest.common.randomness import KeyedNoise
from palimpsest.estimators.base import Estimator, LikelihoodEstimate, require_mask_filling
from palimpsest.objectives.base import Batch, Model, Objective, context, counted_mask, scored_mask
from palimpsest.samplers.base import select_rows


class AnyOrder(Estimator):
    """Estimator of -log of the mean over K random orders of prod over i of p(x_(i-th) | those before).

    In expectation it is an upper bound of -log p(x). It equals the NELBO (T = 0) at K = 1 and falls to -log p(x) as K
    grows (Burda et al., arXiv 1509.00519).

    Time-conditioned networks are shown the unmasking times, drawn together with the order: n uniform mask rates, the
    largest first, as in samplers/first_hitting.py. With k masks left the rate is Beta(k, n - k + 1), as in the NELBO,
    so both statements also hold with time conditioning.
    """

    in_parts = False
    kind = "importance-weighted any-order bound"

    def check(self, objective: Objective) -> None:
        _check(objective, objective.model_class)

    def label(self, model: Model, num_draws: int) -> str:
        return f"importance-weighted any-order bound, {num_draws} orders"

    def exact(self, model: Model) -> bool:
        return False

    def __call__(
        self, model: Model, batch: Batch, seed: int, num_draws: int, start: int = 0, of: int | None = None
    ) -> LikelihoodEstimate:
        """Return one value per row from `num_draws` orders, with one network evaluation per order and scored token."""
        _check(model, type(model))
        orders = [self._one_order(model, batch, KeyedNoise(seed, batch["sample_id"], draw=k)) for k in range(num_draws)]
        tokens_B, scored_B = counted_mask(batch).sum(-1), scored_mask(batch).sum(-1)
        nll_B1 = math.log(num_draws) - torch.stack(orders, dim=1).logsumexp(1, keepdim=True)
        return LikelihoodEstimate(nll_B1, tokens_B, scored_B * num_draws)

    def _one_order(self, model: Model, batch: Batch, noise: KeyedNoise) -> Tensor:
        """Return the log-probability of each row along one random order, float64 (B,)."""
        x0_BL, scored_BL = batch["input_ids"], scored_mask(batch)
        alpha_BL = noise.uniform(x0_BL.shape[1])  # alpha at the time when each token is unmasked
        rank_BL = alpha_BL.masked_fill(~scored_BL, torch.inf).argsort(-1).argsort(-1)
        log_p_B = torch.zeros(len(x0_BL), dtype=torch.float64, device=x0_BL.device)
        for step, now in enumerate(Positions.by_number(rank_BL.masked_fill(~scored_BL, -1), x0_BL.shape[1])):
            if not len(now):
                break
            rows_R, inside = now.compact()
            x_BL = model.process.mask(x0_BL, (rank_BL >= step) & scored_BL)
            t_R = model.schedule.t_from_alpha(now.take(alpha_BL)).clamp(0.0, 1.0)  # one position in each row
            log_p_RV = model.denoise(x_BL[rows_R], t_R, inside, **select_rows(context(batch), rows_R))
            log_p_B[rows_R] += log_p_RV.gather(1, now.take(x0_BL)[:, None]).squeeze(1).double()
        return log_p_B


def _check(model: Model | Objective, kind: type) -> None:
    """Raise ValueError for models of the class `kind` that cannot unmask tokens in any order, or whose network decides
    when a token is unmasked."""
    require_mask_filling(model.process, kind, "importance_weighted")
    if not model.independent_unmasking:
        raise ValueError(
            "eval.estimator=importance_weighted averages over orders that do not depend on the network, and with "
            "parameterization=sedd or d3pm the network also decides when a mask goes: its NELBO is no mean over "
            "orders; use eval.estimator=auto"
        )
