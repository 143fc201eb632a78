"""mode=classify: p(class | text) by Bayes' rule from diffusion models that know the classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from palimpsest.classification.bayes import log_prior
from palimpsest.classification.evidence import explain
from palimpsest.classification.methods import Beside
from palimpsest.classification.models import class_models, labelled_data
from palimpsest.classification.scoring import Race
from palimpsest.classification.verdicts import find_verdicts
from palimpsest.evaluation.drawing import draw
from palimpsest.evaluation.likelihood import protocol
from palimpsest.report.classification import classification_lines, classification_report
from palimpsest.report.history import samples_of
from palimpsest.report.report import Report
from palimpsest.tasks.base import Experiment, write_report, write_results


def classify(
    experiment: Experiment, *, checkpoint_path: str, split: str, race: Race, prior: str | Sequence[float],
    beside: Beside, num_samples: int, num_examples: int, disable_ema: bool,
) -> dict[str, object]:  # fmt: skip
    """Score `split` under every class with the same masks, apply Bayes' rule, hold it against other methods.

    The models are those of `checkpoint_path`, with {label} for the number of the class where there is one per class;
    where it is empty, those of this configuration, and the missing ones are trained. Writes results.json,
    predictions.parquet and report.html into `classify/<split>`.
    """
    data, estimator, seed = labelled_data(experiment, split), experiment.estimator, experiment.seed
    # Mistakes are looked for before the training, which may take days.
    race.check(estimator)
    others = beside.files(split)
    counts_C = np.bincount(np.asarray(data.texts("train")["label"][:]), minlength=len(data.label_names))
    log_prior_C, folder = log_prior(prior, counts_C), experiment.folder() / "classify" / split
    models = class_models(experiment, data, checkpoint_path, disable_ema)
    verdicts = find_verdicts(experiment, models, data, split, race, log_prior_C, beside, others, folder)
    results, known = verdicts.results(race, models), protocol(experiment.protocol, data, split, verdicts.scores)
    write_results(folder, {**results, "protocol": known, "command": experiment.command})
    samples = []
    for label, model in enumerate(models):
        ask = (experiment.drawing, num_samples, num_samples, seed, model.class_id)
        drawn = draw(model.diffusion, experiment.data(label), *ask) if num_samples else []
        samples.append(samples_of(drawn, data.tokenizer))
    examples = explain(models, verdicts, estimator, race, num_examples, seed)
    report = Report("Generative classification", f"{data.name}, {split} split", experiment.command, experiment.facts)
    folders = [experiment.folder()] if verdicts.unconditional else [experiment.folder(k) for k in range(len(models))]
    classification_report(report, verdicts, race, examples, samples, folders)
    path = write_report(experiment, report, folder)
    print(f"\n{classification_lines(verdicts, samples)}", path, sep="\n")
    return results
