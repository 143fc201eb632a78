"""Peak memory and time of a training step with and without training.gradient_checkpointing.

Each runs in its own process, so that peak memory is its own; both alternate, and ratios are of pairs. On a CPU the peak
is the process's resident memory minus that before the network was built.

    python benchmarks/gradient_checkpointing.py        # hidden 256, 8 blocks, 4 heads, L 512, V 2048, batch 8, fp32
"""

import torch

from palimpsest.benchmarks.shared import in_own_processes, new_parser, peak_mib, ratios, report, spread, training_steps
from palimpsest.models.ar import AR
from palimpsest.models.dimamba import DiMamba
from palimpsest.models.dit import DiT
from palimpsest.noise_schedule import LogLinear
from palimpsest.objectives.ar import AR as LeftToRight
from palimpsest.objectives.subs import Subs
from palimpsest.process import Absorbing

SIZE = {"hidden_size": 256, "n_blocks": 8, "dropout": 0.1}
LENGTH, VOCAB, BATCH = 512, 2048, 8
SIDES = ("plain", "again")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NETWORKS = {
    "dit": lambda: DiT(VOCAB, cond_dim=128, n_heads=4, **SIZE), "ar": lambda: AR(VOCAB, n_heads=4, **SIZE),
    "dimamba": lambda: DiMamba(VOCAB, cond_dim=128, **SIZE),
}  # fmt: skip


def peak() -> float:
    return torch.cuda.max_memory_allocated() / 2**20 if DEVICE == "cuda" else peak_mib()


def measure(network: str, again: bool, steps: int) -> dict[str, float]:
    before = peak()
    torch.manual_seed(0)
    net = NETWORKS[network]().to(DEVICE)
    if again:
        net.recompute_blocks()
    objective = LeftToRight(Absorbing(VOCAB - 1)) if net.causal else Subs(LogLinear(), Absorbing(VOCAB - 1))
    batch = {"input_ids": torch.randint(VOCAB - 1, (BATCH, LENGTH), device=DEVICE)}
    seconds, losses = training_steps(
        net, lambda noise: objective.loss(net, batch, noise).mean(), BATCH, steps, clip=None
    )
    return {"seconds": seconds, "peak_mib": peak() - before, "loss": losses[-1]}


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--network", choices=NETWORKS, default="dit")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=3)
    args = parser.parse_args()
    sides = {side: (args.network, side == "again", args.steps) for side in SIDES}
    found = in_own_processes(measure, sides, args.pairs)
    memory = found["peak_mib"]
    seconds = found["seconds"]
    for side in SIDES:
        print(f"{side:6} peak {spread(memory[side])[1]:.0f} MiB, {spread(seconds[side])[1]:.2f} s a step")
    report(
        "gradient_checkpointing",
        network=args.network,
        device=DEVICE,
        pairs=args.pairs,
        memory_ratio=ratios(memory["again"], memory["plain"]),
        time_ratio=ratios(seconds["again"], seconds["plain"]),
        same_loss=found["loss"]["again"] == found["loss"]["plain"],
    )


if __name__ == "__main__":
    main()
