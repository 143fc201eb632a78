"""Guidance towards a class with exact denoisers: the share of texts of the class, and of possible texts, by weight.

The networks are exact, so all errors come from guidance or the sampler. The corpus's own distribution decides the class
and whether a text is possible. Errors are binomial.

    python benchmarks/exact_guidance.py --plot guidance.png      # 1,000 texts each, about 15 minutes on one core
"""

import itertools
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from palimpsest.benchmarks.exact_sampling import FIRST, exact_models, lengths, share, texts_of
from palimpsest.benchmarks.shared import new_parser, report
from palimpsest.common.randomness import KeyedNoise
from palimpsest.corpora.reviews import ReviewGrammar, tokens
from palimpsest.denoisers import ClassGuided, ClassifierGuided, Denoiser
from palimpsest.samplers import first_hitting, uniform

CLASS = 1
WEIGHTS = (0.0, 0.5, 1.0, 1.5, 2.0, 4.0)


class Conditional(Denoiser):
    """The exact denoiser of one class if `class_id` is given, otherwise that of both classes."""

    def __init__(self, of_both: Denoiser, of_class: Denoiser) -> None:
        self.of_both = of_both
        self.of_class = of_class
        self.process = of_both.process
        self.schedule = of_both.schedule
        self.vocab_size = of_both.vocab_size
        self.independent_unmasking = of_both.independent_unmasking

    def denoise(self, *args: torch.Tensor, class_id: torch.Tensor | None = None, **cond: torch.Tensor) -> torch.Tensor:
        return (self.of_both if class_id is None else self.of_class).denoise(*args, **cond)

    def reverse(self, *args: torch.Tensor, class_id: torch.Tensor | None = None, **cond: torch.Tensor) -> torch.Tensor:
        return (self.of_both if class_id is None else self.of_class).reverse(*args, **cond)


def unigrams(grammar: ReviewGrammar, size: int) -> torch.Tensor:
    """Return log p(token | class) from 2,000 texts of each class, with add-one smoothing, (C, V)."""
    number = {word: FIRST + i for i, word in enumerate(grammar.vocabulary)}
    counts_CV = torch.ones(2, size, dtype=torch.float64)
    for label in (0, 1):
        ids = [number[token] for text in grammar.sample(2000, label, seed=5) for token in tokens(text)]
        counts_CV[label] += torch.bincount(torch.tensor(ids), minlength=size)
    return (counts_CV / counts_CV.sum(1, keepdim=True)).log()


def measured(grammar: ReviewGrammar, ids_BL: torch.Tensor, here_BL: torch.Tensor) -> dict[str, float]:
    """Return the share of possible texts, and the share of these that belong to the class, with standard errors."""
    posterior_M = grammar.posterior(texts_of(grammar, ids_BL, here_BL))[:, CLASS]
    possible_M = np.isfinite(posterior_M)
    possible, possible_se = share(possible_M)
    of_the_class, of_the_class_se = share(posterior_M[possible_M] > 0.5)
    shares = {"possible": possible, "possible_se": possible_se}
    return {**shares, "of_the_class": of_the_class, "of_the_class_se": of_the_class_se}


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
    parser = new_parser(__doc__)
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    grammar, start = ReviewGrammar(), time.perf_counter()
    here_BL = lengths(grammar, args.texts, seed=1)
    of_both, of_class = (exact_models(grammar, some) for some in (grammar.grammars, [grammar.grammars[CLASS]]))
    log_p_CV = unigrams(grammar, of_both["masks"].vocab_size)
    samplers = {"masks": first_hitting.sample, "uniform": partial(uniform.sample, steps=16)}
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for kind, sampler in samplers.items():
        model = Conditional(of_both[kind], of_class[kind])
        guides = {
            "D-CFG": partial(ClassGuided, model, CLASS),
            "D-CBG by unigrams": partial(ClassifierGuided, model, CLASS, log_p_CV=log_p_CV, log_prior_C=torch.zeros(2)),
        }
        for (way, guide), weight in itertools.product(guides.items(), WEIGHTS):
            x_BL = torch.where(here_BL, model.process.blank_id, FIRST)
            noise = KeyedNoise(0, torch.arange(args.texts))
            trace = sampler(guide(weight=weight), x_BL, noise, attention_mask=here_BL)
            row = measured(grammar, trace.ids_BL, here_BL)
            rows.setdefault(f"{kind}, {way}", {})[str(weight)] = row
            print(
                f"{kind:8} {way:18} guidance {weight:3}: of the class {row['of_the_class']:6.1%} ± "
                f"{row['of_the_class_se']:.1%}, possible {row['possible']:6.1%} ± {row['possible_se']:.1%}",
                flush=True,
            )
    report("exact_guidance", texts=args.texts, rows=rows, seconds=round(time.perf_counter() - start))
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
