"""Classification of a text in the app, by the scorer of mode=classify, with live views and token attributions."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from palimpsest.app.job import check_text, collected_warnings
from palimpsest.app.networks import Networks
from palimpsest.app.runs import Classifier
from palimpsest.classification.attributions import token_attributions
from palimpsest.classification.bayes import log_prior
from palimpsest.classification.scoring import ClassScores, SequentialTest, score_classes
from palimpsest.classification.typical import UNLIKE, Typical
from palimpsest.dataloader import TextData, with_texts
from palimpsest.estimators.nelbo import Nelbo
from palimpsest.experiment.classifier import TrainedClassifier
from palimpsest.report.evidence import shown_evidence
from palimpsest.report.formatting import format_measurement
from palimpsest.report.prediction import ClassProbability, prediction_html
from palimpsest.report.report import Report

_SPLIT = "the text"  # the name of the typed text among the splits


@dataclass(frozen=True)
class ClassifyRequest:
    """A text to classify, with the keys of `classify` and `seed`."""

    text: str
    num_draws: int
    confidence: float
    prior: str
    seed: int


@dataclass(frozen=True)
class ClassifyResult:
    """The prediction so far, as HTML; at the end also the page of token attributions."""

    html: str
    attributions: str = ""
    warnings: tuple[str, ...] = ()


def classify(
    networks: Networks, classifier: Classifier, request: ClassifyRequest, show: Callable[..., None]
) -> ClassifyResult:
    """Return p(class | text), after a call of `show` with the result so far at each round of draws.

    Raises ValueError for a setting that main.py would refuse, or a text that is too long for the app.
    """
    check_text(request.text)
    settings = {"seed": request.seed, "classify.num_draws": request.num_draws,
                "classify.confidence": request.confidence}  # fmt: skip
    with collected_warnings() as warnings:
        test = SequentialTest(request.num_draws, request.confidence)
        trained = networks.classifier(classifier, settings)
        experiment = trained.experiment
        test.check(experiment.build.estimator)
        data = with_texts(trained.data, _SPLIT, [request.text])
        counts_C = np.zeros(len(data.label_names))
        if request.prior == "empirical":
            counts_C = np.bincount(np.asarray(data.texts("train")["label"]), minlength=len(data.label_names))
        log_prior_C = log_prior(request.prior, counts_C)
        typical = Typical.read(classifier.folder / "classify")

        def prediction(scores: ClassScores) -> str:
            return _prediction(scores, log_prior_C, data.label_names, test, typical)

        how = (experiment.build.estimator, test, experiment.seed, log_prior_C)
        show_so_far = lambda scores: show(ClassifyResult(prediction(scores)))
        scores = score_classes(experiment.trainer, trained.models, data, _SPLIT, *how, show_so_far)
        attributions = _attributions(trained, data, scores, log_prior_C, test)
        return ClassifyResult(prediction(scores), attributions, tuple(warnings))


def _prediction(
    scores: ClassScores, log_prior_C: np.ndarray, names: tuple[str, ...], test: SequentialTest, typical: Typical | None
) -> str:
    posterior_C, (first, second) = scores.posterior(log_prior_C)[0], _pair(scores, log_prior_C)
    low_C, high_C = (ends_MC[0] for ends_MC in scores.interval(log_prior_C))
    columns = zip(names, posterior_C, low_C, high_C, scores.log_p_MC[0], scores.se_MC[0], strict=True)
    shares = [ClassProbability(*column, {first: "p", second: "n"}.get(k, "")) for k, column in enumerate(columns)]
    drawn = f"{scores.draws_M[0]} of at most {test.num_draws} masks under every class"
    if scores.exact:
        drawn = "the likelihood is exact"
    margin = format_measurement(float(scores.margin_M[0]), float(scores.margin_se_M[0]))
    spent = f"{scores.evaluations_M[0]:,} network evaluations, {scores.seconds:.1f} s"
    facts = [drawn, f"{margin} nats between the first two", spent, f"{int(scores.tokens_M[0]):,} tokens"]
    if typical is not None and typical.unlike(scores, log_prior_C)[0]:
        facts.insert(0, UNLIKE)
    return prediction_html(shares, facts)


def _pair(scores: ClassScores, log_prior_C: np.ndarray) -> tuple[int, int]:
    """Return the two compared classes: the only two in order, or the winner and the runner-up."""
    first, second = (scores.log_p_MC[0] + log_prior_C).argsort()[::-1][:2].tolist()
    return (0, 1) if len(log_prior_C) == 2 else (first, second)


def _attributions(
    trained: TrainedClassifier, data: TextData, scores: ClassScores, log_prior_C: np.ndarray, test: SequentialTest
) -> str:
    """Return a page with the text, each token coloured by its contribution to one class against another."""
    experiment = trained.experiment
    first, second = _pair(scores, log_prior_C)
    rows = range(len(data.split(_SPLIT)))
    estimator = experiment.build.estimator
    if not isinstance(estimator, Nelbo):
        return ""
    draws = dict.fromkeys(rows, int(scores.draws_M[0]))
    nats = token_attributions(trained.models, data, _SPLIT, draws, test, estimator, experiment.seed)
    titles = [f"Part {row + 1} of {len(rows)}" if len(rows) > 1 else "Which words spoke" for row in rows]
    report = Report("")
    report.evidence(shown_evidence(data, _SPLIT, {row: (titles[row], first, second) for row in rows}, nats))
    return report.render()
