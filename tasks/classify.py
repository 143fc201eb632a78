"""mode=classify: p(class | text) by Bayes' rule from one diffusion model per class.

Shape suffixes: M texts, C classes, K draws, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix
from scipy.special import log_softmax, softmax
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from sklearn.naive_bayes import MultinomialNB

from metrics import Estimate
from reporting import plots
from reporting.report import Metric, Report
from tasks.base import Experiment, GroundTruth, Likelihood, likelihood, row_numbers, write_results
from tasks.class_models import class_models
from tasks.drawing import draw
from tasks.sample_eval import shown
from tasks.scoring import Precision, Scores, score
from tasks.train import add_loss_curve


@dataclass(frozen=True)
class Bayes:
    """What Bayes' rule says of M texts.

    log_p_MC: estimated log p(text | class), nats. se_MC: its Monte Carlo error. label_M: the true classes.
    """

    log_p_MC: np.ndarray
    se_MC: np.ndarray
    label_M: np.ndarray
    log_prior_C: np.ndarray

    @property
    def posterior_MC(self) -> np.ndarray:
        return softmax(self.log_p_MC + self.log_prior_C, axis=1)

    @property
    def prediction_M(self) -> np.ndarray:
        return (self.log_p_MC + self.log_prior_C).argmax(axis=1)

    @property
    def accuracy(self) -> Estimate:
        return proportion(self.prediction_M == self.label_M)

    @property
    def log_loss(self) -> Estimate:
        """Mean of -log p(true class | text), nats."""
        log_posterior_MC = log_softmax(self.log_p_MC + self.log_prior_C, axis=1)
        nats_M = -log_posterior_MC[np.arange(len(self.label_M)), self.label_M]
        return Estimate(float(nats_M.mean()), float(nats_M.std(ddof=1) / np.sqrt(len(nats_M))))


def proportion(correct_M: np.ndarray) -> Estimate:
    """A share with its binomial standard error."""
    p = float(np.mean(correct_M))
    return Estimate(p, float(np.sqrt(p * (1 - p) / len(correct_M))))


def bayes(scores: list[Scores], label_M: np.ndarray) -> Bayes:
    """Bayes' rule under a uniform prior. Every class was scored with the same masks, so most of the Monte Carlo noise
    is common to the classes and cancels in the comparison."""
    num_classes = len(scores)
    return Bayes(
        -np.stack([s.nll_M for s in scores], axis=1),
        np.stack([s.monte_carlo_se_M for s in scores], axis=1),
        label_M,
        np.full(num_classes, -np.log(num_classes)),
    )


def naive_bayes(data: object, split: str, rows_M: np.ndarray) -> np.ndarray:
    """Predictions (M,) of multinomial naive Bayes on token counts, trained on the whole training split."""
    train, rows = data.split("train"), data.split(split)
    model = MultinomialNB().fit(_counts(train["input_ids"], data.vocabulary.size), np.asarray(train["label"]))
    chosen = [rows["input_ids"][int(i)] for i in rows_M]
    return model.predict(_counts(chosen, data.vocabulary.size))


def _counts(rows: list, vocab_size: int) -> csr_matrix:
    ids = [np.asarray(row) for row in rows]
    start_M = np.cumsum([0] + [len(row) for row in ids])
    columns = np.concatenate(ids)
    return csr_matrix((np.ones(len(columns)), columns, start_M), shape=(len(ids), vocab_size))


def classify(
    experiment: Experiment, *, checkpoint_path: str, split: str, num_draws: int, num_samples: int, disable_ema: bool
) -> dict[str, object]:
    """Score `split` under one model per class with the same masks, apply Bayes' rule.

    The models are those of `checkpoint_path`, with {label} for the number of the class; where it is empty, those of
    this configuration, and the missing ones are trained. Writes results.json and report.html into `classify`.
    """
    both = experiment.data()
    if both.label_names is None or len(both.label_names) < 2:
        raise ValueError(f"mode=classify needs labelled data with two classes or more; data={both.name} has none")
    if both.label is not None:
        raise ValueError(f"mode=classify scores every class: leave out data.label={both.label}")
    rows = both.split(split)
    scores, own, samples = [], [], []
    for label, hypothesis in enumerate(class_models(experiment, both, checkpoint_path, disable_ema)):
        data, diffusion = experiment.data(label), hypothesis.diffusion
        trainer = experiment.trainer(f"score as {both.label_names[label]}", label)
        loader, drawing = both.eval_dataloader(split), Precision(num_draws)
        scores.append(score(trainer, diffusion, loader, experiment.estimator, drawing, experiment.seed))
        trainer = experiment.trainer(f"validate {both.label_names[label]}", label)
        loader = data.eval_dataloader("validation")
        measured = score(trainer, diffusion, loader, experiment.estimator, experiment.precision, experiment.seed)
        own.append(likelihood(data, "validation", measured, experiment.truth))
        drawn = (
            draw(diffusion, data, experiment.drawing, num_samples, num_samples, experiment.seed) if num_samples else []
        )
        samples.append(shown(drawn, data.tokenizer))
    rows_M = row_numbers(rows, scores[0].sample_id_M)
    label_M = np.asarray(rows["label"])[rows_M]
    verdict = bayes(scores, label_M)
    ladder = _ladder(both, split, verdict, rows_M, experiment.truth)
    results = _results(verdict, own, ladder, both.label_names, scores)
    folder = experiment.folder() / "classify"
    write_results(folder, {**results, "command": experiment.command})
    _report(experiment, both, split, verdict, own, ladder, samples).write(folder / "report.html")
    _print(both, split, verdict, own, ladder, samples)
    print(f"{folder / 'report.html'}")
    return results


def _ladder(
    data: object, split: str, verdict: Bayes, rows_M: np.ndarray, truth: GroundTruth | None
) -> list[tuple[str, float, float]]:
    chance = np.bincount(verdict.label_M).max() / len(verdict.label_M)
    naive = proportion(naive_bayes(data, split, rows_M) == verdict.label_M)
    rows = [
        ("chance", float(chance), 0.0),
        ("naive Bayes, unigrams", naive.value, naive.se),
        ("this model", verdict.accuracy.value, verdict.accuracy.se),
    ]
    if truth is not None:
        texts = data.texts(split)["text"]
        optimal_M = truth.posterior([texts[int(i)] for i in rows_M]).argmax(axis=1)
        optimum = proportion(optimal_M == verdict.label_M)
        rows.append(("Bayes-optimal", optimum.value, optimum.se))
    return rows


def _results(
    verdict: Bayes,
    own: list[Likelihood],
    ladder: list[tuple[str, float, float]],
    names: list[str],
    scores: list[Scores],
) -> dict[str, object]:
    precision, recall, f1, support = _per_class(verdict)
    return {
        "accuracy": verdict.accuracy,
        "log_loss_nats": verdict.log_loss,
        "ladder": {name: Estimate(value, se) for name, value, se in ladder},
        "classes": {
            name: {"precision": precision[k], "recall": recall[k], "f1": f1[k], "texts": int(support[k]),
                   "validation_nll_nats_per_token": own[k].model, "true_nats_per_token": own[k].truth,
                   "gap_nats_per_token": own[k].gap}
            for k, name in enumerate(names)
        },
        "confusion": confusion_matrix(verdict.label_M, verdict.prediction_M, labels=range(len(names))),
        "monte_carlo_se_nats_per_text": float(np.mean(verdict.se_MC)),
        "estimator": scores[0].label,
        "network_evaluations_per_text": float(sum(s.evaluations_M.mean() for s in scores)),
    }  # fmt: skip


def _per_class(verdict: Bayes) -> tuple[np.ndarray, ...]:
    classes = range(verdict.log_p_MC.shape[1])
    return precision_recall_fscore_support(verdict.label_M, verdict.prediction_M, labels=classes, zero_division=0)


def _report(
    experiment: Experiment, data: object, split: str, verdict: Bayes, own: list[Likelihood],
    ladder: list[tuple[str, float, float]], samples: list[list],
) -> Report:  # fmt: skip
    names = data.label_names
    report = Report("Generative classification", f"{data.name}, {split} split", experiment.command, experiment.facts)
    report.section("Accuracy", _METHOD)
    report.metrics(
        [
            Metric("accuracy", verdict.accuracy.value, verdict.accuracy.se),
            Metric("log loss", verdict.log_loss.value, verdict.log_loss.se, "nats"),
            Metric("texts", float(len(verdict.label_M))),
            Metric("Monte Carlo error", float(np.mean(verdict.se_MC)), None, "nats/text", "of log p(text | class)"),
        ]
    )
    report.figure(plots.accuracy_ladder(ladder), "Accuracy with 95% intervals, on the same texts.", "Accuracies")
    table = zip(names, *_per_class(verdict), strict=True)
    report.table(["class", "precision", "recall", "F1", "texts"],
                 [[n, f"{p:.3f}", f"{r:.3f}", f"{f:.3f}", int(s)] for n, p, r, f, s in table])  # fmt: skip
    counts = confusion_matrix(verdict.label_M, verdict.prediction_M, labels=range(len(names)))
    report.figure(plots.confusion_matrix(counts, names), "Rows are the true classes.", "Confusion matrix")
    correct = verdict.prediction_M == verdict.label_M
    report.figure(plots.calibration(verdict.posterior_MC.max(axis=1), correct),
                  "How often a verdict of a given confidence is right.", "Calibration curve")  # fmt: skip
    if len(names) == 2:
        margin = verdict.log_p_MC[:, 1] - verdict.log_p_MC[:, 0]
        report.figure(plots.llr_histogram({name: margin[verdict.label_M == k] for k, name in enumerate(names)}),
                      "Evidence in nats, by true class.", "Log-likelihood ratios")  # fmt: skip
    for label, (name, measured, texts) in enumerate(zip(names, own, samples, strict=True)):
        report.section(f"The model of “{name}”", "Likelihood of held-out texts of its own class.")
        report.metrics(measured.metrics())
        truth = measured.truth.value if measured.truth else None
        report.figure(plots.likelihood_against_truth(measured.ladder(), truth, "nats/token"),
                      "Nats per token with 95% intervals over texts.", f"Likelihood of {name} texts")  # fmt: skip
        add_loss_curve(report, experiment.folder(label), truth)
        if measured.scores.num_masked_MP.size:
            report.figure(plots.nll_by_mask_rate(*measured.scores.by_mask_rate()),
                          "Cross-entropy of a masked token against the share masked.",
                          "Cross-entropy against mask rate")  # fmt: skip
        if texts:
            report.samples(texts)
    report.code(experiment.settings, "configuration")
    return report


_METHOD = (
    "One masked diffusion model per class gives log p(text | class); Bayes' rule with equal priors gives "
    "p(class | text). "
    "Every text is scored with the same masks under every class, so that mask noise cancels in the comparison."
)


def _print(
    data: object,
    split: str,
    verdict: Bayes,
    own: list[Likelihood],
    ladder: list[tuple[str, float, float]],
    samples: list[list],
) -> None:
    print(f"\n{data.name} {split}: {len(verdict.label_M)} texts, {verdict.log_p_MC.shape[1]} classes")
    for name, measured in zip(data.label_names, own, strict=True):
        truth = f", true entropy {measured.truth}, above it by {measured.gap}" if measured.truth else ""
        print(f"  {name:>10}: validation NLL {measured.model} nats/token{truth}")
    for name, value, se in ladder:
        print(f"  {name:>22}: {100 * value:5.1f} % ± {100 * se:.1f}")
    for name, texts in zip(data.label_names, samples, strict=True):
        print("".join(f"\n{name}, out of masks: {text.text}" for text in texts))
