"""A text for the page, classified: by the scorer of mode=classify, watched while it draws, with what its words say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from palimpsest.app.job import check_text, warnings
from palimpsest.app.networks import Judges, Networks
from palimpsest.app.runs import Classifier
from palimpsest.classification.attributions import token_attributions
from palimpsest.classification.bayes import log_prior, posterior_interval
from palimpsest.classification.scoring import ClassScores, SequentialTest, score_classes
from palimpsest.classification.typical import UNLIKE, Typical
from palimpsest.dataloader import with_texts
from palimpsest.estimators.nelbo import comparison_noising
from palimpsest.report.evidence import shown_evidence
from palimpsest.report.formatting import format_measurement
from palimpsest.report.prediction import ClassProbability, prediction_html
from palimpsest.report.report import Report

_SPLIT = "the text"  # its name among the splits


@dataclass(frozen=True)
class Question:
    """A text, and how to judge it: as the keys of `classify` and `seed`."""

    text: str
    num_draws: int
    confidence: float
    prior: str
    seed: int


@dataclass(frozen=True)
class Judged:
    """How a text is judged so far, as HTML, and, in the end, the page that shows what its words say."""

    html: str
    evidence: str = ""
    warnings: tuple[str, ...] = ()


def classify(networks: Networks, classifier: Classifier, question: Question, show: Callable[..., None]) -> Judged:
    """p(class | text), and `show` what is known of it after each round of draws.

    Raises:
        ValueError: as main.py would refuse it; or a longer text than the page takes.
    """
    check_text(question.text)
    asked = {"seed": question.seed, "classify.num_draws": question.num_draws,
             "classify.confidence": question.confidence}  # fmt: skip
    with warnings() as heard:
        race = SequentialTest(question.num_draws, question.confidence)
        judges = networks.judges(classifier, asked)
        experiment, models = judges.experiment, judges.models
        race.check(experiment.build.estimator)
        data = with_texts(judges.data, _SPLIT, [question.text])
        counts_C = np.zeros(len(data.label_names))
        if question.prior == "empirical":
            counts_C = np.bincount(np.asarray(data.texts("train")["label"]), minlength=len(data.label_names))
        log_prior_C = log_prior(question.prior, counts_C)

        typical = Typical.read(classifier.folder / "classify")

        def so_far(scores: ClassScores) -> str:
            return _shown(scores, log_prior_C, data.label_names, race, typical)

        scores = score_classes(
            experiment.trainer, models, data, _SPLIT, experiment.build.estimator, race, experiment.seed, log_prior_C,
            lambda scores: show(Judged(so_far(scores))),
        )  # fmt: skip
        return Judged(so_far(scores), _evidence(judges, data, scores, log_prior_C, race), tuple(heard))


def _shown(
    scores: ClassScores, log_prior_C: np.ndarray, names: tuple[str, ...], race: SequentialTest, typical: Typical | None
) -> str:
    posterior_C, (first, second) = scores.posterior(log_prior_C)[0], _pair(scores, log_prior_C)
    low_C, high_C = posterior_C, posterior_C
    if not scores.exact:
        low_C, high_C = (ends_MC[0] for ends_MC in posterior_interval(scores.nats_MCK, log_prior_C))
    columns = zip(names, posterior_C, low_C, high_C, scores.log_p_MC[0], scores.se_MC[0], strict=True)
    shares = [ClassProbability(*column, {first: "p", second: "n"}.get(k, "")) for k, column in enumerate(columns)]
    drawn = "the likelihood is exact" if scores.exact else (
        f"{scores.draws_M[0]} of at most {race.num_draws} masks under every class"
    )  # fmt: skip
    margin = format_measurement(float(scores.margin_M[0]), float(scores.margin_se_M[0]))
    spent = f"{scores.evaluations_M[0]:,} network evaluations, {scores.seconds:.1f} s"
    facts = [drawn, f"{margin} nats between the first two", spent, f"{int(scores.tokens_M[0]):,} tokens"]
    if typical is not None and typical.unlike(scores, log_prior_C)[0]:
        facts.insert(0, UNLIKE)
    return prediction_html(shares, facts)


def _pair(scores: ClassScores, log_prior_C: np.ndarray) -> tuple[int, int]:
    """The classes that are held against each other: the only two, in their order, or the winner and the runner-up."""
    first, second = (scores.log_p_MC[0] + log_prior_C).argsort()[::-1][:2].tolist()
    return (0, 1) if len(log_prior_C) == 2 else (first, second)


def _evidence(judges: Judges, data: object, scores: ClassScores, log_prior_C: np.ndarray, race: SequentialTest) -> str:
    """The rows of the text, coloured by what they say for one class against another."""
    experiment, models = judges.experiment, judges.models
    first, second = _pair(scores, log_prior_C)
    rows = range(len(data.split(_SPLIT)))
    noising = comparison_noising(experiment.build.estimator, models[0].diffusion.objective)
    draws = dict.fromkeys(rows, int(scores.draws_M[0]))
    nats = token_attributions(models, data, _SPLIT, draws, race.num_draws, noising, experiment.seed)
    titles = [f"Part {row + 1} of {len(rows)}" if len(rows) > 1 else "Which words spoke" for row in rows]
    report = Report("")
    report.evidence(shown_evidence(data, _SPLIT, {row: (titles[row], first, second) for row in rows}, nats))
    return report.render()
