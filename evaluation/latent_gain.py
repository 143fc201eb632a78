"""What latents say of their texts: the likelihood with the true ones, with others' and with none, on the same masks.

Shape suffixes: B batch, M rows, K draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import lightning
import numpy as np
import torch

from palimpsest.common.metrics import Estimate, Units, ratio
from palimpsest.dataloader import TextData
from palimpsest.diffusion import Diffusion
from palimpsest.estimators.base import Estimator, LikelihoodEstimate
from palimpsest.evaluation.latent_measures import partners
from palimpsest.evaluation.likelihood import Precision, Scores, row_numbers, score
from palimpsest.objectives.base import Batch, Model


@dataclass(frozen=True)
class LatentGain:
    """Nats per token of the texts of a split, as each is told something else: true, shuffled (the latents of others of
    its texts, another one for each draw), none. gain: shuffled minus true, over_none: none minus true, text by text, so
    that the noise of texts and masks that they share is not in their errors."""

    true: Estimate
    shuffled: Estimate
    none: Estimate
    gain: Estimate
    over_none: Estimate

    def results(self) -> dict[str, object]:
        """Return the numbers for results.json."""
        return {"nll_true_latents": self.true, "nll_shuffled_latents": self.shuffled, "nll_no_latents": self.none,
                "latent_gain": self.gain, "latent_gain_over_none": self.over_none}  # fmt: skip


def latent_gain(
    trainer: lightning.Trainer, diffusion: Diffusion, data: TextData, split: str, estimator: Estimator,
    precision: Precision, seed: int, none: Scores,
) -> LatentGain:  # fmt: skip
    """Measure `split` with true and shuffled latents under the masks of `none`, which was measured with hidden ones."""
    rows, rounds = data.split(split), int(none.round_K[-1]) + 1
    shuffling = Shuffling(estimator, rows, data.latents.of(split), seed)

    def measured(by: Estimator) -> Scores:
        loader = data.eval_dataloader(split, trainer=trainer)
        return score(trainer, diffusion, loader, by, precision, seed, rounds=rounds)

    true, other = measured(estimator), measured(shuffling)
    draws = other.nll_MK.shape[1] // rounds
    own_M = row_numbers(rows, other.sample_id_M)
    place_M = np.full(len(rows), len(own_M))  # of the split's rows among those that were measured
    place_M[own_M] = np.arange(len(own_M))
    giver_MK = np.stack([place_M[shuffling.giver_M(k)[own_M]] for k in range(draws)], axis=1)
    other_MK, true_MK = (s.nll_MK.reshape(len(own_M), rounds, draws).mean(1) for s in (other, true))
    shuffled, gain = (given_by_others(nats_MK, giver_MK, true.tokens_M, true.units)
                      for nats_MK in (other_MK, other_MK - true_MK))  # fmt: skip
    over_none = ratio(none.nll_M - true.nll_M, true.tokens_M, true.units)
    return LatentGain(true.per_token(), shuffled, none.per_token(), gain, over_none)


class Shuffling:
    """An estimator that tells each row the latent of another one: a further one for every draw, where the draws of
    `estimator` can be taken one by one."""

    def __init__(self, estimator: Estimator, rows: object, latents: object, seed: int) -> None:
        self.estimator, self.rows, self.latents = estimator, rows, latents
        self.kind, self.in_parts = estimator.kind, estimator.in_parts
        self.label, self.exact, self.passes = estimator.label, estimator.exact, estimator.passes
        self._givers = [partners(len(rows), seed)]

    def giver_M(self, draw: int) -> np.ndarray:
        """Whose latent each row is told: `draw` + 1 places on along one cycle through all rows, at most to half of the
        way, so that no two rows are ever told each other's."""
        draw %= max(1, (len(self._givers[0]) - 1) // 2)
        while len(self._givers) <= draw:
            self._givers.append(self._givers[0][self._givers[-1]])
        return self._givers[draw]

    def __call__(
        self, model: Model, batch: Batch, seed: int, num_draws: int, start: int = 0, of: int | None = None
    ) -> LikelihoodEstimate:
        """As of `estimator`."""
        passes = self.passes(model)
        if not self.in_parts or self.exact(model) or num_draws % passes:
            return self.estimator(model, self._told(batch, 0), seed, num_draws, start, of)
        found = [self.estimator(model, self._told(batch, k), seed, passes, start + k * passes, of or num_draws)
                 for k in range(num_draws // passes)]  # fmt: skip
        logs = {name: torch.cat([part.logs[name] for part in found], dim=1) for name in found[0].logs}
        nll_BK = torch.cat([part.nll_BK for part in found], dim=1)
        return LikelihoodEstimate(nll_BK, found[0].tokens_B, sum(part.evaluations_B for part in found), logs)

    def _told(self, batch: Batch, draw: int) -> Batch:
        own_B = row_numbers(self.rows, batch["sample_id"].cpu().numpy())
        latent_BKD = torch.from_numpy(self.latents[self.giver_M(draw)[own_B]])
        return {**batch, "latent": latent_BKD.to(batch["latent"].device)}


def given_by_others(nats_MK: np.ndarray, giver_MK: np.ndarray, tokens_M: np.ndarray, units: Units) -> Estimate:
    """Nats per token, the mean over K draws, where row m was told something of row giver_MK[m, k] in draw k.

    Each text plays two parts, as the one that is scored and as the giver, and what these add to the mean need not be
    independent: with latents that raise the likelihood of others' texts as much as they lower their own it cancels. So
    the error is over both parts of each text together, and a pair's own square, which is in both, is counted once. An
    error over scored texts alone can be several times too wide, or too narrow. Where the variance that is found is
    negative, as can happen by chance, it is that of what neither part explains (of one draw, that over scored texts).
    A giver that was not scored has the number M.
    """
    total, draws = tokens_M.sum(), nats_MK.shape[1]
    value = float(nats_MK.mean(axis=1).sum() / total)
    pair_MK = (nats_MK - value * tokens_M[:, None]) / (total * draws)
    scored_M, given_G = pair_MK.sum(axis=1), np.bincount(giver_MK.ravel(), pair_MK.ravel(), len(pair_MK) + 1)
    variance = units.variance(scored_M + given_G[:-1]) - (pair_MK**2).sum()
    if variance < 0 and draws == 1:
        variance = units.variance(scored_M)
    elif variance < 0:
        rest_MK = pair_MK - (scored_M[:, None] + given_G[giver_MK]) / draws
        variance = (rest_MK**2).sum() / (1 - 1 / draws) ** 2
    return Estimate(value, math.sqrt(variance))
