"""Guidance towards a class with exact denoisers: the share of texts of the class, and of possible ones, against the
weight.

The networks are perfect, so whatever is wrong with a text is the guidance's or the sampler's. Classes and possible
texts are judged by the corpus's own distribution. Errors are binomial.

    python benchmarks/exact_guidance.py --plot guidance.png      # 1,000 texts each, about 15 minutes on one core
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks.exact_sampling import FIRST, MASK, Exact, ExactUniform, lengths  # noqa: E402
from denoisers import ClassGuided, ClassifierGuided, Denoiser  # noqa: E402
from noise_schedule import LogLinear  # noqa: E402
from objectives.subs import Subs  # noqa: E402
from objectives.udlm import UDLM  # noqa: E402
from process import Absorbing, Uniform  # noqa: E402
from randomness import KeyedNoise  # noqa: E402
from samplers import first_hitting, uniform  # noqa: E402
from text.exact_denoiser import ExactDenoiser, ExactLeaveOneOut  # noqa: E402
from text.reviews import ReviewGrammar, detokenize, tokens  # noqa: E402

CLASS = 1
WEIGHTS = (0.0, 0.5, 1.0, 1.5, 2.0, 4.0)


class Told(Denoiser):
    """The exact denoiser of one class where that is told, else of both."""

    def __init__(self, of_both: Denoiser, of_class: Denoiser) -> None:
        self.of_both, self.of_class = of_both, of_class
        self.process, self.schedule, self.vocab_size = of_both.process, of_both.schedule, of_both.vocab_size
        self.independent_unmasking = of_both.independent_unmasking

    def denoise(self, *args: object, class_id: torch.Tensor | None = None, **cond: object) -> torch.Tensor:
        return (self.of_both if class_id is None else self.of_class).denoise(*args, **cond)

    def reverse(self, *args: object, class_id: torch.Tensor | None = None, **cond: object) -> torch.Tensor:
        return (self.of_both if class_id is None else self.of_class).reverse(*args, **cond)


def models(grammar: ReviewGrammar) -> dict[str, Denoiser]:
    """The exact denoisers of both processes."""
    size = FIRST + len(grammar.vocabulary)
    of_token = {word: FIRST + i for i, word in enumerate(grammar.vocabulary)}
    noise, found = Uniform(size), {"masks": [], "uniform": []}
    for grammars in (grammar.grammars, [grammar.grammars[CLASS]]):
        network = ExactDenoiser(grammars, of_token, MASK, size)
        found["masks"].append(Exact(Subs(LogLinear(), Absorbing(MASK)).bound(None), network))
        network = ExactLeaveOneOut(grammars, of_token, MASK, size, noise)
        found["uniform"].append(ExactUniform(UDLM(LogLinear(), noise).bound(None), network))
    return {name: Told(*pair) for name, pair in found.items()}


def unigrams(grammar: ReviewGrammar, size: int) -> torch.Tensor:
    """log p(token | class) of 2,000 texts of each, add-one, (C, V)."""
    number = {word: FIRST + i for i, word in enumerate(grammar.vocabulary)}
    counts_CV = torch.ones(2, size, dtype=torch.float64)
    for label in (0, 1):
        ids = [number[token] for text in grammar.sample(2000, label, seed=5) for token in tokens(text)]
        counts_CV[label] += torch.bincount(torch.tensor(ids), minlength=size)
    return (counts_CV / counts_CV.sum(1, keepdim=True)).log()


def measured(grammar: ReviewGrammar, ids_BL: torch.Tensor, here_BL: torch.Tensor) -> dict[str, float]:
    """Shares of possible texts, and of these of the class, with standard errors."""
    words = ["[MASK]", *grammar.vocabulary]
    texts = [detokenize([words[i] for i in row[here].tolist()]) for row, here in zip(ids_BL, here_BL, strict=True)]
    posterior_M = grammar.posterior(texts)[:, CLASS]
    possible_M = np.isfinite(posterior_M)
    found = {}
    for name, hits in (("possible", possible_M), ("of_the_class", posterior_M[possible_M] > 0.5)):
        p, n = float(hits.mean()), len(hits)
        found |= {name: p, f"{name}_se": max(float(np.sqrt(p * (1 - p) / n)), 1 / n)}
    return found


def plot(rows: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """Draw both shares against the weight."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 4), layout="constrained", sharex=True)
    for axes, name in zip(panels, ("of_the_class", "possible"), strict=True):
        for kind, found in rows.items():
            y, se = zip(*((row[name], row[f"{name}_se"]) for row in found.values()), strict=True)
            axes.errorbar([float(w) for w in found], y, se, marker="o", markersize=4, capsize=2, label=kind)
        axes.set(xlabel="sampling.guidance", ylabel=f"share {name.replace('_', ' ')}", ylim=(0, 1.02))
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    grammar, start = ReviewGrammar(), time.perf_counter()
    here_BL, told = lengths(grammar, args.texts, seed=1), models(grammar)
    log_p_CV = unigrams(grammar, told["masks"].vocab_size)
    samplers = {"masks": first_hitting.sample, "uniform": partial(uniform.sample, steps=16)}
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for kind, model in told.items():
        for way in ("D-CFG", "D-CBG by unigrams"):
            for weight in WEIGHTS:
                guided = (ClassGuided(model, CLASS, weight) if way == "D-CFG" else
                          ClassifierGuided(model, CLASS, weight, log_p_CV, torch.zeros(2)))  # fmt: skip
                x_BL = torch.where(here_BL, model.process.blank_id, FIRST)
                noise = KeyedNoise(0, torch.arange(args.texts))
                ids_BL = samplers[kind](guided, x_BL, noise, attention_mask=here_BL).ids_BL
                row = measured(grammar, ids_BL, here_BL)
                rows.setdefault(f"{kind}, {way}", {})[str(weight)] = row
                print(f"{kind:8} {way:18} guidance {weight:3}: of the class {row['of_the_class']:6.1%} ± "
                      f"{row['of_the_class_se']:.1%}, possible {row['possible']:6.1%} ± {row['possible_se']:.1%}",
                      flush=True)  # fmt: skip
    print(json.dumps({"benchmark": "exact_guidance", "texts": args.texts, "rows": rows,
                      "seconds": round(time.perf_counter() - start)}))  # fmt: skip
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
