"""mode=classify: p(class | text) by Bayes' rule from diffusion models that know the classes.

Shape suffixes: M texts, C classes, K draws, P network passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np

from palimpsest.classification.baselines import Baseline, Labelled, baselines
from palimpsest.classification.bayes import log_prior, posterior
from palimpsest.classification.calibration import RateWeights, fit_rate_weights, fit_temperature
from palimpsest.classification.measures import Measures, measure
from palimpsest.common.metrics import Estimate
from palimpsest.common.values import COUNT, PATH, FilePath, Name, list_of, real, whole
from palimpsest.samplers.gaussian import LatentSteps
from palimpsest.tasks.base import Experiment, Likelihood, likelihood, mode, write_results
from palimpsest.tasks.class_models import Hypothesis, class_models
from palimpsest.tasks.class_report import class_report, printed
from palimpsest.tasks.class_scoring import ClassScores, Race, score_classes
from palimpsest.tasks.drawing import draw
from palimpsest.tasks.history import samples_of
from palimpsest.tasks.latent_centroids import nearest_centroid
from palimpsest.tasks.ppl_eval import protocol
from palimpsest.tasks.predictions import predictions_file, read_posterior, write_predictions
from palimpsest.tasks.scoring import score
from palimpsest.tasks.verdicts import Method, Verdicts


@dataclass(frozen=True)
class Beside:
    """What is reported beside the plain rule. calibrate: also with a temperature and weights per mask rate, fitted on
    the validation split. baselines: naive Bayes and logistic regressions on the same texts, and of texts with latents
    the nearest class centroid, by latents drawn as `latent` says. compare: folders of other classifications of the same
    split."""

    calibrate: bool = False
    baselines: bool = True
    compare: Annotated[Sequence[str], list_of(PATH, 0, "[outputs/.../classify/test]")] = ()
    latent: LatentSteps = LatentSteps()


@mode(trains=True, compares=True, measures=True)
def classify(
    experiment: Experiment,
    *,
    checkpoint_path: FilePath | None,
    split: Name,
    race: Race,
    prior: Literal["uniform", "empirical"] | Annotated[Sequence[float], list_of(real("[0, 1]"), 2, "[0.3,0.7]")],
    beside: Beside,
    num_samples: Annotated[int, whole(0, COUNT)],
    num_examples: Annotated[int, whole(0, COUNT)],
    disable_ema: bool,
) -> dict[str, object]:
    """Score `split` under every class with the same masks, apply Bayes' rule, hold it against other methods.

    The models are those of `checkpoint_path`, with {label} for the number of the class where there is one per class;
    where it is empty, those of this configuration, and the missing ones are trained. Writes results.json,
    predictions.parquet and report.html into `classify/<split>`.
    """
    data = _labelled(experiment, split)
    # What can be wrong is looked for before the training, which may take days.
    race.check(experiment.build.estimator)
    if beside.calibrate and split == "validation":
        raise ValueError(
            "classify.calibrate=true fits on the validation split, which classify.split=validation would report; leave "
            "one of them out"
        )
    others = {path: predictions_file(path) for path in beside.compare}
    counts_C = np.bincount(np.asarray(data.texts("train")["label"][:]), minlength=len(data.label_names))
    log_prior_C = log_prior(prior, counts_C)
    folder = experiment.runs.folder() / "classify" / split
    hypotheses = class_models(experiment, data, checkpoint_path, disable_ema)
    ask = (hypotheses, data, split, experiment.build.estimator, race, experiment.seed, log_prior_C)
    scores = score_classes(experiment.trainer, *ask)
    plain = _method("this model", scores.posterior(log_prior_C), scores)
    compared = {path: read_posterior(file, scores.text_id_M, scores.label_M) for path, file in others.items()}
    fitted, held, calibrated = {}, [], {}
    if beside.calibrate:
        ask = (hypotheses, data, "validation", experiment.build.estimator, race, experiment.seed, log_prior_C)
        fitted = _fit(score_classes(experiment.trainer, *ask), log_prior_C)
        calibrated = _calibrated(fitted, scores, log_prior_C)
        held += [_method(_NAMES[name], p_MC, scores) for name, p_MC in calibrated.items()]
    write_predictions(folder, scores, plain.posterior_MC, calibrated)
    held += [_method(path, posterior_MC, scores, network=False) for path, posterior_MC in compared.items()]
    if beside.baselines:
        held += [_method(b.name, b.posterior_MC, scores, network=False) for b in _baselines(data, split, scores)]
    if beside.baselines and data.latents is not None:
        how = (scores, log_prior_C, beside.latent)
        held.append(nearest_centroid(experiment, hypotheses, data, split, *how))
    if experiment.build.truth is not None:
        held.append(_optimal(experiment.build.truth, data, split, scores))
    own = [_own(experiment, hypothesis, label) for label, hypothesis in enumerate(hypotheses)]
    untold = _own(experiment, Hypothesis(hypotheses[0].diffusion, None), None) if hypotheses[0].class_id == 0 else None
    verdicts = Verdicts(data, split, scores, log_prior_C, plain, held, own, untold, fitted)
    samples = [_samples(experiment, hypothesis, label, num_samples) for label, hypothesis in enumerate(hypotheses)]
    results = _results(verdicts, race, list(dict.fromkeys(h.diffusion.provenance for h in hypotheses)))
    known = protocol(experiment, data, split, scores)
    write_results(folder, {**results, "protocol": known, "command": experiment.command})
    report = class_report(experiment, verdicts, race, hypotheses, samples, num_examples)
    report.write(folder / "report.html")
    print(printed(verdicts, samples))
    print(f"{folder / 'report.html'}")
    return results


def _labelled(experiment: Experiment, split: str) -> object:
    """The data, with every split that will be read already read."""
    data = experiment.build.data()
    check_classes(data)
    if split not in data.splits:
        raise ValueError(f"classify.split={split} is none of the splits of data={data.name}: {', '.join(data.splits)}")
    for name in ("train", "validation", split):
        data.split(name)
    for label in range(len(data.label_names)):
        for name in ("train", "validation"):
            experiment.build.data(label).texts(name)  # refuses a class without texts
    return data


def check_classes(data: object) -> None:
    """Raises ValueError for data whose texts can not be classified."""
    if data.label_names is None or len(data.label_names) < 2:
        raise ValueError(f"mode=classify needs labelled data with two classes or more; data={data.name} has none")
    if data.label is not None:
        raise ValueError(f"mode=classify scores every class: leave out data.label={data.label}")
    if data.wrap:
        raise ValueError("mode=classify needs one text per row (or window): set data.wrap=false")


def _optimal(truth: object, data: object, split: str, scores: ClassScores) -> Method:
    """Classify the scored texts by the exact distribution of the corpus."""
    text = _text_of_id(data, split)
    posterior_MC = truth.posterior([text[i] for i in scores.text_id_M.tolist()])
    return _method("Bayes-optimal", posterior_MC, scores, network=False)


def _method(name: str, posterior_MC: np.ndarray, scores: ClassScores, network: bool = True) -> Method:
    evaluations = float(scores.evaluations_M.mean()) if network else None
    return Method(name, posterior_MC, measure(posterior_MC, scores.label_M), evaluations)


def _fit(scores: ClassScores, log_prior_C: np.ndarray) -> dict[str, object]:
    """Temperature and, where masks were drawn, weights per mask rate, of the scores of the validation split."""
    fitted: dict[str, object] = {"temperature": fit_temperature(scores.log_p_MC, scores.label_M, log_prior_C)}
    if scores.has_masks:
        fitted["rate_weights"] = fit_rate_weights(scores.nats_MCP, scores.rate_MP, scores.label_M, log_prior_C)
    return fitted


_NAMES = {"temperature": "this model, temperature fitted", "rates": "this model, mask rates weighted"}


def _calibrated(fitted: dict[str, object], scores: ClassScores, log_prior_C: np.ndarray) -> dict[str, np.ndarray]:
    """p(class | text) (M, C) with what was fitted, by name."""
    found = {"temperature": posterior(scores.log_p_MC / fitted["temperature"], log_prior_C)}
    weights = fitted.get("rate_weights")
    if isinstance(weights, RateWeights):
        found["rates"] = posterior(weights.log_p(scores.nats_MCP, scores.rate_MP), log_prior_C)
    return found


def _baselines(data: object, split: str, scores: ClassScores) -> list[Baseline]:
    return baselines(_texts(data, "train"), _texts(data, "validation"), _texts(data, split), data.vocabulary.size)


def _texts(data: object, split: str) -> Labelled:
    """A split's texts in order of their ids, each with the tokens of all its windows."""
    rows, text = data.split(split).with_format("numpy")[:], _text_of_id(data, split)
    order_R = np.lexsort((rows["sample_id"], rows["text_id"]))
    text_id_M, first_M = np.unique(rows["text_id"][order_R], return_index=True)
    parts = [rows["input_ids"][row] for row in order_R]
    joined = [np.concatenate(parts[a:b]) for a, b in zip(first_M, [*first_M[1:], len(parts)], strict=True)]
    return Labelled([text[i] for i in text_id_M.tolist()], joined, rows["label"][order_R][first_M])


def _text_of_id(data: object, split: str) -> dict[int, str]:
    columns = data.texts(split)[:]
    return dict(zip(columns["text_id"], columns["text"], strict=True))


def _own(experiment: Experiment, hypothesis: Hypothesis, label: int | None) -> Likelihood:
    """Likelihood of the validation texts of a class under its own model (None: of all texts, no class being told)."""
    data = experiment.build.data(label)
    name = "all texts" if label is None else data.label_names[label]
    trainer = experiment.trainer(f"validate {name}", label)
    measured = score(
        trainer, hypothesis.diffusion, data.eval_dataloader("validation", trainer=trainer), experiment.build.estimator,
        experiment.build.precision, experiment.seed, hypothesis.told,
    )  # fmt: skip
    return likelihood(data, "validation", measured, experiment.build.truth)


def _samples(experiment: Experiment, hypothesis: Hypothesis, label: int, number: int) -> list:
    if not number:
        return []
    data = experiment.build.data(label)
    drawn = draw(
        hypothesis.diffusion, data, experiment.build.drawing(), number, number, experiment.seed, hypothesis.class_id
    )
    return samples_of(drawn, data.tokenizer)


def _measured(m: Measures) -> dict[str, object]:
    interval = [m.accuracy_interval.low, m.accuracy_interval.high]
    return {"accuracy": m.accuracy, "accuracy_wilson_95": interval, "macro_f1": m.macro_f1, "roc_auc": m.roc_auc,
            "log_loss_nats": m.log_loss, "brier": m.brier, "ece": m.ece}  # fmt: skip


def _results(verdicts: Verdicts, race: Race, models: list[object]) -> dict[str, object]:
    scores, names, m = verdicts.scores, verdicts.data.label_names, verdicts.plain.measures
    return {
        **_measured(m), "texts": len(scores.label_M), "models": models,
        "methods": {
            method.name: {**_measured(method.measures), "network_evaluations_per_text": method.evaluations}
            for method in verdicts.methods
        },
        "classes": {
            name: {"precision": m.precision_C[k], "recall": m.recall_C[k], "f1": m.f1_C[k],
                   "texts": int(m.support_C[k]), "validation_nll_nats_per_token": verdicts.own[k].model,
                   "true_nats_per_token": verdicts.own[k].truth, "gap_nats_per_token": verdicts.own[k].gap,
                   "units": verdicts.own[k].scores.units.name, "num_units": len(verdicts.own[k].scores.units)}
            for k, name in enumerate(names)
        },
        "confusion": m.confusion_CC,
        "prior": dict(zip(names, np.exp(verdicts.log_prior_C), strict=True)),
        "nll_without_class_nats_per_token": verdicts.untold.model if verdicts.untold else None,
        "margin_monte_carlo_se_nats": _finite_mean(scores.margin_se_M),
        "estimator": scores.label, "masks": race.masks, "confidence": race.confidence,
        "draws_per_text_and_class": float(scores.draws_M.mean()),
        "network_evaluations_per_text": float(scores.evaluations_M.mean()),
        "seconds_per_text": scores.seconds / len(scores.label_M),
        "accuracy_after_evaluations": _curve(*verdicts.after_draws()) if scores.has_masks else None,
        "accuracy_at_mask_rate": _curve(*verdicts.at_mask_rates()) if scores.has_masks else None,
        "temperature": verdicts.fitted.get("temperature"),
        "rate_weights": getattr(verdicts.fitted.get("rate_weights"), "weight_B", None),
    }  # fmt: skip


def _curve(x: Sequence[float], y: Sequence[Estimate]) -> list[list[float]]:
    """Rows of x, value, standard error."""
    return [[float(a), b.value, b.se] for a, b in zip(x, y, strict=True)]


def _finite_mean(values_M: np.ndarray) -> float | None:
    """None where there is no finite value."""
    kept = values_M[np.isfinite(values_M)]
    return float(kept.mean()) if len(kept) else None
