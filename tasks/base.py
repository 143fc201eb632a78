"""What a task is handed, and what every task does with it: measure on a split, compare, write down.

Shape suffixes: M texts of a split.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import lightning
import numpy as np
import pyarrow.compute as pc
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from palimpsest.common.metrics import Estimate, ratio
from palimpsest.diffusion import Provenance
from palimpsest.report.report import Metric
from palimpsest.tasks.scoring import Scores


class GroundTruth(Protocol):
    """A corpus that knows its own probabilities; natural logarithms."""

    def log_prob(self, texts: Sequence[str], label: int) -> np.ndarray: ...

    def log_prob_length(self, num_tokens: Sequence[int], label: int) -> np.ndarray: ...

    def posterior(self, texts: Sequence[str]) -> np.ndarray: ...


class Experiment(Protocol):
    """The experiment that a task receives (experiment/experiment.py)."""

    seed: int
    command: str
    build: object  # builds what the configuration names
    runs: object  # knows folders and what is there already
    weights: object  # makes checkpoints into ready models
    facts: Mapping[str, object]
    protocol: Mapping[str, object]  # which distribution, weights and random numbers a result belongs to
    pretraining: Experiment | None  # the training of the weights that the models of all classes start from

    def trainer(self, title: str, label: int | None = None) -> lightning.Trainer: ...


@dataclass(frozen=True)
class Mode:
    """Properties of a task that other parts must fit.

    Attributes:
        trains: it trains models, or may.
        compares: it compares classes.
        writes: it samples texts.
        measures: it uses trained weights; the settings of a published model come from its file.
    """

    trains: bool = False
    compares: bool = False
    writes: bool = False
    measures: bool = False


def mode(**properties: bool) -> Callable[[Callable], Callable]:
    """Declare the properties of a task (`Mode`), as `task.mode`."""

    def declared(task: Callable) -> Callable:
        task.mode = Mode(**properties)
        return task

    return declared


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

    def metrics(self) -> list[Metric]:
        bits = self.model.scaled(1 / np.log(2))
        perplexity = self.model.exp()
        rows = [
            Metric(
                "NLL",
                self.model.value,
                self.model.se,
                "nats/token",
                f"{self.scores.label}; error over {self.scores.units}",
            ),  # fmt: skip
            Metric("bits", bits.value, bits.se, "bits/token"),
            Metric("perplexity", perplexity.value, perplexity.se),
        ]
        if not self.scores.exact:
            rows.append(Metric("Monte Carlo error", self.scores.monte_carlo_se, None, "nats/token", "of the NLL, from "
                               "the draws alone"))  # fmt: skip
        if self.unigram:
            rows.append(Metric("unigram model", self.unigram.value, self.unigram.se, "nats/token"))
        if self.truth and self.gap:
            excess = self.gap.scaled(100 / self.truth.value)
            rows += [
                Metric("true entropy", self.truth.value, self.truth.se, "nats/token", "exact, same texts"),
                Metric("above the truth", excess.value, excess.se, "%", f"paired over {self.scores.units.name}"),
            ]
        return rows

    def ladder(self) -> list[tuple[str, float, float | None]]:
        """Rows of the figure that holds model against unigram."""
        baseline = [("unigram", self.unigram.value, self.unigram.se)] if self.unigram else []
        return [*baseline, ("this model", self.model.value, self.model.se)]


def likelihood(data: object, split: str, scores: Scores, truth: GroundTruth | None) -> Likelihood:
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


def unigram_nll(data: object, split: str, causal: bool = False) -> np.ndarray:
    """Nats per row under the training split's token frequencies (add-one smoothed), (M,). Left out is what is given:
    for a `causal` model the beginning, else BOS and EOS too where they are; fill is no part of it."""
    context = _Context.of(data, causal)
    counts_V = 1.0 + token_counts(data, causal)[0]
    counts_V[context.ids] = 0
    nats_V = np.log(counts_V.sum()) - np.log(counts_V, where=counts_V > 0, out=np.zeros_like(counts_V))
    nats_V[context.ids] = 0.0
    rows = data.split(split)
    leading_M = context.leading(rows)
    return np.array([nats_V[np.asarray(ids)[n:]].sum() for ids, n in zip(rows["input_ids"], leading_M, strict=True)])


@dataclass(frozen=True)
class _Context:
    """What of a row a model is given. ids: tokens that are given wherever they stand, BOS and EOS of padded rows.
    first: whether the first token is; prompts are in any case, and the prefix (its length by the first tokens)."""

    ids: np.ndarray
    first: bool
    prefix: Callable[[np.ndarray], np.ndarray]

    @classmethod
    def of(cls, data: object, causal: bool) -> _Context:
        """Of a causal model, which has the first token, or of one that is shown what the batches say."""
        collate = data.collate
        if causal or data.fill:  # an ending is scored; BOS may have the id of EOS, so that its place decides
            return cls(np.zeros(0, dtype=np.int64), causal or len(collate.frame_ids) > 0, collate.leading)
        return cls(collate.frame_ids, False, collate.leading)

    def leading(self, rows: object) -> np.ndarray:
        """Given tokens at the beginning of each row, (M,)."""
        ids = rows.select_columns("input_ids").with_format("arrow")[:]["input_ids"]
        prefix_M = np.maximum(self.prefix(pc.list_element(ids, 0).to_numpy()), self.first)
        if "part_ends" in rows.column_names:
            return np.maximum(np.array([ends[0] for ends in rows["part_ends"][:]]), prefix_M)
        return prefix_M


def token_counts(data: object, causal: bool = False, by_class: bool = False) -> np.ndarray:
    """How often each token stands in the training rows, (1, V), or `by_class` in those of each class, (C, V). Given
    tokens are left out (see `unigram_nll`), but for the first one of a causal model's rows without prompts."""
    rows, size = data.split("train"), data.vocabulary.size
    column = rows.select_columns("input_ids").with_format("arrow")[:]["input_ids"]
    counts_CV = np.zeros((len(data.label_names) if by_class else 1, size), dtype=np.int64)
    labels = np.asarray(rows["label"][:]) if by_class else np.zeros(len(rows), dtype=np.int64)
    context = _Context.of(data, causal)
    everything = causal and "part_ends" not in rows.column_names
    leading_M = np.zeros(len(rows), dtype=np.int64) if everything else context.leading(rows)
    start = 0
    for chunk in column.chunks:  # of the file: the ids of a large split are never in memory at once
        here, lengths = slice(start, start + len(chunk)), chunk.value_lengths().to_numpy()
        place = np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)
        counted = place >= np.repeat(leading_M[here], lengths)
        flat = chunk.flatten().to_numpy() + size * np.repeat(labels[here], lengths)
        flat = np.bincount(flat[counted], minlength=counts_CV.size)
        counts_CV, start = counts_CV + flat.reshape(counts_CV.shape), start + len(chunk)
    counts_CV[:, context.ids] = 0
    return counts_CV


def true_nll(
    data: object, split: str, rows_M: np.ndarray, tokens_M: np.ndarray | None, truth: GroundTruth
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


@rank_zero_only
def write_results(folder: Path, results: Mapping[str, object]) -> None:
    """`results.json`: what was measured and under which protocol, for programs to read; written atomically, by the
    first process."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "results.json.partial"
    plain = json.loads(json.dumps(results, default=_plain), parse_constant=lambda name: None)  # JSON has no NaN
    partial.write_text(json.dumps(plain, indent=2) + "\n")
    os.replace(partial, folder / "results.json")


def _plain(value: object) -> object:
    if isinstance(value, Estimate):
        return {"value": value.value, "se": value.se}
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Provenance):
        return asdict(value)
    raise TypeError(f"{type(value).__name__} has no place in results.json")
