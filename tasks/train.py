"""mode=train: fit one model, resuming where an earlier start left off, then measure it and show what it writes."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Annotated

import numpy as np

from palimpsest.common.values import COUNT, whole
from palimpsest.objectives.base import latent_hidden
from palimpsest.report import plots, training_plots
from palimpsest.report.report import Report
from palimpsest.tasks.base import Experiment, likelihood, mode, write_results
from palimpsest.tasks.drawing import draw
from palimpsest.tasks.fitting import fit
from palimpsest.tasks.history import samples_of
from palimpsest.tasks.latent_gain import untrained_marginal
from palimpsest.tasks.ppl_eval import protocol, report_likelihood
from palimpsest.tasks.scoring import score


def history(folder: Path) -> dict[str, np.ndarray]:
    """What was logged under `folder`, by name: (N, 2) of optimizer step and value. Where starts of a run overlap, the
    later one counts."""
    series: dict[str, dict[int, float]] = {}
    files = sorted(folder.glob("csv/version_*/metrics.csv"), key=lambda path: int(path.parent.name.split("_")[1]))
    for file in files:
        for row in csv.DictReader(file.open(encoding="utf-8")):
            if None in row.values():  # the last line of a start that was killed while it wrote
                continue
            for name, value in row.items():
                if value and name not in ("step", "epoch"):
                    series.setdefault(name, {})[int(row["step"]) + 1] = float(value)
    return {name: np.array(sorted(points.items())) for name, points in series.items()}


_WITH_LATENTS = (
    " Training texts are told what the directions that are trained tell them, validation texts their latents: both may "
    "lie below the likelihood above, which is that of texts alone."
)


def add_loss_curve(report: Report, folder: Path, truth: float | None) -> None:
    """The figure that shows how the loss came down, from what was logged under `folder`."""
    logged = history(folder)
    name = next((name for name in ("train/nll", "train/cross_entropy", "train/text_loss") if name in logged), None)
    if name is None:
        return
    validation = (*logged["val/nll"].T, logged["val/nll_se"][:, 1]) if "val/nll" in logged else None
    with_latents = name == "train/text_loss"  # p(text | latent), which the entropy of p(text) does not bound
    report.figure(
        plots.loss_curve(tuple(logged[name].T), validation, None if with_latents else truth),
        "Nats per token; a point of the training curve is the mean since the one before, of one noisy draw per text, "
        "with dropout and without weight averaging." + (_WITH_LATENTS if with_latents else ""),
        "Loss against optimizer step",
    )


def add_course(report: Report, folder: Path) -> None:
    """How the training under `folder` went beside its loss: the loss by mask rate, and its vital signs."""
    logged = history(folder)
    by_rate = {name.rpartition("_")[2]: points for name, points in logged.items() if "_masked_" in name}
    percent = lambda edge: f"{100 * float(edge):.0f}"  # noqa: E731
    shares = {rate: "–".join(map(percent, rate.split("-"))) + " %" for rate in sorted(by_rate)}
    if by_rate:
        report.figure(
            training_plots.nll_by_mask_rate_over_time([(label, by_rate[rate]) for rate, label in shares.items()]),
            "What the network makes of texts with few and with many masks; running means.",
            "Loss per masked token against optimizer step, for five ranges of the share of masked tokens",
        )
    at_rates = {
        float(name.rpartition("_")[2]): points for name, points in logged.items() if "cross_entropy_at_" in name
    }
    if at_rates:
        report.figure(
            training_plots.cross_entropy_at_rates(sorted(at_rates.items())),
            "Validation texts with the same masks every time, and the weights that validation uses. With everything "
            "masked there is nothing to go by but what is given.",
            "Cross-entropy of the masked tokens of the validation texts against optimizer step, by share of masks",
        )
    if (figure := training_plots.signs_of(logged)) is not None:
        left_out = int(logged["train/skipped_steps"][-1, 1]) if "train/skipped_steps" in logged else 0
        report.figure(
            figure,
            "The pale band reaches up to the largest gradient norm of each interval. Tokens per second are counted "
            "without padding, and the clock stands still during validation; MFU: share of the arithmetic that the "
            "device was measured to do in a plain matrix product. Updates left out, because a loss or gradient was not "
            f"finite: {left_out or 'none'}.",
            "Learning rate, gradient norm, tokens per second and peak memory against optimizer step",
        )


@mode(trains=True)
def train(
    experiment: Experiment, *, num_samples: Annotated[int, whole(0, COUNT)], generate_samples: bool
) -> dict[str, object]:
    """Fit, then write results.json and report.html on the validation split."""
    checkpoint = fit(experiment)
    data = experiment.build.data()
    diffusion = experiment.weights.trained(data, str(checkpoint), disable_ema=False)
    trainer = experiment.trainer("validate")
    scores = score(
        trainer, diffusion, data.eval_dataloader("validation", trainer=trainer), experiment.build.estimator,
        experiment.build.precision, experiment.seed, latent_hidden,
    )  # fmt: skip
    measured = likelihood(data, "validation", scores, experiment.build.truth)
    folder = experiment.runs.folder()
    results = {
        "nll_nats_per_token": measured.model, "perplexity": measured.model.exp(),
        "unigram_nats_per_token": measured.unigram, "true_nats_per_token": measured.truth,
        "gap_nats_per_token": measured.gap, "units": scores.units.name, "num_units": len(scores.units),
        "checkpoint": checkpoint,
    }  # fmt: skip
    write_results(
        folder, {**results, "protocol": protocol(experiment, data, "validation", scores), "command": experiment.command}
    )
    report = Report("Training run", data.name, experiment.command, experiment.facts)
    report_likelihood(report, measured, "validation", untrained_marginal(diffusion.objective))
    report.section("Training")
    add_loss_curve(report, folder, measured.truth.value if measured.truth else None)
    add_course(report, folder)
    if num_samples and generate_samples:
        report.section("What it writes")
        report.samples(
            samples_of(
                draw(diffusion, data, experiment.build.drawing(), num_samples, num_samples, experiment.seed),
                data.tokenizer,
            )
        )
    report.code(experiment.build.settings, "configuration")
    report.write(folder / "report.html")
    print(
        f"\nvalidation NLL {measured.model} nats/token, perplexity {measured.model.exp()}, unigram {measured.unigram}"
        f" (errors over {scores.units})"
    )
    if measured.truth:
        print(f"true entropy {measured.truth} nats/token | above it by {measured.gap} (paired)")
    if remark := untrained_marginal(diffusion.objective):
        print(remark)
    print(f"{checkpoint}\n{folder / 'report.html'}")
    return results
