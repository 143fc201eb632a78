"""Classify every text of a split, and evaluate the predictions.

Shape suffixes: M texts, C classes, K draws, P network passes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from palimpsest.classification import typical
from palimpsest.classification.measures import Measures, measure
from palimpsest.classification.methods import ComparedMethods, Method, OtherRun, calibrated, compared, fit, text_keys
from palimpsest.classification.models import ClassModel
from palimpsest.classification.other_texts import SPLIT as OTHER
from palimpsest.classification.other_texts import Detection, detect
from palimpsest.classification.predictions import write_predictions
from palimpsest.classification.scoring import ClassScores, SequentialTest, score_classes
from palimpsest.common.metrics import Estimate, ratios_by_rate
from palimpsest.dataloader import TextData
from palimpsest.evaluation.experiment import Experiment
from palimpsest.evaluation.likelihood import Likelihood, likelihood, score

_COVERAGES = (0.5, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class ClassificationResult:
    """All measurements of a split."""

    data: TextData
    split: str
    scores: ClassScores
    log_prior_C: np.ndarray
    plain: Method  # Bayes' rule
    others: list[Method]  # the compared methods
    per_class: list[Likelihood]  # likelihood of validation texts of each class under its own model
    unconditional: Likelihood | None  # p(text) without a class, if the network allows it
    fitted: dict[str, Any] = field(default_factory=dict)  # parameters of the calibration, by name
    detection: Detection | None = None  # of other texts, if there are any

    @property
    def methods(self) -> list[Method]:
        return [self.plain, *self.others]

    @property
    def nll_of_own_class(self) -> Estimate:
        """Nats per token of the validation texts under their own class."""
        tokens_C = np.array([one.scores.tokens_M.sum() for one in self.per_class], dtype=np.float64)
        share_C = tokens_C / tokens_C.sum()
        value = sum(share * one.model.value for share, one in zip(share_C, self.per_class, strict=True))
        variance = sum((share * one.model.se) ** 2 for share, one in zip(share_C, self.per_class, strict=True))
        return Estimate(float(value), float(variance**0.5))

    def after_draws(self) -> tuple[np.ndarray, list[Estimate]]:
        """Return network evaluations per class, and the accuracy after them; stopped texts keep their prediction."""
        cost = self.scores.passes * self.scores.evaluations_per_draw
        counts = np.unique(np.geomspace(1, self.scores.nats_MCK.shape[2], 13).round().astype(int))
        found = [self.scores.posterior(self.log_prior_C, k) for k in counts]
        return counts * cost, [measure(p, self.scores.label_M).accuracy for p in found]

    def at_mask_rates(self) -> tuple[np.ndarray, list[Estimate]]:
        """Return shares of masked tokens, and the accuracy of a single pass there, of passes that every text took."""
        nats_MCP, rate_MP = self.scores.nats_MCP, self.scores.rate_MP
        winner_MP = (-nats_MCP + self.log_prior_C[:, None]).argmax(axis=1)
        right_MP = winner_MP == self.scores.label_M[:, None]
        taken_MP = np.isfinite(rate_MP).all(axis=0) & (rate_MP > 0)  # hard texts take more
        return ratios_by_rate(rate_MP, right_MP, taken_MP)

    def results(self, test: SequentialTest, models: Sequence[ClassModel]) -> dict[str, object]:
        """Return the numbers for results.json."""
        scores, m = self.scores, self.plain.measures
        names = self.data.label_names
        return {
            **_measured(m), "texts": len(scores.label_M),
            "models": list(dict.fromkeys(model.diffusion.provenance for model in models)),
            "methods": {
                method.name: {
                    **_measured(method.measures), "network_evaluations_per_text": method.evaluations,
                    **({} if method.weight is None else {"weight_of_this_model": method.weight}),
                }
                for method in self.methods
            },
            "classes": {
                name: {"precision": m.precision_C[k], "recall": m.recall_C[k], "f1": m.f1_C[k],
                       "texts": int(m.support_C[k]), "validation_nll_nats_per_token": self.per_class[k].model,
                       "true_nats_per_token": self.per_class[k].truth, "gap_nats_per_token": self.per_class[k].gap,
                       "units": self.per_class[k].scores.units.name, "num_units": len(self.per_class[k].scores.units)}
                for k, name in enumerate(names)
            },
            "confusion": m.confusion_CC,
            typical.KEY: typical.quantiles(scores, self.log_prior_C),
            "prior": dict(zip(names, np.exp(self.log_prior_C), strict=True)),
            "nll_of_own_class_nats_per_token": self.nll_of_own_class,
            "nll_without_class_nats_per_token": self.unconditional.model if self.unconditional else None,
            "margin_monte_carlo_se_nats": _finite_mean(scores.margin_se_M),
            "estimator": scores.label, "masks": test.masks, "confidence": test.confidence,
            "draws_per_text_and_class": float(scores.draws_M.mean()),
            "network_evaluations_per_text": scores.evaluations_per_text,
            "seconds_per_text": scores.seconds / len(scores.label_M),
            "accuracy_after_evaluations": (
                _curve("evaluations", *self.after_draws()) if scores.has_several_draws else None
            ),
            "accuracy_at_mask_rate": _curve("mask_rate", *self.at_mask_rates()) if scores.has_masks else None,
            "temperature": self.fitted.get("temperature"),
            "temperature_by_length": asdict(self.fitted["length"]) if self.fitted else None,
            "other_texts": self.detection and self.detection.results(),
        }  # fmt: skip


def classify_split(
    experiment: Experiment,
    models: Sequence[ClassModel],
    data: TextData,
    split: str,
    test: SequentialTest,
    log_prior_C: np.ndarray,
    compared_with: ComparedMethods,
    others: Mapping[str, OtherRun],
    other_texts: TextData | None,
    folder: Path,
) -> ClassificationResult:
    """Score `split` under every class with the same masks, apply Bayes' rule, and compare it with other methods.

    Writes predictions.parquet into `folder` as soon as there are predictions.

    Args:
        others: predictions of other runs, by name.
        other_texts: `data` with texts from elsewhere, which p(text) is to recognise (classification/other_texts.py).
    """

    def scored(texts: TextData, name: str) -> ClassScores:
        estimator = experiment.build.estimator
        return score_classes(experiment.trainer, models, texts, name, estimator, test, experiment.seed, log_prior_C)

    scores = scored(data, split)
    plain = Method.of_network("this model", scores.posterior(log_prior_C), scores)
    validation = scored(data, "validation") if compared_with.calibrate or other_texts else None
    fitted = fit(validation, log_prior_C) if compared_with.calibrate else {}
    posteriors = calibrated(fitted, scores, log_prior_C)
    write_predictions(folder, scores, text_keys(data, split).hash_M, plain.posterior_MC, posteriors)
    detection = detect(scores, scored(other_texts, OTHER), validation, log_prior_C) if other_texts else None
    validation_MC = calibrated(fitted, validation, log_prior_C)["length"] if fitted else None
    methods = compared(
        experiment, models, data, split, scores, plain, posteriors, validation_MC, others, compared_with, log_prior_C
    )
    per_class = [_class_likelihood(experiment, model, label) for label, model in enumerate(models)]
    learnt_without_class = models[0].class_id is not None and models[0].diffusion.label_dropout > 0
    unconditional = (
        _class_likelihood(experiment, ClassModel(models[0].diffusion), None) if learnt_without_class else None
    )
    return ClassificationResult(
        data, split, scores, log_prior_C, plain, methods, per_class, unconditional, fitted, detection
    )


def _class_likelihood(experiment: Experiment, model: ClassModel, label: int | None) -> Likelihood:
    """Measure the validation texts of a class under its own model (None: all texts, without conditioning)."""
    data = experiment.build.data(label)
    name = "all texts" if label is None else data.label_names[label]
    build = experiment.build
    trainer = experiment.trainer(f"validate {name}", label)
    loader = data.eval_dataloader("validation", trainer=trainer)
    measured = score(
        trainer, model.diffusion, loader, build.estimator, build.precision, experiment.seed, model.with_conditioning
    )
    return likelihood(data, "validation", measured, build.truth)


def _measured(m: Measures) -> dict[str, object]:
    interval = [m.accuracy_interval.low, m.accuracy_interval.high]
    return {"accuracy": m.accuracy, "accuracy_wilson_95": interval, "macro_f1": m.macro_f1, "roc_auc": m.roc_auc,
            "log_loss_nats": m.log_loss, "brier": m.brier, "ece": m.ece, "aurc": m.abstention.aurc,
            "accuracy_at_coverage": {str(share): m.abstention.at(share) for share in _COVERAGES}}  # fmt: skip


def _curve(name: str, x: Sequence[float], accuracies: Sequence[Estimate]) -> list[dict[str, object]]:
    """Return the accuracy at each x, which is called `name`."""
    return [{name: float(one), "accuracy": found} for one, found in zip(x, accuracies, strict=True)]


def _finite_mean(values_M: np.ndarray) -> float | None:
    """Return the mean of the finite values; None if there are none."""
    kept = values_M[np.isfinite(values_M)]
    return float(kept.mean()) if len(kept) else None
