"""Standard error of one text's -log p against network evaluations, for every estimator of the NELBO on one model.

The error is the standard deviation over independent repetitions, pooled over texts. The model is the MDLM of
benchmarks/objectives.py. Two sharper likelihoods of the same weights are also measured.

    DATA_DIR=/path/to/data python benchmarks/estimators.py --checkpoint outputs/objectives/mdlm/checkpoints/last.ckpt
"""

import time

import torch

from palimpsest.benchmarks.objectives import COMMON
from palimpsest.benchmarks.shared import new_parser, report
from palimpsest.estimators.any_order import AnyOrder
from palimpsest.estimators.nelbo import Nelbo
from palimpsest.estimators.ordered import Ordered
from palimpsest.experiment.experiment import Experiment
from palimpsest.objectives.base import Batch, Model
from palimpsest.objectives.mask_sampling import Bernoulli, Complementary, ExactCount
from palimpsest.samplers.ordered import ORDERS
from palimpsest.settings.command_line import compose_config

ESTIMATORS = {
    "uniform": Nelbo(Bernoulli(antithetic_sampling=False)),
    "uniform, importance-sampled": Nelbo(Bernoulli(antithetic_sampling=False, importance_sampling=True)),
    "stratified": Nelbo(Bernoulli()),
    "exact_count": Nelbo(ExactCount()),
    "complementary": Nelbo(Complementary()),
}


@torch.inference_mode()
def errors(model: Model, batch: Batch, evaluations: int, repetitions: int) -> dict[str, tuple[float, float]]:
    """Return mean [nats per token] and pooled standard error [nats per text] of each estimator by evaluations."""
    found = {}
    for name, estimator in ESTIMATORS.items():
        nll_RB = torch.stack([estimator(model, batch, seed, evaluations).nll_BK.mean(1) for seed in range(repetitions)])
        tokens = batch["input_ids"].shape[1]
        found[name] = float(nll_RB.mean() / tokens), float(nll_RB.var(0).mean().sqrt())
    return found


@torch.inference_mode()
def sharper(model: Model, batch: Batch, orders: int) -> dict[str, float]:
    """Return nats per token under the likelihoods that are not the NELBO."""
    tokens = batch["input_ids"].numel()
    out = {f"any order, {k} orders": AnyOrder()(model, batch, 0, k).nll_BK.sum() / tokens for k in (1, orders)}
    out |= {f"duel, {order}": Ordered(order)(model, batch, 0, 1).nll_BK.sum() / tokens for order in ORDERS}
    return {name: float(value) for name, value in out.items()}


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=12)
    parser.add_argument("--evaluations", type=int, nargs="*", default=[2, 8, 32])
    parser.add_argument("--orders", type=int, default=4)
    args = parser.parse_args()
    experiment = Experiment(compose_config(COMMON), "benchmarks/estimators.py")
    data = experiment.build.data()
    model = experiment.weights.trained(data, args.checkpoint, disable_ema=False).model
    rows = torch.linspace(0, len(data.split("validation")) - 1, args.texts).long().tolist()
    batch = data.collate(data.split("validation")[rows])
    table, start = {}, time.perf_counter()
    for evaluations in args.evaluations:
        table[evaluations] = errors(model, batch, evaluations, args.repetitions)
        plain = table[evaluations]["uniform"][1]
        for name, (mean, se) in table[evaluations].items():
            print(
                f"{evaluations:4} evaluations  {name:28} mean {mean:.4f} nats/token, error {se:8.3f} nats/text, "
                f"uniform t needs {(plain / se) ** 2:6.1f} x the evaluations",
                flush=True,
            )
    others = sharper(model, batch, args.orders)
    for name, value in others.items():
        print(f"{name:28} {value:.4f} nats/token", flush=True)
    report(
        "estimators",
        texts=args.texts,
        length=data.length,
        repetitions=args.repetitions,
        errors=table,
        other_likelihoods=others,
        seconds=round(time.perf_counter() - start),
    )


if __name__ == "__main__":
    main()
