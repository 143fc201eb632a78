"""Errors of samples by float32 Gumbel noise, compared with the float64 inversion used here.

One step of a sampler at t = 1 with S steps unmasks a position with probability 1/S and then draws a token. The
references draw both at once, as the argmax over tokens and mask of p / -log u with u in float32. Tokens of
probability below 2^-24 S are then almost never drawn, so too few positions are unmasked, with too frequent tokens.
Measured on a Zipf distribution over 50,257 tokens: the number of unmasked positions, the mean surprise of their tokens
(ideally the entropy), and the temperature of the distribution that fits them best.

    python benchmarks/categorical.py                   # until 150 positions should have gone, at 128 and 1000 steps
"""

import torch
from scipy.optimize import minimize_scalar

from palimpsest.benchmarks.shared import new_parser, report
from palimpsest.common.randomness import KeyedNoise
from palimpsest.samplers.base import TokenChoice

VOCAB, CHUNK = 50_257, 200


def zipf() -> torch.Tensor:
    weight = 1 / torch.arange(1, VOCAB + 1, dtype=torch.float64)
    return weight / weight.sum()


def gumbel(p_V: torch.Tensor, steps: int, draws: int, generator: torch.Generator) -> torch.Tensor:
    """Return the tokens of unmasked positions, by the references' draw over tokens and mask in float32."""
    q = torch.cat([p_V / steps, torch.tensor([1 - 1 / steps])]).float()
    drawn = [
        (q / (1e-10 - (torch.rand(CHUNK, VOCAB + 1, generator=generator) + 1e-10).log())).argmax(-1)
        for _ in range(draws // CHUNK)
    ]
    ids = torch.cat(drawn)
    return ids[ids < VOCAB]


def inversion(p_V: torch.Tensor, steps: int, draws: int) -> torch.Tensor:
    """Return the tokens of unmasked positions, drawn as in samplers/ancestral.py: the position, then its token."""
    noise = KeyedNoise(0, torch.arange(draws))
    goes, u = noise.uniform() < 1 / steps, noise.uniform()
    return TokenChoice().draw(p_V.log().expand(int(goes.sum()), VOCAB), u[goes])


def temperature(p_V: torch.Tensor, ids: torch.Tensor) -> float:
    """Return the maximum-likelihood temperature T of tokens drawn from p^(1/T)."""
    log_p = p_V.log()
    cost = lambda t: -float((log_p[ids] / t).mean() - torch.logsumexp(log_p / t, 0))  # noqa: E731
    return float(minimize_scalar(cost, bounds=(0.2, 3.0), method="bounded").x)


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--positions", type=int, default=150, help="that should go")
    parser.add_argument("--steps", type=int, nargs="*", default=[128, 1000])
    args = parser.parse_args()
    p_V, table = zipf(), {}
    entropy = float(-(p_V * p_V.log()).sum())
    for steps in args.steps:
        draws = args.positions * steps // CHUNK * CHUNK
        wanted = draws / steps
        for name, ids in {
            "float32 Gumbel": gumbel(p_V, steps, draws, torch.Generator().manual_seed(0)),
            "float64 inversion": inversion(p_V, steps, draws),
        }.items():
            surprise = -p_V[ids].log()
            row = {"unmasked_over_expected": len(ids) / wanted, "unmasked_se": wanted**-0.5,
                   "surprise_nats": float(surprise.mean()), "surprise_se": float(surprise.std() / len(ids) ** 0.5),
                   "temperature": temperature(p_V, ids)}  # fmt: skip
            table[f"{name}, {steps} steps"] = row
            print(
                f"{steps:5} steps  {name:18} positions {row['unmasked_over_expected']:.2f} ± {row['unmasked_se']:.2f} "
                f"of what should go, surprise {row['surprise_nats']:.2f} ± {row['surprise_se']:.2f} nats (the law's "
                f"{entropy:.2f}), effective temperature {row['temperature']:.2f}",
                flush=True,
            )
    report("categorical", positions=args.positions, entropy_nats=entropy, table=table)


if __name__ == "__main__":
    main()
