"""Ablation of classification: {common, independent} masks x {1, 4, 16, 64} draws x {sum, per-token mean} of log p.

It also measures the recipe of an earlier attempt (own masks for each class, one independent t, mean over tokens). The
class models are trained before. It prints one JSON per line; `accuracy` is the mean over all disjoint groups of that
many draws, and its error is over texts.

    DATA_DIR=/path/to/data python benchmarks/classification.py --texts 400 --output benchmarks/results/x.jsonl \\
        experiment=imdb_likelihood_cpu          # any configuration of mode=classify, its models trained before
"""

import sys
from pathlib import Path

import numpy as np

from palimpsest.benchmarks.shared import new_parser, report
from palimpsest.classification.bayes import posterior
from palimpsest.classification.measures import measure
from palimpsest.classification.models import class_models
from palimpsest.classification.scoring import ClassScores, SequentialTest, score_classes
from palimpsest.estimators.nelbo import Nelbo
from palimpsest.experiment.experiment import Experiment
from palimpsest.objectives.mask_sampling import Bernoulli, ExactCount
from palimpsest.settings.command_line import compose_config

DRAWS = (1, 4, 16, 64)


def cells(scores: ClassScores, log_prior_C: np.ndarray, draws: tuple[int, ...]) -> list[dict[str, object]]:
    """Accuracy, log loss and calibration by number of draws and reduction."""
    nats_MCK, found = scores.nats_MCK, []
    for count in draws:
        groups = nats_MCK.shape[2] // count
        log_p_GMC = [-nats_MCK[:, :, g * count : (g + 1) * count].mean(axis=2) for g in range(groups)]
        for reduction, divisor_M in (("sum", np.ones(len(nats_MCK))), ("per-token mean", scores.tokens_M)):
            by_group = [measure(posterior(p / divisor_M[:, None], log_prior_C), scores.label_M) for p in log_p_GMC]
            right_M = np.mean(
                [(p + log_prior_C * divisor_M[:, None]).argmax(1) == scores.label_M for p in log_p_GMC], axis=0
            )
            found.append({
                "draws": count, "reduction": reduction, "accuracy": float(right_M.mean()),
                "se": float(right_M.std(ddof=1) / np.sqrt(len(right_M))),
                "log_loss_nats": float(np.mean([m.log_loss.value for m in by_group])),
                "ece": float(np.mean([m.ece for m in by_group])), "texts": len(right_M),
            })  # fmt: skip
    return found


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--texts", type=int, default=400)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    cfg = compose_config([*args.overrides, f"data.max_test_texts={args.texts}"])
    experiment = Experiment(cfg, " ".join(sys.argv))
    data = experiment.build.data()
    models = class_models(experiment, data, cfg.eval.checkpoint_path, cfg.eval.disable_ema)
    log_prior_C = np.full(len(data.label_names), -np.log(len(data.label_names)))
    studies = [
        ("exact mask counts", Nelbo(ExactCount()), SequentialTest(max(DRAWS), masks=masks), DRAWS)
        for masks in ("common", "independent")
    ]
    recipe = Nelbo(Bernoulli(antithetic_sampling=False))
    studies.append(
        ("independent t: the earlier attempt's recipe", recipe, SequentialTest(1, masks="independent"), (1,))
    )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text("")
    for name, estimator, test, draws in studies:
        ask = (models, data, "test", estimator, test, experiment.seed, log_prior_C)
        for cell in cells(score_classes(experiment.trainer, *ask), log_prior_C, draws):
            report("classification", args.output, data=data.name, masks=test.masks, noising=name, **cell)


if __name__ == "__main__":
    main()
