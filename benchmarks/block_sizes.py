"""Validation likelihood against block size, with the same network, steps and tokens for each size.

Each row is a training run of main.py (an interrupted one resumes). Size 1 is measured exactly, the others by exact mask
counts. The entropy of `reviews` is known, and no bound may fall below it.

    python benchmarks/block_sizes.py                       # reviews
    DATA_DIR=/path/to/data python benchmarks/block_sizes.py --data wikitext2
"""

from __future__ import annotations

from pathlib import Path

from palimpsest.benchmarks.shared import WIKITEXT2, new_parser, report, trained

SETTINGS = {  # a given EOS would tell large blocks the length
    "reviews": ["mode=train", "data=reviews", "model.length=80", "data.fill=eos"],
    "wikitext2": WIKITEXT2,
}
STEPS = {"reviews": 2000, "wikitext2": 500}
LENGTHS = {"reviews": 80, "wikitext2": 128}


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--data", choices=SETTINGS, default="reviews")
    parser.add_argument("--sizes", type=int, nargs="+", help="of blocks; 1, 4, 16 and the length unless given")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--output", type=Path, default=Path("outputs/block_sizes"))
    parser.add_argument("--more", nargs="*", default=[], help="further overrides for every run")
    args = parser.parse_args()
    steps, table = args.steps or STEPS[args.data], {}
    for size in args.sizes or [1, 4, 16, LENGTHS[args.data]]:
        folder = args.output / args.data / f"block_{size}"
        budget = [f"block_size={size}", f"trainer.max_steps={steps}", "eval.generate_samples=false"]
        results, seconds = trained(folder, *SETTINGS[args.data], "algo=bd3lm", *budget, *args.more)
        table[size] = {key: results.get(key) for key in ("nll_nats_per_token", "true_nats_per_token",
                       "gap_nats_per_token", "units", "num_units")}  # fmt: skip
        table[size]["seconds"] = round(seconds)
        nll = results["nll_nats_per_token"]
        print(f"block {size:4}  {nll['value']:.4f} ± {nll['se']:.4f} nats/token", flush=True)
    report("block_sizes", data=args.data, steps=steps, table=table)


if __name__ == "__main__":
    main()
