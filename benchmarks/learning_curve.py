"""Accuracy of a classification by training budget; each budget is a training of its own with its own schedule.

It prints one JSON per line, with the key `accuracy`.

    DATA_DIR=/path/to/data python benchmarks/learning_curve.py --steps 150 600 --output benchmarks/results/x.jsonl \\
        experiment=imdb_likelihood_cpu data.max_test_texts=1000     # any configuration of mode=classify
"""

from __future__ import annotations

import time
from pathlib import Path

from palimpsest.benchmarks.shared import new_parser, report
from palimpsest.experiment.running import run
from palimpsest.settings.command_line import compose_config


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--steps", type=int, nargs="+", required=True)
    parser.add_argument("--output", type=Path)
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    save_dir = next((o.partition("=")[2] for o in given.overrides if o.startswith("checkpointing.save_dir=")), None)
    for steps in given.steps:
        # A budget is not part of a run's identity, so each needs its own folder.
        folder = Path(save_dir or "outputs/learning_curve") / f"steps={steps}"
        overrides = [o for o in given.overrides if not o.startswith("checkpointing.save_dir=")]
        budget = [f"trainer.max_steps={steps}", f"checkpointing.save_dir={folder}", "mode=classify"]
        began = time.monotonic()
        results = run(compose_config([*overrides, *budget]), "benchmarks/learning_curve.py")
        report(
            "learning_curve",
            given.output,
            overrides=overrides,
            steps=steps,
            texts=results["texts"],
            accuracy=results["accuracy"].value,
            se=results["accuracy"].se,
            ece=results["ece"],
            log_loss_nats=results["log_loss_nats"].value,
            network_evaluations_per_text=results["network_evaluations_per_text"],
            seconds=round(time.monotonic() - began, 1),
        )


if __name__ == "__main__":
    main()
