"""Share of sampled texts that are possible at all, against network evaluations, with the exact Bayes denoiser.

The network is perfect, so whatever is wrong with a text is the sampler's: tokens that one step writes together are
drawn independently of each other. A text is possible if the grammar of the embedded corpus can write it. Rows have the
lengths of the corpus. Errors are binomial.

    python benchmarks/exact_sampling.py                # 2,000 texts each, about 20 minutes on one core
    python benchmarks/exact_sampling.py --only uniform --plot possible.png
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from noise_schedule import LogLinear  # noqa: E402
from objectives.base import Model  # noqa: E402
from objectives.subs import Subs  # noqa: E402
from objectives.udlm import UDLM  # noqa: E402
from process import Absorbing, Uniform  # noqa: E402
from randomness import KeyedNoise  # noqa: E402
from samplers import ancestral, first_hitting, uniform, unmasking  # noqa: E402
from samplers.trace import Trace  # noqa: E402
from text.exact_denoiser import ExactDenoiser, ExactLeaveOneOut  # noqa: E402
from text.reviews import ReviewGrammar, detokenize, tokens  # noqa: E402

MASK, FIRST = 0, 1  # the id of the first word
STEPS = (8, 16, 32, 64, 128, 256, 1000)


class Exact(Model):
    """An objective over an exact denoiser, whose own answer in float64 takes the place of the float32 projection."""

    def denoise(self, x_BL: torch.Tensor, t_B: torch.Tensor, at_BL: torch.Tensor, **cond: torch.Tensor) -> torch.Tensor:
        return self.backbone.denoise(x_BL, t_B, at_BL, **cond)


class ExactUniform(Model):
    """Uniform-state diffusion over its exact leave-one-out posterior, in float64."""

    def denoise(
        self, x_BL: torch.Tensor, t_B: torch.Tensor, at_BL: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        alpha_B = self.schedule(t_B).alpha
        log_others_NV = self.backbone.leave_one_out(x_BL, alpha_B, at_BL, attention_mask)
        return self.process.with_own_token(x_BL[at_BL], log_others_NV, alpha_B[:, None].expand(at_BL.shape)[at_BL])

    def reverse(self, *args: torch.Tensor, **cond: torch.Tensor) -> torch.Tensor:
        return super(Model, self).reverse(*args, **cond)


def lengths(grammar: ReviewGrammar, number: int, seed: int) -> torch.Tensor:
    """Where the tokens of `number` texts of the corpus are, (B, L)."""
    length_B = torch.tensor([len(tokens(text)) for text in grammar.sample(number, 0, seed)])
    return torch.arange(int(length_B.max())) < length_B[:, None]


def log_probs(grammar: ReviewGrammar, ids_BL: torch.Tensor, here_BL: torch.Tensor) -> np.ndarray:
    """log p of each row as a text of either class, up to the same constant for all, (B,); -inf for none."""
    rows = [row[here].tolist() for row, here in zip(ids_BL, here_BL, strict=True)]
    texts = [detokenize([grammar.vocabulary[i - FIRST] if i >= FIRST else "[MASK]" for i in row]) for row in rows]
    both = np.logaddexp(grammar.log_prob(texts, 0), grammar.log_prob(texts, 1))
    lengths_B = [len(row) for row in rows]
    given = np.logaddexp(grammar.log_prob_length(lengths_B, 0), grammar.log_prob_length(lengths_B, 1))
    return both - given


def measured(log_p_B: np.ndarray, tokens_B: np.ndarray) -> dict[str, float]:
    """The share of possible texts with its standard error, that of one more and one less impossible text at least; and
    -log p per token of the possible ones, which lies below that of real texts where a sampler is too sure."""
    ok_B, n = np.isfinite(log_p_B), len(log_p_B)
    p, nats_B, tokens_B = float(ok_B.mean()), -log_p_B[ok_B], tokens_B[ok_B]
    nats = nats_B.sum() / max(tokens_B.sum(), 1)
    nats_se = np.sqrt(((nats_B - nats * tokens_B) ** 2).sum()) / max(tokens_B.sum(), 1)
    return {"possible": p, "se": max(float(np.sqrt(p * (1 - p) / n)), 1 / n), "nats": nats, "nats_se": float(nats_se)}


def samplers() -> dict[str, tuple[str, Callable[..., Trace]]]:
    """What is compared: name -> (model, sampler)."""
    cached = {steps: partial(ancestral.sample, steps=steps, skip_idle=True) for steps in STEPS}
    one_each = partial(unmasking.sample, how=unmasking.Unmasking(order="random"))
    found = {f"ddpm_cache, {steps} steps": ("masks", sampler) for steps, sampler in cached.items()}
    found |= {f"unmask, random, {steps} steps": ("masks", partial(one_each, steps=steps)) for steps in (8, 32, 64)}
    found["first_hitting"] = ("masks", first_hitting.sample)
    for tail in (True, False):
        of = partial(uniform.sample, noise_removal=tail)
        name = "uniform" if tail else "uniform without greedy tail"
        found |= {f"{name}, {n} steps": ("uniform", partial(of, steps=n)) for n in STEPS[:5]}
    for kind, number in (("informed", 1), ("informed", 4), ("random", 4)):
        for steps in (4, 8, 16, 32, 64):  # a corrector after each step, so twice the evaluations
            how = {"steps": steps, "corrector_steps": 1, "corrector_tokens": number, "corrector": kind}
            found[f"uniform, {kind} corrector, {number} tokens, {steps} steps"] = (
                "uniform",
                partial(uniform.sample, **how),
            )
    return found


def plot(rows: dict[str, dict[str, float]], path: Path) -> None:
    """Draw the share of possible texts against network evaluations."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    families: dict[str, list[dict[str, float]]] = {}
    for name, row in rows.items():
        families.setdefault(name.rpartition(", ")[0] or name, []).append(row)
    for family, found in families.items():
        x, y, se = zip(*((row["evaluations"], row["possible"], row["se"]) for row in found), strict=True)
        axes.errorbar(x, y, se, marker="o", markersize=4, capsize=2, label=family)
    axes.set(xscale="log", xlabel="network evaluations of a text", ylabel="share of possible texts", ylim=(0, 1.02))
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--only", default="", help="samplers whose name contains this")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    grammar = ReviewGrammar()
    size = FIRST + len(grammar.vocabulary)
    of_token = {word: FIRST + i for i, word in enumerate(grammar.vocabulary)}
    noise = Uniform(size)  # the id of the mask is one more token to it, which no clean text has
    networks = (ExactDenoiser(grammar.grammars, of_token, MASK, size),
                ExactLeaveOneOut(grammar.grammars, of_token, MASK, size, noise))  # fmt: skip
    models = {"masks": Exact(Subs(LogLinear(), Absorbing(MASK)).bound(None), networks[0]),
              "uniform": ExactUniform(UDLM(LogLinear(), noise).bound(None), networks[1])}  # fmt: skip
    here_BL = lengths(grammar, args.texts, seed=1)
    print(f"{args.texts} texts of {float(here_BL.sum(-1).double().mean()):.1f} tokens on average", flush=True)
    rows, start = {}, time.perf_counter()
    for name, (kind, sampler) in samplers().items():
        if args.only not in name:
            continue
        model = models[kind]
        x_BL = torch.where(here_BL, model.process.blank_id, FIRST)
        outs = [sampler(model, x_BL[some], KeyedNoise(0, some), attention_mask=here_BL[some])
                for some in torch.arange(args.texts).split(args.batch)]  # fmt: skip
        log_p_B = log_probs(grammar, torch.cat([out.ids_BL for out in outs]), here_BL)
        evaluations = float(torch.cat([out.evaluations_B for out in outs]).double().mean())
        rows[name] = {**measured(log_p_B, here_BL.sum(-1).numpy()), "evaluations": evaluations}
        row = rows[name]
        print(f"{name:45} possible {row['possible']:7.1%} ± {row['se']:.1%}, {row['nats']:.3f} ± {row['nats_se']:.3f} "
              f"nats a token, {evaluations:6.1f} network evaluations", flush=True)  # fmt: skip
    print(json.dumps({"benchmark": "exact_sampling", "texts": args.texts, "samplers": rows,
                      "seconds": round(time.perf_counter() - start)}))  # fmt: skip
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
