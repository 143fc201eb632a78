"""The negative evidence lower bound, by the objective's own loss under evaluation noise; exact for causal models.

Shape suffixes: B batch, K independent draws, P network passes.
"""

from __future__ import annotations

import torch

from palimpsest.common.randomness import evaluation_noise
from palimpsest.estimators.base import Estimator, Measured
from palimpsest.objectives.base import Batch, BoundTo, Objective
from palimpsest.objectives.noising import Noising, TiltedCount


class Nelbo:
    """E over t and masks of the loss.

    noising: how t and masks are drawn; None is the sharpest that the objective allows.
    """

    kind, in_parts = "NELBO", True

    def __init__(self, noising: Noising | None = None) -> None:
        self.noising = noising

    def check(self, objective: Objective) -> None:
        objective.bound(self.noising)

    def label(self, model: BoundTo, num_draws: int) -> str:
        objective = model.objective.bound(self.noising)
        return "exact" if objective.exact else f"NELBO, {objective.noising.label}"

    def exact(self, model: BoundTo) -> bool:
        return model.objective.exact

    def passes(self, model: BoundTo) -> int:
        objective = model.objective.bound(self.noising)
        return 1 if objective.exact else objective.noising.passes

    def __call__(
        self, model: BoundTo, batch: Batch, seed: int, num_draws: int, start: int = 0, of: int | None = None
    ) -> Measured:
        """`num_draws` masks per row, spread over strata of t or of the mask count; one pass if the likelihood is exact.

        Raises:
            ValueError: num_draws is no multiple of the passes a draw takes.
        """
        objective = model.objective.bound(self.noising)
        passes, of = self.passes(model), of or num_draws
        if min(num_draws, of) < 1 or any(number % passes for number in (num_draws, start, of)):
            raise ValueError(
                f"eval.num_draws={num_draws} (in mode=classify, classify.num_draws) must be a positive multiple of "
                f"{passes}: a draw of the estimator ({objective.noising.label}) takes so many network evaluations"
            )
        draws = range(1) if objective.exact else range(start // passes, (start + num_draws) // passes)
        ids_B, group_B = batch["sample_id"], batch.get("text_id")
        noises = [evaluation_noise(seed, ids_B, k, of // passes, group_B) for k in draws]
        losses = [objective.loss(model.backbone, batch, noise) for noise in noises]
        return Measured(
            torch.stack([loss.nll_BL.double().sum(-1) for loss in losses], dim=1),
            losses[0].mask_BL.sum(-1),
            torch.full_like(ids_B, len(draws) * passes * objective.encodes),
            {name: torch.cat([loss.logs[name] for loss in losses], dim=1) for name in losses[0].logs},
        )


def for_comparison(estimator: Estimator, model: BoundTo) -> Estimator:
    """The estimator to compare a text's likelihood under several models with: where no noising was chosen, small mask
    counts are drawn more often. For a single likelihood that buys little, for a difference much (docs/log.md)."""
    return Nelbo(comparison_noising(estimator, model.objective)) if isinstance(estimator, Nelbo) else estimator


def comparison_noising(estimator: Estimator, objective: Objective) -> Noising | None:
    """The noising of `for_comparison`; None where there is nothing to choose."""
    chosen = estimator.noising if isinstance(estimator, Nelbo) else None
    fixed = chosen is not None or not objective.clean_text_costs_nothing or objective.T
    return chosen if fixed else TiltedCount()
