"""algo=mlm: a masked language model trained over all mask rates, which makes it one that writes text.

BERT is trained with one rate. With rates up to 1 the same cross-entropy is the objective of masked diffusion but for
its weights (Mask-Predict, Ghazvininejad et al., arXiv 1904.09324; MDLM, Sahoo et al., arXiv 2406.07524,
eq. 11). So the law is SUBS, and what is measured is always its bound.

Shape suffixes: B batch, L length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from palimpsest.common.randomness import KeyedNoise
from palimpsest.common.values import COPY, RATES, Natural, Share
from palimpsest.noise_schedule import NoiseSchedule
from palimpsest.objectives.base import Backbone, Batch, TokenDiffusion, scored_mask
from palimpsest.objectives.noising import Noised, Noising, order_statistic, shuffled, weighted
from palimpsest.objectives.subs import Subs
from palimpsest.process import Absorbing


class MaskedLM(Subs):
    """SUBS as algo=mlm trains it: the plain cross-entropy of the masked tokens, under rates of one's choice. Special
    tokens are never masked.

    These weights are measured and sampled as any of parameterization=subs, and those as these.
    """

    name = "subs"
    masks_special = False

    def __init__(
        self,
        schedule: NoiseSchedule,
        process: Absorbing,
        noising: Noising | None = None,
        T: Natural = 0,  # noqa: N803 - the key as users type it
        loss_weight: Literal["elbo", "uniform"] = "uniform",
        change_of_variables: bool = False,
    ) -> None:
        super().__init__(schedule, process, noising, T, loss_weight, change_of_variables)


class Rates:
    """A mask rate first, then each scored token masked with that chance; at least one, where a row has any.

    Args:
        rates: to choose from, each as likely as the others; or "continuous" for all between `rate_min` and `rate_max`.
        rate_min, rate_max: limits of the continuous rates; of a list they say nothing.
        per: "sample", a rate of its own for each row; "batch", one for all rows of an optimizer step.
        antithetic_sampling: the rows of an optimizer step take rates spread evenly, else independent ones.

    Only continuous rates from 0 to 1 draw from the whole integral of the bound, so only they can train by its weights.

    Raises:
        ValueError: limits that are none, or that no continuous rates have.
    """

    passes = 1
    discrete = False
    changes_variables = False
    all_rates = True
    counts = True

    def __init__(
        self,
        rates: Annotated[Sequence[float], RATES, COPY] | Literal["continuous"] = "continuous",
        rate_min: Annotated[Share, COPY] = 0.1,
        rate_max: Annotated[Share, COPY] = 1.0,
        per: Annotated[Literal["sample", "batch"], COPY] = "sample",
        antithetic_sampling: bool = True,
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

    @property
    def label(self) -> str:
        """For messages."""
        if self.rates is None:
            return f"mask rates from {self.low:g} to {self.high:g}"
        return f"{len(self.rates)} mask rates"

    @property
    def of_the_bound(self) -> bool:
        """Whether the mean of the draws is the bound."""
        return self.rates is None and (self.low, self.high) == (0, 1)

    def __call__(
        self, schedule: NoiseSchedule, x0_BL: Tensor, scored_BL: Tensor, process: Absorbing, noise: KeyedNoise
    ) -> list[Noised]:
        spread = noise.time if self.antithetic_sampling else noise.uniform
        u_B = noise.shared() if self.per == "batch" else spread()
        rate_B, u_BL = self._rate(u_B), noise.uniform(x0_BL.shape[1]).masked_fill(~scored_BL, torch.inf)
        least_B1 = u_BL.min(-1, keepdim=True).values
        masked_BL = ((u_BL < rate_B[:, None]) | (u_BL == least_B1)) & scored_BL
        xt_BL = process.mask(x0_BL, masked_BL)
        if not self.of_the_bound:
            return [weighted(schedule, xt_BL, rate_B, 1 / rate_B)]
        # 1 / rate has no finite variance. It is replaced by its mean over the rates that give this mask, k of n tokens,
        # and the rate by a draw of its distribution given k under the weight 1 / rate, which is Beta(k, n - k + 1) as
        # in `ExactCount`. A mask that is there only because a row needs one weighs nothing.
        n_B, k_B = scored_BL.sum(-1), masked_BL.sum(-1).clamp(min=1)
        factor_B = torch.where(least_B1.squeeze(1) < rate_B, (n_B + 1) / k_B, 0.0)
        return [weighted(schedule, xt_BL, order_statistic(shuffled(noise, scored_BL), k_B), factor_B)]

    def _rate(self, u_B: Tensor) -> Tensor:
        """Rates from uniform numbers: above `low`, up to `high`, float64 (B,)."""
        if self.rates is None:
            return self.high - u_B * (self.high - self.low)
        rates_R = self.rates.to(u_B.device)
        return rates_R[(u_B * len(rates_R)).long().clamp(max=len(rates_R) - 1)]


def cross_entropy_at(
    objective: TokenDiffusion, backbone: Backbone, batch: Batch, rate: float, noise: KeyedNoise
) -> tuple[Tensor, Tensor]:
    """Of a batch with each scored token masked with chance `rate`: the summed cross-entropy of the masked ones [nats],
    float64, and their number."""
    (look,) = Rates([rate])(objective.schedule, batch["input_ids"], scored_mask(batch), objective.process, noise)
    logs = objective.loss_at(backbone, batch, look.xt_BL, look.t_B).logs
    return logs["cross_entropy"].double().sum(), logs["num_masked"].sum()
