"""Seconds per batch of autoregressive samples, with a KV cache and with the whole prefix at every token.

Both project only the last position and draw with the same numbers. The network reads the latest token, or all tokens so
far, as in the reference implementations. Both alternate in one process on the same weights; ratios are of pairs.

    python benchmarks/ar_sampling.py                   # hidden 256, 6 blocks, 4 heads, L 256, V 50258, batch 4
"""

from functools import partial

import torch
from torch import Tensor

from palimpsest.benchmarks.shared import in_turns, new_parser, ratios, report, spread
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
    parser = new_parser(__doc__)
    parser.add_argument("--pairs", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(0)
    net = AR(VOCAB, **SIZE).eval()
    torch.nn.init.normal_(net.head.weight, std=0.02)
    runs = {"cached": partial(generate, net, True), "prefix": partial(generate, net, False)}
    seconds, tokens = in_turns(runs, args.pairs)
    for name, values in seconds.items():
        low, median, high = spread(values)
        print(f"{name:7} {median:7.2f} s (from {low:.2f} to {high:.2f}), {BATCH * LENGTH / median:.0f} tokens/s")
    report(
        "ar_sampling",
        device="cpu",
        pairs=args.pairs,
        speedup=ratios(seconds["prefix"], seconds["cached"]),
        equal_tokens=float((tokens["cached"][-1] == tokens["prefix"][-1]).float().mean()),
    )


if __name__ == "__main__":
    main()
