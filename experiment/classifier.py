"""Trained classifiers in a notebook: `palimpsest.load_classifier(folder).predict(texts)`.

Shape suffixes: M texts, C classes, L tokens of a text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from palimpsest.classification.attributions import token_attributions
from palimpsest.classification.bayes import log_prior
from palimpsest.classification.models import ClassModel, check_classes, conditional_models, one_per_class
from palimpsest.classification.scoring import ClassScores, SequentialTest, score_classes
from palimpsest.classification.typical import Typical
from palimpsest.data.tokenizers import token_strings
from palimpsest.dataloader import TextData, with_texts
from palimpsest.experiment.experiment import Experiment
from palimpsest.experiment.from_checkpoint import training_identity
from palimpsest.experiment.running import checked, composed
from palimpsest.settings.command_line import in_quotes
from palimpsest.settings.identity import overrides, word
from palimpsest.training.processes import quiet_lightning

SPLIT = "given"  # the name of a user's texts among the splits


@dataclass(frozen=True)
class Predictions:
    """The classes of M texts, by Bayes' rule.

    Attributes:
        classes: names of the classes.
        probability: p(class | text), averaged over the Monte Carlo error, (M, C).
        low, high: ends of the 95 % interval that the draws leave for it, (M, C). It covers the masks only, not what the
            models do not know.
        log_p: estimates of log p(text | class) in nats, (M, C).
        se: their Monte Carlo errors, (M, C); 0 where the likelihood is exact.
        draws: masks per class that each text took, (M,).
        unlike: texts less likely, per token, than 99.9 % of those that the classifier was evaluated on, (M,). Their
            probabilities mean little. None if mode=classify has not run in this folder.
        tokens: the tokens of each text, in order.
        attributions: for each text the part of each token in log p(text | class), (C, L); nan for tokens that are not
            scored. None unless asked for.
    """

    classes: tuple[str, ...]
    probability: np.ndarray
    low: np.ndarray
    high: np.ndarray
    log_p: np.ndarray
    se: np.ndarray
    draws: np.ndarray
    unlike: np.ndarray | None
    tokens: list[list[str]]
    attributions: list[np.ndarray] | None = None

    @property
    def label(self) -> list[str]:
        """The most probable class of each text."""
        return [self.classes[k] for k in self.probability.argmax(axis=1)]


class TrainedClassifier:
    """The class models of a run of `mode=classify`, ready to classify texts.

    Attributes:
        classes: names of the classes.
        models: one model per class, or one network conditioned on each class.
    """

    def __init__(self, experiment: Experiment, data: TextData, models: Sequence[ClassModel]) -> None:
        self.experiment = experiment
        self.data = data
        self.models = list(models)
        self.classes: tuple[str, ...] = tuple(data.label_names)

    def predict(
        self,
        texts: Sequence[str],
        draws: int = 64,
        confidence: float = 0.9,
        prior: str | Sequence[float] = "uniform",
        seed: int = 1,
        attributions: bool = False,
    ) -> Predictions:
        """Return p(class | text) of each text, with errors.

        All classes see a text under the same masks. Long texts are treated as the settings of the training say
        (data.long_texts); windows are added up.

        Args:
            draws: network evaluations per text and class, at most.
            confidence: fewer are taken once the winner is certain to this degree; 1: never.
            prior: "uniform", "empirical" (the shares of the training texts), or the share of each class.
            attributions: also say what each token contributes.

        Raises:
            ValueError: there are no texts, or a setting does not fit.
        """
        if type(draws) is not int or draws < 1 or not 0.5 < confidence <= 1:
            raise ValueError(f"draws={draws} must be a whole number from 1, and confidence={confidence} in (0.5, 1]")
        test = SequentialTest(draws, confidence)
        estimator = self.experiment.build.estimator
        test.check(estimator)
        data = with_texts(self.data, SPLIT, texts)
        counts_C = np.zeros(len(self.classes))  # training texts of each class
        if isinstance(prior, str) and prior == "empirical":
            counts_C = np.bincount(np.asarray(self.data.texts("train")["label"]), minlength=len(self.classes))
        log_prior_C = log_prior(prior, counts_C)
        scores = score_classes(self.experiment.trainer, self.models, data, SPLIT, estimator, test, seed, log_prior_C)
        probability_MC = scores.posterior(log_prior_C)
        low_MC, high_MC = scores.interval(log_prior_C)
        typical = Typical.read(self.experiment.runs.folder() / "classify")
        rows_M = _rows_of_texts(data, len(texts))
        return Predictions(
            self.classes,
            probability_MC,
            low_MC,
            high_MC,
            scores.log_p_MC,
            scores.se_MC,
            scores.draws_M,
            None if typical is None else typical.unlike(scores, log_prior_C),
            [token_strings(data.tokenizer, [i for row in rows for i in _ids(data, row)]) for rows in rows_M],
            self._attributions(data, scores, rows_M, test, seed) if attributions else None,
        )

    def _attributions(
        self, data: TextData, scores: ClassScores, rows_M: list[list[int]], test: SequentialTest, seed: int
    ) -> list[np.ndarray]:
        estimator = self.experiment.build.estimator
        draws = {row: int(scores.draws_M[m]) for m, rows in enumerate(rows_M) for row in rows}
        nats_of_rows = token_attributions(self.models, data, SPLIT, draws, test, estimator, seed)
        nats = dict(zip(draws, nats_of_rows, strict=True))
        return [-np.concatenate([nats[row][:, : len(_ids(data, row))] for row in rows], axis=1) for rows in rows_M]


def read_classes(experiment: Experiment, folder: Path, conditional: bool) -> tuple[TextData, list[ClassModel]]:
    """Return the data and the class models that `mode=classify` would use in `folder`.

    Raises:
        ValueError: the data have no classes, or a class has no model.
    """
    data, disable_ema = experiment.build.data(), experiment.weights.disable_ema
    check_classes(data)
    paths = [experiment.runs.model_path(label) for label in range(len(data.label_names))]
    if conditional:
        return data, conditional_models(experiment, data, str(experiment.runs.model_path()), disable_ema)
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        raise ValueError(
            f"{folder} has no model at {', '.join(missing)}: each of the {len(paths)} classes of data={data.name} "
            "needs one; train them (python main.py mode=classify ...)"
        )
    return data, one_per_class(experiment, list(map(str, paths)), disable_ema)


def load_classifier(folder: str | Path, *typed: str) -> TrainedClassifier:
    """Load the class models of a run of `mode=classify`.

    Args:
        folder: that of the run; it holds `label=0/`, `label=1/`, ..., or the checkpoints of a conditional network.
        typed: settings as on the command line.

    Raises:
        FileNotFoundError: there is no classifier in the folder.
        ValueError: a class has no model, or a setting does not fit.
    """
    quiet_lightning()
    folder = Path(folder)
    files = [folder / "label=0/checkpoints/last.ckpt", folder / "checkpoints/last.ckpt"]
    file = next((path for path in files if path.exists()), None)
    if file is None:
        raise FileNotFoundError(
            f"{folder} holds no classifier: there is neither {files[0].relative_to(folder)} nor "
            f"{files[1].relative_to(folder)}; name the folder of a run of mode=classify"
        )
    known = training_identity(file)["configuration"]
    conditional = known.get("classify.sharing") == "conditional"
    if known.get("data.train_splits"):
        raise ValueError(f"{folder} holds a shared start, which knows no class yet; name the folder of its run")
    if file == files[1] and not conditional:
        raise ValueError(f"{folder} holds one model, which is not conditioned on a class; use palimpsest.load")
    keys = ("classify.discriminative_weight", "training.start_from_counts")
    compared = [f"{key}={word(known[key])}" for key in keys if key in known]
    words = [*overrides(known), *compared, "mode=classify", f"checkpointing.save_dir={in_quotes(str(folder))}", *typed]
    experiment = checked(composed(words), "palimpsest.load_classifier")
    return TrainedClassifier(experiment, *read_classes(experiment, folder, conditional))


def _ids(data: TextData, row: int) -> list[int]:
    return [int(i) for i in data.split(SPLIT)[row]["input_ids"]]


def _rows_of_texts(data: TextData, number: int) -> list[list[int]]:
    """Return the rows of each text, in order; several where it is read in windows."""
    rows = data.split(SPLIT)
    text_R, rows_M = np.asarray(rows["text_id"][:]), [[] for _ in range(number)]
    for row in np.argsort(np.asarray(rows["sample_id"][:]), kind="stable").tolist():
        rows_M[text_R[row]].append(row)
    return rows_M
