"""The negative evidence lower bound: the loss of the objective under evaluation noise; exact for causal models.

Shape suffixes: B batch, K independent draws, P network passes.
"""

import torch

from palimpsest.common.randomness import evaluation_noise
from palimpsest.estimators.base import Estimator, LikelihoodEstimate
from palimpsest.objectives.base import Batch, BoundModel, Objective
from palimpsest.objectives.mask_sampling import MaskSampler, TiltedCount


class Nelbo:
    """The mean of the loss over t and masks.

    Args:
        noising: how t and masks are drawn; None for the mask sampler with the least variance.
    """

    kind = "NELBO"
    in_parts = True

    def __init__(self, noising: MaskSampler | None = None) -> None:
        self.mask_sampler = noising

    def check(self, objective: Objective) -> None:
        objective.bound(self.mask_sampler)

    def label(self, model: BoundModel, num_draws: int) -> str:
        objective = model.objective.bound(self.mask_sampler)
        return "exact" if objective.exact else f"NELBO, {objective.mask_sampler.label}"

    def exact(self, model: BoundModel) -> bool:
        return model.objective.exact

    def passes(self, model: BoundModel) -> int:
        objective = model.objective.bound(self.mask_sampler)
        return 1 if objective.exact else objective.mask_sampler.passes

    def __call__(
        self, model: BoundModel, batch: Batch, seed: int, num_draws: int, start: int = 0, of: int | None = None
    ) -> LikelihoodEstimate:
        """Average `num_draws` masks per row, spread over strata of t or of the mask count; one pass if exact. Raises
        ValueError if `num_draws` is not a positive multiple of the passes of a draw."""
        objective = model.objective.bound(self.mask_sampler)
        passes, of = self.passes(model), of or num_draws
        if min(num_draws, of) < 1 or any(number % passes for number in (num_draws, start, of)):
            raise ValueError(
                f"eval.num_draws={num_draws} (in mode=classify, classify.num_draws) must be a positive multiple of "
                f"{passes}: a draw of the estimator ({objective.mask_sampler.label}) takes so many network evaluations"
            )
        draws = range(1) if objective.exact else range(start // passes, (start + num_draws) // passes)
        ids_B, group_B = batch["sample_id"], batch.get("text_id")
        noises = [evaluation_noise(seed, ids_B, k, of // passes, group_B) for k in draws]
        losses = [objective.loss(model.backbone, batch, noise) for noise in noises]
        return LikelihoodEstimate(
            torch.stack([loss.nll_BL.double().sum(-1) for loss in losses], dim=1),
            losses[0].mask_BL.sum(-1),
            torch.full_like(ids_B, len(draws) * passes * objective.encodes),
            {name: torch.cat([loss.logs[name] for loss in losses], dim=1) for name in losses[0].logs},
        )


def for_comparison(estimator: Estimator, model: BoundModel) -> Estimator:
    """Return the estimator for comparing likelihoods of one text under several models.

    Unless a mask sampler was chosen, it draws small mask counts more often. That helps a single likelihood little, but
    a difference much (docs/log.md).
    """
    if not isinstance(estimator, Nelbo):
        return estimator
    return Nelbo(comparison_mask_sampler(estimator, model.objective))


def comparison_mask_sampler(estimator: Estimator, objective: Objective) -> MaskSampler | None:
    """Return the mask sampler of `for_comparison`; None for the default of the objective."""
    chosen = estimator.mask_sampler if isinstance(estimator, Nelbo) else None
    fixed = chosen is not None or not objective.zero_loss_on_clean_text or objective.T
    return chosen if fixed else TiltedCount()
