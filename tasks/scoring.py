"""Likelihood of every text of a split, by an estimator, on all devices, to a wanted precision.

Shape suffixes: B batch, M texts of the split, K draws, P network passes, R rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import lightning
import numpy as np
import torch
import torch.distributed
from torch import Tensor

from palimpsest.common.metrics import UNIT_COLUMNS, Estimate, Units, ratio
from palimpsest.common.randomness import hash_seed
from palimpsest.diffusion import Diffusion
from palimpsest.estimators.base import Estimator
from palimpsest.objectives.base import Batch, scored_mask


@dataclass(frozen=True)
class Scores:
    """What was measured, one row per text (of wrapped data, per row), sorted by sample id.

    kind: what the numbers estimate. label: how. exact: without Monte Carlo error. causal: the first token of a row is
    context, and its ending is scored. nll_MK: nats, one column per draw, of which the mean is the estimate. round_K:
    the round of draws each column belongs to. tokens_M: tokens that count. maskable_M: those that can be masked, the
    fill behind a text among them. evaluations_M: network evaluations spent.
    cross_entropy_MP, num_masked_MP: summed cross-entropy (nats) of the masked tokens of a pass, and their number.
    units: what the errors are over.
    """

    kind: str
    label: str
    exact: bool
    causal: bool
    sample_id_M: np.ndarray
    nll_MK: np.ndarray
    round_K: np.ndarray
    tokens_M: np.ndarray
    maskable_M: np.ndarray
    evaluations_M: np.ndarray
    cross_entropy_MP: np.ndarray
    num_masked_MP: np.ndarray
    units: Units

    @property
    def nll_M(self) -> np.ndarray:
        """Nats per text, the mean over its draws."""
        return self.nll_MK.mean(axis=1)

    @property
    def monte_carlo_se(self) -> float:
        """Standard error of the nats per token of the split that comes from the draws alone, the texts being given; 0
        for exact likelihoods, nan from a single draw. From the rounds where there are several, else from the draws of
        the one round, which is conservative: they are stratified, and this ignores it. The windows of a text share
        their times, so a text's draws are summed over its windows first."""
        means_MK = self.nll_MK
        if self.units.name == "texts":
            text_M = np.unique(self.units.first_M, return_inverse=True)[1]
            means_MK = np.zeros((text_M.max() + 1, self.nll_MK.shape[1]))
            np.add.at(means_MK, text_M, self.nll_MK)
        if self.round_K[-1] > 0:
            means_MK = np.stack([means_MK[:, self.round_K == r].mean(1) for r in range(self.round_K[-1] + 1)], 1)
        draws = means_MK.shape[1]
        if draws < 2:
            return 0.0 if self.exact else np.nan
        return float(np.sqrt(means_MK.var(axis=1, ddof=1).sum() / draws) / self.tokens_M.sum())

    def per_token(self) -> Estimate:
        """Nats per token of the split, with its standard error over the units."""
        return ratio(self.nll_M, self.tokens_M, self.units)

    def by_mask_rate(self, num_bins: int = 10) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Cross-entropy in nats per masked token against the share of masked tokens: (rate, nats, standard error);
        empty where nothing was masked. The passes of a text are summed first, as they are not independent."""
        rate_MP = self.num_masked_MP / np.maximum(self.maskable_M[:, None], 1)
        bin_MP = np.clip((rate_MP * num_bins).astype(int), 0, num_bins - 1)
        rows = []
        for index in range(num_bins):
            here_MP = (bin_MP == index) & (self.num_masked_MP > 0)
            here_M = here_MP.any(axis=1)
            if not here_M.any():
                continue
            nats_M, masked_M = ((column_MP * here_MP).sum(axis=1)[here_M]
                                for column_MP in (self.cross_entropy_MP, self.num_masked_MP))  # fmt: skip
            estimate = ratio(nats_M, masked_M, self.units[here_M])
            rows.append((rate_MP[here_MP].mean(), estimate.value, estimate.se))
        return tuple(np.array(column) for column in zip(*rows, strict=True)) if rows else (np.zeros(0),) * 3


class Scorer(lightning.LightningModule):
    """Lets a Lightning Trainer (devices, precision, progress) measure a split with an estimator."""

    def __init__(
        self, diffusion: Diffusion, estimator: Estimator, num_draws: int, seed: int, told: Callable[[Batch], Batch]
    ) -> None:
        super().__init__()
        if num_draws < 1:
            raise ValueError(f"eval.num_draws={num_draws} must be at least 1")
        self.diffusion, self.estimator, self.num_draws, self.seed = diffusion, estimator, num_draws, seed
        self.told = told
        self.measured: list[dict[str, Tensor]] = []

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        found = self.estimator(self.diffusion.model, self.told(batch), self.seed, self.num_draws)
        none = found.nll_BK.new_zeros((len(found.nll_BK), 0))
        self.measured.append({
            "sample_id": batch["sample_id"].cpu(),
            "nll": found.nll_BK.double().cpu(),
            "tokens": found.tokens_B.cpu(),
            "maskable": scored_mask(batch).sum(-1).cpu(),
            "evaluations": found.evaluations_B.cpu(),
            "cross_entropy": found.logs.get("cross_entropy", none).double().cpu(),
            "num_masked": found.logs.get("num_masked", none).cpu(),
            **{name: batch[name].cpu() for name in UNIT_COLUMNS if name in batch},
        })  # fmt: skip


@dataclass(frozen=True)
class Precision:
    """When to stop drawing. A round takes `num_draws` network evaluations per text; with a `target_se` (nats per token
    of the split, from the draws alone: `Scores.monte_carlo_se`) rounds go on until it is reached, or `max_draws` are
    spent. The error over texts, which more draws cannot bring below that of exact likelihoods, plays no part."""

    num_draws: int
    target_se: float | None = None
    max_draws: int = 1024

    def __post_init__(self) -> None:
        if self.num_draws < 1:
            raise ValueError(f"eval.num_draws={self.num_draws} must be at least 1")
        if self.target_se is not None and self.target_se <= 0:
            raise ValueError(f"eval.target_se={self.target_se} must be positive, or null for one round of draws")
        if self.target_se is not None and self.max_draws < self.num_draws:
            raise ValueError(f"eval.max_draws={self.max_draws} must be at least eval.num_draws={self.num_draws}")

    @property
    def rounds(self) -> int:
        """At most so many."""
        return 1 if self.target_se is None else self.max_draws // self.num_draws


def score(
    trainer: lightning.Trainer, diffusion: Diffusion, loader: object, estimator: Estimator, precision: Precision,
    seed: int, told: Callable[[Batch], Batch] = lambda batch: batch, rounds: int | None = None,
) -> Scores:  # fmt: skip
    """Measure every text that `loader` yields, on all of the trainer's devices. told: batch -> batch, with what the
    network is to be told beside the tokens. rounds: exactly so many, whatever the precision, to be paired with another
    measurement of so many."""
    scores: Scores | None = None
    for number in range(rounds or precision.rounds):
        scorer = Scorer(diffusion, estimator, precision.num_draws, hash_seed(seed, number), told)
        found = _round(trainer, scorer, loader)
        scores = found if scores is None else _joined(scores, found, number)
        if rounds is None and (precision.target_se is None or scores.monte_carlo_se <= precision.target_se):
            return scores
    if rounds is not None:
        return scores
    print(
        f"eval.target_se={precision.target_se} was not reached with eval.max_draws={precision.max_draws}: "
        f"the Monte Carlo error is {scores.monte_carlo_se:.2g} nats/token"
    )
    return scores


def _joined(before: Scores, new: Scores, number: int) -> Scores:
    assert (before.sample_id_M == new.sample_id_M).all()
    columns = {name: np.concatenate([getattr(before, name), getattr(new, name)], axis=1)
               for name in ("nll_MK", "cross_entropy_MP", "num_masked_MP")}  # fmt: skip
    round_K = np.concatenate([before.round_K, np.full(new.nll_MK.shape[1], number)])
    evaluations_M = before.evaluations_M + new.evaluations_M
    return replace(before, round_K=round_K, evaluations_M=evaluations_M, **columns)


def _round(trainer: lightning.Trainer, scorer: Scorer, loader: object) -> Scores:
    rows, model, estimator = measure(trainer, scorer, loader), scorer.diffusion.model, scorer.estimator
    return Scores(
        estimator.kind, estimator.label(model, scorer.num_draws), estimator.exact(model), model.objective.causal,
        rows["sample_id"], rows["nll"], np.zeros(rows["nll"].shape[1], dtype=int), rows["tokens"], rows["maskable"],
        rows["evaluations"], rows["cross_entropy"], rows["num_masked"], Units.of(rows),
    )  # fmt: skip


def measure(trainer: lightning.Trainer, scorer: lightning.LightningModule, loader: object) -> dict[str, np.ndarray]:
    """What `scorer` leaves in `measured` for every row of `loader`, by name, from all devices, sorted by sample id.

    Raises:
        ValueError: there are no rows, or a likelihood is not finite.
    """
    device = scorer.device
    trainer.test(scorer, loader, verbose=False)
    scorer.to(device)  # a trainer leaves a model on the CPU
    batches = scorer.measured
    if trainer.world_size > 1:
        gathered: list = [None] * trainer.world_size
        torch.distributed.all_gather_object(gathered, batches)
        batches = [batch for rank in gathered for batch in rank]
    if not batches:
        raise ValueError("there is nothing to score: the split is empty")
    if not all(bool(column.isfinite().all()) for batch in batches for column in batch.values()):
        raise ValueError("a likelihood is not finite: the weights or the noise schedule gave NaN or infinity")
    columns = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    order = columns["sample_id"].argsort()
    assert (columns["sample_id"][order].diff() > 0).all(), "a row was scored by two devices"
    return {name: column[order].numpy() for name, column in columns.items()}
