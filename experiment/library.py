"""Trained models in a notebook: `palimpsest.load(path)`, then likelihoods, texts and classes in a line each.

The settings of a model are those that its checkpoint carries, as scripts/generate.py and the page take them.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch

from palimpsest.classification.bayes import averaged_posterior, log_prior
from palimpsest.data.tokenizers import of_record, vocabulary
from palimpsest.dataloader import TextData, with_texts
from palimpsest.diffusion import Diffusion
from palimpsest.estimators.base import Estimator
from palimpsest.estimators.nelbo import Nelbo, comparison_noising
from palimpsest.evaluation.drawing import decoded, draw
from palimpsest.evaluation.sampling_inputs import Template
from palimpsest.experiment.carried import carried, checkpoint_path
from palimpsest.experiment.experiment import Experiment
from palimpsest.experiment.running import checked
from palimpsest.models.checkpoints import read_contents
from palimpsest.settings.command_line import compose_config, in_quotes
from palimpsest.settings.identity import overrides

_SPLIT = "given"  # the name of a user's texts among the splits


@dataclass(frozen=True)
class TextLikelihoods:
    """Estimates of log p(text) in nats, one per text.

    Attributes:
        log_p: the estimates. Of a diffusion model each is a lower bound, whose mean over draws it is.
        se: their standard errors from the draws; 0 where the likelihood is exact.
        tokens: how many tokens of each text count.
        evaluations: how often the network read each text.
        kind: what is estimated, and how.
    """

    log_p: np.ndarray
    se: np.ndarray
    tokens: np.ndarray
    evaluations: np.ndarray
    kind: str

    @property
    def nats_per_token(self) -> float:
        """Negative log-likelihood of all texts together, per token."""
        return float(-self.log_p.sum() / self.tokens.sum())


class TrainedModel:
    """A trained model with its tokenizer, ready to measure and to write.

    Attributes:
        diffusion: the objective bound to the network; `diffusion.model` is what samplers and estimators take.
        data: how texts become rows; its texts are read only where they are needed.
        label: the class whose texts it was trained on; None for all.
    """

    def __init__(self, experiment: Experiment, data: TextData, diffusion: Diffusion, label: int | None) -> None:
        self.experiment = experiment
        self.data = data
        self.diffusion = diffusion
        self.label = label

    @property
    def tokenizer(self) -> object:
        return self.data.tokenizer

    def log_likelihood(self, texts: Sequence[str], num_draws: int = 64, seed: int = 1) -> TextLikelihoods:
        """Estimate log p(text) of each text; a causal model's is exact.

        Args:
            num_draws: network evaluations per text, over which a bound is averaged.

        Raises:
            ValueError: a text is longer than the rows of the model.
        """
        estimator, model = self.experiment.build.estimator, self.diffusion.model
        nats_MK, tokens_M, evaluations_M, _ = self._measured(texts, estimator, seed, num_draws)
        exact, draws = estimator.exact(model), nats_MK.shape[1]
        se_M = np.zeros(len(texts)) if exact else np.full(len(texts), np.nan)
        if not exact and draws > 1:
            se_M = nats_MK.std(axis=1, ddof=1) / np.sqrt(draws)
        kind = estimator.label(model, num_draws)
        return TextLikelihoods(-nats_MK.mean(axis=1), se_M, tokens_M, evaluations_M, kind)

    def _measured(
        self, texts: Sequence[str], estimator: Estimator, seed: int, num_draws: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return nats (M, K), tokens (M,), evaluations (M,) and numbers (M,) of texts, windows added up."""
        data = with_texts(self.data, _SPLIT, list(texts))
        device = next(self.diffusion.backbone.parameters()).device
        found = {name: [] for name in ("nats", "tokens", "evaluations", "text")}
        with torch.inference_mode():
            for batch in data.eval_dataloader(_SPLIT):
                batch = {name: value.to(device) for name, value in batch.items()}
                one = estimator(self.diffusion.model, batch, seed, num_draws)
                found["nats"].append(one.nll_BK.double().cpu().numpy())
                found["tokens"].append(one.tokens_B.cpu().numpy())
                found["evaluations"].append(one.evaluations_B.cpu().numpy())
                found["text"].append(batch["text_id"].cpu().numpy())
        text_R = np.concatenate(found["text"])
        summed = []
        for name in ("nats", "tokens", "evaluations"):
            rows = np.concatenate(found[name])
            total = np.zeros((len(texts), *rows.shape[1:]), dtype=rows.dtype)
            np.add.at(total, text_R, rows)
            summed.append(total)
        return (*summed, text_R)

    def sample(self, number: int = 1, prefix: str | None = None, length: int | None = None, seed: int = 1) -> list[str]:
        """Draw texts.

        Args:
            prefix: how every text begins.
            length: tokens of a text. None: a padded model's texts are as long as training texts picked at random, for
                which those are read; others have the length of the model's rows, or end where they choose to.

        Raises:
            ValueError: the prefix does not fit.
            FileNotFoundError: the training texts are not there; name a length.
        """
        drawing = self.experiment.build.drawing(self.diffusion.provenance.length)
        drawing = type(drawing)(drawing.sampler, Template(prefix), drawing.protocol, drawing.var_length)
        data = self.data if length is None else _with_row(self.data, length)
        size = self.experiment.build.machine.eval_batch
        drawn = draw(self.diffusion, data, drawing, number, size, seed)
        return [decoded(one, drawing.given, self.tokenizer) for one in drawn]


def load(path: str | Path, *typed: str) -> TrainedModel:
    """Load a trained model: the folder of a run, or a `.ckpt` file that a training here wrote.

    typed: settings as on the command line, such as "sampling.predictor=ddpm_cache" or "eval.disable_ema=true".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint of ours, or a setting does not fit it.
    """
    warnings.filterwarnings("ignore", module="lightning")  # its warnings are about trainers, and none is used here
    file = checkpoint_path(path)
    known = carried(file)
    words = [
        *overrides(known["configuration"]),
        "mode=sample_eval",
        f"eval.checkpoint_path={in_quotes(str(file))}",
        *typed,
    ]
    experiment = checked(compose_config(words), "palimpsest.load")
    label = known.get("label")
    data = experiment.build.data(label)
    record = (read_contents(file).get("run") or {}).get("tokenizer")
    if record is not None:
        tokenizer = of_record(record)
        if tokenizer is not None and vocabulary(tokenizer).fingerprint == known.get("tokenizer"):
            data.tokenizer = tokenizer  # else it is built again from the training texts
    diffusion = experiment.weights.trained(data, str(file), "eval.disable_ema=true" in typed)
    return TrainedModel(experiment, data, diffusion, label)


def log_likelihood(path: str | Path, texts: Sequence[str], num_draws: int = 64, seed: int = 1) -> TextLikelihoods:
    """Estimate log p(text) of each text under the model at `path` (see `TrainedModel.log_likelihood`)."""
    return load(path).log_likelihood(texts, num_draws, seed)


def sample(path: str | Path, number: int = 1, prefix: str | None = None, seed: int = 1) -> list[str]:
    """Draw texts from the model at `path` (see `TrainedModel.sample`)."""
    return load(path).sample(number, prefix, seed=seed)


def classify(
    models: Sequence[TrainedModel | str | Path],
    texts: Sequence[str],
    num_draws: int = 64,
    seed: int = 1,
    prior: str | Sequence[float] = "uniform",
) -> np.ndarray:
    """Return p(class | text) by Bayes' rule from one model per class, in the order of the classes, (M, C).

    All models see each text under the same masks, and the posterior is averaged over their Monte Carlo error
    (classification/bayes.py).

    Args:
        prior: "uniform", or the share of each class.
    """
    loaded = [one if isinstance(one, TrainedModel) else load(one) for one in models]
    estimator = loaded[0].experiment.build.estimator
    if isinstance(estimator, Nelbo):  # masks that all models see alike
        estimator = Nelbo(comparison_noising(estimator, loaded[0].diffusion.objective))
    nats_MCK = np.stack([one._measured(texts, estimator, seed, num_draws)[0] for one in loaded], axis=1)
    return averaged_posterior(nats_MCK, log_prior(prior, np.zeros(len(loaded))))


def _with_row(data: TextData, length: int) -> TextData:
    """Return `data` whose training rows lend a length, and nothing else."""
    known, other = data.vocabulary, copy(data)
    row = [known.pad_id] * length
    if not data.wrap:
        row = [
            known.bos_id if known.bos_id is not None else known.pad_id,
            *row[2:],
            known.eos_id if known.eos_id is not None else known.pad_id,
        ]
    columns = {"input_ids": [row], "length": [length], "sample_id": [0]}
    other._splits = {**data._splits, "train": datasets.Dataset.from_dict(columns)}
    return other
