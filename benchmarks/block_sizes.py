"""Validation likelihood against block size, with the same network, steps and tokens for each size.

Each row is a training run of main.py (an interrupted one resumes). Size 1 is measured exactly, the others by exact mask
counts. The entropy of `reviews` is known, and no bound may fall below it.

    python benchmarks/block_sizes.py                       # reviews
    DATA_DIR=/path/to/data python benchmarks/block_sizes.py --data wikitext2
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SETTINGS = {
    "reviews": ["data=reviews", "model.length=80", "data.fill=eos"],  # a given EOS would tell large blocks the length
    "wikitext2": [
        "data=wikitext2", "data.source.detokenizer=null", "data.tokenizer_name_or_path=bpe", "data.vocab_size=4096",
        "model=tiny", "model.hidden_size=128", "model.n_blocks=3", "model.n_heads=4", "model.length=128",
        "model.cond_dim=8", "model.dropout=0", "loader.global_batch_size=32", "optim=muon",
        "lr_scheduler=cosine_decay_warmup", "lr_scheduler.num_warmup_steps=100", "trainer.val_check_interval=250",
        "training.ema=0.99", "eval.num_draws=8",
    ],
}  # fmt: skip
STEPS = {"reviews": 2000, "wikitext2": 500}
LENGTHS = {"reviews": 80, "wikitext2": 128}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=SETTINGS, default="reviews")
    parser.add_argument("--sizes", type=int, nargs="+", help="of blocks; 1, 4, 16 and the length unless given")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--output", type=Path, default=Path("outputs/block_sizes"))
    parser.add_argument("--more", nargs="*", default=[], help="further overrides for every run")
    args = parser.parse_args()
    steps, table = args.steps or STEPS[args.data], {}
    for size in args.sizes or [1, 4, 16, LENGTHS[args.data]]:
        folder = args.output / args.data / f"block_{size}"
        command = [sys.executable, str(ROOT / "main.py"), "mode=train", *SETTINGS[args.data], "algo=bd3lm",
                   f"block_size={size}", f"trainer.max_steps={steps}", f"checkpointing.save_dir={folder}",
                   "eval.generate_samples=false", *args.more]  # fmt: skip
        start = time.perf_counter()
        subprocess.run(command, check=True)
        results = json.loads((folder / "results.json").read_text())
        table[size] = {key: results.get(key) for key in ("nll_nats_per_token", "true_nats_per_token",
                       "gap_nats_per_token", "units", "num_units")}  # fmt: skip
        table[size]["seconds"] = round(time.perf_counter() - start)
        nll = results["nll_nats_per_token"]
        print(f"block {size:4}  {nll['value']:.4f} ± {nll['se']:.4f} nats/token", flush=True)
    print(json.dumps({"benchmark": "block_sizes", "data": args.data, "steps": steps, "table": table}))


if __name__ == "__main__":
    main()
