"""The report of a classification, and what is printed of it.

Shape suffixes: M texts, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from palimpsest.estimators.nelbo import comparison_noising
from palimpsest.report import classification_plots as figures
from palimpsest.report import plots
from palimpsest.report.formatting import Interval
from palimpsest.report.report import Metric, Report
from palimpsest.tasks.base import Experiment
from palimpsest.tasks.class_models import Hypothesis
from palimpsest.tasks.class_scoring import Race
from palimpsest.tasks.evidence import shown_evidence, token_evidence
from palimpsest.tasks.train import add_loss_curve
from palimpsest.tasks.verdicts import Verdicts


def class_report(
    experiment: Experiment, verdicts: Verdicts, race: Race, hypotheses: Sequence[Hypothesis], samples: list[list],
    num_examples: int,
) -> Report:  # fmt: skip
    """Everything about a classification, from the verdict to the words that spoke for it."""
    data = verdicts.data
    report = Report(
        "Generative classification", f"{data.name}, {verdicts.split} split", experiment.command, experiment.facts
    )
    _accuracy(report, verdicts, race)
    _calibration(report, verdicts)
    _draws(report, verdicts, race)
    chosen = _examples(verdicts, num_examples)
    if chosen:
        how = "" if verdicts.scores.exact else _FROM_MASKS
        report.section("Which tokens spoke", _EVIDENCE.format(how))
        noising = comparison_noising(experiment.build.estimator, hypotheses[0].diffusion.objective)
        draws = {row: int(verdicts.scores.draws_M[m]) for row, (m, *_) in chosen.items()}
        nats = token_evidence(hypotheses, data, verdicts.split, draws, race.num_draws, noising, experiment.seed)
        report.evidence(shown_evidence(data, verdicts.split, {row: rest for row, (_, *rest) in chosen.items()}, nats))
    for label, name in enumerate(data.label_names):
        _class_model(report, experiment, verdicts, label, name, samples[label])
    report.code(experiment.build.settings, "configuration")
    return report


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


def _examples(verdicts: Verdicts, number: int) -> dict[int, tuple[int, str, int, int]]:
    """Rows of the surest texts, right and wrong: row -> (place among the scores, title, class for, class against)."""
    scores, names = verdicts.scores, verdicts.data.label_names
    posterior_MC = verdicts.plain.posterior_MC
    log_odds_MC = scores.log_p_MC + verdicts.log_prior_C
    ranked_MC = log_odds_MC.argsort(axis=1)[:, ::-1]
    margin_M = (
        np.take_along_axis(log_odds_MC, ranked_MC[:, :1], 1)[:, 0]
        - np.take_along_axis(log_odds_MC, ranked_MC[:, 1:2], 1)[:, 0]
    )
    right_M = ranked_MC[:, 0] == scores.label_M
    by_margin = margin_M.argsort()[::-1]
    surest = [*by_margin[right_M[by_margin]][:number], *by_margin[~right_M[by_margin]][:number]]
    rows = verdicts.data.split(verdicts.split)
    row_text_R, sample_R = np.asarray(rows["text_id"][:]), np.asarray(rows["sample_id"][:])
    chosen = {}
    for m in surest:
        mine = np.flatnonzero(row_text_R == scores.text_id_M[m])
        row = int(mine[sample_R[mine].argmin()])
        winner, rival = (0, 1) if len(names) == 2 else (int(ranked_MC[m, 0]), int(ranked_MC[m, 1]))
        verdict = int(ranked_MC[m, 0])
        outcome = "right" if right_M[m] else f"wrong, it is {names[scores.label_M[m]]}"
        title = f"text {scores.text_id_M[m]}: {names[verdict]} at {posterior_MC[m, verdict]:.4f} ({outcome})"
        chosen[row] = (int(m), title + (f", first of {len(mine)} windows" if len(mine) > 1 else ""), winner, rival)
    return chosen


def _class_model(
    report: Report, experiment: Experiment, verdicts: Verdicts, label: int, name: str, texts: list
) -> None:
    measured = verdicts.own[label]
    report.section(f"The model of “{name}”", "Likelihood of held-out texts of its own class.")
    report.metrics(measured.metrics())
    truth = measured.truth.value if measured.truth else None
    report.figure(plots.likelihood_against_truth(measured.ladder(), truth, "nats/token"),
                  f"Nats per token with 95% intervals over {measured.scores.units.name}.",
                  f"Likelihood of {name} texts")  # fmt: skip
    if verdicts.untold is None or label == 0:
        add_loss_curve(report, experiment.runs.folder(None if verdicts.untold else label), truth)
    if measured.scores.num_masked_MP.size:
        report.figure(plots.nll_by_mask_rate(*measured.scores.by_mask_rate()),
                      "Cross-entropy of a masked token against the share masked.",
                      "Cross-entropy against mask rate")  # fmt: skip
    if texts:
        report.samples(texts)


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


def printed(verdicts: Verdicts, samples: list[list]) -> str:
    """The same in a few lines, for the terminal."""
    data, scores = verdicts.data, verdicts.scores
    lines = [f"\n{data.name} {verdicts.split}: {len(scores.label_M)} texts, {len(data.label_names)} classes"]
    for name, own in zip(data.label_names, verdicts.own, strict=True):
        truth = f", true entropy {own.truth}, above it by {own.gap}" if own.truth else ""
        lines.append(f"  {name:>10}: validation NLL {own.model} nats/token{truth}")
    if verdicts.untold:
        lines.append(f"  {'no class':>10}: validation NLL {verdicts.untold.model} nats/token")
    for method in sorted(verdicts.methods, key=lambda method: method.measures.accuracy.value):
        m = method.measures
        cost = f", {method.evaluations:.1f} network evaluations a text" if method.evaluations else ""
        lines.append(f"  {method.name:>34}: {100 * m.accuracy.value:5.1f} % ± {100 * m.accuracy.se:.1f}, "
                     f"log loss {m.log_loss.value:.3f}, ECE {m.ece:.3f}{cost}")  # fmt: skip
    for name, texts in zip(data.label_names, samples, strict=True):
        lines += [f"\n{name}, out of masks: {text.text}" for text in texts]
    return "\n".join(lines)
