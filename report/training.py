"""Report of a training: loss, vital signs, likelihood, and samples."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from palimpsest.evaluation.likelihood import Likelihood
from palimpsest.report import plots
from palimpsest.report.denoising import Sample
from palimpsest.report.likelihood import likelihood_section, truth_line
from palimpsest.report.report import Report


def training_report(report: Report, folder: Path, measured: Likelihood, samples: Sequence[Sample], remark: str) -> None:
    """Write the sections of a training whose logs are under `folder`."""
    likelihood_section(report, measured, "validation", remark)
    report.section("Training")
    add_loss_curve(report, folder, measured.truth.value if measured.truth else None)
    add_course(report, folder)
    if samples:
        report.section("What it writes")
        report.samples(samples)


def training_lines(measured: Likelihood) -> str:
    """Return the lines for a terminal."""
    numbers = (
        f"validation NLL {measured.model} nats/token, perplexity {measured.model.exp()}, unigram "
        f"{measured.unigram} (errors over {measured.scores.units})"
    )
    return "\n".join([numbers, *truth_line(measured)])


def history(folder: Path) -> dict[str, np.ndarray]:
    """Return what was logged under `folder`, by name: (N, 2) of optimizer step and value.

    If starts of a run overlap, the later one counts.
    """
    series: dict[str, dict[int, float]] = {}
    files = sorted(folder.glob("csv/version_*/metrics.csv"), key=lambda path: int(path.parent.name.split("_")[1]))
    for file in files:
        for row in csv.DictReader(file.open(encoding="utf-8")):
            if None in row.values():  # the last line of a killed run is incomplete
                continue
            for name, value in row.items():
                if value and name not in ("step", "epoch"):
                    series.setdefault(name, {})[int(row["step"]) + 1] = float(value)
    return {name: np.array(sorted(points.items())) for name, points in series.items()}


# Training losses in the order of preference -> what sets them apart from the NLL of validation texts.
_LOSSES = {
    "train/nll": "",
    "train/cross_entropy": " The training loss is a mean over masked tokens and no NLL.",
    "train/text_loss": " Training texts are conditioned as the trained modes say, validation texts on their latents: "
    "both may be below the likelihood above, which is that of texts alone.",
    "train/loss": " Some mask rates count more in the training loss than in the NLL.",
}


def add_loss_curve(report: Report, folder: Path, truth: float | None) -> None:
    """Add the loss curve from the logs under `folder`."""
    logged = history(folder)
    name = next((name for name in _LOSSES if name in logged), None)
    if name is None:
        return
    validation = (*logged["val/nll"].T, logged["val/nll_se"][:, 1]) if "val/nll" in logged else None
    with_latents = name == "train/text_loss"  # p(text | latent), which the entropy of p(text) does not bound
    report.figure(
        plots.loss_curve(tuple(logged[name].T), validation, None if with_latents else truth),
        "Nats per token; a point of the training curve is the mean since the one before, of one noisy draw per text, "
        "with dropout and without weight averaging." + _LOSSES[name],
        "Loss against optimizer step",
    )


def add_course(report: Report, folder: Path) -> None:
    """Add the figures of how the training under `folder` went: its loss by mask rate, and its vital signs."""
    logged = history(folder)
    by_rate = {name.rpartition("_")[2]: points for name, points in logged.items() if "_masked_" in name}
    percent = lambda edge: f"{100 * float(edge):.0f}"
    shares = {rate: "–".join(map(percent, rate.split("-"))) + " %" for rate in sorted(by_rate)}
    if by_rate:
        series = [(label, by_rate[rate]) for rate, label in shares.items()]
        report.figure(
            plots.losses_over_time(series, "loss (nats per masked token)", smooth=True),
            "Loss on texts with few and with many masks; running means.",
            "Loss per masked token against optimizer step, for five ranges of the share of masked tokens",
        )
    at_rates = sorted((float(name.rpartition("_")[2]), name) for name in logged if "cross_entropy_at_" in name)
    if at_rates:
        series = [(f"{percent:g} % masked", logged[name]) for percent, name in at_rates]
        report.figure(
            plots.losses_over_time(series, "cross-entropy (nats per masked token)", smooth=False),
            "Validation texts with the same masks every time, and the weights that validation uses. With everything "
            "masked, only observed tokens remain.",
            "Cross-entropy of the masked tokens of the validation texts against optimizer step, by share of masks",
        )
    if (figure := plots.vital_signs(logged)) is not None:
        left_out = int(logged["train/skipped_steps"][-1, 1]) if "train/skipped_steps" in logged else 0
        report.figure(
            figure,
            "The pale band reaches up to the largest gradient norm of each interval. Tokens per second are counted "
            "without padding, and the clock stands still during validation; MFU: share of the arithmetic that the "
            "device was measured to do in a plain matrix product. Updates left out, because a loss or gradient was not "
            f"finite: {left_out or 'none'}.",
            "Learning rate, gradient norm, tokens per second and peak memory against optimizer step",
        )
