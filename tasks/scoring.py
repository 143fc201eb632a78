"""Likelihood of every text of a split, by the objective's own loss under evaluation noise.

Shape suffixes: B batch, M texts of the split, K draws, L length.
"""

from __future__ import annotations

from dataclasses import dataclass

import lightning
import numpy as np
import torch
import torch.distributed
from torch import Tensor

from diffusion import Diffusion
from metrics import Estimate, NLLMeter
from objectives.base import Batch


@dataclass(frozen=True)
class Scores:
    """What was measured, one row per text, sorted by sample id.

    nll_MK: nats, an unbiased draw each of the bound on -log p(text). tokens_M: scored tokens.
    cross_entropy_MK, num_masked_MK: summed cross-entropy (nats) of the masked tokens of a draw, and their number.
    """

    sample_id_M: np.ndarray
    nll_MK: np.ndarray
    tokens_M: np.ndarray
    cross_entropy_MK: np.ndarray
    num_masked_MK: np.ndarray

    @property
    def nll_M(self) -> np.ndarray:
        """Nats per text, the mean over its draws."""
        return self.nll_MK.mean(axis=1)

    @property
    def monte_carlo_se_M(self) -> np.ndarray:
        """Standard error of `nll_M` from the draws alone; nan from a single draw. Conservative: the draws are
        stratified, which this ignores."""
        draws = self.nll_MK.shape[1]
        if draws < 2:
            return np.full(len(self.nll_MK), np.nan)
        return self.nll_MK.std(axis=1, ddof=1) / np.sqrt(draws)

    def per_token(self) -> Estimate:
        """Nats per token of the split, with its standard error over texts."""
        meter = NLLMeter()
        meter.update(torch.from_numpy(self.nll_M), torch.from_numpy(self.tokens_M))
        return meter.estimate()

    def by_mask_rate(self, num_bins: int = 10) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Cross-entropy in nats per masked token against the share of masked tokens: (rate, nats, standard error)."""
        rate = (self.num_masked_MK / self.tokens_M[:, None]).ravel()
        ce, masked = self.cross_entropy_MK.ravel(), self.num_masked_MK.ravel()
        bins = np.clip((rate * num_bins).astype(int), 0, num_bins - 1)
        rows = []
        for index in range(num_bins):
            here = (bins == index) & (masked > 0)
            if not here.any():
                continue
            meter = NLLMeter()
            meter.update(torch.from_numpy(ce[here]), torch.from_numpy(masked[here]))
            estimate = meter.estimate()
            rows.append((rate[here].mean(), estimate.value, estimate.se))
        return tuple(np.array(column) for column in zip(*rows, strict=True)) if rows else (np.zeros(0),) * 3


class Scorer(lightning.LightningModule):
    """Lets a Lightning Trainer (devices, precision, progress) score a split with `num_draws` draws a text."""

    def __init__(self, diffusion: Diffusion, num_draws: int, seed: int) -> None:
        super().__init__()
        if num_draws < 1:
            raise ValueError(f"eval.num_draws={num_draws} must be at least 1")
        self.diffusion, self.num_draws, self.seed = diffusion, num_draws, seed
        self.measured: list[dict[str, Tensor]] = []

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        losses = [self.diffusion.loss(batch, k, self.num_draws, self.seed) for k in range(self.num_draws)]
        self.measured.append({
            "sample_id": batch["sample_id"].cpu(),
            "tokens": losses[0].mask_BL.sum(-1).cpu(),
            "nll": torch.stack([loss.nll_BL.double().sum(-1) for loss in losses], dim=1).cpu(),
            "cross_entropy": torch.stack([loss.logs["cross_entropy"].double() for loss in losses], dim=1).cpu(),
            "num_masked": torch.stack([loss.logs["num_masked"] for loss in losses], dim=1).cpu(),
        })  # fmt: skip


def score(trainer: lightning.Trainer, diffusion: Diffusion, loader: object, num_draws: int, seed: int) -> Scores:
    """Score every text that `loader` yields, on all of the trainer's devices."""
    scorer = Scorer(diffusion, num_draws, seed)
    trainer.test(scorer, loader, verbose=False)
    batches = scorer.measured
    if trainer.world_size > 1:
        gathered: list = [None] * trainer.world_size
        torch.distributed.all_gather_object(gathered, batches)
        batches = [batch for rank in gathered for batch in rank]
    if not batches:
        raise ValueError("there is nothing to score: the split is empty")
    columns = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    order = columns["sample_id"].argsort()
    rows = {name: column[order].numpy() for name, column in columns.items()}
    return Scores(rows["sample_id"], rows["nll"], rows["tokens"], rows["cross_entropy"], rows["num_masked"])
