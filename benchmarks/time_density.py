"""Validation NLL against training steps by the way in which training draws t, and the steps that each way needs.

Every training prints one JSON. The table says after how many steps a way reaches the NLL that uniform t has at the end;
± is the standard error over the seeds.

    DATA_DIR=/path/to/data python benchmarks/time_density.py --output benchmarks/results/x.jsonl
    python benchmarks/time_density.py --table benchmarks/results/x.jsonl
"""

import csv
import json
import time
from pathlib import Path

import numpy as np

from palimpsest.benchmarks.shared import new_parser, report
from palimpsest.experiment.running import run
from palimpsest.settings.command_line import compose_config

WAYS = {
    "uniform": [],
    "bell": ["training.time_density=bell"],
    "bell_corrected": ["training.time_density=bell_corrected"],
    "exact_count": ["training.masking=exact_count"],
    "loss_weight=uniform": ["training.loss_weight=uniform"],
}
SETTINGS = (
    "mode=train data=wikitext2 data.source.detokenizer=null data.tokenizer_name_or_path=bpe data.vocab_size=2048 "
    "data.max_valid_texts=400 model=tiny model.length=64 model.hidden_size=128 model.cond_dim=32 model.n_blocks=3 "
    "model.n_heads=4 model.dropout=0 optim.lr=1e-3 lr_scheduler.num_warmup_steps=50 training.ema=0.99 "
    "loader.global_batch_size=32 loader.eval_batch_size=64 eval.num_draws=4 eval.generate_samples=false"
)


def curve(way: str, seed: int, steps: int, every: int, folder: Path) -> dict:
    """Train once and return validation NLL [nats/token] by step."""
    save_dir = folder / f"{way}-{seed}"
    budget = [f"trainer.max_steps={steps}", f"trainer.val_check_interval={every}", f"checkpointing.save_dir={save_dir}"]
    began = time.monotonic()
    run(compose_config([*SETTINGS.split(), *WAYS[way], *budget, f"seed={seed}"]), "benchmarks/time_density.py")
    found = {}
    for metrics in sorted(save_dir.rglob("metrics.csv")):  # a training that was resumed has several
        with metrics.open() as file:
            rows = [row for row in csv.DictReader(file) if row.get("val/nll")]
        found |= {int(row["step"]) + 1: float(row["val/nll"]) for row in rows}
    seconds = round(time.monotonic() - began)
    return {"way": way, "seed": seed, "steps": list(found), "nll": list(found.values()), "seconds": seconds}


def steps_to(nll: float, curve: dict) -> float:
    """Return the first step at which the curve is at most `nll`, interpolated; infinite if it never is."""
    points = list(zip([0, *curve["steps"]], [np.inf, *curve["nll"]], strict=True))
    for (before, high), (after, low) in zip(points, points[1:], strict=False):
        if low <= nll:
            return after if np.isinf(high) else before + (after - before) * (high - nll) / (high - low)
    return np.inf


def table(curves: list[dict]) -> str:
    """Return the Markdown table of all ways."""
    ends = {one["seed"]: one["nll"][-1] for one in curves if one["way"] == "uniform"}
    lines = ["| t is drawn | seeds | NLL at the end | steps to the end of `uniform` |", "|---|---|---|---|"]
    for way in dict.fromkeys(one["way"] for one in curves):
        mine = [one for one in curves if one["way"] == way]
        needed = [steps_to(ends[one["seed"]], one) for one in mine]
        lines.append(f"| {way} | {len(mine)} | {_mean([one['nll'][-1] for one in mine], 3)} | {_mean(needed, 0)} |")
    return "\n".join(lines)


def _mean(values: list[float], digits: int) -> str:
    if not np.isfinite(values).all():
        return "not reached"
    error = f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{error}"


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--every", type=int, default=250, help="steps between validations")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--folder", type=Path, default=Path("outputs/time_density"))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--table", type=Path, help="print the table of an output and train nothing")
    given = parser.parse_args()
    if given.table:
        print(table([json.loads(line) for line in given.table.read_text().splitlines()]))
        return
    curves = []
    for seed in given.seeds:
        for way in given.ways:
            curves.append(curve(way, seed, given.steps, given.every, given.folder))
            report("time_density", given.output, **curves[-1])
    if "uniform" in given.ways:
        print(table(curves))


if __name__ == "__main__":
    main()
