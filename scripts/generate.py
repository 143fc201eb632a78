"""Sample texts from a checkpoint, with the data, tokenizer, network and objective that it carries.

python scripts/generate.py --checkpoint outputs/reviews/micro-0123abcd --prefix "the plot is" --num-samples 3 --show
python scripts/generate.py --checkpoint last.ckpt --template "The [MASK] was {{5}} ." --sampling greedy --steps 16
python scripts/generate.py --checkpoint last.ckpt --sampling topk --top-k 50 --temperature 0.7 --schedule cosine \\
    --order confidence --remask low_confidence --steps 64 --max-length 64 --gif seed=2

It completes `python main.py mode=sample_eval eval.checkpoint_path=...`, which it prints first. Settings without an
option are typed as there: key=value.
"""

import argparse
import runpy
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from palimpsest.common.output import guard_output
from palimpsest.experiment.from_checkpoint import checkpoint_path, training_identity
from palimpsest.settings import command_line
from palimpsest.settings.identity import overrides, word

ROOT = Path(__file__).resolve().parents[1]

# Options of predictor=unmask and block_unmask, with their keys.
UNMASKING = {"schedule": "sampling.schedule", "order": "sampling.order", "threshold": "sampling.threshold",
             "remask": "sampling.remask", "steps": "sampling.steps"}  # fmt: skip
TEXTS = {"prefix": "sampling.prefix", "template": "sampling.template", "max_length": "sampling.max_length"}
SAMPLING = ("distribution", "greedy", "topk", "nucleus")
MAX_PRINTED = 20


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    out = argparse.ArgumentParser(
        prog="generate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    out.add_argument("--checkpoint", required=True, help="a .ckpt file of a training here, or the folder of its run")
    prompt = out.add_argument_group("prompt")
    prompt.add_argument("--prefix", help="the beginning of every text")
    prompt.add_argument("--template", help="a text with gaps: [MASK] for one token, {{5}} for five")
    tokens = out.add_argument_group("choice of tokens")
    tokens.add_argument(
        "--sampling",
        choices=SAMPLING,
        help="distribution: the model's distribution of a token (the default); --order chooses the positions",
    )
    tokens.add_argument("--top-k", type=int, help="of --sampling topk (50)")
    tokens.add_argument("--top-p", type=float, help="of --sampling nucleus (0.9)")
    tokens.add_argument("--temperature", type=float)
    order = out.add_argument_group("order of positions")
    order.add_argument("--steps", type=int, help="network evaluations, at most; of a block model for each block")
    order.add_argument("--schedule", help="number of masks that each step leaves: linear, cosine, exponential")
    order.add_argument("--order", help="positions that go first: random, left_to_right, confidence, margin, entropy")
    order.add_argument("--threshold", type=float, help="unmask all positions with at least this confidence")
    order.add_argument("--remask", help="none, low_confidence, remdm")
    out.add_argument("--num-samples", type=int, default=1)
    out.add_argument("--max-length", type=int, help="tokens of a text, at most")
    out.add_argument("--seed", type=int)
    out.add_argument("--show", action="store_true", help="watch it in the terminal")
    out.add_argument("--gif", action="store_true", help="also write denoising.gif")
    out.add_argument("--out", default="outputs/generated", help="folder of the results (outputs/generated)")
    out.add_argument("overrides", nargs="*", metavar="key=value", help="anything else that main.py takes")
    return out


def arguments(args: argparse.Namespace) -> list[str]:
    """Return the arguments of `main.py`.

    Raises:
        ValueError: options contradict each other or the model, or the checkpoint does not carry its configuration.
        FileNotFoundError: there is no checkpoint.
    """
    path = checkpoint_path(args.checkpoint, "--checkpoint")
    known = training_identity(path, "--checkpoint")
    configuration = known["configuration"]
    sampler = predictor(configuration)
    settings = {
        "mode": "sample_eval", "eval.checkpoint_path": str(path), "checkpointing.save_dir": args.out,
        "eval.split": "null", "sampling.num_samples": args.num_samples,
        "sampling.num_sample_log": min(args.num_samples, MAX_PRINTED),
        "sampler": sampler, **token_choice(args), "seed": args.seed, "data.label": known.get("label"),
    }  # fmt: skip
    typed = {name: getattr(args, name) for name in (*UNMASKING, *TEXTS) if getattr(args, name) is not None}
    unused = [name for name in typed if name in UNMASKING and (name, sampler) != ("steps", "uniform")]
    if sampler not in ("unmask", "block_unmask") and unused:
        how = "from left to right, a token at a time" if sampler == "ar" else "by changing any token"
        raise ValueError(f"--{unused[0]} {typed[unused[0]]}: this model writes {how}; leave it out")
    settings |= {{**UNMASKING, **TEXTS}[name]: value for name, value in typed.items()}
    settings |= {key: "true" for key in ("sampling.show", "sampling.gif") if getattr(args, key.partition(".")[2])}
    keys = [argument.partition("=")[0].lstrip("+") for argument in args.overrides]
    if args.seed is not None and "seed" in keys:
        raise ValueError(f"--seed {args.seed} and seed= are the same; leave one of them out")
    replaced = {command_line.ALIASES.get(key, key) for key in keys}
    ours = overrides(configuration)
    ours += [f"{key}={quoted(key, value)}" for key, value in settings.items() if value is not None]
    return [*(argument for argument in ours if argument.partition("=")[0].lstrip("+") not in replaced), *args.overrides]


def quoted(key: str, value: object) -> str:
    """Quote a value for Hydra: texts literally, but elsewhere "null" and "true" are keywords."""
    if key in command_line.TEXTS:
        return command_line.in_quotes(value)
    return value if value in ("null", "true") else word(value)


def predictor(configuration: dict[str, object]) -> str:
    """Return the default sampler of a model: iterative unmasking if it has masks, within blocks if it has blocks."""
    objective = configuration.get("parameterization")
    own = command_line.sampler_of(objective)
    if own not in (None, "block", "analytic"):  # these three are for masks, which may also be unmasked step by step
        return own
    blocks = configuration.get("block_size") != configuration.get("model.length") or configuration.get("data.segments")
    return "block_unmask" if objective == "bd3lm" and blocks else "unmask"


def token_choice(args: argparse.Namespace) -> dict[str, object]:
    """Return --sampling, --top-k, --top-p and --temperature as keys; None for those that were not given."""
    implied = "topk" if args.top_k is not None else "nucleus" if args.top_p is not None else "distribution"
    kind = args.sampling or implied
    for name, value, wanted in (("--top-k", args.top_k, "topk"), ("--top-p", args.top_p, "nucleus")):
        if value is not None and kind != wanted:
            raise ValueError(f"{name} {value} belongs to --sampling {wanted}, but --sampling is {kind}")
    if kind == "greedy" and args.temperature not in (None, 0):
        raise ValueError(f"--temperature {args.temperature} means nothing to --sampling greedy; leave one of them out")
    return {
        "sampling.temperature": 0.0 if kind == "greedy" else args.temperature,
        "sampling.top_k": 50 if kind == "topk" and args.top_k is None else args.top_k,
        "sampling.nucleus_p": 0.9 if kind == "nucleus" and args.top_p is None else args.top_p,
    }


def generate(typed: Sequence[str]) -> None:
    """Parse the options, print the command of main.py, and run it."""
    guard_output()
    args = parser().parse_intermixed_args(typed)
    with command_line.clear_errors():
        words = arguments(args)
    print(f"python main.py {shlex.join(words)}\n", file=sys.stderr)
    sys.argv = [str(ROOT / "main.py"), *words]
    runpy.run_path(sys.argv[0], run_name="__main__")  # Hydra needs main.py to be the program


if __name__ == "__main__":
    generate(sys.argv[1:])
