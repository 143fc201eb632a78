"""Seconds per batch of samples, with positions chosen first, against projection of every position at every step.

The plain loop is that of the reference implementations: network and vocabulary projection over (B, L, V) at every step,
the posterior of every position, Gumbel noise over all of it. Both alternate in one process on the same weights; ratios
are of pairs. The trunk alone, once per step, is the minimum for any sampler that evaluates the network at every step.

    python benchmarks/sampling.py                      # hidden 256, 6 blocks, 4 heads, L 256, V 50258, batch 4
"""

import itertools
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from palimpsest.benchmarks.shared import in_turns, new_parser, ratios, report, spread
from palimpsest.common.randomness import KeyedNoise
from palimpsest.models.dit import DiT
from palimpsest.noise_schedule import LogLinear
from palimpsest.objectives.base import Model
from palimpsest.objectives.subs import Subs
from palimpsest.process import Absorbing
from palimpsest.samplers import ancestral, first_hitting
from palimpsest.samplers.base import time_grid

SIZE = {"hidden_size": 256, "cond_dim": 128, "n_blocks": 6, "n_heads": 4, "dropout": 0.0}
LENGTH, VOCAB, BATCH, MASK = 256, 50_258, 4, 50_257


@torch.no_grad()
def plain(net: DiT, x_BL: Tensor, steps: int, timed: int) -> int:
    """Project everything at every step, with float32 Gumbel noise for the posterior.

    All steps cost the same, so the first `timed` of them give the total.
    """
    mask_id, no_noise_B = net.vocab_size - 1, torch.zeros(len(x_BL), device=x_BL.device)
    for t, s in list(itertools.pairwise(time_grid(steps, 1e-5)))[:timed]:
        logits = net(x_BL, no_noise_B)
        logits[..., mask_id] += -1e6
        q = (logits - logits.logsumexp(-1, keepdim=True)).exp() * float(t - s)
        q[..., mask_id] = float(s)
        drawn = (q / (1e-10 - (torch.rand_like(q) + 1e-10).log())).argmax(-1)
        x_BL = torch.where(x_BL == mask_id, drawn, x_BL)
    return steps


@torch.no_grad()
def trunk(net: DiT, steps: int) -> int:
    x = torch.full((BATCH, LENGTH), MASK)
    for _ in range(steps):
        net.encode(x, torch.zeros(BATCH))
    return steps


def ours(net: DiT, sampler: Callable) -> float:
    model, x = Model(Subs(LogLinear(), Absorbing(MASK)), net), torch.full((BATCH, LENGTH), MASK)
    out = sampler(model, x, KeyedNoise(0, torch.arange(BATCH)))
    return float(out.evaluations_B.float().mean())


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--timed-plain-steps", type=int, default=16, help="of the plain loop; the rest is extrapolated")
    args = parser.parse_args()
    torch.manual_seed(0)
    net = DiT(VOCAB, **SIZE).eval()
    torch.nn.init.normal_(net.head.weight, std=0.02)
    runs = {
        "ddpm": partial(ours, net, partial(ancestral.sample, steps=args.steps, skip_idle=False)),
        "ddpm_cache": partial(ours, net, partial(ancestral.sample, steps=args.steps, skip_idle=True)),
        "first_hitting": partial(ours, net, first_hitting.sample),
        "plain": partial(plain, net, torch.full((BATCH, LENGTH), MASK), args.steps, args.timed_plain_steps),
        "trunk": partial(trunk, net, args.steps),
    }
    seconds, evaluations = in_turns(runs, args.pairs)
    seconds["plain"] = [timed * args.steps / args.timed_plain_steps for timed in seconds["plain"]]
    for name, values in seconds.items():
        low, median, high = spread(values)
        print(
            f"{name:10} {median:7.2f} s (from {low:.2f} to {high:.2f}), "
            f"{evaluations[name][-1]:.0f} network evaluations per sample"
        )
    report(
        "sampling",
        device="cpu",
        steps=args.steps,
        pairs=args.pairs,
        ddpm_speedup=ratios(seconds["plain"], seconds["ddpm"]),
        ddpm_cache_speedup=ratios(seconds["plain"], seconds["ddpm_cache"]),
        first_hitting_speedup=ratios(seconds["plain"], seconds["first_hitting"]),
        ddpm_seconds_over_trunk_alone=ratios(seconds["ddpm"], seconds["trunk"])[1],
    )


if __name__ == "__main__":
    main()
