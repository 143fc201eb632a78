"""Validation likelihood of every objective and backbone at one budget: WikiText-2, the same tokens, similar sizes.

Each row is a training run of main.py (an interrupted one resumes), measured by the sharpest estimator of its objective.

    DATA_DIR=/path/to/data python benchmarks/objectives.py --output outputs/objectives     # hours on one CPU core
"""

from pathlib import Path

from palimpsest.benchmarks.shared import new_parser, report, trained

COMMON = [
    "mode=train", "data=wikitext2", "data.source.detokenizer=null", "data.tokenizer_name_or_path=bpe",
    "data.vocab_size=4096", "model=tiny", "model.hidden_size=128", "model.n_blocks=3", "model.n_heads=4",
    "model.length=128", "model.cond_dim=8", "model.dropout=0", "loader.global_batch_size=32", "optim=muon",
    "lr_scheduler=cosine_decay_warmup", "lr_scheduler.num_warmup_steps=100", "trainer.val_check_interval=250",
    "training.ema=0.99", "eval.num_draws=8", "sampling.num_sample_log=2",
]  # fmt: skip
RUNS = {
    "AR": ["parameterization=ar"],
    "MDLM": [],
    "MDLM, time conditioning": ["time_conditioning=true"],
    "MDLM, plain cross-entropy": ["training.loss_weight=uniform"],
    "D3PM": ["parameterization=d3pm", "time_conditioning=true"],
    "SEDD": ["parameterization=sedd"],
    "DiMamba": ["backbone=dimamba"],
}


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--output", type=Path, default=Path("outputs/objectives"))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--only", nargs="*", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--more", nargs="*", default=[], help="further overrides for every run")
    args = parser.parse_args()
    table = {}
    for name in args.only:
        folder = args.output / name.lower().replace(", ", "_").replace(" ", "_")
        results, seconds = trained(folder, *COMMON, *RUNS[name], f"trainer.max_steps={args.steps}", *args.more)
        nll = results["nll_nats_per_token"]
        table[name] = {"nll": nll["value"], "se": nll["se"], "seconds": seconds,
                       "estimator": results["protocol"]["estimator"], "errors_over": results["units"],
                       "num_units": results["num_units"]}  # fmt: skip
        print(f"{name:28} {nll['value']:.4f} ± {nll['se']:.4f} nats/token  {table[name]['estimator']}", flush=True)
    report("objectives", steps=args.steps, tokens=args.steps * 32 * 128, table=table)


if __name__ == "__main__":
    main()
