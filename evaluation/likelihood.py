"""Likelihood of a split to a given precision, with the unigram likelihood and the true entropy to compare.

Shape suffixes: B batch, M texts of the split, K draws, P network passes, R rounds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Protocol

import lightning
import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from palimpsest.common.metrics import UNIT_COLUMNS, Estimate, Units, ratio, ratios_by_rate
from palimpsest.common.randomness import hash_seed
from palimpsest.common.values import AtLeastOne, Count, Needs, Positive
from palimpsest.data.unigram import unigram_nll
from palimpsest.dataloader import TextData
from palimpsest.diffusion import Diffusion
from palimpsest.estimators.base import Estimator
from palimpsest.evaluation.devices import map_over_devices
from palimpsest.objectives.base import Batch, Model, scored_mask


@dataclass(frozen=True)
class Scores:
    """Likelihood estimates, one row per text (of wrapped data: per row), sorted by sample id."""

    kind: str  # the estimated quantity
    label: str  # the method
    exact: bool  # without Monte Carlo error
    causal: bool  # the first token of a row is context, and its end is scored
    sample_id_M: np.ndarray
    nll_MK: np.ndarray  # nats; the mean over draws is the estimate
    round_K: np.ndarray  # the round of each draw
    tokens_M: np.ndarray  # counted tokens
    maskable_M: np.ndarray  # tokens that can be masked, including EOS padding
    evaluations_M: np.ndarray  # of the network
    cross_entropy_MP: np.ndarray  # summed over the masked tokens of a pass, nats
    num_masked_MP: np.ndarray  # tokens masked in a pass
    units: Units  # independent units that errors are over
    text_id_M: np.ndarray | None = None  # source text of a row that is (part of) one text

    @property
    def nll_M(self) -> np.ndarray:
        """Nats per text, the mean over its draws."""
        return self.nll_MK.mean(axis=1)

    @property
    def num_texts(self) -> int:
        """Number of texts; of rows, if a row may contain several texts."""
        return len(self.tokens_M if self.text_id_M is None else np.unique(self.text_id_M))

    @property
    def evaluations_per_text(self) -> float:
        return float(self.evaluations_M.sum() / self.num_texts)

    @property
    def monte_carlo_se(self) -> float:
        """Standard error of the nats per token from the draws alone; 0 for exact likelihoods, nan from a single draw.

        Computed from rounds if there are several, else from the draws of the one round, which is conservative because
        they are stratified. The windows of a text share their times, so draws are summed over windows first.
        """
        means_MK = self.nll_MK
        if self.text_id_M is not None:
            text_M = np.unique(self.text_id_M, return_inverse=True)[1]
            means_MK = np.zeros((text_M.max() + 1, self.nll_MK.shape[1]))
            np.add.at(means_MK, text_M, self.nll_MK)
        if self.round_K[-1] > 0:
            means_MK = np.stack([means_MK[:, self.round_K == r].mean(1) for r in range(self.round_K[-1] + 1)], 1)
        draws = means_MK.shape[1]
        if draws < 2:
            return 0.0 if self.exact else np.nan
        return float(np.sqrt(means_MK.var(axis=1, ddof=1).sum() / draws) / self.tokens_M.sum())

    def per_token(self) -> Estimate:
        """Return the nats per token of the split, with its standard error over the units."""
        return ratio(self.nll_M, self.tokens_M, self.units)

    def columns(self) -> dict[str, np.ndarray]:
        """Return the nats and tokens of each text, with its units, (M,) each."""
        return {
            "sample_id": self.sample_id_M,
            "nats": self.nll_M,
            "tokens": self.tokens_M,
            "unit_first": self.units.first_M,
            "unit_last": self.units.last_M,
        }

    def by_mask_rate(self) -> tuple[np.ndarray, list[Estimate]]:
        """Return shares of masked tokens, and the cross-entropy there in nats per masked token."""
        rate_MP = self.num_masked_MP / np.maximum(self.maskable_M[:, None], 1)
        return ratios_by_rate(rate_MP, self.cross_entropy_MP, self.num_masked_MP, self.units)


@dataclass(frozen=True)
class Precision:
    """Stopping rule of the draws: rounds of `num_draws` network evaluations per text.

    With a `target_se` (nats per token, `Scores.monte_carlo_se`), rounds are added until it or `max_draws` is reached.
    """

    num_draws: Count
    target_se: Positive | None = None
    max_draws: Annotated[AtLeastOne, Needs("target_se")] = 1024

    def __post_init__(self) -> None:
        if self.target_se is not None and self.max_draws < self.num_draws:
            raise ValueError(f"eval.max_draws={self.max_draws} must be at least eval.num_draws={self.num_draws}")

    @property
    def rounds(self) -> int:
        """Maximum number of rounds."""
        return 1 if self.target_se is None else self.max_draws // self.num_draws


def score(
    trainer: lightning.Trainer,
    diffusion: Diffusion,
    loader: DataLoader,
    estimator: Estimator,
    precision: Precision,
    seed: int,
    conditioned: Callable[[Batch], Batch] = lambda batch: batch,
    rounds: int | None = None,
) -> Scores:
    """Measure every text of `loader` on all of the trainer's devices.

    Args:
        conditioned: adds conditioning to a batch.
        rounds: a fixed number of rounds, to be paired with another measurement.
    """
    model = diffusion.model
    measured: list[dict[str, np.ndarray]] = []
    for number in range(rounds or precision.rounds):
        how = (estimator, hash_seed(seed, number), precision.num_draws)
        measure = lambda batch, how=how: _measure(model, conditioned(batch), *how)
        measured.append(map_over_devices(trainer, diffusion, measure, loader))
        scores = _scores(model, measured, estimator, precision.num_draws)
        if rounds is None and (precision.target_se is None or scores.monte_carlo_se <= precision.target_se):
            return scores
    if rounds is None:
        print(
            f"eval.target_se={precision.target_se} was not reached with eval.max_draws={precision.max_draws}: "
            f"the Monte Carlo error is {scores.monte_carlo_se:.2g} nats/token"
        )
    return scores


def _measure(model: Model, batch: Batch, estimator: Estimator, seed: int, num_draws: int) -> dict[str, Tensor]:
    estimate = estimator(model, batch, seed, num_draws)
    no_masks = estimate.nll_BK.new_zeros((len(estimate.nll_BK), 0))
    return {
        "sample_id": batch["sample_id"],
        "nll": estimate.nll_BK.double(),
        "tokens": estimate.tokens_B,
        "maskable": scored_mask(batch).sum(-1),
        "evaluations": estimate.evaluations_B,
        "cross_entropy": estimate.logs.get("cross_entropy", no_masks).double(),
        "num_masked": estimate.logs.get("num_masked", no_masks),
        **{name: batch[name] for name in UNIT_COLUMNS if name in batch},
    }


def _scores(model: Model, rounds: list[dict[str, np.ndarray]], estimator: Estimator, num_draws: int) -> Scores:
    """Return the scores of several rounds over the same texts."""
    first = rounds[0]
    assert all((part["sample_id"] == first["sample_id"]).all() for part in rounds)
    joined = {
        name: np.concatenate([part[name] for part in rounds], axis=1) for name in ("nll", "cross_entropy", "num_masked")
    }
    return Scores(
        estimator.kind,
        estimator.label(model, num_draws),
        estimator.exact(model),
        model.objective.causal,
        first["sample_id"],
        joined["nll"],
        np.repeat(np.arange(len(rounds)), [part["nll"].shape[1] for part in rounds]),
        first["tokens"],
        first["maskable"],
        sum(part["evaluations"] for part in rounds),
        joined["cross_entropy"],
        joined["num_masked"],
        Units.of(first),
        first.get("text_id"),
    )


class GroundTruth(Protocol):
    """A corpus with known probabilities; natural logarithms."""

    def log_prob(self, texts: Sequence[str], label: int) -> np.ndarray: ...

    def log_prob_length(self, num_tokens: Sequence[int], label: int) -> np.ndarray: ...

    def posterior(self, texts: Sequence[str]) -> np.ndarray: ...


@dataclass(frozen=True)
class Likelihood:
    """The likelihood of a split and its baselines, in nats per scored token."""

    scores: Scores
    model: Estimate
    unigram: Estimate | None  # of training-set token frequencies; None without a train split
    truth: Estimate | None = None  # entropy of the corpus on the same texts, if known
    gap: Estimate | None = None  # model minus truth, paired by text

    def results(self) -> dict[str, object]:
        """Return the numbers for results.json."""
        return {
            "nll_nats_per_token": self.model, "perplexity": self.model.exp(), "unigram_nats_per_token": self.unigram,
            "true_nats_per_token": self.truth, "gap_nats_per_token": self.gap, "units": self.scores.units.name,
            "num_units": len(self.scores.units),
        }  # fmt: skip


def likelihood(data: TextData, split: str, scores: Scores, truth: GroundTruth | None) -> Likelihood:
    """Compare the scores of `split` with the unigram likelihood and, if known, the true entropy."""
    rows_M = row_numbers(data.split(split), scores.sample_id_M)
    ratio_of = lambda nll_M: ratio(nll_M, scores.tokens_M, scores.units)
    unigram = entropy = gap = None
    if "train" in data.splits:
        unigram = ratio_of(unigram_nll(data, split, scores.causal)[rows_M])
    if truth is not None:
        given_length = not scores.causal and data.fill is None
        true_nll_M = true_nll(data, split, rows_M, scores.tokens_M if given_length else None, truth)
        entropy = ratio_of(true_nll_M)
        gap = ratio_of(scores.nll_M - true_nll_M)
    return Likelihood(scores, scores.per_token(), unigram, entropy, gap)


def row_numbers(rows: Mapping[str, Sequence[int]], sample_id_M: np.ndarray) -> np.ndarray:
    """Return the row of each sample in a packed split, (M,)."""
    ids = np.asarray(rows["sample_id"])
    order = ids.argsort()
    return order[np.searchsorted(ids, sample_id_M, sorter=order)]


def true_nll(
    data: TextData, split: str, rows_M: np.ndarray, tokens_M: np.ndarray | None, truth: GroundTruth
) -> np.ndarray:
    """Return -log p(text) of rows of a split under the exact distribution of the corpus, in nats (M,).

    tokens_M: condition on these lengths, which padded rows show to the model. Data of all classes are their mixture.
    """
    every = data.texts(split)
    text_of_id = dict(zip(every["text_id"], every["text"], strict=True))
    texts = [text_of_id[int(i)] for i in np.asarray(data.split(split)["text_id"])[rows_M]]
    labels = range(len(data.label_names)) if data.label is None else [data.label]
    joint = np.logaddexp.reduce([truth.log_prob(texts, k) for k in labels])
    if tokens_M is None:
        return np.log(len(labels)) - joint
    return np.logaddexp.reduce([truth.log_prob_length(tokens_M, k) for k in labels]) - joint


def protocol(
    experiment_protocol: Mapping[str, object], data: TextData, split: str, scores: Scores
) -> dict[str, object]:
    """Add to the experiment's protocol the settings that must be equal for two perplexities to be comparable."""
    return {
        **experiment_protocol, "kind": "exact likelihood" if scores.label == "exact" else scores.kind,
        "data": data.name, "data_protocol": data.protocol or "ours", "split": split,
        "label": data.label, "tokenizer": data.vocabulary.fingerprint,
        "detokenizer": data.detokenizer(split), "length": data.length, "wrap": data.wrap,
        "packing": asdict(data.packing(split)), "prompted": data.prompted, "fill": data.fill, "estimator": scores.label,
        "prefix_length": data.prefix_length, "score_special": data.score_special,
        "distribution": _definition(data, causal=experiment_protocol["parameterization"] == "ar"),
        "network_evaluations_per_text": scores.evaluations_per_text,
        "latents": data.latents and data.latents.fingerprint,
    }  # fmt: skip


def _definition(data: TextData, causal: bool) -> str:
    """Return the likelihood's definition: what is scored, and what is observed."""
    endings = not causal and not data.fill and not data.score_special
    conditions = {"prompt": data.prompted, "first token": data.first_given,
             f"first {data.prefix_length} tokens": data.prefix_length,
             "where its special tokens stand": endings}  # fmt: skip
    listed = ", ".join(name for name, is_so in conditions.items() if is_so)
    beginning = data.prompted or data.first_given or data.prefix_length
    apart = ", documents apart" if data.document_mask else ""
    return f"p({'rest' if beginning else 'text'}{' | ' if listed else ''}{listed}){apart}"
