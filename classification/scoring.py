"""Likelihood of every text of a split under every class, with common masks, until each prediction is certain.

Shape suffixes: B rows of a batch, M texts, C classes, K draws, P network passes, R rows.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import lightning
import numpy as np
import torch
from torch import Tensor

from palimpsest.classification.bayes import averaged_posterior, posterior_interval
from palimpsest.classification.models import ClassModel
from palimpsest.classification.sequential_test import undecided
from palimpsest.common.randomness import hash_seed
from palimpsest.common.values import Count, real
from palimpsest.dataloader import TextData
from palimpsest.estimators.base import Estimator
from palimpsest.estimators.nelbo import for_comparison
from palimpsest.evaluation.devices import map_over_devices
from palimpsest.evaluation.likelihood import row_numbers
from palimpsest.objectives.base import Batch, scored_mask

# Network evaluations per text and class after which the sequential test is applied.
_LOOKS = (4, 6, 8, 12, 16, 24, 32, 48)


@dataclass(frozen=True)
class SequentialTest:
    """Number of draws of a text, and the rule that stops them."""

    num_draws: Count  # maximum network evaluations per text and class
    confidence: Annotated[float, real("(0.5, 1]")] = 1.0  # at which a text stops; 1: never
    masks: Literal["common", "independent"] = "common"  # independent masks per class are less accurate

    def check(self, estimator: Estimator) -> None:
        """Raise ValueError for an estimator whose draws cannot be taken a few at a time."""
        if self.confidence < 1 and not estimator.in_parts:
            raise ValueError(
                f"classify.confidence={self.confidence} stops drawing early, but the value of the {estimator.kind} "
                "depends on the number of draws; set classify.confidence=1 or another eval.estimator"
            )

    def seeds(self, seed: int, number: int) -> list[int]:
        """Return the seed of the masks of each of `number` models."""
        return [seed if self.masks == "common" else hash_seed(seed, model) for model in range(number)]

    def looks(self, passes: int, watched: bool = False) -> list[int]:
        """Return after how many evaluations to test, in whole draws of `passes`; if `watched`, also without a test."""
        if self.confidence == 1 and not watched:
            return [self.num_draws]
        whole = [look for look in _LOOKS if look % passes == 0 and look < self.num_draws]
        return [*whole, self.num_draws]


@dataclass(frozen=True)
class ClassScores:
    """Measurements, one row per text."""

    text_id_M: np.ndarray
    label_M: np.ndarray  # the true class
    nats_MCP: np.ndarray  # each pass's estimate of -log p(text | class); nan if the text had stopped
    rate_MP: np.ndarray  # share of tokens masked; nan as above
    passes: int  # of a draw
    tokens_M: np.ndarray  # scored tokens
    evaluations_M: np.ndarray  # of the network, over all classes
    seconds: float  # of the whole measurement
    kind: str  # this and the next two: as in evaluation/likelihood.py
    label: str
    exact: bool
    draws_per_pass: int = 1  # more than 1 if the estimator is not the mean of its draws
    weight_MP: np.ndarray | None = None  # of the masked tokens, scaled so that the mean over masks is `tokens_M`

    @property
    def nats_MCK(self) -> np.ndarray:
        """Nats by draw."""
        return self.nats_MCP.reshape(*self.nats_MCP.shape[:2], -1, self.passes).mean(-1)

    @property
    def evaluations_per_text(self) -> float:
        return float(self.evaluations_M.mean())

    @property
    def log_p_MC(self) -> np.ndarray:
        """Estimates of log p(text | class), nats."""
        return -np.nanmean(self.nats_MCP, axis=2)

    def posterior(self, log_prior_C: np.ndarray, draws: int | None = None) -> np.ndarray:
        """Return p(class | text) (M, C), averaged over the Monte Carlo error; of the first `draws` draws, if given."""
        return averaged_posterior(self.nats_MCK[:, :, :draws], log_prior_C)

    def interval(self, log_prior_C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the ends of the 95 % interval of `posterior`, (M, C) each, which has it inside.

        The posterior shrinks log-odds that few draws leave uncertain, the interval does not.
        """
        posterior_MC = self.posterior(log_prior_C)
        if self.exact:
            return posterior_MC, posterior_MC
        low_MC, high_MC = posterior_interval(self.nats_MCK, log_prior_C)
        return np.minimum(low_MC, posterior_MC), np.maximum(high_MC, posterior_MC)

    @property
    def se_MC(self) -> np.ndarray:
        """Monte Carlo error of `log_p_MC`, mostly common to the classes (see `margin_se_M`); nan from a single draw."""
        return self._error(self.nats_MCK)

    @property
    def margin_M(self) -> np.ndarray:
        """log p(text | winner) - log p(text | runner-up), nats, without priors."""
        ranked_MC = np.sort(self.log_p_MC, axis=1)
        return ranked_MC[:, -1] - ranked_MC[:, -2]

    @property
    def margin_se_M(self) -> np.ndarray:
        """Monte Carlo error of `margin_M`."""
        first_M, second_M = np.argsort(-self.log_p_MC, axis=1)[:, :2].T
        rows_M = np.arange(len(first_M))
        return self._error((self.nats_MCK[rows_M, second_M] - self.nats_MCK[rows_M, first_M])[:, None])[:, 0]

    def _error(self, draws_MCK: np.ndarray) -> np.ndarray:
        """Return the standard error of the mean over draws, (M, C); 0 if the likelihood is exact."""
        if self.exact:
            return np.zeros(draws_MCK.shape[:2])
        count_M1 = np.isfinite(draws_MCK[:, 0]).sum(-1)[:, None]
        several_M = count_M1[:, 0] > 1
        se_MC = np.full(draws_MCK.shape[:2], np.nan)
        se_MC[several_M] = np.nanstd(draws_MCK[several_M], axis=2, ddof=1) / np.sqrt(count_M1[several_M])
        return se_MC

    @property
    def has_masks(self) -> bool:
        """Return True if some pass masked tokens."""
        return bool(np.nanmax(self.rate_MP, initial=0.0) > 0)

    @property
    def has_several_draws(self) -> bool:
        """Return True if a text was drawn more than once."""
        return not self.exact and self.nats_MCK.shape[2] > 1

    @property
    def draws_M(self) -> np.ndarray:
        """Masks (orders) per class that each text took."""
        return np.isfinite(self.nats_MCP[:, 0]).sum(-1) * self.draws_per_pass

    @property
    def evaluations_per_draw(self) -> float:
        """Network evaluations of a text under a class for each of its draws; of a text in windows several."""
        return float(self.evaluations_M.sum() / (self.draws_M.sum() * self.nats_MCP.shape[1]))


def score_classes(
    trainer: Callable[[str], lightning.Trainer],
    models: Sequence[ClassModel],
    data: TextData,
    split: str,
    estimator: Estimator,
    test: SequentialTest,
    seed: int,
    log_prior_C: np.ndarray,
    watch: Callable[[ClassScores], None] | None = None,
) -> ClassScores:
    """Measure every text of `split` (a text's windows together) under every class.

    Args:
        trainer: title -> Trainer, for a round of draws.
        watch: receives the scores so far after each round.

    Raises:
        ValueError: the draws do not fit the estimator.
    """
    model = models[0].diffusion.model
    estimator = for_comparison(estimator, model)
    exact, passes = estimator.exact(model), estimator.passes(model)
    networks = torch.nn.ModuleList(dict.fromkeys(m.diffusion for m in models))
    rows = data.split(split)
    row_text_R = np.asarray(rows["text_id"])
    text_id_M, first_M, text_R = np.unique(row_text_R, return_index=True, return_inverse=True)
    active_M = np.ones(len(text_id_M), dtype=bool)
    nats: list[np.ndarray] = []
    rates: list[np.ndarray] = []
    weights: list[np.ndarray] = []
    tokens_M, evaluations_M = None, np.zeros(len(text_id_M), dtype=int)
    start, done = time.perf_counter(), 0
    for look in [test.num_draws] if exact else test.looks(passes, watch is not None and estimator.in_parts):
        title = f"score {active_M.sum():,} of {len(active_M):,} texts, evaluations {done + 1}–{look}"
        round_trainer, draws = trainer(title), _draws(models, estimator, seed, test, range(done, look))
        loader = data.eval_dataloader(split, np.flatnonzero(active_M[text_R]), round_trainer)
        found = map_over_devices(round_trainer, networks, draws, loader)
        if len(found["sample_id"]) != active_M[text_R].sum():
            raise ValueError(
                f"of {active_M[text_R].sum()} rows only {len(found['sample_id'])} were scored, and mode=classify "
                "scores every text: set trainer.limit_test_batches=1.0, and limit the texts with data.max_test_texts"
            )
        text_of = text_R[row_numbers(rows, found["sample_id"])]
        nats_MCP, rate_MP, weight_MP, tokens = _by_text(found, text_of, len(text_id_M))
        tokens_M = tokens if tokens_M is None else tokens_M
        np.add.at(evaluations_M, text_of, found["evaluations"])
        for gathered, new in ((nats, nats_MCP), (rates, rate_MP), (weights, weight_MP)):
            new[~active_M] = np.nan
            gathered.append(new)
        done = look
        scores = ClassScores(
            text_id_M,
            np.asarray(rows["label"])[first_M],
            np.concatenate(nats, axis=2),
            np.concatenate(rates, axis=1),
            passes if not exact else 1,
            tokens_M,
            evaluations_M,
            time.perf_counter() - start,
            estimator.kind,
            estimator.label(model, test.num_draws),
            exact,
            1 if exact or estimator.in_parts else test.num_draws,
            np.concatenate(weights, axis=1),
        )
        if watch is not None:
            watch(scores)
        if look < test.num_draws and not exact:
            active_M = undecided(scores.nats_MCK, log_prior_C, test.confidence, tokens_M)
        if not active_M.any():
            break
    return scores


def _draws(
    models: Sequence[ClassModel], estimator: Estimator, seed: int, test: SequentialTest, part: range
) -> Callable[[Batch], dict[str, Tensor]]:
    """Return a function that measures a batch under every class: the evaluations `part` of `num_draws`."""
    seeds = test.seeds(seed, len(models))

    def measure(batch: Batch) -> dict[str, Tensor]:
        found = [
            estimator(m.diffusion.model, m.with_conditioning(batch), seed, len(part), part.start, test.num_draws)
            for m, seed in zip(models, seeds, strict=True)
        ]
        nats_BCP = torch.stack([f.logs.get("nats", f.nll_BK).double() for f in found], dim=1)
        masked_BP = found[0].logs.get("num_masked", torch.zeros_like(nats_BCP[:, 0]))
        weight_BP = found[0].logs.get("weight", torch.ones_like(nats_BCP[:, 0]))
        expected_B = scored_mask(batch).sum(-1) if "weight" in found[0].logs else torch.ones_like(found[0].tokens_B)
        weight_BP = weight_BP * (found[0].tokens_B / expected_B.clamp(min=1))[:, None]
        return {
            "sample_id": batch["sample_id"],
            "nats": nats_BCP,
            "num_masked": masked_BP.double(),
            "weight": weight_BP,
            "tokens": found[0].tokens_B,
            "evaluations": sum(f.evaluations_B for f in found),
        }

    return measure


def _by_text(
    found: dict[str, np.ndarray], text_of: np.ndarray, num_texts: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Sum over the rows of each text: nats (M, C, P), share of masked tokens and their weight (M, P), tokens (M,)."""
    totals = []
    for part in (found[name] for name in ("nats", "num_masked", "weight", "tokens")):
        totals.append(np.zeros((num_texts, *part.shape[1:])))
        np.add.at(totals[-1], text_of, part)
    nats_MCP, masked_MP, weight_MP, tokens_M = totals
    return nats_MCP, masked_MP / np.maximum(tokens_M, 1)[:, None], weight_MP, tokens_M
