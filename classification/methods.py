"""Classification methods: Bayes' rule, its calibrations, the methods it is compared with, and ensembles with these.

Shape suffixes: M texts, C classes, R rows of the split.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np

from palimpsest.classification.baselines import Baseline, Labelled, baselines
from palimpsest.classification.bayes import posterior
from palimpsest.classification.calibration import TEMPERATURES, fit_length_temperature, fit_temperature
from palimpsest.classification.ensembles import best_baseline, fit_weight, product_of_experts
from palimpsest.classification.latent_centroids import nearest_centroid
from palimpsest.classification.measures import Measures, measure
from palimpsest.classification.models import ClassModel
from palimpsest.classification.predictions import predictions_file, read_posterior
from palimpsest.classification.scoring import ClassScores
from palimpsest.common.values import PATH, list_of
from palimpsest.data.rows import text_hashes
from palimpsest.dataloader import TextData
from palimpsest.evaluation.experiment import Experiment
from palimpsest.samplers.gaussian import LatentSteps

CALIBRATED = {"temperature": "this model, temperature fitted", "length": "this model, temperature by length"}
# Ensembles take the calibrated predictions of other runs, too; older runs have no temperature by length.
_CALIBRATED_COLUMNS = ("calibrated_length", "calibrated_temperature", "posterior")


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ComparedMethods:
    """Methods that Bayes' rule is compared with."""

    calibrate: bool = False  # with temperatures that are fitted on the validation split
    baselines: bool = True  # with naive Bayes and logistic regressions, and with the nearest centroid of latents
    # Folders of other classifications of the same split.
    compare: Annotated[Sequence[str], list_of(PATH, 0, "[outputs/.../classify/test]")] = ()
    latent: LatentSteps = LatentSteps()  # how latents are sampled for the nearest centroid

    def other_runs(self, data: TextData, split: str, folder: Path, log_prior_C: np.ndarray) -> dict[str, OtherRun]:
        """Return the predictions to compare with, by folder name; `folder` receives those of this run.

        Raises:
            ValueError: calibration would be fitted on the split that is reported; a run is compared with itself, named
                twice, or about other texts.
            FileNotFoundError: there are no such predictions.
        """
        if self.calibrate and split == "validation":
            raise ValueError(
                "classify.calibrate=true fits on the validation split, which classify.split=validation would report; "
                "leave one of them out"
            )
        files = {path: predictions_file(path) for path in self.compare}
        seen = {folder.resolve(): "this run itself"}
        for path, file in files.items():
            place = file.parent.resolve()
            if place in seen:
                raise ValueError(f"classify.compare: {path} is the folder of {seen[place]}; name each other run once")
            seen[place] = path
            _warn_of_another_prior(path, file, dict(zip(data.label_names, np.exp(log_prior_C), strict=True)))
        texts = text_keys(data, split) if files else None
        return {path: OtherRun.read(file, texts, self.calibrate) for path, file in files.items()}


def _warn_of_another_prior(path: str, file: Path, ours: Mapping[str, float]) -> None:
    """Warn if the results beside `file` are of another prior."""
    results = file.parent / "results.json"
    theirs = json.loads(results.read_text()).get("prior") if results.exists() else None
    if theirs and not all(
        math.isclose(ours.get(name, math.nan), share, rel_tol=1e-6) for name, share in theirs.items()
    ):
        log.warning(
            "classify.compare: %s has the prior %s and this run %s, so their ensemble has neither; classify both with "
            "the same classify.prior",
            *(path, theirs, {name: round(float(share), 6) for name, share in ours.items()}),
        )


@dataclass(frozen=True)
class Method:
    """A classification method with its predictions."""

    name: str
    posterior_MC: np.ndarray  # p(class | text)
    measures: Measures
    evaluations: float | None = None  # of a network, per text over all classes; None without a network, or if unknown
    weight: float | None = None  # of this model in an ensemble with a baseline

    @classmethod
    def of_network(cls, name: str, posterior_MC: np.ndarray, scores: ClassScores) -> Method:
        """Measure predictions from `scores`."""
        return cls(name, posterior_MC, measure(posterior_MC, scores.label_M), scores.evaluations_per_text)


def fit(scores: ClassScores, log_prior_C: np.ndarray) -> dict[str, Any]:
    """Fit temperatures to the scores of the validation split."""
    log_p_MC, label_M = scores.log_p_MC, scores.label_M
    fitted = {
        "temperature": fit_temperature(log_p_MC, label_M, log_prior_C),
        "length": fit_length_temperature(log_p_MC, _lengths(scores), label_M, log_prior_C),
    }
    if np.isclose(fitted["temperature"], TEMPERATURES, rtol=1e-3).any():
        about = "classify.calibrate: the fitted temperature is at a limit, %g: %d validation texts do not determine it"
        log.warning(about, fitted["temperature"], len(label_M))
    return fitted


def calibrated(fitted: Mapping[str, Any], scores: ClassScores, log_prior_C: np.ndarray) -> dict[str, np.ndarray]:
    """Return the calibrated p(class | text) (M, C), by name."""
    if not fitted:
        return {}
    by_length_MC = fitted["length"].log_p(scores.log_p_MC, _lengths(scores))
    return {
        "temperature": posterior(scores.log_p_MC / fitted["temperature"], log_prior_C),
        "length": posterior(by_length_MC, log_prior_C),
    }


def _lengths(scores: ClassScores) -> np.ndarray:
    """Return the tokens of each text; 1 if none is scored, because its classes are equally likely anyway."""
    return np.maximum(scores.tokens_M, 1)


class TextKeys(NamedTuple):
    """Number, class and hash of each text of a split, by which predictions of several runs are matched."""

    number_M: np.ndarray
    label_M: np.ndarray
    hash_M: np.ndarray


def text_keys(data: TextData, split: str) -> TextKeys:
    """Return the keys of the texts of a split that have tokens, in the order of their numbers."""
    rows = data.split(split)
    number_M, first_M = np.unique(rows["text_id"][:], return_index=True)
    text = text_of_id(data, split)
    hash_M = text_hashes(text[number] for number in number_M.tolist())
    return TextKeys(number_M, np.asarray(rows["label"][:])[first_M], hash_M)


@dataclass(frozen=True)
class OtherRun:
    """Predictions of another run for the same texts."""

    posterior_MC: np.ndarray  # p(class | text)
    in_ensemble_MC: np.ndarray  # calibrated, if this run is and that one was

    @classmethod
    def read(cls, file: Path, texts: TextKeys, calibrated: bool) -> OtherRun:
        """Read the predictions for these texts. Raises ValueError if the file is about others."""
        columns = _CALIBRATED_COLUMNS if calibrated else ("posterior",)
        return cls(read_posterior(file, *texts), read_posterior(file, *texts, columns))


def compared(
    experiment: Experiment,
    models: Sequence[ClassModel],
    data: TextData,
    split: str,
    scores: ClassScores,
    plain: Method,
    posteriors: Mapping[str, np.ndarray],
    validation_MC: np.ndarray | None,
    others: Mapping[str, OtherRun],
    compared_with: ComparedMethods,
    log_prior_C: np.ndarray,
) -> list[Method]:
    """Measure the compared methods on the same texts.

    Args:
        plain: this model without calibration.
        posteriors: its calibrated p(class | text) (M, C), by name.
        validation_MC: the same for the validation texts, with the temperature by length; None without calibration.
        others: predictions of other runs, by name.
    """

    def add(name: str, posterior_MC: np.ndarray, evaluations: float | None = None) -> None:
        methods.append(Method(name, posterior_MC, measure(posterior_MC, scores.label_M), evaluations))

    own_MC = posteriors.get("length", plain.posterior_MC)
    methods = [Method.of_network(CALIBRATED[name], p_MC, scores) for name, p_MC in posteriors.items()]
    for path, run in others.items():
        add(path, run.posterior_MC)
    if others:
        members = [own_MC, *(run.in_ensemble_MC for run in others.values())]
        add(f"ensemble of {len(members)} runs", product_of_experts(members))
    if compared_with.baselines:
        parts = [_texts(data, name) for name in ("train", "validation", split)]
        found = baselines(*parts, data.vocabulary.size)
        for baseline in found:
            if split != "validation" or not baseline.chosen:
                add(baseline.name, baseline.posterior_MC)
        if split != "validation":  # which the baseline is chosen on
            methods.append(_with_baseline(found, own_MC, validation_MC, parts[1].label_M, plain.evaluations, scores))
        if data.latents is not None:
            found = nearest_centroid(experiment, models, data, split, scores, log_prior_C, compared_with.latent)
            add("nearest class centroid of the text's latent", *found)
    if experiment.build.truth is not None:
        text = text_of_id(data, split)
        add("Bayes-optimal", experiment.build.truth.posterior([text[i] for i in scores.text_id_M.tolist()]))
    return methods


def _with_baseline(
    found: Sequence[Baseline],
    own_MC: np.ndarray,
    validation_MC: np.ndarray | None,
    validation_label_M: np.ndarray,
    evaluations: float | None,
    scores: ClassScores,
) -> Method:
    """Measure the ensemble with the best baseline.

    The baseline and, if this model has predictions for validation texts, the weights are chosen on these. Otherwise
    both methods have the same weight.
    """
    best = best_baseline(found, validation_label_M)
    weight = 0.5 if validation_MC is None else fit_weight(validation_MC, best.validation_MC, validation_label_M)
    posterior_MC = product_of_experts([own_MC, best.posterior_MC], [weight, 1 - weight])
    measures = measure(posterior_MC, scores.label_M)
    return Method(f"ensemble with {best.name}", posterior_MC, measures, evaluations, weight)


def _texts(data: TextData, split: str) -> Labelled:
    """Return the texts of a split in order of their ids, each with the tokens of all its windows."""
    rows, text = data.split(split).with_format("numpy")[:], text_of_id(data, split)
    order_R = np.lexsort((rows["sample_id"], rows["text_id"]))
    text_id_M, first_M = np.unique(rows["text_id"][order_R], return_index=True)
    parts = [rows["input_ids"][row] for row in order_R]
    joined = [np.concatenate(parts[a:b]) for a, b in zip(first_M, [*first_M[1:], len(parts)], strict=True)]
    texts = [text[i] for i in text_id_M.tolist()]
    if data.packing(split).long_texts == "truncate":  # nobody sees what is cut off
        texts = [
            data.tokenizer.decode(ids.tolist(), skip_special_tokens=True) if len(ids) == data.length else whole
            for ids, whole in zip(joined, texts, strict=True)
        ]
    return Labelled(texts, joined, rows["label"][order_R][first_M])


def text_of_id(data: TextData, split: str) -> dict[int, str]:
    """Return the texts of a split by their number."""
    columns = data.texts(split)[:]
    return dict(zip(columns["text_id"], columns["text"], strict=True))
