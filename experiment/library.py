"""Models in a notebook: `palimpsest.load(path)` or `palimpsest.train(...)`, then likelihoods, texts and classes.

The settings of a model are those that its checkpoint carries. Shape suffixes: M texts, C classes, K draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from palimpsest.classification.bayes import averaged_posterior, log_prior
from palimpsest.data.tokenizers import token_strings, tokenizer_from_record
from palimpsest.dataloader import TextData, with_texts
from palimpsest.diffusion import Diffusion
from palimpsest.estimators.base import Estimator
from palimpsest.estimators.nelbo import Nelbo, comparison_mask_sampler
from palimpsest.evaluation.drawing import SampledTokens, decoded, draw
from palimpsest.evaluation.sampling_inputs import Template
from palimpsest.experiment.experiment import Experiment
from palimpsest.experiment.from_checkpoint import checkpoint_path, complete
from palimpsest.experiment.running import checked, composed, run
from palimpsest.models.checkpoints import read_settings
from palimpsest.settings.command_line import in_quotes, key_of
from palimpsest.settings.identity import overrides, word
from palimpsest.training.processes import quiet_lightning

_SPLIT = "given"  # the name of a user's texts among the splits
_PUBLISHED = ("data=openwebtext", "data.wrap=false")  # what the models of the reference projects were trained on


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


class SampledText(str):
    """A sampled text: a string that knows how it was written.

    Attributes:
        tokens: its tokens as strings, special tokens among them.
        steps: the step that wrote each token; 0 for tokens that were given.
        confidence: the model's probability of each token when it was written; 1 for tokens that were given.
        evaluations: network evaluations spent.
    """

    tokens: list[str]
    steps: list[int]
    confidence: list[float]
    evaluations: int

    @classmethod
    def of(cls, text: str, drawn: SampledTokens, tokenizer: PreTrainedTokenizerBase) -> SampledText:
        """Return `text` with the trace of `drawn`."""
        found = cls(text)
        found.tokens = token_strings(tokenizer, drawn.ids)
        found.steps = drawn.steps
        found.confidence = drawn.confidence
        found.evaluations = drawn.evaluations
        return found


@dataclass(eq=False, repr=False)
class TrainedModel:
    """A trained model with its tokenizer, ready to measure and to write.

    Attributes:
        path: the checkpoint.
        diffusion: the objective bound to the network; `diffusion.model` is what samplers and estimators take.
        data: how texts become rows; its texts are read only where they are needed.
        label: the class whose texts it was trained on; None for all.
    """

    path: str
    experiment: Experiment
    data: TextData
    diffusion: Diffusion
    label: int | None
    _words: Sequence[str]  # the settings as on the command line

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.data.tokenizer

    def log_likelihood(
        self, texts: Sequence[str], draws: int = 64, estimator: str | None = None, seed: int = 1
    ) -> TextLikelihoods:
        """Estimate log p(text) of each text; that of a causal model is exact.

        Args:
            draws: network evaluations per text, over which a bound is averaged.
            estimator: a choice of `eval.estimator`; None for that of the model's settings.

        Raises:
            ValueError: a text is longer than the rows of the model, or the estimator does not fit the model.
        """
        how = self._with([f"eval.estimator={estimator}"] if estimator else []).build.estimator
        model = self.diffusion.model
        nats_MK, tokens_M, evaluations_M = self._measured(texts, how, seed, draws)
        exact = how.exact(model)
        number = nats_MK.shape[1]
        se_M = np.full(len(texts), 0.0 if exact else np.nan)
        if not exact and number > 1:
            se_M = nats_MK.std(axis=1, ddof=1) / np.sqrt(number)
        return TextLikelihoods(-nats_MK.mean(axis=1), se_M, tokens_M, evaluations_M, how.label(model, draws))

    def _with(self, typed: Sequence[str]) -> Experiment:
        """Return the experiment with further settings."""
        return checked(composed([*self._words, *typed]), "palimpsest.load") if typed else self.experiment

    def _measured(
        self, texts: Sequence[str], estimator: Estimator, seed: int, draws: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return nats (M, K), tokens (M,) and evaluations (M,) of texts, windows added up."""
        data = with_texts(self.data, _SPLIT, texts)
        device = next(self.diffusion.backbone.parameters()).device
        found = []
        with torch.inference_mode():
            for batch in data.eval_dataloader(_SPLIT):
                batch = {name: value.to(device) for name, value in batch.items()}
                one = estimator(self.diffusion.model, batch, seed, draws)
                found.append((one.nll_BK.double(), one.tokens_B, one.evaluations_B, batch["text_id"]))
        *columns, text_R = (torch.cat(column).cpu().numpy() for column in zip(*found, strict=True))
        summed = []
        for rows in columns:
            total = np.zeros((len(texts), *rows.shape[1:]), dtype=rows.dtype)
            np.add.at(total, text_R, rows)
            summed.append(total)
        return tuple(summed)

    def sample(
        self,
        number: int = 1,
        prompt: str | None = None,
        template: str | None = None,
        sampler: str | None = None,
        steps: int | None = None,
        length: int | None = None,
        seed: int = 1,
    ) -> list[SampledText]:
        """Draw texts.

        Args:
            prompt: how every text begins.
            template: a text with gaps, such as "The [MASK] was {{5}} ."; {{5}} stands for five tokens.
            sampler: a choice of `sampling.predictor`; None for that of the model's settings.
            steps: sampling steps, `sampling.steps`.
            length: tokens of a text. None: a padded model's texts are as long as training texts picked at random, for
                which those are read; others have the length of the model's rows, or end where they choose to.

        Raises:
            ValueError: the prompt or the template does not fit, or the sampler does not fit the model.
            FileNotFoundError: the training texts are not there; name a length.
        """
        if not isinstance(number, int | np.integer) or number < 1:
            raise ValueError(f"number={number!r}: give a number of texts")
        typed = [f"sampling.predictor={sampler}"] if sampler else []
        typed += [f"sampling.steps={steps}"] if steps is not None else []
        drawing = self._with(typed).build.drawing(self.diffusion.provenance.length)
        drawing = replace(drawing, inputs=Template(prompt, template))
        data = self.data if length is None else _with_row(self.data, length)
        size = self.experiment.build.machine.eval_batch
        drawn = draw(self.diffusion, data, drawing, number, size, seed)
        return [SampledText.of(decoded(one, drawing.inputs, self.tokenizer), one, self.tokenizer) for one in drawn]


def load(path: str | Path, *typed: str) -> TrainedModel:
    """Load a trained model.

    Args:
        path: the folder of a run, a `.ckpt` file, or a published model of the reference projects (a `.ckpt` file, a
            folder in the Hub's layout or a Hub id); its texts become rows as `data=openwebtext data.wrap=false` says,
            unless other data are typed.
        typed: settings as on the command line, such as "sampling.predictor=ddpm_cache" or "eval.disable_ema=true".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint, or a setting does not fit it.
    """
    quiet_lightning()
    file = checkpoint_path(path)
    checkpoint = read_settings(file, "path")
    known = checkpoint.identity
    words = ["mode=sample_eval", f"eval.checkpoint_path={in_quotes(str(file))}", *typed]
    ours = "configuration" in known
    sizes = [one for one in typed if key_of(one) == "model"]
    if ours and sizes:
        raise ValueError(f"{sizes[0]}: the sizes of the network are those of {file}; leave it out")
    words = [*overrides(known["configuration"]), *words] if ours else complete([*_PUBLISHED, *words])
    experiment = checked(composed(words), "palimpsest.load")
    label = known.get("label")
    data = experiment.build.data(label)
    tokenizer = tokenizer_from_record(checkpoint.tokenizer, known.get("tokenizer"))
    other = any(key_of(one) in ("data.tokenizer_name_or_path", "data.vocab_size", "data.mask_token") for one in typed)
    if not other and tokenizer is not None:
        data.tokenizer = tokenizer  # else it is built again from the training texts
    diffusion = experiment.weights.trained(data, str(file), experiment.weights.disable_ema)
    return TrainedModel(str(file), experiment, data, diffusion, label, words)


def train(*typed: str, **settings: object) -> TrainedModel:
    """Train a model, or go on with a training that is not complete, and load it; what `mode=train` does.

    Args:
        typed: settings as on the command line: `train("data=text", "data.path=notes.txt")`.
        settings: the same by keyword; a dict holds the keys below one: `train(data="reviews", trainer={"max_steps":
            500})`.

    Raises:
        ValueError, OSError: as the command line would refuse it.
    """
    words = ["mode=train", *typed, *_words(settings)]
    cfg = composed(words)
    results = run(cfg, " ".join(["palimpsest.train", *words]), words)
    return load(str(results["checkpoint"]))


def log_likelihood(path: str | Path, texts: Sequence[str], draws: int = 64, seed: int = 1) -> TextLikelihoods:
    """Estimate log p(text) of each text under the model at `path` (see `TrainedModel.log_likelihood`)."""
    return load(path).log_likelihood(texts, draws, seed=seed)


def sample(path: str | Path, number: int = 1, prompt: str | None = None, seed: int = 1) -> list[SampledText]:
    """Draw texts from the model at `path` (see `TrainedModel.sample`)."""
    return load(path).sample(number, prompt, seed=seed)


def classify(
    models: Sequence[TrainedModel | str | Path],
    texts: Sequence[str],
    draws: int = 64,
    seed: int = 1,
    prior: str | Sequence[float] = "uniform",
) -> np.ndarray:
    """Return p(class | text) by Bayes' rule from one model per class, in the order of the classes, (M, C).

    All models see each text under the same masks, and the posterior is averaged over their Monte Carlo error
    (classification/bayes.py).

    Args:
        prior: "uniform", or the share of each class.

    Raises:
        ValueError: fewer than two models, one of them knows all classes, or they do not read the same tokens.
    """
    if prior == "empirical":
        raise ValueError("prior=empirical: these models have no training texts in common; give the share of each class")
    if isinstance(models, str | Path | TrainedModel) or len(models) < 2:
        raise ValueError(
            "give a list of models, one per class; palimpsest.load_classifier reads a whole run of classify"
        )
    loaded = [one if isinstance(one, TrainedModel) else load(one) for one in models]
    if len({one.data.vocabulary.fingerprint for one in loaded}) > 1:
        raise ValueError(
            "the models have different tokenizers, so they do not read the same texts; train them with one"
        )
    if told := [one.path for one in loaded if one.diffusion.backbone.num_classes]:
        raise ValueError(
            f"{told[0]} is one network for all classes; palimpsest.load_classifier reads it with the folder of its run"
        )
    estimator = loaded[0].experiment.build.estimator
    if isinstance(estimator, Nelbo):  # masks that all models see alike
        estimator = Nelbo(comparison_mask_sampler(estimator, loaded[0].diffusion.objective))
    measured = [one._measured(texts, estimator, seed, draws) for one in loaded]
    tokens_MC = np.stack([tokens_M for _, tokens_M, _ in measured], axis=1)
    if (unlike := np.flatnonzero(np.ptp(tokens_MC, axis=1))).size:
        numbers = ", ".join(map(str, tokens_MC[unlike[0]]))
        raise ValueError(
            f"the models read different parts of text {unlike[0]} ({numbers} tokens); "
            "load them with the same data.long_texts, and train them with the same model.length"
        )
    nats_MCK = np.stack([nats_MK for nats_MK, _, _ in measured], axis=1)
    return averaged_posterior(nats_MCK, log_prior(prior, np.zeros(len(loaded))))


def _words(settings: Mapping[str, object], above: str = "") -> Iterator[str]:
    """Yield settings as on the command line."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _words(value, f"{above}{name}.")
        else:
            yield f"{above}{name}={value if isinstance(value, str) else word(value)}"


def _with_row(data: TextData, length: int) -> TextData:
    """Return `data` whose training rows lend a length, and nothing else."""
    known, other = data.vocabulary, copy(data)
    if not 2 <= length <= data.length:
        raise ValueError(f"length={length} must lie in 2..{data.length}, the tokens of the model's rows")
    row = [known.pad_id] * length
    if not data.wrap:
        first, last = (known.pad_id if own is None else own for own in (known.bos_id, known.eos_id))
        row = [first, *row[2:], last]
    columns = {"input_ids": [row], "length": [length], "sample_id": [0]}
    other._splits = {**data._splits, "train": datasets.Dataset.from_dict(columns)}
    return other
