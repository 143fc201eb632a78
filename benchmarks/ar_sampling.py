"""Seconds per batch of autoregressive samples, with a KV cache and with the whole prefix at every token.

Both project only the last position and draw with the same numbers. The network reads the latest token, or all tokens so
far, as in the reference implementations. Both alternate in one process on the same weights; ratios are of pairs.

    python benchmarks/ar_sampling.py                   # hidden 256, 6 blocks, 4 heads, L 256, V 50258, batch 4
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from torch import Tensor

from palimpsest.common.randomness import KeyedNoise
from palimpsest.models.ar import AR
from palimpsest.objectives.projection import log_probs
from palimpsest.process import draw_categorical

SIZE = {"hidden_size": 256, "n_blocks": 6, "n_heads": 4, "dropout": 0.0}
LENGTH, VOCAB, BATCH, MASK, BOS = 256, 50_258, 4, 50_257, 50_256


@torch.no_grad()
def generate(net: AR, cached: bool) -> Tensor:
    """Return BOS and `LENGTH` drawn tokens, (BATCH, LENGTH + 1)."""
    u_BL = KeyedNoise(0, torch.arange(BATCH)).uniform(LENGTH)
    x_BL = torch.full((BATCH, LENGTH + 1), BOS)
    cache = net.new_cache(BATCH, LENGTH) if cached else None
    for i in range(LENGTH):
        hidden_BLD = net.encode(x_BL[:, i : i + 1], cache=cache) if cached else net.encode(x_BL[:, : i + 1])
        x_BL[:, i + 1] = draw_categorical(log_probs(hidden_BLD[:, -1], net.head, MASK), u_BL[:, i])
    return x_BL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(0)
    net = AR(VOCAB, **SIZE).eval()
    torch.nn.init.normal_(net.head.weight, std=0.02)
    runs = {"cached": True, "prefix": False}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    tokens = {}
    for _ in range(args.pairs):
        for name, cached in runs.items():
            start = time.perf_counter()
            tokens[name] = generate(net, cached)
            seconds[name].append(time.perf_counter() - start)
    for name, values in seconds.items():
        rate = BATCH * LENGTH / statistics.median(values)
        print(
            f"{name:7} {statistics.median(values):7.2f} s (from {min(values):.2f} to {max(values):.2f}), "
            f"{rate:.0f} tokens/s"
        )
    speedup = [p / c for p, c in zip(seconds["prefix"], seconds["cached"], strict=True)]
    print(
        json.dumps(
            {
                "benchmark": "ar_sampling",
                "device": "cpu",
                "threads": torch.get_num_threads(),
                "pairs": args.pairs,
                "speedup": [min(speedup), statistics.median(speedup), max(speedup)],
                "equal_tokens": float((tokens["cached"] == tokens["prefix"]).float().mean()),
            }
        )
    )


if __name__ == "__main__":
    main()
