"""mode=train: fit one model, resuming where an earlier start left off, then measure it and show what it writes."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from reporting import plots
from reporting.report import Report
from tasks.base import Experiment, likelihood, write_results
from tasks.drawing import draw
from tasks.fitting import fit
from tasks.ppl_eval import protocol, report_likelihood
from tasks.sample_eval import shown
from tasks.scoring import score


def history(folder: Path) -> dict[str, np.ndarray]:
    """What was logged under `folder`, by name: (N, 2) of optimizer step and value. Where starts of a run overlap, the
    later one counts."""
    series: dict[str, dict[int, float]] = {}
    files = sorted(folder.glob("csv/version_*/metrics.csv"), key=lambda path: int(path.parent.name.split("_")[1]))
    for file in files:
        for row in csv.DictReader(file.open()):
            for name, value in row.items():
                if value and name not in ("step", "epoch"):
                    series.setdefault(name, {})[int(row["step"]) + 1] = float(value)
    return {name: np.array(sorted(points.items())) for name, points in series.items()}


def add_loss_curve(report: Report, folder: Path, truth: float | None) -> None:
    """The figure that shows how the loss came down, from what was logged under `folder`."""
    logged = history(folder)
    name = next((name for name in ("train/nll", "train/cross_entropy") if name in logged), None)
    if name is None:
        return
    validation = (*logged["val/nll"].T, logged["val/nll_se"][:, 1]) if "val/nll" in logged else None
    report.figure(
        plots.loss_curve(tuple(logged[name].T), validation, truth),
        "Nats per token; the training curve is one noisy draw per batch, with dropout and without weight averaging.",
        "Loss against optimizer step",
    )


def train(experiment: Experiment, *, num_samples: int, generate_samples: bool) -> dict[str, object]:
    """Fit, then write results.json and report.html on the validation split."""
    checkpoint = fit(experiment)
    data = experiment.data()
    diffusion = experiment.trained(data, str(checkpoint), disable_ema=False)
    trainer = experiment.trainer("validate")
    scores = score(
        trainer, diffusion, data.eval_dataloader("validation", trainer=trainer), experiment.estimator,
        experiment.precision, experiment.seed,
    )  # fmt: skip
    measured = likelihood(data, "validation", scores, experiment.truth)
    folder = experiment.folder()
    results = {
        "nll_nats_per_token": measured.model, "perplexity": measured.model.exp(),
        "unigram_nats_per_token": measured.unigram, "true_nats_per_token": measured.truth,
        "gap_nats_per_token": measured.gap, "checkpoint": checkpoint,
    }  # fmt: skip
    write_results(
        folder, {**results, "protocol": protocol(experiment, data, "validation", scores), "command": experiment.command}
    )
    report = Report("Training run", data.name, experiment.command, experiment.facts)
    report_likelihood(report, measured, "validation")
    report.section("Training")
    add_loss_curve(report, folder, measured.truth.value if measured.truth else None)
    if num_samples and generate_samples:
        report.section("What it writes")
        report.samples(
            shown(draw(diffusion, data, experiment.drawing, num_samples, num_samples, experiment.seed), data.tokenizer)
        )
    report.code(experiment.settings, "configuration")
    report.write(folder / "report.html")
    print(
        f"\nvalidation NLL {measured.model} nats/token, perplexity {measured.model.exp()}, unigram {measured.unigram}"
    )
    if measured.truth:
        print(f"true entropy {measured.truth} nats/token | above it by {measured.gap} (paired)")
    print(f"{checkpoint}\n{folder / 'report.html'}")
    return results
