"""Token attributions: the log-likelihood ratio of two classes, token by token.

Shape suffixes: M texts, R rows of the split, L length, C classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from palimpsest.classification.models import ClassModel
from palimpsest.classification.results import ClassificationResult
from palimpsest.classification.scoring import SequentialTest
from palimpsest.common.randomness import evaluation_noise
from palimpsest.dataloader import TextData
from palimpsest.estimators.base import Estimator
from palimpsest.estimators.nelbo import Nelbo, comparison_mask_sampler


@dataclass(frozen=True)
class ExplainedText:
    """A text whose prediction is explained, by the first row of its windows."""

    text: int  # index among the scored texts
    row: int  # its first row in the split
    windows: int  # number of rows
    classes: tuple[int, int]  # the two compared classes
    nats_CL: np.ndarray  # as from `token_attributions`


def explain(
    models: Sequence[ClassModel],
    result: ClassificationResult,
    estimator: Estimator,
    test: SequentialTest,
    number: int,
    seed: int,
) -> list[ExplainedText]:
    """Return the `number` surest right predictions and as many of the surest wrong ones, with token attributions; none
    if the estimator is not a mean over masks."""
    scores = result.scores
    data, split = result.data, result.split
    log_odds_MC = scores.log_p_MC + result.log_prior_C
    ranked_MC = log_odds_MC.argsort(axis=1)[:, ::-1]
    first_M, second_M = np.take_along_axis(log_odds_MC, ranked_MC[:, :2], 1).T
    by_margin, right_M = (first_M - second_M).argsort()[::-1], ranked_MC[:, 0] == scores.label_M
    surest = [*by_margin[right_M[by_margin]][:number], *by_margin[~right_M[by_margin]][:number]]
    if not surest or not isinstance(estimator, Nelbo):
        return []
    rows = data.split(split)
    row_text_R, sample_R = np.asarray(rows["text_id"][:]), np.asarray(rows["sample_id"][:])
    windows = [np.flatnonzero(row_text_R == scores.text_id_M[m]) for m in surest]
    first = [int(text_rows[sample_R[text_rows].argmin()]) for text_rows in windows]
    draws = {row: int(scores.draws_M[m]) for row, m in zip(first, surest, strict=True)}
    nats = token_attributions(models, data, split, draws, test, estimator, seed)
    two = len(data.label_names) == 2
    return [ExplainedText(int(m), row, len(text_rows), (0, 1) if two else tuple(ranked_MC[m, :2].tolist()), nats_CL)
            for m, row, text_rows, nats_CL in zip(surest, first, windows, nats, strict=True)]  # fmt: skip


@torch.inference_mode()
def token_attributions(
    models: Sequence[ClassModel],
    data: TextData,
    split: str,
    draws: Mapping[int, int],
    test: SequentialTest,
    estimator: Estimator,
    seed: int,
) -> list[np.ndarray]:
    """Return the nats of each token in -log p(row | class), float64 (C, L) for each row; nan on unscored tokens.

    draws: row number -> how many draws the sequential test took. With the test, the estimator and the seed of the
    measurement, the sum over L is the measured value of the row.

    Raises ValueError if the estimator is not a mean over masks: its values are not sums over tokens.
    """
    if not isinstance(estimator, Nelbo):
        raise ValueError(f"the {estimator.kind} is not a sum over tokens; use eval.estimator=auto for attributions")
    noising = comparison_mask_sampler(estimator, models[0].diffusion.objective)
    device, attributions = models[0].diffusion.device, []
    for row, taken in draws.items():
        batch = {name: column.to(device) for name, column in data.collate(data.split(split)[[row]]).items()}
        by_class = []
        for model, own_seed in zip(models, test.seeds(seed, len(models)), strict=True):
            conditioned, network = model.with_conditioning(batch), model.diffusion
            objective = network.objective.bound(noising)
            passes = 1 if objective.exact else objective.mask_sampler.passes
            numbers = range(1 if objective.exact else max(taken // passes, 1))
            ids_B, group_B = batch["sample_id"], batch.get("text_id")
            noises = [evaluation_noise(own_seed, ids_B, k, test.num_draws // passes, group_B) for k in numbers]
            losses = [objective.loss(network.backbone, conditioned, noise) for noise in noises]
            nats_L = sum(loss.nll_BL[0].double() for loss in losses) / len(losses)
            by_class.append(nats_L.masked_fill(~losses[0].mask_BL[0], torch.nan))
        attributions.append(torch.stack(by_class).cpu().numpy())
    return attributions
