"""Peak memory and time of a training step with and without training.gradient_checkpointing.

Each runs in its own process, so that peak memory is its own; both alternate, and ratios are of pairs. On a CPU the peak
is the process's resident memory minus that before the network was built.

    python benchmarks/gradient_checkpointing.py        # hidden 256, 8 blocks, 4 heads, L 512, V 2048, batch 8, fp32
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch

from palimpsest.common.randomness import training_noise
from palimpsest.models.ar import AR
from palimpsest.models.dimamba import DiMamba
from palimpsest.models.dit import DiT
from palimpsest.noise_schedule import LogLinear
from palimpsest.objectives.ar import AR as LeftToRight
from palimpsest.objectives.subs import Subs
from palimpsest.process import Absorbing

SIZE = {"hidden_size": 256, "n_blocks": 8, "dropout": 0.1}
LENGTH, VOCAB, BATCH = 512, 2048, 8
NETWORKS = {
    "dit": lambda: DiT(VOCAB, cond_dim=128, n_heads=4, **SIZE), "ar": lambda: AR(VOCAB, n_heads=4, **SIZE),
    "dimamba": lambda: DiMamba(VOCAB, cond_dim=128, **SIZE),
}  # fmt: skip


def peak_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(network: str, again: bool, steps: int) -> dict[str, float]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before = peak_mib(device)
    torch.manual_seed(0)
    net = NETWORKS[network]().to(device)
    if again:
        net.recompute_blocks()
    objective = LeftToRight(Absorbing(VOCAB - 1)) if net.causal else Subs(LogLinear(), Absorbing(VOCAB - 1))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-4, fused=True)
    batch = {"input_ids": torch.randint(VOCAB - 1, (BATCH, LENGTH), device=device)}
    seconds = []
    for step in range(steps + 1):
        start = time.perf_counter()
        noise = training_noise(0, torch.arange(BATCH, device=device) + step * BATCH, BATCH)
        loss = objective.loss(net, batch, noise).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        last = float(loss.detach())  # waits for the device
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds[1:]), "peak_mib": peak_mib(device) - before, "loss": last}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="dit")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--side", choices=["plain", "again"])
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args.network, args.side == "again", args.steps)))
        return
    runs: dict[str, list[dict]] = {"plain": [], "again": []}
    for _ in range(args.pairs):
        for side, found in runs.items():
            command = [sys.executable, __file__, "--side", side, "--network", args.network, "--steps", str(args.steps)]
            found.append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
    pairs = list(zip(runs["plain"], runs["again"], strict=True))
    memory = [b["peak_mib"] / a["peak_mib"] for a, b in pairs]
    seconds = [b["seconds"] / a["seconds"] for a, b in pairs]
    for side, found in runs.items():
        print(
            f"{side:6} peak {statistics.median(r['peak_mib'] for r in found):.0f} MiB, "
            f"{statistics.median(r['seconds'] for r in found):.2f} s a step"
        )
    print(
        json.dumps(
            {
                "benchmark": "gradient_checkpointing",
                "network": args.network,
                "threads": torch.get_num_threads(),
                "device": "cuda" if torch.cuda.is_available() else "cpu",
                "pairs": args.pairs,
                "memory_ratio": [min(memory), statistics.median(memory), max(memory)],
                "time_ratio": [min(seconds), statistics.median(seconds), max(seconds)],
                "same_loss": all(a["loss"] == b["loss"] for a, b in pairs),
            }
        )
    )


if __name__ == "__main__":
    main()
