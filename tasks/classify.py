"""mode=classify: p(class | text) by Bayes' rule from class models."""

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np

from palimpsest.classification.attributions import explain
from palimpsest.classification.bayes import log_prior
from palimpsest.classification.methods import ComparedMethods
from palimpsest.classification.models import class_models, labelled_data
from palimpsest.classification.other_texts import with_other_texts
from palimpsest.classification.results import classify_split
from palimpsest.classification.scoring import SequentialTest
from palimpsest.common.values import COUNT, FilePath, Name, list_of, real, whole
from palimpsest.evaluation.drawing import draw
from palimpsest.evaluation.experiment import Experiment
from palimpsest.evaluation.likelihood import protocol
from palimpsest.report.classification import classification_lines, classification_report
from palimpsest.report.history import samples_of
from palimpsest.report.report import Report
from palimpsest.tasks.base import mode, write_report, write_results


@mode(trains=True, compares=True, measures=True)
def classify(
    experiment: Experiment,
    *,
    checkpoint_path: FilePath | None,
    split: Name,
    test: SequentialTest,
    prior: Literal["uniform", "empirical"] | Annotated[Sequence[float], list_of(real("[0, 1]"), 2, "[0.3,0.7]")],
    compared_with: ComparedMethods,
    other_texts: FilePath | None,
    num_samples: Annotated[int, whole(0, COUNT)],
    num_examples: Annotated[int, whole(0, COUNT)],
    disable_ema: bool,
) -> dict[str, object]:
    """Score `split` under every class with the same masks, apply Bayes' rule, and compare it with other methods.

    The models are those of `checkpoint_path`, with {label} for the number of the class if there is one per class. If it
    is empty, they are those of this configuration, and missing ones are trained. Writes results.json,
    predictions.parquet and report.html into `classify/<split>`.
    """
    data = labelled_data(experiment, split)
    estimator = experiment.build.estimator
    # Settings are checked before the training, which may take days.
    test.check(estimator)
    folder = experiment.runs.folder() / "classify" / split
    counts_C = np.bincount(np.asarray(data.texts("train")["label"][:]), minlength=len(data.label_names))
    log_prior_C = log_prior(prior, counts_C)
    others = compared_with.other_runs(data, split, folder, log_prior_C)
    elsewhere = with_other_texts(data, other_texts, split) if other_texts else None
    models = class_models(experiment, data, checkpoint_path, disable_ema)
    result = classify_split(
        experiment, models, data, split, test, log_prior_C, compared_with, others, elsewhere, folder
    )
    results = result.results(test, models)
    known = protocol(experiment.protocol, data, split, result.scores)
    write_results(folder, {**results, "protocol": known, "command": experiment.command})
    samples = []
    for label, model in enumerate(models):
        args = (experiment.build.drawing(), num_samples, num_samples, experiment.seed, model.class_id)
        sampled = draw(model.diffusion, experiment.build.data(label), *args) if num_samples else []
        samples.append(samples_of(sampled, data.tokenizer))
    examples = explain(models, result, estimator, test, num_examples, experiment.seed)
    report = Report("Generative classification", f"{data.name}, {split} split", experiment.command, experiment.facts)
    labels = [None] if models[0].class_id is not None else range(len(models))
    folders = [experiment.runs.folder(label) for label in labels]
    classification_report(report, result, test, examples, samples, folders)
    path = write_report(experiment, report, folder)
    print(f"\n{classification_lines(result, samples)}", path, sep="\n")
    return results
