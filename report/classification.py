"""Report of a classification: accuracy, calibration, abstention, other texts, and token attributions.

Shape suffixes: M texts, C classes.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from palimpsest.classification.attributions import ExplainedText
from palimpsest.classification.methods import CALIBRATED, Method
from palimpsest.classification.other_texts import Detection
from palimpsest.classification.results import ClassificationResult
from palimpsest.classification.scoring import SequentialTest
from palimpsest.report import classification_plots as figures
from palimpsest.report.denoising import Sample
from palimpsest.report.evidence import shown_evidence
from palimpsest.report.formatting import Interval, Metric
from palimpsest.report.likelihood import likelihood_figure, likelihood_metrics, mask_rate_figure
from palimpsest.report.plain_text import visible
from palimpsest.report.report import Report
from palimpsest.report.training import add_loss_curve


def classification_report(
    report: Report,
    result: ClassificationResult,
    test: SequentialTest,
    examples: Sequence[ExplainedText],
    samples: Sequence[Sequence[Sample]],
    folders: Sequence[Path],
) -> None:
    """Write all sections of a classification.

    Args:
        samples: generated texts of each class.
        folders: of the trainings of the classes; one for a conditional model.
    """
    _accuracy(report, result, test)
    _calibration(report, result)
    _abstention(report, result)
    if result.detection:
        _other_texts(report, result.detection, result.split)
    _draws(report, result, test)
    if examples:
        report.section("Token attributions", _ATTRIBUTIONS.format("" if result.scores.exact else _FROM_MASKS))
        chosen = {one.row: (_title(result, one), *one.classes) for one in examples}
        nats = [one.nats_CL for one in examples]
        report.evidence(shown_evidence(result.data, result.split, chosen, nats))
    for label in range(len(result.per_class)):
        _class_model(report, result, label, samples[label], folders[label : label + 1])


def _accuracy(report: Report, result: ClassificationResult, test: SequentialTest) -> None:
    m, scores = result.plain.measures, result.scores
    nll = result.nll_of_own_class
    names = result.data.label_names
    common = _COMMON if test.masks == "common" and scores.has_masks else ""
    averaged = _AVERAGED if scores.nats_MCK.shape[2] > 1 else ""
    prior = ", ".join(f"{name} {p:.3g}" for name, p in zip(names, np.exp(result.log_prior_C), strict=True))
    report.section("Accuracy", f"{_METHOD}{common}{averaged} Prior (classify.prior): {prior}.")
    report.metrics(
        [
            Metric.of("accuracy", m.accuracy, "", f"95%: {_percent(m.accuracy_interval)}"),
            Metric.of("macro F1", m.macro_f1),
            Metric.of("log loss", m.log_loss, "nats"),
            Metric.of("NLL under its own class", nll, "nats/token", "validation texts"),
            Metric("texts", float(len(scores.label_M))),
            Metric("network evaluations", scores.evaluations_per_text, None, "per text", "over all classes"),
            Metric("time", 1000 * scores.seconds / len(scores.label_M), None, "ms/text"),
        ]
    )
    rows = [(method.name, method.measures.accuracy.value, method.measures.accuracy.se) for method in result.methods]
    rows.append(("always the most frequent class", float(np.bincount(scores.label_M).max() / len(scores.label_M)), 0.0))
    rows.sort(key=lambda row: row[1])
    report.figure(
        figures.accuracy_ladder(rows, "this model"), "Accuracy with 95% intervals, on the same texts.", "Accuracies"
    )
    report.table(
        ["method", "accuracy, %, and 95%", "AUC", "log loss", "ECE", "AURC", "passes"],
        [_method_cells(method) for method in result.methods],
        "All on the same texts. Baselines are fitted on the training texts and know the shares of their classes; "
        "temperatures, weights and regularisation are fitted on the validation split. AUC: area under the ROC curve. "
        "AURC: area under the risk–coverage curve (Abstention). Passes: network evaluations per text, over all "
        "classes." + _ensembles(result),
    )  # fmt: skip
    report.table(
        ["class", "precision", "recall", "F1", "texts"],
        [[n, f"{m.precision_C[k]:.3f}", f"{m.recall_C[k]:.3f}", f"{m.f1_C[k]:.3f}", int(m.support_C[k])]
         for k, n in enumerate(names)],
    )  # fmt: skip
    report.figure(figures.confusion_matrix(m.confusion_CC, names), "Rows are the true classes.", "Confusion matrix")


def _method_cells(method: Method) -> list[object]:
    m, accuracy = method.measures, method.measures.accuracy_interval
    auc = "–" if m.roc_auc is None else f"{m.roc_auc:.3f}"
    passes = "–" if method.evaluations is None else f"{method.evaluations:.0f}"
    interval = Interval(100 * m.accuracy.value, 100 * accuracy.low, 100 * accuracy.high)
    losses = [f"{m.log_loss.value:.3f}", f"{m.ece:.3f}", f"{m.abstention.aurc.value:.3f}"]
    return [method.name, interval, auc, *losses, passes]


def _ensembles(result: ClassificationResult) -> str:
    """Return what the ensembles are, if there are any."""
    weight = next((method.weight for method in result.others if method.weight is not None), None)
    ensembles = any(method.name.startswith("ensemble") for method in result.others)
    text = " Ensembles average log p(class | text)." if ensembles else ""
    if weight is not None and result.fitted:
        text += (
            f" The weight of this model beside the baseline is {weight:.2f}, chosen on the validation split, on which "
            "the baseline and its regularisation were chosen, too."
        )
    elif weight is not None:
        text += " This model and the baseline, the best on the validation split, have equal weights."
    return text


def _percent(interval: object) -> str:
    return f"{100 * interval.low:.1f} to {100 * interval.high:.1f} %"


def _calibration(report: Report, result: ClassificationResult) -> None:
    scores, names = result.scores, result.data.label_names
    report.section("Calibration")
    calibrated = [method for method in result.others if method.name in CALIBRATED.values()]
    for method in [result.plain, *calibrated[-1:]]:
        r = method.measures.reliability
        figure = figures.calibration(r.confidence_B, r.accuracy_B, r.counts_B, r.ece)
        about = f"{method.name}: how often a prediction of a given confidence is right."
        report.figure(figure, about, f"Calibration of {method.name}")
    if len(names) == 2:
        margin_M = scores.log_p_MC[:, 1] - scores.log_p_MC[:, 0]
        figure = figures.llr_histogram({n: margin_M[scores.label_M == k] for k, n in enumerate(names)})
        report.figure(figure, "Evidence in nats, by true class.", "Log-likelihood ratios")


def _abstention(report: Report, result: ClassificationResult) -> None:
    """Show the accuracy of the most confident predictions, of one calibration only: the temperature by length."""
    methods = [method for method in result.methods if method.name != CALIBRATED["temperature"]]
    shown = {method.name: method.measures.abstention.right_M for method in methods}
    abstention = result.plain.measures.abstention
    report.section("Abstention", _ABSTENTION)
    half, most = abstention.at(0.5), abstention.at(0.9)
    report.metrics(
        [
            Metric.of("accuracy", half, "", "on the surest 50 % of the texts"),
            Metric.of("accuracy", most, "", "on the surest 90 %"),
            Metric.of("AURC", abstention.aurc, "", "mean error rate over coverages"),
        ]
    )
    report.figure(
        figures.accuracy_against_coverage(shown, result.plain.name),
        "Accuracy of the most confident predictions, by each method's own largest posterior. Band: 95% of this model.",
        "Accuracy against coverage",
    )


def _other_texts(report: Report, found: Detection, split: str) -> None:
    report.section("Texts from elsewhere", _OTHER_TEXTS)
    report.metrics(
        [
            Metric.of("AUROC", found.by_likelihood, "", "by p(text)"),
            Metric.of("AUROC", found.by_typicality, "", "by typicality"),
            Metric.of("AUROC", found.by_posterior, "", "by the largest posterior"),
        ]
    )
    figure = figures.likelihood_histogram({split: found.own_M, "other texts": found.other_M}, found.typical)
    report.figure(figure, "Likelihood per token of the texts, without a class.", "Likelihood of other texts")


def _draws(report: Report, result: ClassificationResult, test: SequentialTest) -> None:
    scores = result.scores
    if not scores.has_several_draws:
        return
    report.section("Accuracy by draws", _ABOUT_DRAWS + (_SEQUENTIAL if test.confidence < 1 else ""))
    evaluations, accuracy = result.after_draws()
    curve = (evaluations, [a.value for a in accuracy], [a.se for a in accuracy])
    others = {method.name: method.measures.accuracy.value for method in result.others if method.evaluations is None}
    found = result.plain.measures.accuracy
    spent = (
        {"sequential": ([scores.draws_M.mean() * scores.evaluations_per_draw], [found.value], [found.se])}
        if test.confidence < 1
        else {}
    )
    figure = figures.accuracy_against_draws({f"{test.masks} masks": curve}, others, spent)
    report.figure(figure, "Accuracy had no text been drawn more often.", "Accuracy against draws")
    if test.confidence < 1:
        about = f"Draws per class until the prediction was certain at {test.confidence}."
        report.figure(figures.draws_histogram(scores.draws_M, test.num_draws), about, "Draws per text")
    if not scores.has_masks:
        return
    rate, found = result.at_mask_rates()
    figure = figures.accuracy_against_mask_rate(rate, [a.value for a in found], [a.se for a in found])
    report.figure(figure, "Predictions from a single draw.", "Accuracy against mask rate")


def _title(result: ClassificationResult, example: ExplainedText) -> str:
    scores, m = result.scores, example.text
    names = result.data.label_names
    predicted = int((scores.log_p_MC[m] + result.log_prior_C).argmax())
    outcome = "right" if predicted == scores.label_M[m] else f"wrong, it is {names[scores.label_M[m]]}"
    posterior = result.plain.posterior_MC[m, predicted]
    title = f"text {scores.text_id_M[m]}: {names[predicted]} at {posterior:.4f} ({outcome})"
    return title + (f", first of {example.windows} windows" if example.windows > 1 else "")


def _class_model(
    report: Report, result: ClassificationResult, label: int, samples: Sequence[Sample], folders: Sequence[Path]
) -> None:
    measured, name = result.per_class[label], result.data.label_names[label]
    report.section(f"The model of “{name}”", "Likelihood of held-out texts of its own class.")
    report.metrics(likelihood_metrics(measured))
    likelihood_figure(report, measured, f"Likelihood of {name} texts")
    for folder in folders:
        add_loss_curve(report, folder, measured.truth.value if measured.truth else None)
    mask_rate_figure(report, measured, "Cross-entropy of a masked token against the share masked.")
    if samples:
        report.samples(samples)


_METHOD = "log p(text | class) from class models; Bayes' rule gives p(class | text)."
_AVERAGED = (
    " The error of few masks is averaged over, so probabilities are less extreme than the log-likelihoods alone."
)
_COMMON = " Every text is scored with the same masks under every class, so that mask noise cancels in the comparison."
_ABSTENTION = "A classifier may leave texts that it is unsure of to a person. Coverage is the share that it predicts."
_OTHER_TEXTS = (
    "How well texts from elsewhere are told from those of the split: the probability that another text ranks as more "
    "unusual (AUROC; 0.5: not at all). By p(text), the least likely per token is the most unusual. Simple texts can be "
    "more likely than those of the data; by typicality, both directions are unusual. The largest posterior is what a "
    "classifier without p(text) has."
)
_ABOUT_DRAWS = (
    "The likelihood is an average over random masks; the accuracy from a single draw depends on how much it masks."
)
_SEQUENTIAL = " Draws for a text stop when its prediction is certain."
_FROM_MASKS = ", from the same masks as the prediction"
_ATTRIBUTIONS = (
    "Each token's part of the log-likelihood ratio of two classes{}. "
    "Shown are the surest right predictions and the surest wrong ones; of a text in windows, the first."
)


def classification_lines(result: ClassificationResult, samples: Sequence[Sequence[Sample]]) -> str:
    """Return the lines for a terminal."""
    data, scores = result.data, result.scores
    lines = [f"{data.name} {result.split}: {len(scores.label_M)} texts, {len(data.label_names)} classes"]
    for name, measured in zip(data.label_names, result.per_class, strict=True):
        truth = f", true entropy {measured.truth}, above it by {measured.gap}" if measured.truth else ""
        lines.append(f"  {name:>10}: validation NLL {measured.model} nats/token{truth}")
    if result.unconditional:
        lines.append(f"  {'no class':>10}: validation NLL {result.unconditional.model} nats/token")
    for method in sorted(result.methods, key=lambda method: method.measures.accuracy.value):
        m = method.measures
        cost = f", {method.evaluations:.1f} network evaluations a text" if method.evaluations else ""
        lines.append(
            f"  {method.name:>34}: {100 * m.accuracy.value:5.1f} % ± {100 * m.accuracy.se:.1f}, "
            f"log loss {m.log_loss.value:.3f}, ECE {m.ece:.3f}{cost}"
        )
    if result.detection:
        found = result.detection
        lines.append(
            f"  {len(found.other_M)} other texts: AUROC {found.by_likelihood} by p(text), {found.by_typicality} by "
            f"typicality, {found.by_posterior} by the largest posterior"
        )
    for name, texts in zip(data.label_names, samples, strict=True):
        lines += [f"\n{visible(name)}, sampled: {visible(text.text)}" for text in texts]
    return "\n".join(lines)
