"""algo=mlm: a masked language model trained over all mask rates, so that it can generate texts.

BERT is trained with one rate. With rates up to 1 the same cross-entropy is the objective of masked diffusion except
for its weights (Mask-Predict, Ghazvininejad et al., arXiv 1904.09324; MDLM, Sahoo et al., arXiv 2406.07524, eq. 11).
So the model is that of SUBS, and evaluation always uses its bound.

Shape suffixes: B batch, L length.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from palimpsest.common.randomness import KeyedNoise
from palimpsest.common.values import COPY, RATES, Natural, Needs, Share
from palimpsest.noise_schedule import NoiseSchedule
from palimpsest.objectives.base import Backbone, Batch, TokenDiffusion, scored_mask
from palimpsest.objectives.mask_sampling import Draw, MaskSampler, order_statistic, shuffle_keys, weighted
from palimpsest.objectives.subs import Subs
from palimpsest.process import Absorbing


class MaskedLM(Subs):
    """SUBS trained by the plain cross-entropy of the masked tokens; special tokens are never masked.

    Its weights are evaluated and sampled exactly like those of parameterization=subs.
    """

    name = "subs"  # in the fingerprints of its trainings, whose weights are those of subs
    masks_special = False

    def __init__(
        self,
        schedule: NoiseSchedule,
        process: Absorbing,
        noising: MaskSampler | None = None,
        T: Natural = 0,  # noqa: N803
        loss_weight: Literal["elbo", "uniform"] = "uniform",
        change_of_variables: bool = False,
    ) -> None:
        super().__init__(schedule, process, noising, T, loss_weight, change_of_variables)


class Rates(MaskSampler):
    """Draw a mask rate first, then mask each scored token with that probability; at least one per row, if it has any.

    Only continuous rates from 0 to 1 cover the integral of the bound, so only they can train with its weights. Raises
    ValueError for invalid limits, and for limits with a list of rates.

    Args:
        rates: a list to choose from uniformly, or "continuous" for all rates between `rate_min` and `rate_max`.
        rate_min, rate_max: limits of continuous rates.
        per: "sample" for a rate per row, "batch" for one rate for all rows of an optimizer step.
        antithetic_sampling: spread the rates of an optimizer step evenly; otherwise they are independent.
    """

    def __init__(
        self,
        rates: Annotated[Sequence[float], RATES, COPY] | Literal["continuous"] = "continuous",
        rate_min: Annotated[Share, COPY] = 0.1,
        rate_max: Annotated[Share, COPY] = 1.0,
        per: Annotated[Literal["sample", "batch"], COPY] = "sample",
        antithetic_sampling: Annotated[bool, Needs("per", ("sample",))] = True,
    ) -> None:
        continuous = isinstance(rates, str)
        if continuous and rate_min >= rate_max:
            raise ValueError(f"training.masking_rate_min={rate_min} must be below training.masking_rate_max={rate_max}")
        if not continuous and (rate_min, rate_max) != (0.1, 1.0):
            raise ValueError(
                f"training.masking_rate_min={rate_min} training.masking_rate_max={rate_max} limit "
                "training.masking_rates=continuous, and they are a list; leave one of them out"
            )
        self.per = per
        self.antithetic_sampling = antithetic_sampling
        self.rates = None if continuous else torch.tensor(list(rates), dtype=torch.float64)
        self.low = rate_min
        self.high = rate_max
        self.estimates_bound = continuous and (rate_min, rate_max) == (0, 1)
        self.label = f"mask rates from {rate_min:g} to {rate_max:g}" if continuous else f"{len(rates)} mask rates"

    def __call__(
        self, schedule: NoiseSchedule, x0_BL: Tensor, scored_BL: Tensor, process: Absorbing, noise: KeyedNoise
    ) -> list[Draw]:
        row_times = noise.time if self.antithetic_sampling else noise.uniform
        u_B = noise.shared() if self.per == "batch" else row_times()
        rate_B, u_BL = self._rate(u_B), noise.uniform(x0_BL.shape[1]).masked_fill(~scored_BL, torch.inf)
        least_B1 = u_BL.min(-1, keepdim=True).values
        masked_BL = ((u_BL < rate_B[:, None]) | (u_BL == least_B1)) & scored_BL
        xt_BL = process.mask(x0_BL, masked_BL)
        if not self.estimates_bound:
            return [weighted(schedule, xt_BL, rate_B, 1 / rate_B)]
        # 1 / rate has no finite variance. It is replaced by its mean over the rates that give k of n masks. The rate is
        # drawn from its distribution given k under the weight 1 / rate: Beta(k, n - k + 1), as in `ExactCount`.
        # A mask that exists only because every row needs one has weight 0.
        n_B, k_B = scored_BL.sum(-1), masked_BL.sum(-1).clamp(min=1)
        factor_B = torch.where(least_B1.squeeze(1) < rate_B, (n_B + 1) / k_B, 0.0)
        return [weighted(schedule, xt_BL, order_statistic(shuffle_keys(noise, scored_BL), k_B), factor_B)]

    def _rate(self, u_B: Tensor) -> Tensor:
        """Return rates above `low` and up to `high` from uniform numbers, float64 (B,)."""
        if self.rates is None:
            return self.high - u_B * (self.high - self.low)
        self.rates = self.rates.to(u_B.device)
        return self.rates[(u_B * len(self.rates)).long().clamp(max=len(self.rates) - 1)]


def cross_entropy_at(
    objective: TokenDiffusion, backbone: Backbone, batch: Batch, rate: float, noise: KeyedNoise
) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy [nats, float64] and the number of masked tokens at a mask rate of `rate`."""
    (draw,) = Rates([rate])(objective.schedule, batch["input_ids"], scored_mask(batch), objective.process, noise)
    logs = objective.loss_at(backbone, batch, draw).logs
    return logs["cross_entropy"].double().sum(), logs["num_masked"].sum()
