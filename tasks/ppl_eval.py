"""mode=ppl_eval: the likelihood of a split, with its error and its protocol."""

import math

from palimpsest.common.values import FilePath, Name
from palimpsest.evaluation.comparison import LIKELIHOODS
from palimpsest.evaluation.experiment import Experiment
from palimpsest.evaluation.latent_gain import latent_gain
from palimpsest.evaluation.likelihood import likelihood, protocol, score
from palimpsest.objectives.base import drop_latent
from palimpsest.report.likelihood import gain_section, likelihood_lines, likelihood_section, untrained_marginal
from palimpsest.report.report import Report
from palimpsest.tasks.base import mode, write_columns, write_report, write_results


@mode(measures=True)
def ppl_eval(
    experiment: Experiment, *, checkpoint_path: FilePath | None, disable_ema: bool, split: Name
) -> dict[str, object]:
    """Score every text of `split`; write results.json and report.html.

    Reports p(text); for texts with latents, also p(text | latent).
    """
    data = experiment.build.data()
    diffusion = experiment.weights.trained(data, checkpoint_path, disable_ema)
    trainer = experiment.trainer("ppl_eval")
    how = (experiment.build.estimator, experiment.build.precision, experiment.seed)
    scores = score(trainer, diffusion, data.eval_dataloader(split, trainer=trainer), *how, drop_latent)
    gain = None if data.latents is None else latent_gain(trainer, diffusion, data, split, *how, scores)
    measured = likelihood(data, split, scores, experiment.build.truth)
    # Numbers of different kinds and splits never overwrite one another.
    kind = "" if scores.kind == "NELBO" else f"-{scores.label.split(',')[0].replace(' ', '_').lower()}"
    folder = experiment.runs.folder() / "ppl_eval" / f"{split}{kind}"
    results = {
        **measured.results(), "monte_carlo_se": scores.monte_carlo_se,
        "bits_per_token": measured.model.scaled(1 / math.log(2)), "texts": scores.num_texts,
        "tokens": int(scores.tokens_M.sum()), "network_evaluations_per_text": scores.evaluations_per_text,
        **(gain.results() if gain else {}),
    }  # fmt: skip
    known = protocol(experiment.protocol, data, split, scores) | {
        "trained_length": diffusion.provenance.length,
        "steps": diffusion.provenance.steps,
    }
    write_columns(folder / LIKELIHOODS, scores.columns())
    write_results(folder, {**results, "protocol": known, "command": experiment.command})
    remark = untrained_marginal(diffusion.objective)
    report = Report("Perplexity", f"{data.name}, {split} split", experiment.command, experiment.facts)
    likelihood_section(report, measured, split, remark)
    if gain:
        gain_section(report, gain, data.latents.metadata)
    path = write_report(experiment, report, folder)
    lines = likelihood_lines(measured, f"{data.name} {split}", gain)
    print(f"\n{lines}", *filter(None, [remark]), path, sep="\n")
    return results
