"""Likelihood of a split: measured by an estimator to a wanted precision, beside a unigram model and the truth.

Shape suffixes: B batch, M texts of the split, K draws, P network passes, R rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Protocol

import lightning
import numpy as np
from torch import Tensor

from palimpsest.common.metrics import UNIT_COLUMNS, Estimate, Units, ratio, ratios_by_rate
from palimpsest.common.randomness import hash_seed
from palimpsest.common.values import AtLeastOne, Count, Positive
from palimpsest.data.unigram import unigram_nll
from palimpsest.dataloader import TextData
from palimpsest.diffusion import Diffusion
from palimpsest.estimators.base import Estimator
from palimpsest.evaluation.devices import map_over_devices
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

    def columns(self) -> dict[str, np.ndarray]:
        """Return the nats and tokens of each text, with the units of the errors, (M,) each."""
        return {
            "sample_id": self.sample_id_M,
            "nats": self.nll_M,
            "tokens": self.tokens_M,
            "unit_first": self.units.first_M,
            "unit_last": self.units.last_M,
        }

    def by_mask_rate(self) -> tuple[np.ndarray, list[Estimate]]:
        """Return the shares of masked tokens, and the cross-entropy there in nats per masked token."""
        rate_MP = self.num_masked_MP / np.maximum(self.maskable_M[:, None], 1)
        return ratios_by_rate(rate_MP, self.cross_entropy_MP, self.num_masked_MP, self.units)


@dataclass(frozen=True)
class Precision:
    """When to stop drawing. A round takes `num_draws` network evaluations per text; with a `target_se` (nats per token
    of the split, from the draws alone: `Scores.monte_carlo_se`) rounds go on until it is reached, or `max_draws` are
    spent. The error over texts, which more draws cannot bring below that of exact likelihoods, plays no part."""

    num_draws: Count
    target_se: Positive | None = None
    max_draws: AtLeastOne = 1024

    def __post_init__(self) -> None:
        if self.target_se is not None and self.max_draws < self.num_draws:
            raise ValueError(f"eval.max_draws={self.max_draws} must be at least eval.num_draws={self.num_draws}")

    @property
    def rounds(self) -> int:
        """At most so many."""
        return 1 if self.target_se is None else self.max_draws // self.num_draws


def score(
    trainer: lightning.Trainer, diffusion: Diffusion, loader: object, estimator: Estimator, precision: Precision,
    seed: int, conditioned: Callable[[Batch], Batch] = lambda batch: batch, rounds: int | None = None,
) -> Scores:  # fmt: skip
    """Measure every text that `loader` yields, on all of the trainer's devices.

    Args:
        conditioned: batch -> the batch with the conditioning that the network gets beside the tokens.
        rounds: this many rounds of draws whatever the precision, to be paired with another measurement of as many.
    """
    found: list[Scores] = []
    for number in range(rounds or precision.rounds):
        found.append(_round(trainer, diffusion, loader, estimator, precision.num_draws, hash_seed(seed, number),
                            conditioned))  # fmt: skip
        scores = _joined(found)
        if rounds is None and (precision.target_se is None or scores.monte_carlo_se <= precision.target_se):
            return scores
    if rounds is None:
        print(
            f"eval.target_se={precision.target_se} was not reached with eval.max_draws={precision.max_draws}: "
            f"the Monte Carlo error is {scores.monte_carlo_se:.2g} nats/token"
        )
    return scores


def _joined(rounds: list[Scores]) -> Scores:
    """Return the draws of several rounds over the same texts as one measurement."""
    first = rounds[0]
    assert all((part.sample_id_M == first.sample_id_M).all() for part in rounds)
    columns = {name: np.concatenate([getattr(part, name) for part in rounds], axis=1)
               for name in ("nll_MK", "cross_entropy_MP", "num_masked_MP")}  # fmt: skip
    round_K = np.repeat(np.arange(len(rounds)), [part.nll_MK.shape[1] for part in rounds])
    return replace(first, round_K=round_K, evaluations_M=sum(part.evaluations_M for part in rounds), **columns)


def _round(
    trainer: lightning.Trainer, diffusion: Diffusion, loader: object, estimator: Estimator, num_draws: int, seed: int,
    conditioned: Callable[[Batch], Batch],
) -> Scores:  # fmt: skip
    model = diffusion.model

    def measure(batch: Batch) -> dict[str, Tensor]:
        found = estimator(model, conditioned(batch), seed, num_draws)
        none = found.nll_BK.new_zeros((len(found.nll_BK), 0))
        return {
            "sample_id": batch["sample_id"],
            "nll": found.nll_BK.double(),
            "tokens": found.tokens_B,
            "maskable": scored_mask(batch).sum(-1),
            "evaluations": found.evaluations_B,
            "cross_entropy": found.logs.get("cross_entropy", none).double(),
            "num_masked": found.logs.get("num_masked", none),
            **{name: batch[name] for name in UNIT_COLUMNS if name in batch},
        }

    rows = map_over_devices(trainer, diffusion, measure, loader)
    return Scores(
        estimator.kind, estimator.label(model, num_draws), estimator.exact(model), model.objective.causal,
        rows["sample_id"], rows["nll"], np.zeros(rows["nll"].shape[1], dtype=int), rows["tokens"], rows["maskable"],
        rows["evaluations"], rows["cross_entropy"], rows["num_masked"], Units.of(rows),
    )  # fmt: skip


class GroundTruth(Protocol):
    """A corpus that knows its own probabilities; natural logarithms."""

    def log_prob(self, texts: Sequence[str], label: int) -> np.ndarray: ...

    def log_prob_length(self, num_tokens: Sequence[int], label: int) -> np.ndarray: ...

    def posterior(self, texts: Sequence[str]) -> np.ndarray: ...


@dataclass(frozen=True)
class Likelihood:
    """The likelihood of a split, with what to hold it against, all in nats per scored token.

    truth: the corpus's own entropy on the same texts, where it is known. gap: model minus truth, text by text, so its
    error is far smaller than that of either. unigram: the same texts under training-set token frequencies, None for
    data without a train split.
    """

    scores: Scores
    model: Estimate
    unigram: Estimate | None
    truth: Estimate | None = None
    gap: Estimate | None = None

    def results(self) -> dict[str, object]:
        """Return the numbers for results.json."""
        return {
            "nll_nats_per_token": self.model, "perplexity": self.model.exp(), "unigram_nats_per_token": self.unigram,
            "true_nats_per_token": self.truth, "gap_nats_per_token": self.gap, "units": self.scores.units.name,
            "num_units": len(self.scores.units),
        }  # fmt: skip


def likelihood(data: TextData, split: str, scores: Scores, truth: GroundTruth | None) -> Likelihood:
    """Hold measured scores of `split` against a unigram model and, where the corpus knows it, the true entropy."""
    rows_M = row_numbers(data.split(split), scores.sample_id_M)
    unigram = None
    if "train" in data.splits:
        unigram = ratio(unigram_nll(data, split, scores.causal)[rows_M], scores.tokens_M, scores.units)
    if truth is None:
        return Likelihood(scores, scores.per_token(), unigram)
    given_length = not scores.causal and data.fill is None
    true_nll_M = true_nll(data, split, rows_M, scores.tokens_M if given_length else None, truth)
    return Likelihood(
        scores,
        scores.per_token(),
        unigram,
        ratio(true_nll_M, scores.tokens_M, scores.units),
        ratio(scores.nll_M - true_nll_M, scores.tokens_M, scores.units),
    )


def row_numbers(rows: Mapping[str, Sequence[int]], sample_id_M: np.ndarray) -> np.ndarray:
    """Where in a packed split the samples stand, (M,)."""
    ids = np.asarray(rows["sample_id"])
    order = ids.argsort()
    return order[np.searchsorted(ids, sample_id_M, sorter=order)]


def true_nll(
    data: TextData, split: str, rows_M: np.ndarray, tokens_M: np.ndarray | None, truth: GroundTruth
) -> np.ndarray:
    """-log p(text) of rows of a split under the corpus's own law, in nats (M,); given its length if `tokens_M` are
    said, because a padded row shows a model how long its text is. With all classes in the data the law is their
    mixture.
    """
    every = data.texts(split)["text"]
    texts = [every[int(i)] for i in rows_M]
    labels = range(len(data.label_names)) if data.label is None else [data.label]
    joint = np.logaddexp.reduce([truth.log_prob(texts, k) for k in labels])
    if tokens_M is None:
        return np.log(len(labels)) - joint
    return np.logaddexp.reduce([truth.log_prob_length(tokens_M, k) for k in labels]) - joint


def protocol(known: Mapping[str, object], data: TextData, split: str, scores: Scores) -> dict[str, object]:
    """Return what must be equal for two perplexities to be comparable, and what they are of. known: the protocol of
    the experiment."""
    return {
        **known, "kind": "exact likelihood" if scores.label == "exact" else scores.kind,
        "data": data.name, "data_protocol": data.protocol or "ours", "split": split,
        "label": data.label, "tokenizer": data.vocabulary.fingerprint,
        "detokenizer": data.detokenizer(split), "length": data.length, "wrap": data.wrap,
        "packing": asdict(data.packing(split)), "prompted": data.prompted, "fill": data.fill, "estimator": scores.label,
        "prefix_length": data.prefix_length, "score_special": data.score_special,
        "law": _law(data, causal=known["parameterization"] == "ar"),
        "network_evaluations_per_text": float(scores.evaluations_M.mean()),
        "latents": data.latents and data.latents.fingerprint,
    }  # fmt: skip


def _law(data: TextData, causal: bool) -> str:
    """What a likelihood of these rows is of: what is scored, and what is given beside the beginning of a row."""
    endings = not causal and not data.fill and not data.score_special
    given = {"prompt": data.prompted, "first token": data.first_given,
             f"first {data.prefix_length} tokens": data.prefix_length,
             "where its special tokens stand": endings}  # fmt: skip
    said = ", ".join(name for name, is_so in given.items() if is_so)
    beginning = data.prompted or data.first_given or data.prefix_length
    return f"p({'rest' if beginning else 'text'}{' | ' if said else ''}{said})"
