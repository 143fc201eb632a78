"""Share of possible texts among samples of the exact Bayes denoiser, against network evaluations.

The network is exact, so all errors come from the sampler, which draws the tokens of one step independently. A text is
possible if the grammar of the embedded corpus can generate it. Rows have the corpus's lengths. Errors are binomial.

    python benchmarks/exact_sampling.py                # 2,000 texts each, about 20 minutes on one core
    python benchmarks/exact_sampling.py --only uniform --plot possible.png
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from palimpsest.benchmarks.shared import new_parser, report
from palimpsest.common.positions import Positions
from palimpsest.common.randomness import KeyedNoise
from palimpsest.corpora.exact_denoiser import ExactDenoiser, ExactLeaveOneOut
from palimpsest.corpora.grammar import FiniteStateGrammar
from palimpsest.corpora.reviews import ReviewGrammar, detokenize, tokens
from palimpsest.noise_schedule import LogLinear
from palimpsest.objectives.base import Model
from palimpsest.objectives.subs import Subs
from palimpsest.objectives.udlm import UDLM
from palimpsest.process import Absorbing, Uniform
from palimpsest.samplers import ancestral, entropy_bounded, first_hitting, uniform, unmasking
from palimpsest.samplers.trace import Trace

MASK, FIRST = 0, 1  # the id of the first word
STEPS = (8, 16, 32, 64, 128, 256, 1000)


class Exact(Model):
    """An objective over an exact denoiser, whose own answer in float64 takes the place of the float32 projection."""

    def denoise(self, x_BL: torch.Tensor, t_B: torch.Tensor, at: Positions, **cond: torch.Tensor) -> torch.Tensor:
        return self.backbone.denoise(x_BL, t_B, at, **cond)


class ExactUniform(Model):
    """Uniform-state diffusion over its exact leave-one-out posterior, in float64."""

    def denoise(
        self, x_BL: torch.Tensor, t_B: torch.Tensor, at: Positions, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        alpha_B = self.schedule(t_B).alpha
        log_others_NV = self.backbone.leave_one_out(x_BL, alpha_B, at, attention_mask)
        return self.process.with_own_token(at.take(x_BL), log_others_NV, at.of_rows(alpha_B))

    def reverse(self, *args: torch.Tensor, **cond: torch.Tensor) -> torch.Tensor:
        return super(Model, self).reverse(*args, **cond)


def exact_models(grammar: ReviewGrammar, grammars: Sequence[FiniteStateGrammar]) -> dict[str, Model]:
    """Return the exact denoisers of masks and of random tokens, for texts of `grammars` with equal weights."""
    size = FIRST + len(grammar.vocabulary)
    of_token = {word: FIRST + i for i, word in enumerate(grammar.vocabulary)}
    noise = Uniform(size)  # one of its tokens is the mask's id, which no clean text has
    masked = ExactDenoiser(grammars, of_token, MASK, size)
    resampled = ExactLeaveOneOut(grammars, of_token, MASK, size, noise)
    return {
        "masks": Exact(Subs(LogLinear(), Absorbing(MASK)).bound(None), masked),
        "uniform": ExactUniform(UDLM(LogLinear(), noise).bound(None), resampled),
    }


def lengths(grammar: ReviewGrammar, number: int, seed: int) -> torch.Tensor:
    """Return a mask (B, L) of the token positions of `number` texts with lengths from the corpus."""
    length_B = torch.tensor([len(tokens(text)) for text in grammar.sample(number, 0, seed)])
    return torch.arange(int(length_B.max())) < length_B[:, None]


def texts_of(grammar: ReviewGrammar, ids_BL: torch.Tensor, here_BL: torch.Tensor) -> list[str]:
    """Return the texts of sampled rows; a token that is no word makes its text impossible."""
    words = ["[MASK]", *grammar.vocabulary]
    return [detokenize([words[i] for i in row[here].tolist()]) for row, here in zip(ids_BL, here_BL, strict=True)]


def share(hits: np.ndarray) -> tuple[float, float]:
    """Return the share of hits and its standard error, at least that of one hit more or less."""
    p, n = float(hits.mean()), len(hits)
    return p, max(float(np.sqrt(p * (1 - p) / n)), 1 / n)


def measured(grammar: ReviewGrammar, ids_BL: torch.Tensor, here_BL: torch.Tensor) -> dict[str, float]:
    """Return the share of possible texts and their -log p per token, which is low if a sampler sharpens."""
    texts, tokens_B = texts_of(grammar, ids_BL, here_BL), here_BL.sum(-1).numpy()
    given = np.logaddexp(*(grammar.log_prob_length(tokens_B.tolist(), label) for label in (0, 1)))
    log_p_B = np.logaddexp(*(grammar.log_prob(texts, label) for label in (0, 1))) - given
    ok_B = np.isfinite(log_p_B)
    possible, se = share(ok_B)
    nats_B = -log_p_B[ok_B]
    total = max(tokens_B[ok_B].sum(), 1)
    nats = nats_B.sum() / total
    nats_se = float(np.sqrt(((nats_B - nats * tokens_B[ok_B]) ** 2).sum()) / total)
    return {"possible": possible, "se": se, "nats": nats, "nats_se": nats_se}


def samplers() -> dict[str, tuple[str, Callable[..., Trace]]]:
    """Return the samplers to compare, by name, each with the name of its model."""
    cached = {steps: partial(ancestral.sample, steps=steps, skip_idle=True) for steps in STEPS}
    one_each = partial(unmasking.sample, how=unmasking.Unmasking(order="random"))
    found = {f"ddpm_cache, {steps} steps": ("masks", sampler) for steps, sampler in cached.items()}
    found |= {f"unmask, random, {steps} steps": ("masks", partial(one_each, steps=steps)) for steps in (8, 32, 64)}
    found["first_hitting"] = ("masks", first_hitting.sample)
    bounded = {gamma: partial(entropy_bounded.sample, gamma=gamma) for gamma in (0.1, 1.0, 3.0)}
    found |= {f"entropy_bounded, gamma {gamma}": ("masks", sampler) for gamma, sampler in bounded.items()}
    for tail in (True, False):
        of = partial(uniform.sample, noise_removal=tail)
        name = "uniform" if tail else "uniform without greedy tail"
        found |= {f"{name}, {n} steps": ("uniform", partial(of, steps=n)) for n in STEPS[:5]}
    for kind, number in (("informed", 1), ("informed", 4), ("random", 4)):
        for steps in (4, 8, 16, 32, 64):  # a corrector after each step, so twice the evaluations
            how = {"steps": steps, "corrector_steps": 1, "corrector_tokens": number, "corrector": kind}
            name = f"uniform, {kind} corrector, {number} tokens, {steps} steps"
            found[name] = ("uniform", partial(uniform.sample, **how))
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
    parser = new_parser(__doc__)
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--only", default="", help="samplers whose name contains this")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    grammar = ReviewGrammar()
    models = exact_models(grammar, grammar.grammars)
    here_BL = lengths(grammar, args.texts, seed=1)
    print(f"{args.texts} texts of {float(here_BL.sum(-1).double().mean()):.1f} tokens on average", flush=True)
    rows, start = {}, time.perf_counter()
    for name, (kind, sampler) in samplers().items():
        if args.only not in name:
            continue
        model = models[kind]
        x_BL = torch.where(here_BL, model.process.blank_id, FIRST)
        batches = torch.arange(args.texts).split(args.batch)
        outs = [sampler(model, x_BL[some], KeyedNoise(0, some), attention_mask=here_BL[some]) for some in batches]
        ids_BL = torch.cat([out.ids_BL for out in outs])
        evaluations = float(torch.cat([out.evaluations_B for out in outs]).double().mean())
        rows[name] = row = {**measured(grammar, ids_BL, here_BL), "evaluations": evaluations}
        print(
            f"{name:45} possible {row['possible']:7.1%} ± {row['se']:.1%}, {row['nats']:.3f} ± {row['nats_se']:.3f} "
            f"nats a token, {evaluations:6.1f} network evaluations",
            flush=True,
        )
    report("exact_sampling", texts=args.texts, samplers=rows, seconds=round(time.perf_counter() - start))
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
