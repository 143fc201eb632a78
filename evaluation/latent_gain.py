"""Latent gain: the likelihood of texts under true, shuffled and no latents, with the same masks.

Shape suffixes: B batch, M rows, K draws.
"""

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
    """Nats per token of a split by condition; differences are paired by text, so that common noise cancels."""

    true: Estimate
    shuffled: Estimate  # with the latents of other texts, a different one for each draw
    none: Estimate  # unconditional
    gain: Estimate  # shuffled minus true
    over_none: Estimate  # none minus true

    def results(self) -> dict[str, object]:
        """Return the numbers for results.json."""
        return {"nll_true_latents": self.true, "nll_shuffled_latents": self.shuffled, "nll_no_latents": self.none,
                "latent_gain": self.gain, "latent_gain_over_none": self.over_none}  # fmt: skip


def latent_gain(
    trainer: lightning.Trainer,
    diffusion: Diffusion,
    data: TextData,
    split: str,
    estimator: Estimator,
    precision: Precision,
    seed: int,
    none: Scores,
) -> LatentGain:
    """Measure `split` with true and shuffled latents, under the masks of the unconditional measurement `none`."""
    rows, rounds = data.split(split), int(none.round_K[-1]) + 1
    shuffling = ShuffledLatents(estimator, rows, data.latents.of(split), seed)

    def measured(by: Estimator) -> Scores:
        loader = data.eval_dataloader(split, trainer=trainer)
        return score(trainer, diffusion, loader, by, precision, seed, rounds=rounds)

    true, other = measured(estimator), measured(shuffling)
    draws = other.nll_MK.shape[1] // rounds
    own_M = row_numbers(rows, other.sample_id_M)
    place_M = np.full(len(rows), len(own_M))  # of the split's rows among those that were measured
    place_M[own_M] = np.arange(len(own_M))
    donor_MK = np.stack([place_M[shuffling.donor_M(k)[own_M]] for k in range(draws)], axis=1)
    other_MK, true_MK = (s.nll_MK.reshape(len(own_M), rounds, draws).mean(1) for s in (other, true))
    shuffled, gain = (
        shuffled_nats_per_token(nats_MK, donor_MK, true.tokens_M, true.units)
        for nats_MK in (other_MK, other_MK - true_MK)
    )
    over_none = ratio(none.nll_M - true.nll_M, true.tokens_M, true.units)
    return LatentGain(true.per_token(), shuffled, none.per_token(), gain, over_none)


class ShuffledLatents:
    """An estimator that gives each row the latent of another row, a different one for every draw if possible."""

    def __init__(self, estimator: Estimator, rows: object, latents: object, seed: int) -> None:
        self.estimator = estimator
        self.rows, self.latents = rows, latents
        self.kind, self.in_parts = estimator.kind, estimator.in_parts
        self.label, self.exact = estimator.label, estimator.exact
        self.passes = estimator.passes
        self._donors = [partners(len(rows), seed)]

    def donor_M(self, draw: int) -> np.ndarray:
        """Return the row whose latent each row gets: `draw` + 1 places along a cycle through all rows.

        It lies at most half of the cycle away, so that no two rows ever get each other's latent.
        """
        draw %= max(1, (len(self._donors[0]) - 1) // 2)
        while len(self._donors) <= draw:
            self._donors.append(self._donors[0][self._donors[-1]])
        return self._donors[draw]

    def __call__(
        self, model: Model, batch: Batch, seed: int, num_draws: int, start: int = 0, of: int | None = None
    ) -> LikelihoodEstimate:
        """Measure as `estimator` does."""
        passes = self.passes(model)
        if not self.in_parts or self.exact(model) or num_draws % passes:
            return self.estimator(model, self._with_donor(batch, 0), seed, num_draws, start, of)
        parts = [self.estimator(model, self._with_donor(batch, k), seed, passes, start + k * passes, of or num_draws)
                 for k in range(num_draws // passes)]  # fmt: skip
        logs = {name: torch.cat([part.logs[name] for part in parts], dim=1) for name in parts[0].logs}
        nll_BK = torch.cat([part.nll_BK for part in parts], dim=1)
        return LikelihoodEstimate(nll_BK, parts[0].tokens_B, sum(part.evaluations_B for part in parts), logs)

    def _with_donor(self, batch: Batch, draw: int) -> Batch:
        row_B = row_numbers(self.rows, batch["sample_id"].cpu().numpy())
        latent_BKD = torch.from_numpy(self.latents[self.donor_M(draw)[row_B]])
        return {**batch, "latent": latent_BKD.to(batch["latent"].device)}


def shuffled_nats_per_token(nats_MK: np.ndarray, donor_MK: np.ndarray, tokens_M: np.ndarray, units: Units) -> Estimate:
    """Return nats per token, the mean over K draws, where row m has the latent of row donor_MK[m, k] in draw k.

    Each text is scored once and donates its latent once, and these two contributions may be correlated. So the error
    is over both contributions of each text together; the square of a pair, which is in both, counts once. If the
    estimated variance is negative, which can happen by chance, the variance unexplained by either contribution is used
    (of one draw: that over scored texts). A donor that was not scored has the number M.
    """
    total, draws = tokens_M.sum(), nats_MK.shape[1]
    value = float(nats_MK.mean(axis=1).sum() / total)
    pair_MK = (nats_MK - value * tokens_M[:, None]) / (total * draws)
    scored_M, donated_M = pair_MK.sum(axis=1), np.bincount(donor_MK.ravel(), pair_MK.ravel(), len(pair_MK) + 1)
    variance = units.variance(scored_M + donated_M[:-1]) - (pair_MK**2).sum()
    if variance < 0 and draws == 1:
        variance = units.variance(scored_M)
    elif variance < 0:
        rest_MK = pair_MK - (scored_M[:, None] + donated_M[donor_MK]) / draws
        variance = (rest_MK**2).sum() / (1 - 1 / draws) ** 2
    return Estimate(value, math.sqrt(variance))
