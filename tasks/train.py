"""mode=train: fit one model, resuming from its last checkpoint, then evaluate it and sample from it."""

from typing import Annotated

from palimpsest.common.values import COUNT, whole
from palimpsest.evaluation.comparison import LIKELIHOODS
from palimpsest.evaluation.drawing import draw
from palimpsest.evaluation.experiment import Experiment
from palimpsest.evaluation.likelihood import likelihood, protocol, score
from palimpsest.objectives.base import drop_latent
from palimpsest.report.history import samples_of
from palimpsest.report.likelihood import untrained_marginal
from palimpsest.report.report import Report
from palimpsest.report.training import training_lines, training_report
from palimpsest.tasks.base import mode, write_columns, write_report, write_results


@mode(trains=True)
def train(
    experiment: Experiment, *, num_samples: Annotated[int, whole(0, COUNT)], generate_samples: bool, disable_ema: bool
) -> dict[str, object]:
    """Fit, then write results.json and report.html on the validation split."""
    checkpoint = experiment.fit()
    data = experiment.build.data()
    folder = experiment.runs.folder()
    diffusion = experiment.weights.trained(data, str(checkpoint), disable_ema)
    trainer = experiment.trainer("validate")
    how = (experiment.build.estimator, experiment.build.precision, experiment.seed)
    scores = score(trainer, diffusion, data.eval_dataloader("validation", trainer=trainer), *how, drop_latent)
    measured = likelihood(data, "validation", scores, experiment.build.truth)
    results = {**measured.results(), "checkpoint": checkpoint}
    known = protocol(experiment.protocol, data, "validation", scores) | {"steps": diffusion.provenance.steps}
    write_columns(folder / LIKELIHOODS, scores.columns())
    write_results(folder, {**results, "protocol": known, "command": experiment.command})
    number = num_samples if generate_samples else 0
    sampled = draw(diffusion, data, experiment.build.drawing(), number, number, experiment.seed) if number else []
    remark = untrained_marginal(diffusion.objective)
    report = Report("Training run", data.name, experiment.command, experiment.facts)
    training_report(report, folder, measured, samples_of(sampled, data.tokenizer), remark)
    path = write_report(experiment, report, folder)
    print(f"\n{training_lines(measured)}", *filter(None, [remark]), checkpoint, path, sep="\n")
    return results
