"""Classification methods: Bayes' rule, its calibrations, and the methods it is compared with.

Shape suffixes: M texts, C classes, R rows of the split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np

from palimpsest.classification.baselines import Labelled, baselines
from palimpsest.classification.bayes import posterior
from palimpsest.classification.calibration import RateWeights, fit_rate_weights, fit_temperature
from palimpsest.classification.latent_centroids import nearest_centroid
from palimpsest.classification.measures import Measures, measure
from palimpsest.classification.models import ClassModel
from palimpsest.classification.predictions import predictions_file
from palimpsest.classification.scoring import ClassScores
from palimpsest.common.values import PATH, list_of
from palimpsest.dataloader import TextData
from palimpsest.evaluation.experiment import Experiment
from palimpsest.samplers.gaussian import LatentSteps

_NAMES = {"temperature": "this model, temperature fitted", "rates": "this model, mask rates weighted"}


@dataclass(frozen=True)
class ComparedMethods:
    """Methods that Bayes' rule is compared with."""

    calibrate: bool = False  # with a temperature and weights per mask rate, fitted on the validation split
    baselines: bool = True  # with naive Bayes and logistic regressions, and with the nearest centroid of latents
    # Folders of other classifications of the same split.
    compare: Annotated[Sequence[str], list_of(PATH, 0, "[outputs/.../classify/test]")] = ()
    latent: LatentSteps = LatentSteps()  # how latents are sampled for the nearest centroid

    def files(self, split: str) -> dict[str, Path]:
        """Return the predictions to compare with, by folder name.

        Raises:
            ValueError: calibration would be fitted on the split that is reported.
            FileNotFoundError: there are no such predictions.
        """
        if self.calibrate and split == "validation":
            raise ValueError(
                "classify.calibrate=true fits on the validation split, which classify.split=validation would report; "
                "leave one of them out"
            )
        return {path: predictions_file(path) for path in self.compare}


@dataclass(frozen=True)
class Method:
    """A classification method with its predictions."""

    name: str
    posterior_MC: np.ndarray  # p(class | text)
    measures: Measures
    evaluations: float | None = None  # of a network, per text over all classes; None without a network

    @classmethod
    def of_network(cls, name: str, posterior_MC: np.ndarray, scores: ClassScores) -> Method:
        """Measure predictions from `scores`."""
        return cls(name, posterior_MC, measure(posterior_MC, scores.label_M), float(scores.evaluations_M.mean()))


def fit(scores: ClassScores, log_prior_C: np.ndarray) -> dict[str, object]:
    """Fit a temperature and, if masks were drawn, weights per mask rate, to the scores of the validation split."""
    fitted: dict[str, object] = {"temperature": fit_temperature(scores.log_p_MC, scores.label_M, log_prior_C)}
    if scores.has_masks:
        fitted["rate_weights"] = fit_rate_weights(scores.nats_MCP, scores.rate_MP, scores.label_M, log_prior_C)
    return fitted


def calibrated(fitted: Mapping[str, object], scores: ClassScores, log_prior_C: np.ndarray) -> dict[str, np.ndarray]:
    """Return the calibrated p(class | text) (M, C), by name."""
    if not fitted:
        return {}
    posteriors = {"temperature": posterior(scores.log_p_MC / fitted["temperature"], log_prior_C)}
    weights = fitted.get("rate_weights")
    if isinstance(weights, RateWeights):
        posteriors["rates"] = posterior(weights.log_p(scores.nats_MCP, scores.rate_MP), log_prior_C)
    return posteriors


def compared(
    experiment: Experiment,
    models: Sequence[ClassModel],
    data: TextData,
    split: str,
    scores: ClassScores,
    posteriors: Mapping[str, np.ndarray],
    others: Mapping[str, np.ndarray],
    compared_with: ComparedMethods,
    log_prior_C: np.ndarray,
) -> list[Method]:
    """Measure the compared methods on the same texts.

    Args:
        posteriors: calibrated p(class | text) (M, C), by name.
        others: p(class | text) of other runs, by name.
    """

    def add(name: str, posterior_MC: np.ndarray, evaluations: float | None = None) -> None:
        methods.append(Method(name, posterior_MC, measure(posterior_MC, scores.label_M), evaluations))

    methods = [Method.of_network(_NAMES[name], p_MC, scores) for name, p_MC in posteriors.items()]
    for path, posterior_MC in others.items():
        add(path, posterior_MC)
    if compared_with.baselines:
        parts = [_texts(data, name) for name in ("train", "validation", split)]
        for baseline in baselines(*parts, data.vocabulary.size):
            add(baseline.name, baseline.posterior_MC)
        if data.latents is not None:
            found = nearest_centroid(experiment, models, data, split, scores, log_prior_C, compared_with.latent)
            add("nearest class centroid of the text's latent", *found)
    if experiment.build.truth is not None:
        text = _text_of_id(data, split)
        add("Bayes-optimal", experiment.build.truth.posterior([text[i] for i in scores.text_id_M.tolist()]))
    return methods


def _texts(data: TextData, split: str) -> Labelled:
    """Return the texts of a split in order of their ids, each with the tokens of all its windows."""
    rows, text = data.split(split).with_format("numpy")[:], _text_of_id(data, split)
    order_R = np.lexsort((rows["sample_id"], rows["text_id"]))
    text_id_M, first_M = np.unique(rows["text_id"][order_R], return_index=True)
    parts = [rows["input_ids"][row] for row in order_R]
    joined = [np.concatenate(parts[a:b]) for a, b in zip(first_M, [*first_M[1:], len(parts)], strict=True)]
    return Labelled([text[i] for i in text_id_M.tolist()], joined, rows["label"][order_R][first_M])


def _text_of_id(data: TextData, split: str) -> dict[int, str]:
    columns = data.texts(split)[:]
    return dict(zip(columns["text_id"], columns["text"], strict=True))
