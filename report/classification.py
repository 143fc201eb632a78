"""Show a classification: how often it is right, how honest it is, and which words spoke for its verdicts.

Shape suffixes: M texts, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from palimpsest.classification.evidence import Example
from palimpsest.classification.scoring import Race
from palimpsest.classification.verdicts import Verdicts
from palimpsest.report import classification_plots as figures
from palimpsest.report.denoising import Sample
from palimpsest.report.evidence import shown_evidence
from palimpsest.report.formatting import Interval, Metric
from palimpsest.report.likelihood import likelihood_figure, likelihood_metrics, mask_rate_figure
from palimpsest.report.report import Report
from palimpsest.report.training import add_loss_curve


def classification_report(
    report: Report, verdicts: Verdicts, race: Race, examples: Sequence[Example], samples: Sequence[Sequence[Sample]],
    folders: Sequence[Path],
) -> None:  # fmt: skip
    """Write everything about a classification, from the verdicts to the words that spoke for them.

    Args:
        samples: texts of each class, out of masks.
        folders: of the trainings of the classes; one for a conditional model.
    """
    _accuracy(report, verdicts, race)
    _calibration(report, verdicts)
    _draws(report, verdicts, race)
    if examples:
        report.section("Which tokens spoke", _EVIDENCE.format("" if verdicts.scores.exact else _FROM_MASKS))
        chosen = {one.row: (_title(verdicts, one), *one.classes) for one in examples}
        nats = [one.nats_CL for one in examples]
        report.evidence(shown_evidence(verdicts.data, verdicts.split, chosen, nats))
    for label in range(len(verdicts.own)):
        _class_model(report, verdicts, label, samples[label], folders[label : label + 1])


def _accuracy(report: Report, verdicts: Verdicts, race: Race) -> None:
    m, names, scores = verdicts.plain.measures, verdicts.data.label_names, verdicts.scores
    report.section("Accuracy", _METHOD + (_COMMON if race.masks == "common" and scores.has_masks else "")
                   + (_AVERAGED if scores.nats_MCK.shape[2] > 1 else ""))  # fmt: skip
    report.metrics(
        [
            Metric("accuracy", m.accuracy.value, m.accuracy.se, "", f"95%: {_percent(m.accuracy_interval)}"),
            Metric("macro F1", m.macro_f1.value, m.macro_f1.se),
            Metric("log loss", m.log_loss.value, m.log_loss.se, "nats"),
            Metric("texts", float(len(scores.label_M))),
            Metric("network evaluations", float(scores.evaluations_M.mean()), None, "per text", "over all classes"),
            Metric("time", 1000 * scores.seconds / len(scores.label_M), None, "ms/text"),
        ]
    )
    rows = [(o.name, o.measures.accuracy.value, o.measures.accuracy.se) for o in verdicts.methods]
    rows.append(("chance", float(np.bincount(scores.label_M).max() / len(scores.label_M)), 0.0))
    rows.sort(key=lambda row: row[1])
    report.figure(figures.accuracy_ladder(rows, "this model"), "Accuracy with 95% intervals, on the same texts.",
                  "Accuracies")  # fmt: skip
    report.table(
        ["method", "accuracy, %, and 95%", "F1", "AUC", "log loss", "Brier", "ECE", "passes"],
        [[o.name, Interval(100 * o.measures.accuracy.value, 100 * o.measures.accuracy_interval.low,
                           100 * o.measures.accuracy_interval.high), f"{o.measures.macro_f1.value:.3f}",
          "–" if o.measures.roc_auc is None else f"{o.measures.roc_auc:.3f}", f"{o.measures.log_loss.value:.3f}",
          f"{o.measures.brier.value:.3f}", f"{o.measures.ece:.3f}",
          "–" if o.evaluations is None else f"{o.evaluations:.1f}"]
         for o in verdicts.methods],
        "All on the same texts. What is fitted is fitted on the validation split. F1: mean over the classes. AUC: area "
        "under the ROC curve. Passes: network evaluations per text, over all classes.",
    )  # fmt: skip
    report.table(
        ["class", "precision", "recall", "F1", "texts"],
        [[n, f"{m.precision_C[k]:.3f}", f"{m.recall_C[k]:.3f}", f"{m.f1_C[k]:.3f}", int(m.support_C[k])]
         for k, n in enumerate(names)],
    )  # fmt: skip
    report.figure(figures.confusion_matrix(m.confusion_CC, names), "Rows are the true classes.", "Confusion matrix")


def _percent(interval: object) -> str:
    return f"{100 * interval.low:.1f} to {100 * interval.high:.1f} %"


def _calibration(report: Report, verdicts: Verdicts) -> None:
    scores, names = verdicts.scores, verdicts.data.label_names
    report.section("How honest the probabilities are")
    of_networks = [method for method in verdicts.methods if method.evaluations is not None]
    for method in [of_networks[0], *of_networks[1:][-1:]]:
        r = method.measures.reliability
        report.figure(figures.calibration(r.confidence_B, r.accuracy_B, r.counts_B, r.ece),
                      f"{method.name}: how often a verdict of a given confidence is right.",
                      f"Calibration of {method.name}")  # fmt: skip
    if len(names) == 2:
        margin_M = scores.log_p_MC[:, 1] - scores.log_p_MC[:, 0]
        report.figure(figures.llr_histogram({n: margin_M[scores.label_M == k] for k, n in enumerate(names)}),
                      "Evidence in nats, by true class.", "Log-likelihood ratios")  # fmt: skip


def _draws(report: Report, verdicts: Verdicts, race: Race) -> None:
    scores = verdicts.scores
    if scores.exact or not scores.has_masks:
        return
    report.section("What the draws bought", _DRAWS + (_SEQUENTIAL if race.confidence < 1 else ""))
    evaluations, accuracy = verdicts.after_draws()
    curve = figures.Curve(evaluations, [a.value for a in accuracy], [a.se for a in accuracy])
    others = {o.name: o.measures.accuracy.value for o in verdicts.others if o.evaluations is None}
    found = verdicts.plain.measures.accuracy
    spent = {"sequential": figures.Point(float(scores.draws_M.mean()), found.value, found.se)}
    report.figure(
        figures.accuracy_against_draws({f"{race.masks} masks": curve}, others, spent if race.confidence < 1 else {}),
        "Accuracy had no text been drawn more often.", "Accuracy against draws",
    )  # fmt: skip
    if race.confidence < 1:
        report.figure(figures.draws_histogram(scores.draws_M, race.num_draws),
                      f"Evaluations per class until the winner was certain at {race.confidence}.",
                      "Draws per text")  # fmt: skip
    rate, found = verdicts.at_mask_rates()
    report.figure(figures.accuracy_against_mask_rate(rate, [a.value for a in found], [a.se for a in found]),
                  "Verdicts from a single draw.", "Accuracy against mask rate")  # fmt: skip


def _title(verdicts: Verdicts, example: Example) -> str:
    scores, names, m = verdicts.scores, verdicts.data.label_names, example.text
    verdict = int((scores.log_p_MC[m] + verdicts.log_prior_C).argmax())
    outcome = "right" if verdict == scores.label_M[m] else f"wrong, it is {names[scores.label_M[m]]}"
    title = f"text {scores.text_id_M[m]}: {names[verdict]} at {verdicts.plain.posterior_MC[m, verdict]:.4f} ({outcome})"
    return title + (f", first of {example.windows} windows" if example.windows > 1 else "")


def _class_model(
    report: Report, verdicts: Verdicts, label: int, samples: Sequence[Sample], folders: Sequence[Path]
) -> None:
    measured, name = verdicts.own[label], verdicts.data.label_names[label]
    report.section(f"The model of “{name}”", "Likelihood of held-out texts of its own class.")
    report.metrics(likelihood_metrics(measured))
    likelihood_figure(report, measured, f"Likelihood of {name} texts")
    for folder in folders:
        add_loss_curve(report, folder, measured.truth.value if measured.truth else None)
    mask_rate_figure(report, measured, "Cross-entropy of a masked token against the share masked.")
    if samples:
        report.samples(samples)


_METHOD = "log p(text | class) from models that know the classes; Bayes' rule gives p(class | text)."
_AVERAGED = (
    " What few masks leave open is averaged over, so probabilities are less extreme than the log-likelihoods alone."
)
_COMMON = " Every text is scored with the same masks under every class, so that mask noise cancels in the comparison."
_DRAWS = "The likelihood is an average over random masks, and what a single one is worth depends on how much it masks."
_SEQUENTIAL = " A text is drawn until its winner is certain."
_FROM_MASKS = ", from the very masks that the verdict comes from"
_EVIDENCE = (
    "Each token's part of the log-likelihood ratio of two classes{}. "
    "Shown are the surest of the right verdicts and the surest of the wrong ones; of a text in windows, the first."
)


def classification_lines(verdicts: Verdicts, samples: Sequence[Sequence[Sample]]) -> str:
    """Return the lines for a terminal."""
    data, scores = verdicts.data, verdicts.scores
    lines = [f"{data.name} {verdicts.split}: {len(scores.label_M)} texts, {len(data.label_names)} classes"]
    for name, own in zip(data.label_names, verdicts.own, strict=True):
        truth = f", true entropy {own.truth}, above it by {own.gap}" if own.truth else ""
        lines.append(f"  {name:>10}: validation NLL {own.model} nats/token{truth}")
    if verdicts.unconditional:
        lines.append(f"  {'no class':>10}: validation NLL {verdicts.unconditional.model} nats/token")
    for method in sorted(verdicts.methods, key=lambda method: method.measures.accuracy.value):
        m = method.measures
        cost = f", {method.evaluations:.1f} network evaluations a text" if method.evaluations else ""
        lines.append(f"  {method.name:>34}: {100 * m.accuracy.value:5.1f} % ± {100 * m.accuracy.se:.1f}, "
                     f"log loss {m.log_loss.value:.3f}, ECE {m.ece:.3f}{cost}")  # fmt: skip
    for name, texts in zip(data.label_names, samples, strict=True):
        lines += [f"\n{name}, out of masks: {text.text}" for text in texts]
    return "\n".join(lines)
