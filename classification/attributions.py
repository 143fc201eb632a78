"""Which tokens of a text spoke for which class: the text's log-likelihood ratio, token by token.

Shape suffixes: M texts, R rows of the split, L length, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from palimpsest.classification.models import ClassModel
from palimpsest.classification.scoring import Race
from palimpsest.classification.verdicts import Verdicts
from palimpsest.common.randomness import evaluation_noise
from palimpsest.dataloader import TextData
from palimpsest.estimators.base import Estimator
from palimpsest.estimators.nelbo import comparison_noising
from palimpsest.objectives.noising import Noising


@dataclass(frozen=True)
class Example:
    """A text whose verdict is explained, by the first row of its windows.

    text: its place among the scored texts. row: its first row in the split. windows: how many rows it has. classes: the
    two that are held against each other. nats_CL: as from `token_evidence`.
    """

    text: int
    row: int
    windows: int
    classes: tuple[int, int]
    nats_CL: np.ndarray


def explain(
    models: Sequence[ClassModel], verdicts: Verdicts, estimator: Estimator, race: Race, number: int, seed: int
) -> list[Example]:
    """Return the `number` surest of the right verdicts and of the wrong ones, with what their tokens say."""
    scores, data, split = verdicts.scores, verdicts.data, verdicts.split
    log_odds_MC = scores.log_p_MC + verdicts.log_prior_C
    ranked_MC = log_odds_MC.argsort(axis=1)[:, ::-1]
    first_M, second_M = np.take_along_axis(log_odds_MC, ranked_MC[:, :2], 1).T
    by_margin, right_M = (first_M - second_M).argsort()[::-1], ranked_MC[:, 0] == scores.label_M
    surest = [*by_margin[right_M[by_margin]][:number], *by_margin[~right_M[by_margin]][:number]]
    if not surest:
        return []
    rows = data.split(split)
    row_text_R, sample_R = np.asarray(rows["text_id"][:]), np.asarray(rows["sample_id"][:])
    windows = [np.flatnonzero(row_text_R == scores.text_id_M[m]) for m in surest]
    first = [int(mine[sample_R[mine].argmin()]) for mine in windows]
    noising = comparison_noising(estimator, models[0].diffusion.objective)
    draws = {row: int(scores.draws_M[m]) for row, m in zip(first, surest, strict=True)}
    nats = token_evidence(models, data, split, draws, race.num_draws, noising, seed)
    two = len(data.label_names) == 2
    return [Example(int(m), row, len(mine), (0, 1) if two else tuple(ranked_MC[m, :2].tolist()), nats_CL)
            for m, row, mine, nats_CL in zip(surest, first, windows, nats, strict=True)]  # fmt: skip


@torch.inference_mode()
def token_evidence(
    models: Sequence[ClassModel], data: TextData, split: str, draws: Mapping[int, int], of: int,
    noising: Noising | None, seed: int,
) -> list[np.ndarray]:  # fmt: skip
    """Return the nats of each token in -log p(row | class), float64 (C, L) for each row.

    They are nan on tokens that are not scored.

    draws: row number in the split -> how many of the `of` draws of the design it took when it was scored. With the
    `noising` and the seed of that measurement the sum over L is what it found for this row.
    """
    device, found = models[0].diffusion.device, []
    for row, taken in draws.items():
        batch = data.collate(data.split(split)[[row]])
        batch = {name: column.to(device) for name, column in batch.items()}
        by_class = []
        for model in models:
            told, network = model.with_conditioning(batch), model.diffusion
            objective = network.objective.bound(noising)
            passes = 1 if objective.exact else objective.noising.passes
            numbers = range(1 if objective.exact else max(taken // passes, 1))
            ids_B, group_B = batch["sample_id"], batch.get("text_id")
            noises = [evaluation_noise(seed, ids_B, k, of // passes, group_B) for k in numbers]
            losses = [objective.loss(network.backbone, told, noise) for noise in noises]
            nats_L = sum(loss.nll_BL[0].double() for loss in losses) / len(losses)
            by_class.append(nats_L.masked_fill(~losses[0].mask_BL[0], torch.nan))
        found.append(torch.stack(by_class).cpu().numpy())
    return found
